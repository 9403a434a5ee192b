"""Cut target tensors into pieces: a tensor is viewed as a matrix, and a stretch of rows and a stretch of columns form a rectangle.

A rectangle is copied from the source to all its places in the target, or holds pads: zeros, a mean, noise, or the method's rows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from growkern.errors import PlanError
from growkern.execution import torch_backend as reference
from growkern.execution.axis_runs import Side, Stretch, scale_of
from growkern.execution.torch_backend import Noise, Piece
from growkern.optimizer.state_rules import Rule
from growkern.planning.growth_plan import AxisMap, GrowthPlan, Pad, TensorRow
from growkern.planning.index_map import PAD, IndexMap
from growkern.planning.vector import Vector
from growkern.support.dtypes import arithmetic

Given = Callable[[Tensor, int], Tensor]


class _Cell(NamedTuple):
    """A stretch of rows by a stretch of columns, the pad kinds of stretches that copy nothing, and whether noise is added."""

    rows: Stretch
    cols: Stretch
    pads: tuple[Pad, ...]
    free: bool


class _Layout(NamedTuple):
    rows: Side
    cols: Side
    cells: list[_Cell]
    plain: list[tuple[Stretch, Stretch]]  # all cells, if every cell is only copied and scaled
    whole: tuple[Stretch, Stretch] | None  # the only cell, if it reads its whole source
    centred: list[int]  # axes along which the mean is subtracted first
    source: tuple[int, int]  # matrix shape
    target: tuple[int, int]


def _cell(rows: Side, cols: Side, r: Stretch, c: Stretch, rule: Rule) -> _Cell:
    """Make a cell. A cell of a weight gets noise if it has twin noise or a random pad, and no pad of another kind."""
    pads: tuple[Pad, ...] = tuple(side.pad for side, s in ((rows, r), (cols, c)) if s.source == PAD)
    heard = all(any(copy.noise for copy in side.copies) for side in (r, c))
    heard = heard and (rows.noisy or cols.noisy)
    drawn = all(pad in ("random_reader", "random_writer") for pad in pads)
    return _Cell(r, c, pads, rule.is_weight and drawn and (heard or "random_writer" in pads))


class Cutter:
    """Cuts target tensors into pieces; computes sides and stretches once for all tensors with the same axes.

    ``given``: the width method's ``rows``, from source rows and the number of new rows to the new rows.
    """

    def __init__(self, plan: GrowthPlan, given: Given | None = None) -> None:
        self.plan, self.given = plan, given
        self.n_read = 0  # bytes read for statistics of sources
        equal: dict[AxisMap, AxisMap] = {}
        self._axes = {key: equal.setdefault(axis, axis) for key, axis in plan.axes.items()}
        self._sides: dict[tuple[object, ...], Side] = {}
        self._layouts: dict[tuple[object, ...], _Layout] = {}
        self._stretches: dict[tuple[object, ...], list[Stretch]] = {}
        self._stds: dict[
            str, Tensor
        ] = {}  # by source: master weights and averages get the same noise
        self._means: dict[tuple[AxisMap, Rule], AxisMap] = {}
        self._scaled: dict[tuple[AxisMap, float, float], AxisMap] = {}
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

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
            layout = self._layout(row, rule, *kind[:2])
            if not layout.centred and any(cell.free for cell in layout.cells):
                noisy[kind].setdefault(row.source, source)
        for (device, dtype, _), by_name in noisy.items():
            sources = list(by_name.values())
            norms = reference.norms_of(sources, 2)
            roots = torch.tensor([source.numel() ** 0.5 for source in sources], dtype=dtype)
            stds = _std(norms / roots.to(device))
            self._stds |= dict(zip(by_name, stds, strict=True))
            self.n_read += sum(source.numel() * source.element_size() for source in sources)

    def pieces(
        self, row: TensorRow, src: Tensor, dst: Tensor, rule: Rule, upper: Tensor | None = None
    ) -> Iterator[Piece]:
        """Cut one target tensor (weight, gradient or state) by its rule; ``upper`` is the next layer's source tensor."""
        if row.constant is not None:
            into = dst.view(1, dst.numel())
            yield Piece(self._constant(row.constant, dst).expand_as(into), into)
            return
        dtype = arithmetic(dst.dtype)
        layout = self._layout(row, rule, src.device, dtype)
        for axis in layout.centred:
            self.n_read += 2 * src.numel() * src.element_size()
            src = src - src.mean(axis, keepdim=True)
            upper = (
                upper - upper.mean(axis, keepdim=True)
                if upper is not None and row.next_layer_source
                else None
            )
        above = (
            _matrix(upper, layout.source) if upper is not None and row.next_layer_source else None
        )
        source, target = _matrix(src, layout.source), _matrix(dst, layout.target)
        if layout.whole is not None:
            r, c = layout.whole
            yield Piece(source, target, r.copies, c.copies, r.index, c.index)
            return
        if layout.plain:
            for r, c in layout.plain:
                value = _part(_read(source, above, r, c), r, c)
                yield Piece(value, target, r.copies, c.copies, r.index, c.index)
            return
        rows, cols = layout.rows, layout.cols
        fill, noise = _Fill(source, rows, cols, rule, dtype, self.given), None
        for cell in layout.cells:
            r, c = cell.rows, cell.cols
            if cell.free and noise is None:
                std = self._stds.get(row.source)
                std = self._stds.setdefault(row.source, fill.std) if std is None else std
                keys = reference.axis_keys(self.plan.seed, _tensor_id(row.name))
                noise = Noise(std.to(dtype), keys)
            drawn = noise if cell.free else None
            if not cell.pads:
                value = _part(_read(source, above, r, c), r, c)
                yield Piece(value, target, r.copies, c.copies, r.index, c.index, drawn)
                continue
            value, scaled = fill.of(cell)
            if cell.free and "random_writer" in cell.pads:
                r, c = r.drawn((rows if rows.free else cols).drawn), c.drawn(1.0)
            elif not scaled:
                r, c = r.unscaled, c.unscaled
            yield Piece(value, target, r.copies, c.copies, None, None, drawn)
        self.n_read += fill.n_statistics * source.numel() * source.element_size()

    def _layout(
        self, row: TensorRow, rule: Rule, device: torch.device, dtype: torch.dtype
    ) -> "_Layout":
        """Return the layout of tensors with the row's axes, computed once."""
        axes = tuple(map(self._axes.__getitem__, row.axes))  # shared by blocks
        if row.factor != 1 or row.grad_factor != 1:
            own = row.factor, row.grad_factor
            scaled = self._scaled.setdefault((axes[0], *own), axes[0].times(*own))
            axes = (scaled, *axes[1:])
        mixed = axes[row.next_layer_axis] if row.next_layer_source is not None else None
        key = axes, mixed, rule, device, dtype
        layout = self._layouts.get(key)
        if layout is None:
            if rule.reduced is not None:
                at = len(axes) + rule.reduced
                axes = (*axes[:at], self._mean_of(axes[at], rule), *axes[at + 1 :])
            at = _split(axes)
            rows, cols = (self._side(part, rule, mixed) for part in (axes[:at], axes[at:]))
            free = rule.is_weight and (rows.free or cols.free)
            by_row = self._cut(rows, device, dtype, True, free)
            by_col = self._cut(cols, device, dtype, False, free)
            cells = [_cell(rows, cols, r, c, rule) for r in by_row for c in by_col if r.n and c.n]
            source = rows.index_map.n_source, cols.index_map.n_source
            target = rows.index_map.n_target, cols.index_map.n_target
            copied = not any(cell.free or cell.pads for cell in cells)
            plain = [(cell.rows, cell.cols) for cell in cells] if copied else []
            centred = [i for i, axis in enumerate(axes) if rule.is_weight and axis.centred]
            whole = plain[0] if len(plain) == 1 and mixed is None else None
            if whole and any(
                s.index is None and s.n != n for s, n in zip(whole, source, strict=True)
            ):
                whole = None
            layout = _Layout(rows, cols, cells, plain, whole, centred, source, target)
            self._layouts[key] = layout
        return layout

    def _mean_of(self, axis: AxisMap, rule: Rule) -> AxisMap:
        """Return an axis of size 1 in place of an axis that the state is averaged over; its factor is the mean of that axis's factors."""
        scale, runs = scale_of(axis, rule).expanded(), axis.index_map.runs
        copied = [scale[i] for run in runs if run.source != PAD for i in range(*run.span)]
        unit, power = Vector.full(1.0, 1), rule.grad or 1  # at power 0, all factors are 1
        mean = Vector.full((sum(copied) / max(1, len(copied))) ** (1 / power), 1)
        mean_axis = AxisMap(IndexMap.identity(1), unit, mean)
        return self._means.setdefault((axis, rule), mean_axis)

    def _side(self, axes: tuple[AxisMap, ...], rule: Rule, mixed: AxisMap | None) -> Side:
        key = axes, mixed, rule
        if key not in self._sides:
            self._sides[key] = Side(axes, rule, mixed)
        return self._sides[key]

    def _cut(
        self, side: Side, device: torch.device, dtype: torch.dtype, rows: bool, counted: bool
    ) -> list[Stretch]:
        key = side, rows, counted, device, dtype
        if key not in self._stretches:
            self._stretches[key] = side.stretches(device, dtype, rows=rows, counted=counted)
        return self._stretches[key]

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


def _std(rms: Tensor) -> Tensor:
    """Return the noise scale of a weight: its root mean square, rounded to bfloat16 so that the order of summation has no effect."""
    return rms.to(torch.bfloat16).to(rms.dtype) / reference.BYTES_STD


def _tensor_id(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "little")


class _Fill:
    """Sources of cells with pads: broadcast zeros or means, or the method's rows."""

    def __init__(
        self,
        source: Tensor,
        rows: Side,
        cols: Side,
        rule: Rule,
        dtype: torch.dtype,
        given: Given | None,
    ) -> None:
        self.source, self.rows, self.cols, self.rule, self.dtype = source, rows, cols, rule, dtype
        self._given = given
        self._means: dict[tuple[bool, bool], Tensor] = {}
        self.n_statistics = 0  # number of times that statistics read the whole source

    @cached_property
    def std(self) -> Tensor:
        """Noise scale of the source, for a weight that ``Cutter.measure`` did not measure."""
        self.n_statistics += 1
        norm = reference.norms_of([self.source], 2)[0]
        return _std(norm / max(1, self.source.numel()) ** 0.5)

    def of(self, cell: _Cell) -> tuple[Tensor, bool]:
        """Return the source tensor of a cell, and whether the scales of its copies apply."""
        r, c, pads, _ = cell
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
        if self._given is None:
            raise PlanError(
                "the plan's width method computes the new coordinates: pass the method as width= beside plan=."
            )
        self.n_statistics += 1
        rows = self.rows.pad == "from_method" and self.rows.index_map.has_pads
        source, side = (self.source, self.rows) if rows else (self.source.T, self.cols)
        return self._given(source, side.index_map.n_target - side.n_copied).contiguous()

    def mean(self, over_rows: bool, over_cols: bool) -> Tensor:
        """Return the mean over the rows, the columns or both, (1, C), (R, 1) or (1, 1); each is computed once."""
        if (over_rows, over_cols) not in self._means:
            self.n_statistics += 1
            blocks = list(reference.blocks(self.source))
            if over_cols:
                blocks = [block.mean(1, keepdim=True) for block in blocks]
            if over_rows:
                n = max(1, self.source.shape[0])
                blocks = [torch.stack([block.sum(0, keepdim=True) for block in blocks]).sum(0) / n]
            self._means[over_rows, over_cols] = torch.cat(blocks)
        return self._means[over_rows, over_cols]

    @cached_property
    def mean_of_law(self) -> Tensor:
        """Mean of all copied elements, scaled by the law: the start value of an element that copies no source element."""
        rows, cols = (
            torch.tensor(side.copies, dtype=self.dtype, device=self.source.device)
            for side in (self.rows, self.cols)
        )
        self.n_statistics += 1
        n = self.rows.n_copied * self.cols.n_copied
        by_row = torch.cat([block @ cols for block in reference.blocks(self.source)])
        return (rows @ by_row / max(1, n)).view(1, 1)


def _read(source: Tensor, above: Tensor | None, r: Stretch, c: Stretch) -> Tensor:
    """Return the tensor that a cell copies: the source, or the next layer's source."""
    return above if above is not None and (r.upper or c.upper) else source


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
