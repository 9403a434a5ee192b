"""Target tensors -> pieces: every tensor is seen as rows x columns; every pair of a row span and a column span is a rectangle that
copies a rectangle of the source, the mean of one, or a constant.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor

from growkern import reference
from growkern.index_map import PAD, IndexMap, Vector, twins
from growkern.plan import AxisMap, GrowthPlan, Pad, TensorRow
from growkern.reference import Noise, Piece

N_SPANS = 32  # an axis of more runs than this is gathered by an index instead of run by run


@dataclass(frozen=True)
class Span:
    """A stretch of one side of a target: ``n`` coordinates from ``target`` copy those from ``source`` on, or those of ``index``.

    ``factors`` and ``ids`` (of the noise) are None where there is none.
    """

    target: int
    n: int
    source: int
    scale: float
    index: Tensor | None = None
    scales: Tensor | None = None
    factors: Tensor | None = None
    ids: Tensor | None = None


@dataclass(frozen=True)
class _Side:
    """The rows or the columns of a target seen as a matrix: some of its axes, row-major.

    ``factors`` and ``ids``: noise per coordinate (0 for none) and the counter it is drawn from; twins share a counter.
    ``copies``: per source coordinate, the sum of the scales of its copies.
    """

    index_map: IndexMap
    scale: Vector
    pad: Pad
    factors: Vector
    ids: tuple[int, ...]
    noisy: bool
    copies: tuple[float, ...]

    @property
    def n_copied(self) -> int:
        return sum(run.length for run in self.index_map.runs if run.source != PAD)


class Cutter:
    """Cuts target tensors into pieces; what depends on an axis alone is worked out once."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self.sides: dict[tuple[tuple[str, ...], int], _Side] = {}
        self.cuts: dict[tuple[tuple[str, ...], int, torch.device, torch.dtype], list[Span]] = {}

    def pieces(self, row: TensorRow, src: Tensor, dst: Tensor, order: int) -> Iterator[Piece]:
        """Cut one target tensor. ``order``: 0 for a weight, k for state of order k in the gradient."""
        if row.constant is not None:
            target = dst.view(-1, dst.shape[-1])
            yield Piece(
                torch.full((1, 1), row.constant, dtype=dst.dtype, device=dst.device).expand_as(
                    target
                ),
                target,
            )
            return
        for axis, this in enumerate(self.plan.axis_maps(row)):
            if this.centred and order == 0:
                src = src - src.mean(axis, keepdim=True)
        keys = self._split(row)
        rows, cols = (self._side(key, order) for key in keys)
        source = src.reshape(rows.index_map.n_source, cols.index_map.n_source)
        target = dst.view(rows.index_map.n_target, cols.index_map.n_target)
        fill = _Fill(source, rows, cols, order, reference.arithmetic(dst.dtype))
        std: Tensor | None = None
        for r in self._spans(keys[0], order, fill):
            for c in self._spans(keys[1], order, fill):
                into = target[r.target : r.target + r.n, c.target : c.target + c.n]
                value, scaled = fill.of(r, c)
                noise = None
                if (
                    r.factors is not None
                    and c.factors is not None
                    and r.ids is not None
                    and c.ids is not None
                    and fill.free(r, c)
                ):
                    std = fill.rms() if std is None else std
                    noise = Noise(
                        std,
                        (self.plan.seed, _tensor_id(row.name)),
                        r.factors,
                        c.factors,
                        r.ids,
                        c.ids,
                    )
                whole = r.source != PAD and c.source != PAD
                yield Piece(
                    value,
                    into,
                    rows=r.index if whole else None,
                    cols=c.index if whole else None,
                    scale=r.scale * c.scale if scaled else 1.0,
                    row_scale=r.scales if scaled else None,
                    col_scale=c.scales if scaled else None,
                    noise=noise,
                )

    def _split(self, row: TensorRow) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Which axes are rows and which columns: at most the last grown axis, and what follows it, are columns."""
        grown = [i for i, axis in enumerate(self.plan.axis_maps(row)) if not axis.is_identity]
        at = len(row.axes) - 1
        if len(grown) == 1 and grown[0] < at:
            at = grown[0] + 1
        elif grown:
            at = grown[-1]
        return row.axes[:at], row.axes[at:]

    def _side(self, keys: tuple[str, ...], order: int) -> _Side:
        if (keys, order) in self.sides:
            return self.sides[keys, order]
        axes = [self.plan.axes[key] for key in keys]
        index_map, scale, factors = IndexMap.identity(1), Vector.full(1.0, 1), Vector.full(1.0, 1)
        ids = [0]
        pad: Pad = "zero"
        noisy = False
        for axis in axes:
            n = axis.index_map.n_target
            index_map = index_map.product(axis.index_map)
            scale = scale.outer(
                axis.weight_scale if order == 0 else axis.grad_scale.map(lambda a: a**order)
            )
            own_factors, own_ids = _noise(axis)
            factors, ids = factors.outer(own_factors), [i * n + j for i in ids for j in own_ids]
            pad = pad if axis.index_map.is_identity else axis.pad
            noisy = noisy or (axis.pad == "normal" and not axis.index_map.is_identity)
        copies = [0.0] * index_map.n_source
        for j, s in zip(index_map.indices, scale.expanded(), strict=True):
            if j != PAD:
                copies[j] += s
        side = self.sides[keys, order] = _Side(
            index_map, scale, pad, factors, tuple(ids), noisy, tuple(copies)
        )
        return side

    def _spans(self, keys: tuple[str, ...], order: int, fill: "_Fill") -> list[Span]:
        """Cut a side where its runs or its scale change; gather by index where that is too often."""
        device, dtype = fill.source.device, fill.dtype
        if (keys, order, device, dtype) not in self.cuts:
            side = self._side(keys, order)
            spans = _cut(side)
            if len(spans) > N_SPANS:
                spans = _gather(side, spans, device, dtype)
            if order == 0:
                spans = [_with_noise(side, span, device) for span in spans]
            self.cuts[keys, order, device, dtype] = spans
        return self.cuts[keys, order, device, dtype]


def _noise(axis: AxisMap) -> tuple[Vector, list[int]]:
    """Noise factor of each target coordinate of an axis, and the counter it is drawn from."""
    index_map = axis.index_map
    own = list(range(index_map.n_target))
    if axis.pad != "normal" or index_map.is_identity:
        return Vector.full(1.0, index_map.n_target), own
    signs, partners = twins(index_map)
    values = [
        1.0 if j == PAD else axis.noise * sign
        for j, sign in zip(index_map.indices, signs, strict=True)
    ]
    return Vector.of(values), list(partners)


def _cut(side: _Side) -> list[Span]:
    spans, pieces = list[Span](), iter(side.scale.pieces)
    value, left = 1.0, 0
    for target, n, source in side.index_map.runs:
        done = 0
        while done < n:
            if left == 0:
                value, left = next(pieces)
            step = min(left, n - done)
            spans.append(Span(target + done, step, PAD if source == PAD else source + done, value))
            done, left = done + step, left - step
    return spans


def _gather(side: _Side, cuts: list[Span], device: torch.device, dtype: torch.dtype) -> list[Span]:
    """Join neighbouring spans that copy, and those that do not."""
    joined: list[Span] = []
    for cut in cuts:
        last = joined[-1] if joined else None
        if last is not None and (last.source == PAD) == (cut.source == PAD):
            joined[-1] = replace(last, n=last.n + cut.n)
        else:
            joined.append(replace(cut, source=min(cut.source, 0), scale=1.0))
    indices = torch.tensor(side.index_map.indices, dtype=torch.int32)
    scales = torch.tensor(side.scale.expanded(), dtype=dtype)
    return [
        replace(
            s,
            index=None if s.source == PAD else indices[part].to(device),
            scales=scales[part].to(device),
        )
        for s in joined
        for part in [slice(s.target, s.target + s.n)]
    ]


def _with_noise(side: _Side, span: Span, device: torch.device) -> Span:
    factors = side.factors.expanded()[span.target : span.target + span.n]
    if not any(factors):
        return span
    ids = torch.tensor(
        side.ids[span.target : span.target + span.n], dtype=torch.int32, device=device
    )
    return replace(span, factors=torch.tensor(factors, dtype=torch.float32, device=device), ids=ids)


def _tensor_id(name: str) -> int:
    return (
        int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "little") >> 1
    )  # 31 bits: non-negative as int32


class _Fill:
    """What a piece is read from: the source where both spans copy, else what stands for it, broadcast."""

    def __init__(
        self, source: Tensor, rows: _Side, cols: _Side, order: int, dtype: torch.dtype
    ) -> None:
        self.source, self.rows, self.cols, self.order, self.dtype = source, rows, cols, order, dtype

    def rms(self) -> Tensor:
        """Root mean square of the source: what noise is measured in."""
        norm: Tensor = torch.norm(self.source, dtype=self.dtype)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return norm / max(1, self.source.numel()) ** 0.5  # pyright: ignore[reportUnknownVariableType]

    def pads(self, r: Span, c: Span) -> list[Pad]:
        return [side.pad for side, span in ((self.rows, r), (self.cols, c)) if span.source == PAD]

    def free(self, r: Span, c: Span) -> bool:
        """True where noise may be: weights that copy, or that read a pad, but not those that write one."""
        return (
            self.order == 0
            and (self.rows.noisy or self.cols.noisy)
            and all(pad == "normal" for pad in self.pads(r, c))
        )

    def of(self, r: Span, c: Span) -> tuple[Tensor, bool]:
        """The tensor to read, and whether the scales apply to it."""
        pads = self.pads(r, c)
        if not pads:
            return _part(self.source, r, c), True
        if self.order == 2:
            return self._mean_of_law().expand(r.n, c.n), False
        if self.order or any(pad != "mean" for pad in pads):
            return self.source.new_zeros(1, 1).expand(r.n, c.n), True
        axes = [axis for axis, span in enumerate((r, c)) if span.source == PAD]
        mean = self.source.mean(axes, keepdim=True, dtype=self.dtype)
        rows = mean if r.source == PAD else _gathered(mean, 0, r)
        return (rows if c.source == PAD else _gathered(rows, 1, c)).expand(r.n, c.n), True

    def _mean_of_law(self) -> Tensor:
        """Mean over the elements that copy, each scaled by the law: what an element without an ancestor starts from."""
        rows, cols = (
            torch.tensor(side.copies, dtype=self.dtype, device=self.source.device)
            for side in (self.rows, self.cols)
        )
        n = self.rows.n_copied * self.cols.n_copied
        return (rows @ (self.source.to(self.dtype) @ cols) / max(1, n)).view(1, 1)


def _part(tensor: Tensor, r: Span, c: Span) -> Tensor:
    rows = tensor if r.index is not None else tensor[r.source : r.source + r.n]
    return rows if c.index is not None else rows[:, c.source : c.source + c.n]


def _gathered(tensor: Tensor, axis: int, span: Span) -> Tensor:
    return (
        tensor.narrow(axis, span.source, span.n)
        if span.index is None
        else tensor.index_select(axis, span.index)
    )
