"""Cut target tensors into pieces with one start map per axis, and name the matrices that learn the maps.

An axis of several segments (fused q, k and v) gives a piece per segment. On an axis whose last component is head_dim, heads are learned
as wholes, ``M = H (x) I_head_dim``: RoPE's pairs stay pairs, and ``H`` has head_dim ** 2 times fewer numbers. Vocabulary, positions and an
axis whose head_dim grows are not learned.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Literal

from torch import Tensor

from growkern.model.size_values import Component, space_of, space_size
from growkern.model.spec import AxisUse, ModelSpec, Segment, on_residual
from growkern.planning.growth_plan import AxisMap, GrowthPlan, TensorRow
from growkern.planning.index_map import PAD

Tie = Literal["use", "published", "shared"]
NOT_LEARNED = "vocab", "positions"  # spaces without learned matrices, as published
Span = tuple[int, int]  # first coordinate, number of coordinates


@dataclass(frozen=True, eq=False)
class AxisStart:
    """The map of one segment of an axis at the start of learning, and the matrix that learns the map.

    Attributes:
        use: Use of the segment, as an axis of its own.
        source: Span of the segment in the source.
        target: Span of the segment in the target.
        indices: Source coordinate of each target coordinate, both counted from the start of the segment, or ``PAD``.
        scales: The plan's weight scale of each target coordinate.
        whole: Coordinates of a head, which the matrix moves as a whole; 1 on axes without head_dim.
        matrix: Name of the matrix; None if the segment is not learned.
    """

    use: AxisUse
    source: Span
    target: Span
    indices: tuple[int, ...]
    scales: tuple[float, ...]
    whole: int = 1
    matrix: str | None = None

    @property
    def keeps_heads(self) -> bool:
        """True when the matrix would start as the identity."""
        n, m = self.shape
        return n == m and self.entries == tuple((i, i) for i in range(n))

    @property
    def kind(self) -> str:
        """Role and spaces of the segment, without block indices and names of streams, and its sizes."""
        return f"{kind_of(self.use)} {self.source[1]} -> {self.target[1]}"

    @cached_property
    def is_identity(self) -> bool:
        """True when the start map copies every coordinate to itself."""
        same = self.indices == tuple(range(self.source[1]))
        return same and all(scale == 1 for scale in self.scales)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix: target heads by source heads; on axes without head_dim, every coordinate is a head."""
        return self.target[1] // self.whole, self.source[1] // self.whole

    @cached_property
    def start_factors(self) -> tuple[float, ...]:
        """Factor on each target coordinate of the start map: its scale; 0 for a pad."""
        return tuple(0.0 if j == PAD else s for j, s in zip(self.indices, self.scales, strict=True))

    @cached_property
    def factors(self) -> tuple[float, ...]:
        """Factor on each target coordinate of the matrix's product: its scale; 1 where the scale is 0, so that the coordinate learns."""
        return tuple(scale or 1.0 for scale in self.scales)

    @cached_property
    def entries(self) -> tuple[tuple[int, int], ...]:
        """Row and column of every 1 of the matrix at the start of learning; all other entries are 0."""
        n = self.whole
        return tuple(
            (i // n, self.indices[i] // n)
            for i in range(0, len(self.indices), n)
            if any(self.start_factors[i : i + n])
        )


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a target tensor: the row of the tensor in the plan, and the start of each axis."""

    row: TensorRow
    axes: tuple[AxisStart, ...]

    def of(self, source: Tensor) -> Tensor:
        """Return the part of a source tensor that the piece reads."""
        for dim, axis in enumerate(self.axes):
            source = source.narrow(dim, *axis.source)
        return source

    def into(self, target: Tensor) -> Tensor:
        """Return the part of a target tensor that the piece writes."""
        for dim, axis in enumerate(self.axes):
            target = target.narrow(dim, *axis.target)
        return target


class Cutter:
    """Cuts target tensors into pieces; axes of the same use in the same block share their starts."""

    def __init__(self, spec: ModelSpec, plan: GrowthPlan, tie: Tie) -> None:
        self.spec, self.plan = spec, plan
        self.tie: Tie = tie
        self._starts: dict[tuple[AxisUse, str], list[AxisStart]] = {}

    def pieces(self, row: TensorRow) -> list[Piece]:
        """Return the pieces of a target tensor."""
        place = self.spec.block_of(row.name)
        block = "" if place is None else f"{place[0].path}.{place[1]}"
        axes = [
            self._of(use, self.plan.axes[key], block)
            for use, key in zip(self.spec.tensors[row.source], row.axes, strict=True)
        ]
        return [Piece(row, starts) for starts in product(*axes)]

    def _of(self, use: AxisUse, axis: AxisMap, block: str) -> list[AxisStart]:
        """Return the start of every segment of an axis."""
        if (use, block) not in self._starts:
            self._starts[use, block] = [*self._cut(use, axis, block)]
        return self._starts[use, block]

    def _cut(self, use: AxisUse, axis: AxisMap, block: str) -> Iterator[AxisStart]:
        before, after = self.plan.source_sizes, self.plan.target_sizes
        indices, scales = axis.index_map.indices, axis.weight_scale.expanded()
        source = target = 0
        for segment in use.segments:
            n, m = _size(segment, before), _size(segment, after)
            own = [PAD if j == PAD else j - source for j in indices[target : target + m]]
            start = AxisStart(
                replace(use, segments=(segment,)), (source, n), (target, m), tuple(own), tuple(scales[target : target + m])
            )  # fmt: skip
            fixed = any(space_of(stream) in NOT_LEARNED for stream in start.use.streams)
            if _is_head_dim(segment[-1]):
                start = replace(start, whole=_size(segment[-1:], before))
                fixed = fixed or start.whole != _size(segment[-1:], after)
            if not fixed and not start.keeps_heads:
                start = replace(start, matrix=_matrix(start.use, self.tie, block))
            yield start
            source, target = source + n, target + m


def _size(segment: Segment, sizes: Mapping[str, int]) -> int:
    return prod(space_size(component, sizes) for component in segment)


def _is_head_dim(component: Component) -> bool:
    """True for head_dim, and for the head_dim of query, key and value of one head, one after the other."""
    parts = component if isinstance(component, tuple) else (component,)
    return all(isinstance(part, str) and part.startswith("head_dim") for part in parts)


def _matrix(use: AxisUse, tie: Tie, block: str) -> str:
    """Return the name of the matrix of a segment; segments with the same name share one matrix."""
    if tie == "shared":
        return kind_of(use)
    local = f"{block} " if any("." in space_of(stream) for stream in use.streams) else ""
    if tie == "use":
        return f"{local}{use}"
    streams = (space_of(s) if on_residual(s) else s for s in map(str, use.segments[0]))
    return local + " x ".join(streams)


def kind_of(use: AxisUse) -> str:
    """Return the role and the spaces of an axis, without block indices and names of streams."""
    spaces = [space_of(stream).partition(".")[0] for stream in use.streams]
    return f"{use.role} {' x '.join(spaces)}"
