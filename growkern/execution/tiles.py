"""Cut target tensors into pieces: a tensor is viewed as a matrix, and a run of rows and a run of columns form a tile.

A tile is copied from the source to all its places in the target, or holds pads: zeros, a mean, noise, or the method's rows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from hashlib import blake2b
from math import inf, prod
from typing import NamedTuple

import torch
from torch import Tensor

from growkern.errors import CommitError, PlanError
from growkern.execution import torch_backend as reference
from growkern.execution.axis_runs import AxisLayout, AxisRun, Reach, scale_of
from growkern.execution.measures import chunks, roots_of_mean_squares
from growkern.execution.torch_backend import Noise, Piece
from growkern.optimizer.state_rules import Rule
from growkern.planning.growth_plan import AxisMap, GrowthPlan, Pad, TensorRow
from growkern.planning.index_map import PAD, IndexMap
from growkern.planning.vector import Vector
from growkern.support.dtypes import arithmetic

Given = Callable[[Tensor, int], Tensor]
BROKEN = "Load a checkpoint with finite weights, or set these elements."


class _Tile(NamedTuple):
    """A run of rows by a run of columns, the pad kinds of runs that copy nothing, and whether noise is added."""

    rows: AxisRun
    cols: AxisRun
    pads: tuple[Pad, ...]
    adds_noise: bool


class _Tiling(NamedTuple):
    """How tensors with the same axes are cut: the layouts of their rows and columns, and all tiles."""

    rows: AxisLayout
    cols: AxisLayout
    tiles: list[_Tile]
    plain: list[tuple[AxisRun, AxisRun]]  # all tiles, if every tile is only copied and scaled
    whole: tuple[AxisRun, AxisRun] | None  # the only tile, if it reads its whole source
    centered: list[int]  # axes along which the mean is subtracted first
    reach: Reach
    source: tuple[int, int]  # matrix shape
    target: tuple[int, int]


def _tile(rows: AxisLayout, cols: AxisLayout, r: AxisRun, c: AxisRun, rule: Rule) -> _Tile:
    """Make a tile. A tile of a weight gets noise if it has twin noise or a random pad, and no pad of another kind."""
    pads: tuple[Pad, ...] = tuple(
        layout.pad for layout, run in ((rows, r), (cols, c)) if run.source == PAD
    )
    heard = all(any(copy.noise for copy in run.copies) for run in (r, c))
    heard = heard and (rows.noisy or cols.noisy)
    drawn = all(pad in ("random_reader", "random_writer") for pad in pads)
    return _Tile(r, c, pads, rule.is_weight and drawn and (heard or "random_writer" in pads))


class Tiler:
    """Cuts target tensors into pieces; computes axis layouts and axis runs once for all tensors with the same axes.

    ``given``: the width method's ``rows``, from source rows and the number of new rows to the new rows.
    """

    def __init__(self, plan: GrowthPlan, given: Given | None = None) -> None:
        self.plan, self.given = plan, given
        self.n_read = 0  # bytes read for statistics of sources
        self.finite_only = False  # True when means are of the elements that are finite
        self.statistics: list[tuple[Tensor, Tensor]] = []  # target, and a mean or rows that it has
        equal: dict[AxisMap, AxisMap] = {}
        self._axes = {key: equal.setdefault(axis, axis) for key, axis in plan.axes.items()}
        self._axis_layouts: dict[tuple[object, ...], AxisLayout] = {}
        self._tilings: dict[tuple[object, ...], _Tiling] = {}
        self._axis_runs: dict[tuple[object, ...], list[AxisRun]] = {}
        self._stds: dict[
            str, Tensor
        ] = {}  # by source: master weights and averages get the same noise
        self._means: dict[tuple[AxisMap, Rule], AxisMap] = {}
        self._scaled: dict[tuple[AxisMap, float, float], AxisMap] = {}
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        self._copies: dict[tuple[AxisLayout, torch.dtype, torch.device], Tensor] = {}

    def measure(
        self, jobs: Iterable[tuple[TensorRow, Tensor, Tensor, Rule, Tensor | None]]
    ) -> None:
        """Measure the root mean square of all weights that get noise in one batch; jobs hold the arguments of ``pieces``."""
        noisy: dict[tuple[torch.device, torch.dtype, torch.dtype], dict[str, Tensor]] = defaultdict(
            dict
        )
        for row, source, target, rule, _ in jobs:
            known = row.source in self._stds
            if known or not rule.is_weight or row.constant is not None or not source.numel():
                continue
            kind = source.device, arithmetic(target.dtype), source.dtype
            tiling = self._tiling(row, rule, *kind[:2])
            if not tiling.centered and any(tile.adds_noise for tile in tiling.tiles):
                noisy[kind].setdefault(row.source, source)
        for (_, dtype, _), by_name in noisy.items():
            sources = list(by_name.values())
            stds = [_std(rms, dtype) for rms in roots_of_mean_squares(sources)]
            self._stds |= dict(zip(by_name, stds, strict=True))
            self.n_read += 2 * sum(source.numel() * source.element_size() for source in sources)

    def pieces(
        self, row: TensorRow, src: Tensor, dst: Tensor, rule: Rule, next_layer: Tensor | None = None
    ) -> Iterator[Piece]:
        """Cut one target tensor (weight, gradient or state) by its rule; ``next_layer`` is the next layer's source tensor."""
        if row.constant is not None:
            into = dst.view(prod(dst.shape[:-1]), prod(dst.shape[-1:]))
            yield Piece(self._constant(row.constant, dst).expand_as(into), into)
            return
        dtype = arithmetic(dst.dtype)
        tiling = self._tiling(row, rule, src.device, dtype)
        for axis in tiling.centered:
            self.n_read += 2 * src.numel() * src.element_size()
            src = src - src.mean(axis, keepdim=True)
            next_layer = (
                next_layer - next_layer.mean(axis, keepdim=True)
                if next_layer is not None and row.next_layer_source
                else None
            )
        above = (
            _matrix(next_layer, tiling.source)
            if next_layer is not None and row.next_layer_source
            else None
        )
        source, target = _matrix(src, tiling.source), _matrix(dst, tiling.target)
        if tiling.whole is not None:
            r, c = tiling.whole
            yield Piece(source, target, r.copies, c.copies, r.index, c.index)
            return
        if tiling.plain:
            for r, c in tiling.plain:
                value = _part(_read(source, above, r, c), r, c)
                yield Piece(value, target, r.copies, c.copies, r.index, c.index)
            return
        rows, cols = tiling.rows, tiling.cols
        fill, noise = _Fill(row.source, source, rows, cols, rule, dtype, self), None
        for tile in tiling.tiles:
            r, c = tile.rows, tile.cols
            if tile.adds_noise and noise is None:
                std = self._stds.get(row.source)
                std = self._stds.setdefault(row.source, fill.std) if std is None else std
                keys = reference.axis_keys(self.plan.seed, _tensor_id(row.name))
                noise = Noise(std.to(dtype), keys)
            drawn = noise if tile.adds_noise else None
            if not tile.pads:
                value = _part(_read(source, above, r, c), r, c)
                yield Piece(value, target, r.copies, c.copies, r.index, c.index, drawn)
                continue
            value, scaled = fill.of(tile)
            if tile.adds_noise and "random_writer" in tile.pads:
                r, c = r.drawn((rows if rows.has_random_writer else cols).drawn), c.drawn(1.0)
            elif not scaled:
                r, c = r.unscaled, c.unscaled
            yield Piece(value, target, r.copies, c.copies, None, None, drawn)
        self.n_read += fill.n_statistics * source.numel() * source.element_size()
        self.statistics += [(dst, statistic) for statistic in fill.statistics]

    def reach(self, row: TensorRow, source: Tensor, target: Tensor, rule: Rule) -> Reach:
        """Return how far a job can change the size of an element; infinitely far if its weight is centered first."""
        tiling = self._tiling(row, rule, source.device, arithmetic(target.dtype))
        return tiling.reach._replace(largest=inf) if tiling.centered else tiling.reach

    def std(self, row: TensorRow) -> Tensor:
        """Return the noise scale of a weight that was cut into pieces with noise."""
        return self._stds[row.source]

    def _tiling(
        self, row: TensorRow, rule: Rule, device: torch.device, dtype: torch.dtype
    ) -> "_Tiling":
        """Return the tiling of tensors with the row's axes, computed once."""
        axes = tuple(map(self._axes.__getitem__, row.axes))  # shared by blocks
        if row.factor != 1 or row.grad_factor != 1:
            own = row.factor, row.grad_factor
            scaled = self._scaled.setdefault((axes[0], *own), axes[0].times(*own))
            axes = (scaled, *axes[1:])
        mixed = axes[row.next_layer_axis] if row.next_layer_source is not None else None
        key = axes, mixed, rule, device, dtype
        tiling = self._tilings.get(key)
        if tiling is None:
            if rule.reduced is not None:
                at = len(axes) + rule.reduced
                axes = (*axes[:at], self._mean_of(axes[at], rule), *axes[at + 1 :])
            at = _split(axes)
            rows, cols = (self._axis_layout(part, rule, mixed) for part in (axes[:at], axes[at:]))
            with_ids = rule.is_weight and (rows.has_random_writer or cols.has_random_writer)
            by_row = self._runs_of(rows, device, dtype, True, with_ids)
            by_col = self._runs_of(cols, device, dtype, False, with_ids)
            tiles = [_tile(rows, cols, r, c, rule) for r in by_row for c in by_col if r.n and c.n]
            source = rows.index_map.n_source, cols.index_map.n_source
            target = rows.index_map.n_target, cols.index_map.n_target
            copied = not any(tile.adds_noise or tile.pads for tile in tiles)
            plain = [(tile.rows, tile.cols) for tile in tiles] if copied else []
            centered = [i for i, axis in enumerate(axes) if rule.is_weight and axis.centered]
            whole = plain[0] if len(plain) == 1 and mixed is None else None
            if whole and any(
                run.index is None and run.n != n for run, n in zip(whole, source, strict=True)
            ):
                whole = None
            reach = Reach.of(rows, cols, noisy=any(tile.adds_noise for tile in tiles))
            tiling = _Tiling(rows, cols, tiles, plain, whole, centered, reach, source, target)
            self._tilings[key] = tiling
        return tiling

    def _mean_of(self, axis: AxisMap, rule: Rule) -> AxisMap:
        """Return an axis of size 1 in place of an axis that the state is averaged over; its factor is the mean of that axis's factors."""
        scale, runs = scale_of(axis, rule).expanded(), axis.index_map.runs
        copied = [scale[i] for run in runs if run.source != PAD for i in range(*run.span)]
        unit, power = Vector.full(1.0, 1), rule.grad or 1  # at power 0, all factors are 1
        mean = Vector.full((sum(copied) / max(1, len(copied))) ** (1 / power), 1)
        mean_axis = AxisMap(IndexMap.identity(1), unit, mean)
        return self._means.setdefault((axis, rule), mean_axis)

    def _axis_layout(
        self, axes: tuple[AxisMap, ...], rule: Rule, mixed: AxisMap | None
    ) -> AxisLayout:
        key = axes, mixed, rule
        if key not in self._axis_layouts:
            self._axis_layouts[key] = AxisLayout(axes, rule, mixed)
        return self._axis_layouts[key]

    def _runs_of(
        self,
        layout: AxisLayout,
        device: torch.device,
        dtype: torch.dtype,
        rows: bool,
        with_ids: bool,
    ) -> list[AxisRun]:
        key = layout, rows, with_ids, device, dtype
        if key not in self._axis_runs:
            self._axis_runs[key] = layout.axis_runs(device, dtype, rows=rows, with_ids=with_ids)
        return self._axis_runs[key]

    def copies(self, layout: AxisLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ``layout.copies`` on a device; each layout is uploaded once."""
        key = layout, dtype, device
        if key not in self._copies:
            self._copies[key] = torch.tensor(layout.copies, dtype=dtype, device=device)
        return self._copies[key]

    def _constant(self, value: float, like: Tensor) -> Tensor:
        key = value, like.dtype, like.device
        if key not in self._constants:
            self._constants[key] = torch.full((1, 1), value, dtype=like.dtype, device=like.device)
        return self._constants[key]


def _matrix(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    if tensor.shape == shape:
        return tensor
    return tensor.view(shape) if tensor.dim() < 2 else tensor.reshape(shape)


def _split(axes: tuple[AxisMap, ...]) -> int:
    """Return the number of row axes; the columns are the axes after a single grown axis, else the last grown axis and those after it."""
    grown = [i for i, axis in enumerate(axes) if not axis.is_identity]
    if len(grown) == 1 and grown[0] < len(axes) - 1:
        return grown[0] + 1
    return grown[-1] if grown else len(axes) - 1


def _std(rms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the noise scale of a weight: its root mean square, rounded to bfloat16."""
    return rms.to(torch.bfloat16).to(dtype) / reference.BYTES_STD


def _tensor_id(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "little")


class _Fill:
    """Sources of tiles with pads: broadcast zeros or means, or the method's rows."""

    def __init__(
        self,
        name: str,
        source: Tensor,
        rows: AxisLayout,
        cols: AxisLayout,
        rule: Rule,
        dtype: torch.dtype,
        tiler: Tiler,
    ) -> None:
        self.source, self.rows, self.cols, self.rule, self.dtype = source, rows, cols, rule, dtype
        self.name, self._tiler, self.finite_only = name, tiler, tiler.finite_only
        self.statistics: list[Tensor] = []
        self._means: dict[tuple[bool, bool], Tensor] = {}
        self.n_statistics = 0  # number of times that statistics read the whole source

    @cached_property
    def std(self) -> Tensor:
        """Noise scale of the source, for a weight that ``Tiler.measure`` did not measure."""
        self.n_statistics += 2
        (rms,) = roots_of_mean_squares([self.source])
        return _std(rms, self.dtype)

    def of(self, tile: _Tile) -> tuple[Tensor, bool]:
        """Return the source tensor of a tile, and whether the scales of its copies apply."""
        r, c, pads, _ = tile
        if not self.rule.is_weight and self.rule.missing == "mean":
            return self.mean_of_law.expand(r.n, c.n), False
        if self.rule.is_weight and pads == ("from_method",):
            if r.source == PAD:
                start = self.rows.n_pads_before(r.copies[0].target)
                return _taken(self.given.narrow(0, start, r.n), 1, c), False
            start = self.cols.n_pads_before(c.copies[0].target)
            return _taken(self.given.narrow(0, start, c.n).T, 0, r), False
        if not self.rule.is_weight or any(pad != "mean" for pad in pads):
            return self.source.new_zeros(1, 1).expand(r.n, c.n), True
        mean = self.mean(r.source == PAD, c.source == PAD)
        rows = mean if r.source == PAD else _taken(mean, 0, r)
        return (rows if c.source == PAD else _taken(rows, 1, c)).expand(r.n, c.n), True

    @cached_property
    def given(self) -> Tensor:
        """New rows, or new columns as rows, from the width method."""
        if self._tiler.given is None:
            raise PlanError(
                "the plan's width method computes the new coordinates: pass the method as width= beside plan=."
            )
        self.n_statistics += 1
        rows = self.rows.pad == "from_method" and self.rows.index_map.has_pads
        source, layout = (self.source, self.rows) if rows else (self.source.T, self.cols)
        if n := int(source.isfinite().logical_not().sum()):  # the method would fail, or spread them
            raise CommitError(
                f"cannot compute new rows of {self.name}: {n} of {source.numel()} elements "
                f"{'is' if n == 1 else 'are'} not finite. {BROKEN} "
                "Nothing was changed."
            )
        made = self._tiler.given(source, layout.index_map.n_target - layout.n_copied).contiguous()
        self.statistics.append(made)
        return made

    def mean(self, over_rows: bool, over_cols: bool) -> Tensor:
        """Return the mean over the rows, the columns or both, (1, C), (R, 1) or (1, 1); each is computed once."""
        if (over_rows, over_cols) not in self._means:
            self.n_statistics += 1
            parts = list(chunks(self.source))
            if over_cols:
                parts = [part.mean(1, keepdim=True) for part in parts]
            if over_rows:
                n = max(1, self.source.shape[0])
                parts = [torch.stack([part.sum(0, keepdim=True) for part in parts]).sum(0) / n]
            self._means[over_rows, over_cols] = torch.cat(parts)
            self.statistics.append(self._means[over_rows, over_cols])
        return self._means[over_rows, over_cols]

    @cached_property
    def mean_of_law(self) -> Tensor:
        """Mean of all copied elements, scaled by the law: the start value of an element that copies no source element."""
        rows, cols = (
            self._tiler.copies(layout, self.dtype, self.source.device)
            for layout in (self.rows, self.cols)
        )
        self.n_statistics += 1
        n = self.rows.n_copied * self.cols.n_copied
        source = self.source
        if self.finite_only:
            finite = source.isfinite()
            source = source.where(finite, 0)
            n *= finite.double().mean().item()
        by_row = torch.cat([chunk @ cols for chunk in chunks(source)])
        mean = (rows @ by_row / (n or 1)).view(1, 1)
        self.statistics.append(mean)
        return mean


def _read(source: Tensor, above: Tensor | None, r: AxisRun, c: AxisRun) -> Tensor:
    """Return the tensor that a tile copies: the source, or the next layer's source."""
    return above if above is not None and (r.from_next_layer or c.from_next_layer) else source


def _part(tensor: Tensor, r: AxisRun, c: AxisRun) -> Tensor:
    if r.index is None and r.n != tensor.shape[0]:
        tensor = tensor[r.source : r.source + r.n]
    return (
        tensor[:, c.source : c.source + c.n]
        if c.index is None and c.n != tensor.shape[1]
        else tensor
    )


def _taken(tensor: Tensor, axis: int, run: AxisRun) -> Tensor:
    return (
        tensor.narrow(axis, run.source, run.n)
        if run.index is None
        else tensor.index_select(axis, run.index)
    )
