"""Target tensors -> pieces: a tensor is seen as rows x columns; every stretch of source rows and stretch of source columns is a
rectangle that goes to all its copies in the target, or stands for what no source is copied to: a mean, a constant."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from growkern import reference
from growkern.index_map import PAD, IndexMap, Run, Vector, twins
from growkern.plan import AxisMap, GrowthPlan, Pad, TensorRow
from growkern.reference import Copy, Noise, Piece

N_RUNS, N_LONG_RUNS = (
    32,
    1024,
)  # an axis of more runs is copied by an index; of long runs, more are worth it
LONG = 64  # coordinates: 128 bytes of the smallest dtype


@dataclass(frozen=True, eq=False)
class Stretch:
    """``n`` source coordinates from ``source`` on (``PAD``: none), or those of ``index``, and where they go."""

    source: int
    n: int
    copies: tuple[Copy, ...]
    index: Tensor | None = None

    @cached_property
    def unscaled(self) -> "Stretch":
        """The same, copied as it is."""
        return replace(self, copies=tuple(replace(c, scale=1.0, scales=None) for c in self.copies))


class _Cut(NamedTuple):
    target: int
    n: int
    source: int
    scale: float
    noise: float
    first_id: int


class Side:
    """The rows or the columns of a target seen as a matrix: some of its axes, row-major; ``order`` as in ``Cutter.pieces``."""

    def __init__(self, axes: Sequence[AxisMap], order: int) -> None:
        self.index_map = IndexMap.identity(1)
        self.scale, self.factors = Vector.full(1.0, 1), Vector.full(1.0, 1)
        self.pad: Pad = "zero"
        self.noisy = False
        self.ids = IndexMap.identity(1)
        for axis in axes:
            own = axis.weight_scale if order == 0 else axis.grad_scale.map(lambda a: a**order)
            factors, ids = _noise(axis, order)
            self.ids = self.ids.product(ids)
            self.index_map = self.index_map.product(axis.index_map)
            self.scale, self.factors = self.scale.outer(own), self.factors.outer(factors)
            if not axis.index_map.is_identity:
                self.pad = axis.pad
                self.noisy = self.noisy or axis.pad == "normal"
        self.quiet = not any(value for value, _ in self.factors.pieces)

    @cached_property
    def copies(self) -> list[float]:
        """Per source coordinate, the sum of the scales of its copies."""
        sums = [0.0] * self.index_map.n_source
        for j, s in zip(self.index_map.indices, self.scale.expanded(), strict=True):
            if j != PAD:
                sums[j] += s
        return sums

    @cached_property
    def n_copied(self) -> int:
        """Target coordinates that copy one."""
        return sum(run.length for run in self.index_map.runs if run.source != PAD)

    def stretches(self, device: torch.device, dtype: torch.dtype, *, rows: bool) -> list[Stretch]:
        """Cut the side where what is copied, or how, changes; go by an index where that is too often."""
        n, n_target = len(self.index_map.runs), self.index_map.n_target
        long = n <= N_LONG_RUNS and n_target >= LONG * n
        if n <= N_RUNS or long:
            cuts = self._cuts()
            if len(cuts) <= 4 * N_RUNS or long:
                pads = [Stretch(PAD, cut.n, (_copy(cut),)) for cut in cuts if cut.source == PAD]
                return [*_segments([cut for cut in cuts if cut.source != PAD]), *pads]
        make = _Copies(self, device, dtype)
        return list(self._scattered(make) if rows and scatters(device) else self._gathered(make))

    def _cuts(self) -> list["_Cut"]:
        """Runs of one scale and one noise factor."""
        n_target, cuts = self.index_map.n_target, list[_Cut]()
        changes = {run.target: run for run in self.index_map.runs}
        ids = {run.target: run for run in self.ids.runs}
        scales, factors = self.scale.changes, self.factors.changes
        starts = sorted({*changes, *ids, *scales, *factors} - {n_target})
        run, own, scale, factor = Run(0, 0, PAD), Run(0, 0, 0), 1.0, 1.0
        for start, end in pairwise([*starts, n_target]):
            run, own = changes.get(start, run), ids.get(start, own)
            scale, factor = scales.get(start, scale), factors.get(start, factor)
            source = PAD if run.source == PAD else run.source + start - run.target
            first_id = own.source + start - own.target
            cuts.append(_Cut(start, end - start, source, scale, factor, first_id))
        return cuts

    def _scattered(self, make: "_Copies") -> Iterator[Stretch]:
        """Source coordinates of equally many copies go together, each copy to a list of target coordinates."""
        if pads := [i for i, j in enumerate(self.index_map.indices) if j == PAD]:
            yield Stretch(PAD, len(pads), (make.listed(pads, place=True),))
        for sources, targets in self.index_map.by_count.values():
            copies = [make.listed(own, place=True) for own in targets]
            yield Stretch(0, len(sources), tuple(copies), make.int32(sources))

    def _gathered(self, make: "_Copies") -> Iterator[Stretch]:
        """Neighbouring target coordinates that copy something go together, and those that do not."""
        indices = self.index_map.indices
        start = 0
        for end in range(1, len(indices) + 1):
            if end == len(indices) or (indices[end] == PAD) != (indices[start] == PAD):
                copy = replace(make.listed(range(start, end)), target=start)
                pad = indices[start] == PAD
                index = None if pad else make.int32(indices[start:end])
                yield Stretch(PAD if pad else 0, end - start, (copy,), index)
                start = end


def scatters(device: torch.device) -> bool:
    """Whether rows of a random map go from a source row to all its places (a GPU loads it once), or are fetched in target order."""
    return device.type == "cuda"


class _Copies:
    """Makes the copies of a side that list their coordinates."""

    def __init__(self, side: Side, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.scales = torch.tensor(side.scale.expanded(), dtype=dtype, device=device)
        self.factors = self.ids = None
        if not side.quiet:
            self.factors = torch.tensor(side.factors.expanded(), dtype=dtype, device=device)
            self.ids = self.int32(side.ids.indices)

    def int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def listed(self, targets: Sequence[int], *, place: bool = False) -> Copy:
        """Any coordinates of the target."""
        at = self.int32(targets)
        return Copy(
            targets=at if place else None,
            scales=self.scales[at],
            noise=0.0 if self.factors is None else 1.0,
            noises=None if self.factors is None else self.factors[at],
            ids=None if self.ids is None else self.ids[at],
        )


def _copy(cut: _Cut, skip: int = 0) -> Copy:
    target, first_id = cut.target + skip, cut.first_id + skip
    return Copy(target, scale=cut.scale, noise=cut.noise, first_id=first_id)


def _segments(cuts: list[_Cut]) -> Iterator[Stretch]:
    """Cut the source where a cut begins or ends, so that every cut is made of whole segments."""
    bounds = sorted({bound for cut in cuts for bound in (cut.source, cut.source + cut.n)})
    following = dict(pairwise(bounds))
    copies: dict[int, list[Copy]] = defaultdict(list)
    for cut in cuts:
        start = cut.source
        while start < cut.source + cut.n:
            copies[start].append(_copy(cut, start - cut.source))
            start = following[start]
    for start, found in sorted(copies.items()):
        yield Stretch(start, following[start] - start, tuple(found))


def _noise(axis: AxisMap, order: int) -> tuple[Vector, IndexMap]:
    """Noise factor of each target coordinate of an axis (0 in state), and its counter; twins share a counter."""
    index_map, value = axis.index_map, 0.0 if order else 1.0
    if order or axis.pad != "normal" or index_map.is_identity:
        return Vector.full(value, index_map.n_target), IndexMap.identity(index_map.n_target)
    signs, partners = twins(index_map)
    if not index_map.has_pads:
        return signs.map(lambda sign: axis.noise * sign), partners
    copied = index_map.per_copy(lambda _: axis.noise, pad=0.0)
    free = index_map.per_copy(lambda _: 0.0, pad=1.0)
    return signs.zip(copied, lambda x, y: x * y).zip(free, lambda x, y: x + y), partners


class Cutter:
    """Cuts target tensors into pieces; what depends on an axis alone is worked out once."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self.n_read = 0  # bytes that statistics of sources read
        equal: dict[AxisMap, AxisMap] = {}
        self._axes = {key: equal.setdefault(axis, axis) for key, axis in plan.axes.items()}
        self._sides: dict[tuple[object, ...], Side] = {}
        self._pairs: dict[tuple[tuple[str, ...], int], tuple[Side, Side]] = {}
        self._stretches: dict[tuple[Side, bool, torch.device, torch.dtype], list[Stretch]] = {}
        self._stds: dict[int, Tensor] = {}
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def measure(self, jobs: Iterable[tuple[TensorRow, Tensor, Tensor, int]]) -> None:
        """Measure every weight that gets noise at once, rather than each by itself; jobs as arguments of ``pieces``."""
        noisy: dict[tuple[torch.device, torch.dtype, torch.dtype], dict[int, Tensor]] = defaultdict(
            dict
        )
        for row, source, target, order in jobs:
            if order or row.constant is not None or not source.numel():
                continue
            centred = any(self._axes[key].centred for key in row.axes)
            sides = self._two_sides(row.axes, 0)
            if not centred and any(side.noisy and not side.quiet for side in sides):
                kind = source.device, reference.arithmetic(target.dtype), source.dtype
                noisy[kind][source.data_ptr()] = source
        for (device, dtype, _), by_place in noisy.items():
            sources = list(by_place.values())
            norms = reference.norms_of(sources, 2)
            roots = torch.tensor([source.numel() ** 0.5 for source in sources], dtype=dtype)
            stds = _std(norms / roots.to(device))
            self._stds |= {
                source.data_ptr(): std for source, std in zip(sources, stds, strict=True)
            }
            self.n_read += sum(source.numel() * source.element_size() for source in sources)

    def pieces(self, row: TensorRow, src: Tensor, dst: Tensor, order: int) -> Iterator[Piece]:
        """Cut one target tensor. ``order``: 0 for a weight, k for state of order k in the gradient."""
        if row.constant is not None:
            into = dst.view(1, dst.numel())
            yield Piece(self._constant(row.constant, dst).expand_as(into), into)
            return
        measured = self._stds.get(
            src.data_ptr()
        )  # of the live tensor: memory of a copy may have been another's
        for axis, key in enumerate(row.axes):
            if order == 0 and self._axes[key].centred:
                self.n_read += 2 * src.numel() * src.element_size()
                src = src - src.mean(axis, keepdim=True)
        rows, cols = self._two_sides(row.axes, order)
        source = src.reshape(rows.index_map.n_source, cols.index_map.n_source)
        target = dst.view(rows.index_map.n_target, cols.index_map.n_target)
        fill = _Fill(source, rows, cols, order, reference.arithmetic(dst.dtype))
        for r in self._cut(rows, fill, True):
            for c in self._cut(cols, fill, False):
                if not r.n or not c.n:
                    continue
                value, scaled = fill.of(r, c)
                whole = r.source != PAD and c.source != PAD
                noise = None
                if fill.free(r, c):
                    std = fill.std if measured is None else measured
                    noise = Noise(std, reference.axis_keys(self.plan.seed, _tensor_id(row.name)))
                yield Piece(
                    value,
                    target,
                    (r if scaled else r.unscaled).copies,
                    (c if scaled else c.unscaled).copies,
                    r.index if whole else None,
                    c.index if whole else None,
                    noise,
                )
        self.n_read += fill.n_statistics * source.numel() * source.element_size()

    def _two_sides(self, keys: tuple[str, ...], order: int) -> tuple[Side, Side]:
        if (keys, order) not in self._pairs:
            axes = tuple(self._axes[key] for key in keys)
            at = _split(axes)
            self._pairs[keys, order] = self._side(axes[:at], order), self._side(axes[at:], order)
        return self._pairs[keys, order]

    def _side(self, axes: tuple[AxisMap, ...], order: int) -> Side:
        key = (*map(id, axes), order)
        if key not in self._sides:
            self._sides[key] = Side(axes, order)
        return self._sides[key]

    def _cut(self, side: Side, fill: "_Fill", rows: bool) -> list[Stretch]:
        key = side, rows, fill.source.device, fill.dtype
        if key not in self._stretches:
            self._stretches[key] = side.stretches(fill.source.device, fill.dtype, rows=rows)
        return self._stretches[key]

    def _constant(self, value: float, like: Tensor) -> Tensor:
        key = value, like.dtype, like.device
        if key not in self._constants:
            self._constants[key] = torch.full((1, 1), value, dtype=like.dtype, device=like.device)
        return self._constants[key]


def _split(axes: tuple[AxisMap, ...]) -> int:
    """How many axes are rows: at most the last grown axis, and what follows it, are columns."""
    grown = [i for i, axis in enumerate(axes) if not axis.is_identity]
    if len(grown) == 1 and grown[0] < len(axes) - 1:
        return grown[0] + 1
    return grown[-1] if grown else len(axes) - 1


def _std(rms: Tensor) -> Tensor:
    """Noise is measured in the root mean square of its weight, to eight bits, so that devices that sum in another order agree."""
    return rms.to(torch.bfloat16).to(rms.dtype) / reference.BYTES_STD


def _tensor_id(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "little")


class _Fill:
    """What a piece is read from: the source where both stretches copy, else what stands for it, broadcast."""

    def __init__(
        self, source: Tensor, rows: Side, cols: Side, order: int, dtype: torch.dtype
    ) -> None:
        self.source, self.rows, self.cols, self.order, self.dtype = source, rows, cols, order, dtype
        self._means: dict[tuple[bool, bool], Tensor] = {}
        self.n_statistics = 0  # times that the whole source is read for one

    @cached_property
    def std(self) -> Tensor:
        """Of the noise, where it was not measured before."""
        self.n_statistics += 1
        norm = reference.norms_of([self.source], 2)[0]
        return _std(norm / max(1, self.source.numel()) ** 0.5)

    def pads(self, r: Stretch, c: Stretch) -> list[Pad]:
        return [side.pad for side, s in ((self.rows, r), (self.cols, c)) if s.source == PAD]

    def free(self, r: Stretch, c: Stretch) -> bool:
        """True where there is noise: weights that copy, or that read a pad, but not those that write one."""
        return (
            self.order == 0
            and (self.rows.noisy or self.cols.noisy)
            and all(pad == "normal" for pad in self.pads(r, c))
            and any(copy.noise for copy in r.copies)
            and any(copy.noise for copy in c.copies)
        )

    def of(self, r: Stretch, c: Stretch) -> tuple[Tensor, bool]:
        """The tensor to read, and whether the scales apply to it."""
        pads = self.pads(r, c)
        if not pads:
            return _part(self.source, r, c), True
        if self.order == 2:
            return self.mean_of_law.expand(r.n, c.n), False
        if self.order or any(pad != "mean" for pad in pads):
            return self.source.new_zeros(1, 1).expand(r.n, c.n), True
        mean = self.mean(r.source == PAD, c.source == PAD)
        rows = mean if r.source == PAD else _taken(mean, 0, r)
        return (rows if c.source == PAD else _taken(rows, 1, c)).expand(r.n, c.n), True

    def mean(self, over_rows: bool, over_cols: bool) -> Tensor:
        """Mean over the rows, the columns or both, (1, C), (R, 1) or (1, 1); measured once."""
        if (over_rows, over_cols) not in self._means:
            self.n_statistics += 1
            found = list(reference.blocks(self.source))
            if over_cols:
                found = [block.mean(1, keepdim=True) for block in found]
            if over_rows:
                n = max(1, self.source.shape[0])
                found = [torch.stack([block.sum(0, keepdim=True) for block in found]).sum(0) / n]
            self._means[over_rows, over_cols] = torch.cat(found)
        return self._means[over_rows, over_cols]

    @cached_property
    def mean_of_law(self) -> Tensor:
        """Mean over the elements that copy, each scaled by the law: what an element without an ancestor starts from."""
        rows, cols = (
            torch.tensor(side.copies, dtype=self.dtype, device=self.source.device)
            for side in (self.rows, self.cols)
        )
        self.n_statistics += 1
        n = self.rows.n_copied * self.cols.n_copied
        by_row = torch.cat([block @ cols for block in reference.blocks(self.source)])
        return (rows @ by_row / max(1, n)).view(1, 1)


def _part(tensor: Tensor, r: Stretch, c: Stretch) -> Tensor:
    if r.index is None and r.n != tensor.shape[0]:
        tensor = tensor[r.source : r.source + r.n]
    return (
        tensor[:, c.source : c.source + c.n]
        if c.index is None and c.n != tensor.shape[1]
        else tensor
    )


def _taken(tensor: Tensor, axis: int, s: Stretch) -> Tensor:
    return (
        tensor.narrow(axis, s.source, s.n)
        if s.index is None
        else tensor.index_select(axis, s.index)
    )
