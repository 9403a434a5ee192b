"""Rows or columns of a target as axis runs: ranges of source coordinates with all their copies, and ranges of pads."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from growkern.execution.torch_backend import Copy
from growkern.optimizer.state_rules import Rule
from growkern.planning.axis_map import AxisMap, Pad
from growkern.planning.index_map import ONE, PAD, IndexMap, Run, pair_copies
from growkern.planning.vector import Vector

N_RUNS, N_LONG_RUNS = (
    32,
    1024,
)  # maximal number of runs to copy by slices rather than by an index: in general, and for long runs
LONG = 64  # coordinates per long run: 128 bytes of the smallest dtype


@dataclass(frozen=True, eq=False)
class AxisRun:
    """``n`` source coordinates, from ``source`` on (``PAD``: none) or listed in ``index``, and their copies in the target.

    ``from_next_layer``: True when the source is the next layer's tensor.
    """

    source: int
    n: int
    copies: tuple[Copy, ...]
    index: Tensor | None = None
    from_next_layer: bool = False

    @cached_property
    def unscaled(self) -> "AxisRun":
        """This run with scale 1."""
        return replace(self, copies=tuple(replace(c, scale=1.0, scales=None) for c in self.copies))

    @cached_property
    def unindexed(self) -> "AxisRun":
        """This run with a source that is the same for all coordinates."""
        return self if self.index is None else replace(self, index=None)

    def drawn(self, strength: float) -> "AxisRun":
        """Return this run with noise of factor ``strength`` and scale 1."""
        copies = (
            replace(c, noise=strength, noises=None, scale=1.0, scales=None) for c in self.copies
        )
        return replace(self, copies=tuple(copies))


class _ScaledRun(NamedTuple):
    """A run of the index map with one scale, one noise factor, consecutive noise ids and one source tensor."""

    target: int
    n: int
    source: int
    scale: float
    noise: float
    first_id: int
    from_next_layer: bool


class AxisLayout:
    """Rows or columns of a target matrix: some axes of the target tensor, flattened row-major and grown by a rule."""

    def __init__(
        self, axes: Sequence[AxisMap], rule: Rule, next_layer_axis: AxisMap | None = None
    ) -> None:
        self.index_map = self.ids = ONE
        self.scale = self.factors = self.own_layer = Vector.full(1.0, 1)
        self.pad: Pad = "zero"
        self.noisy, self.drawn = False, 1.0
        self._maps = list[IndexMap]()
        for axis in axes:
            index_map = axis.index_map.first_copies() if rule.first_copy_only else axis.index_map
            if rule.grad and not rule.is_weight:  # an element copied with factor 0 counts as a pad
                index_map = index_map.where(axis.grad_scale)
            self._maps.append(index_map)
            factors, ids = _noise(axis, rule)
            self.ids = self.ids.product(ids)
            if next_layer_axis is not None:
                own_layer = _own_layer(index_map, mixed=axis is next_layer_axis)
                self.own_layer = self.own_layer.outer(own_layer)
            self.index_map = self.index_map.product(index_map)
            self.scale = self.scale.outer(scale_of(axis, rule))
            self.factors = self.factors.outer(factors)
            if not axis.index_map.is_identity:
                self.pad, self.drawn = axis.pad, axis.drawn
                self.noisy = self.noisy or axis.pad == "random_reader"
        if next_layer_axis is None:  # 0 for coordinates that copy the next layer
            self.own_layer = Vector.full(1.0, self.index_map.n_target)
        self.quiet = not any(value for value, _ in self.factors.repeats)

    @property
    def has_random_writer(self) -> bool:
        """True when the layout has pads of the kind ``"random_writer"``."""
        return self.pad == "random_writer" and self.index_map.has_pads

    @cached_property
    def lines(self) -> tuple[tuple[int, int, int], list[int]] | None:
        """Lengths of the axes before, of and behind the padded one, and the line of sources for each target coordinate.

        A line is one coordinate of all axes but the padded one, such as an expert. None where a single axis has all coordinates.
        """
        padded = [i for i, index_map in enumerate(self._maps) if index_map.has_pads]
        others = [m for i, m in enumerate(self._maps) if i not in padded]
        if len(padded) != 1 or all(m.n_source == m.n_target == 1 for m in others):
            return None
        (at,) = padded
        before, behind = ONE, ONE
        for index_map in self._maps[:at]:
            before = before.product(index_map)
        for index_map in self._maps[at + 1 :]:
            behind = behind.product(index_map)
        own, n = self._maps[at], behind.n_source
        line = [
            a * n + b for a in before.indices for _ in range(own.n_target) for b in behind.indices
        ]
        return (before.n_source, own.n_source, n), line

    def by_line(self, run: AxisRun, device: torch.device) -> AxisRun:
        """Return a run of pads that reads the line of each coordinate."""
        assert self.lines is not None
        first, line = run.copies[0], self.lines[1]
        at = (
            torch.arange(first.target, first.target + run.n)
            if first.targets is None
            else first.targets.cpu()
        )
        return replace(run, index=torch.tensor(line, dtype=torch.int32)[at.long()].to(device))

    @cached_property
    def shares(self) -> list[float]:
        """Sum of the scales of the copies, per source coordinate, divided by the number of all copies."""
        sums = [0.0] * self.index_map.n_source
        for j, s in zip(self.index_map.indices, self.scale.expanded(), strict=True):
            if j != PAD:
                sums[j] += s
        return [s / max(1, self.n_copied) for s in sums]

    @cached_property
    def n_copied(self) -> int:
        """Number of target coordinates that copy a source coordinate."""
        return sum(run.length for run in self.index_map.runs if run.source != PAD)

    def n_pads_before(self, target: int) -> int:
        """Return the number of pads before a target coordinate."""
        pads = (run for run in self.index_map.runs if run.source == PAD and run.target < target)
        return sum(min(run.length, target - run.target) for run in pads)

    def axis_runs(
        self, device: torch.device, dtype: torch.dtype, *, rows: bool, with_ids: bool
    ) -> list[AxisRun]:
        """Cut the layout into contiguous runs with one scale and one noise factor; if there are too many, list indices instead.

        Args:
            device: Device of the tensors.
            dtype: Dtype of the arithmetic.
            rows: True for rows.
            with_ids: True when noise ids are needed even if all noise factors of this layout are 0.
        """
        n, n_target = len(self.index_map.runs), self.index_map.n_target
        long = n <= N_LONG_RUNS and n_target >= LONG * n
        if n <= N_RUNS or long:
            scaled_runs = self._scaled_runs()
            if len(scaled_runs) <= 4 * N_RUNS or long:
                pads = [
                    AxisRun(PAD, run.n, (_copy(run),)) for run in scaled_runs if run.source == PAD
                ]
                copied = [run for run in scaled_runs if run.source != PAD]
                own, next_layer = (
                    [run for run in copied if run.from_next_layer is which]
                    for which in (False, True)
                )
                following = (replace(run, from_next_layer=True) for run in _by_source(next_layer))
                return [*_by_source(own), *following, *pads]
        make = _Copies(self, device, dtype, with_ids)
        return list(self._scattered(make) if rows and scatters(device) else self._gathered(make))

    def _scaled_runs(self) -> list["_ScaledRun"]:
        """Cut the index map into runs with one scale, one noise factor and one source tensor."""
        n_target, scaled_runs = self.index_map.n_target, list[_ScaledRun]()
        changes = {run.target: run for run in self.index_map.runs}
        ids = {run.target: run for run in self.ids.runs}
        scales, factors = self.scale.changes, self.factors.changes
        own_layers = self.own_layer.changes
        starts = sorted({*changes, *ids, *scales, *factors, *own_layers} - {n_target})
        run, own, scale, factor, own_layer = Run(0, 0, PAD), Run(0, 0, 0), 1.0, 1.0, 1.0
        for start, end in pairwise([*starts, n_target]):
            run, own = changes.get(start, run), ids.get(start, own)
            scale, factor = scales.get(start, scale), factors.get(start, factor)
            own_layer = own_layers.get(start, own_layer)
            source = PAD if run.source == PAD else run.source + start - run.target
            first_id = own.source + start - own.target
            scaled_runs.append(
                _ScaledRun(start, end - start, source, scale, factor, first_id, not own_layer)
            )
        return scaled_runs

    def _scattered(self, make: "_Copies") -> Iterator[AxisRun]:
        """Group source coordinates with equally many copies; each copy lists its target coordinates."""
        if pads := [i for i, j in enumerate(self.index_map.indices) if j == PAD]:
            yield AxisRun(PAD, len(pads), (make.listed(pads, place=True),))
        own_layer = self.own_layer.expanded()
        for which in (False, True):
            read = [
                PAD if own_layer[i] == which else j for i, j in enumerate(self.index_map.indices)
            ]
            index_map = (
                self.index_map if all(own_layer) else IndexMap.of(read, self.index_map.n_source)
            )
            for sources, targets in index_map.by_count.values():
                copies = [make.listed(own, place=True) for own in targets]
                yield AxisRun(
                    0, len(sources), tuple(copies), make.int32(sources), from_next_layer=which
                )
            if all(own_layer):
                return

    def _gathered(self, make: "_Copies") -> Iterator[AxisRun]:
        """Group neighboring target coordinates that are all pads, or that all copy one source tensor."""
        indices = self.index_map.indices
        kinds = zip((j == PAD for j in indices), self.own_layer.expanded(), strict=True)
        for (pad, own_layer), same in groupby(enumerate(kinds), lambda numbered: numbered[1]):
            first, *_, last = [i for i, _ in same] * 2
            start, end = first, last + 1
            copy = replace(make.listed(range(start, end)), target=start)
            index = None if pad else make.int32(indices[start:end])
            yield AxisRun(
                PAD if pad else 0, end - start, (copy,), index, from_next_layer=not own_layer
            )


class Reach(NamedTuple):
    """How far a growth can change the size of an element: largest scale, smallest scale above 0, and strongest noise."""

    largest: float
    smallest: float
    noise: float

    @staticmethod
    def of(rows: AxisLayout, cols: AxisLayout, *, noisy: bool) -> "Reach":
        """Measure the layouts of a tensor; noise is in standard deviations of the weight, and 0 unless ``noisy``."""
        scales = [[abs(x) for x, _ in side.scale.repeats if x] or [1.0] for side in (rows, cols)]
        (low, high), (left, right) = ((min(side), max(side)) for side in scales)
        factors = [[abs(x) for x, _ in side.factors.repeats] or [0.0] for side in (rows, cols)]
        drawn = (side.drawn for side in (rows, cols) if side.has_random_writer)
        noise = max(max(factors[0]) * max(factors[1]), *drawn, 0.0) if noisy else 0.0
        return Reach(high * right, low * left, noise)


def scatters(device: torch.device) -> bool:
    """True when rows of a random map are scattered (a GPU loads each source row once), False when they are gathered in target order."""
    return device.type == "cuda"


class _Copies:
    """Makes copies that list their coordinates of an axis layout."""

    def __init__(
        self, layout: AxisLayout, device: torch.device, dtype: torch.dtype, with_ids: bool
    ) -> None:
        self.device = device
        self.scale, self.scales = self._one_or_each(layout.scale, dtype)
        self.noise, self.noises, self.ids = 0.0, None, None
        if not layout.quiet:
            self.noise, self.noises = self._one_or_each(layout.factors, dtype)
        if with_ids or not layout.quiet:
            self.ids = self.int32(layout.ids.indices)

    def _one_or_each(self, vector: Vector, dtype: torch.dtype) -> tuple[float, Tensor | None]:
        uniform = vector.uniform
        if uniform is not None:
            return uniform, None
        return 1.0, torch.tensor(vector.expanded(), dtype=dtype, device=self.device)

    def int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def listed(self, targets: Sequence[int], *, place: bool = False) -> Copy:
        """Return a copy of the layout at any target coordinates, which ``place`` stores as ``Copy.targets``."""
        at = self.int32(targets)
        return Copy(
            targets=at if place else None,
            scale=self.scale,
            scales=None if self.scales is None else self.scales[at],
            noise=self.noise,
            noises=None if self.noises is None else self.noises[at],
            ids=None if self.ids is None else self.ids[at],
        )


def _copy(run: _ScaledRun, skip: int = 0) -> Copy:
    target, first_id = run.target + skip, run.first_id + skip
    return Copy(target, scale=run.scale, noise=run.noise, first_id=first_id)


def _by_source(runs: list[_ScaledRun]) -> Iterator[AxisRun]:
    """Divide the source at the bounds of all runs, so that every run consists of whole source ranges; yield each with its copies."""
    bounds = sorted({bound for run in runs for bound in (run.source, run.source + run.n)})
    following = dict(pairwise(bounds))
    copies: dict[int, list[Copy]] = defaultdict(list)
    for run in runs:
        start = run.source
        while start < run.source + run.n:
            copies[start].append(_copy(run, start - run.source))
            start = following[start]
    for start, range_copies in sorted(copies.items()):
        yield AxisRun(start, following[start] - start, tuple(range_copies))


def _own_layer(index_map: IndexMap, *, mixed: bool) -> Vector:
    """Return 0 for all but the first copy of every source coordinate if ``mixed`` (the next layer is copied there), else 1."""
    if not mixed:
        return Vector.full(1.0, index_map.n_target)
    first = index_map.first_copies()
    return Vector.of(
        0.0 if j != PAD and i == PAD else 1.0
        for i, j in zip(first.indices, index_map.indices, strict=True)
    )


def scale_of(axis: AxisMap, rule: Rule) -> Vector:
    """Return a rule's factor for each target coordinate of an axis."""
    powers = (axis.weight_scale, rule.weight), (axis.grad_scale, rule.grad)
    scales = [vector.map(lambda x, k=k: x**k) for vector, k in powers if k]
    if len(scales) == 2:
        return scales[0].zip(scales[1], lambda x, y: x * y)
    return scales[0] if scales else Vector.full(1.0, axis.index_map.n_target)


def _noise(axis: AxisMap, rule: Rule) -> tuple[Vector, IndexMap]:
    """Return noise factor (0 for state) and noise counter of each target coordinate of an axis; a pair of copies shares a counter."""
    index_map, value = axis.index_map, 1.0 if rule.is_weight else 0.0
    if not rule.is_weight or axis.pad != "random_reader" or index_map.is_identity:
        return Vector.full(value, index_map.n_target), IndexMap.identity(index_map.n_target)
    if not axis.noise and not index_map.has_pads:
        return Vector.full(0.0, index_map.n_target), IndexMap.identity(index_map.n_target)
    signs, partners = pair_copies(index_map)
    if not index_map.has_pads:
        return signs.map(lambda sign: axis.noise * sign), partners
    copied = index_map.per_copy(lambda _: axis.noise, pad=0.0)
    drawn = index_map.per_copy(lambda _: 0.0, pad=axis.drawn)
    return signs.zip(copied, lambda x, y: x * y).zip(drawn, lambda x, y: x + y), partners
