"""Learned operators of a growth: matrices over axes, coefficients over layers, and (Mango) coefficients over tensors.

    grown = closed form + (operators applied to the source - operators at their start applied to the source)

At the start, the matrices are the plan's index maps, and the coefficients choose the plan's source layers, so the second term is exactly 0:
learning starts at the closed form bit for bit. What the closed form has beside copies (noise, random rows, means, zeros of identity
blocks) is in the first term, a fixed addend. The operators are stored as changes from their start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from growkern.learning.pieces import AxisStart, Piece, Tie
from growkern.support.dtypes import arithmetic

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layers:
    """Learned coefficients over source blocks.

    Attributes:
        name: Name of the coefficients.
        sources: Index of a coefficient -> name of the tensor that the coefficient multiplies.
    """

    name: str
    sources: Mapping[int, str]


@dataclass(eq=False)
class Operators:
    """The learned operators of one growth; ``change`` applies them to source tensors.

    Attributes:
        tie: Which axes share a matrix; see ``growkern.learn``.
        parameters: Name -> change from the start, a leaf tensor: matrices (rows, columns), coefficients over layers (source blocks,),
            coefficients over tensors (tensors, tensors).
        pieces: Target tensor -> its pieces, for tensors that the operators change.
        layers: Target tensor -> its coefficients over layers, where layers are learned.
        mixes: Piece -> name of its coefficients over tensors, the index of the piece, and all pieces that are mixed.
        n_frozen: Number of target tensors that stay in the closed form because their source does not require gradients.
    """

    tie: Tie = "use"
    parameters: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    pieces: dict[str, list[Piece]] = field(default_factory=dict[str, list[Piece]])
    layers: dict[str, Layers] = field(default_factory=dict[str, Layers])
    mixes: dict[Piece, tuple[str, int, list[Piece]]] = field(
        default_factory=dict[Piece, tuple[str, int, list[Piece]]]
    )
    n_frozen: int = 0
    _on_device: dict[tuple[object, ...], Tensor] = field(
        default_factory=dict[tuple[object, ...], Tensor]
    )

    @property
    def n_numbers(self) -> int:
        """Number of learned numbers."""
        return sum(p.numel() for p in self.parameters.values())

    def change(self, name: str, sources: Values) -> Tensor:
        """Return what the operators add to the closed form of a target tensor, differentiable in ``parameters``.

        Args:
            name: Name of the target tensor, one of ``pieces``.
            sources: Source tensors by name.

        Returns:
            A tensor of the target's shape, in float64 for a float64 source and in float32 for others.
        """
        pieces = self.pieces[name]
        with torch.autocast(sources[pieces[0].row.source].device.type, enabled=False):
            changes = [self._piece(piece, sources) for piece in pieces]
        if len(pieces) == 1:
            return changes[0]
        shape = [
            max(sum(piece.axes[dim].target) for piece in pieces) for dim in range(changes[0].dim())
        ]
        whole = changes[0].new_zeros(shape)
        for piece, change in zip(pieces, changes, strict=True):
            piece.into(whole).copy_(change)
        return whole

    def _piece(self, piece: Piece, sources: Values) -> Tensor:
        start, change = self._source(piece, sources)
        if (mix := self.mixes.get(piece)) is not None:
            name, index, members = mix
            for weight, member in zip(self._like(name, start)[index], members, strict=True):
                value, moved = self._source(member, sources)
                change = _sum(change, weight * _sum(value, moved))
        for dim, axis in enumerate(piece.axes):
            learned = self._learned(axis, dim, _sum(start, change))
            change = _sum(None if change is None else self._started(axis, dim, change), learned)
            start = self._started(axis, dim, start)
        change = torch.zeros_like(start) if change is None else change
        return change * piece.row.factor

    def _source(self, piece: Piece, sources: Values) -> tuple[Tensor, Tensor | None]:
        """Return the part of the source that a piece reads at the start, and what learned coefficients over layers add to it."""
        tensor = sources[piece.row.source]
        dtype, layers = arithmetic(tensor.dtype), self.layers.get(piece.row.name)
        change: Tensor | None = None
        if layers is not None:
            weights = self._like(layers.name, tensor)
            for k, name in layers.sources.items():
                change = _sum(change, weights[k] * piece.of(sources[name]).to(dtype))
        return piece.of(tensor).to(dtype), change

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter on the device of a tensor, in the dtype of the arithmetic."""
        return self.parameters[name].to(tensor.device, arithmetic(tensor.dtype))

    def _started(self, axis: AxisStart, dim: int, x: Tensor) -> Tensor:
        """Apply the start map of an axis."""
        if axis.is_identity:
            return x
        grown = x.index_select(dim, self._kept(axis, "indices", axis.indices, x, torch.int64))
        return grown * _along(self._kept(axis, "start", axis.start_factors, x), dim, x)

    def _learned(self, axis: AxisStart, dim: int, x: Tensor) -> Tensor | None:
        """Apply the change of an axis's matrix; None for an axis without one."""
        if axis.matrix is None:
            return None
        rest = x.movedim(dim, 0)
        matrix = self._like(axis.matrix, x)
        grown = matrix @ rest.reshape(matrix.shape[1], -1)
        grown = grown.reshape(-1, *rest.shape[1:]).movedim(0, dim)
        return grown * _along(self._kept(axis, "factors", axis.factors, x), dim, x)

    def _kept(
        self, axis: AxisStart, what: str, values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """Return numbers of an axis as a tensor on the device of another tensor; they are uploaded once."""
        key = axis, what, like.device, dtype or like.dtype
        if key not in self._on_device:
            made = torch.tensor(values, dtype=key[-1], device=like.device)
            self._on_device[key] = made.clamp_(min=0) if dtype == torch.int64 else made
        return self._on_device[key]


def _along(vector: Tensor, dim: int, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - dim - 1))


@overload
def _sum(x: Tensor, y: Tensor | None) -> Tensor: ...
@overload
def _sum(x: Tensor | None, y: Tensor) -> Tensor: ...
@overload
def _sum(x: None, y: None) -> None: ...
@overload
def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None: ...
def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """Add two tensors; None is 0."""
    if x is None or y is None:
        return y if x is None else x
    return x + y
