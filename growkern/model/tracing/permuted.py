"""Forwards with moved and permuted weights that no memory holds: products permute the activations around a source weight instead.

``W'[i, j] = (W + MOVED * u v^T)[p[i], q[j]]``, so that ``(x W')[j] = y[q[j]]`` with ``y = z W + MOVED * (z u) v^T`` and ``z[p[i]] = x[i]``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from growkern.model.tracing.forward import replaced

MOVED = 0.05  # standard deviation of what is added to the weights
CHUNK = (
    1 << 19
)  # elements of a weight that are converted to another dtype at once: they stay in the cache


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight.

    Attributes:
        source: The tensor of the source.
        vectors: Factor of what is added, for each axis of the source.
        index: Source coordinate of every coordinate, for each axis of the source; None where all stay in place.
        order: Axis of the source that each axis is.
        dtype: Dtype of the weight.
    """

    source: Tensor
    vectors: Sequence[Tensor]
    index: Sequence[Tensor | None]
    order: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """Return the weight in memory of its own."""
        added = torch.tensor(MOVED, device=self.source.device, dtype=self.dtype)
        for vector in self.vectors:
            added = added[..., None] * vector
        value = added.add_(self.source)
        for axis, index in enumerate(self.index):
            value = value if index is None else value.index_select(axis, index)
        return value.permute(self.order)

    def times(self, x: Tensor) -> Tensor:
        """Return the matrix product of activations and the weight."""
        a, b = self.order
        before, after = self.index[a], self.index[b]
        if before is not None:
            x = torch.empty_like(x).index_copy_(1, before, x)
        moved = (MOVED * (x @ self.vectors[a]))[:, None] * self.vectors[b]
        y = self._times_source(x, moved)
        return y if after is None else y.index_select(1, after)

    def _times_source(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the product of activations and the source's weight."""
        turned = self.order == (1, 0)
        if self.source.dtype == self.dtype:
            return y.addmm_(x, self.source.t() if turned else self.source)
        n = max(1, CHUNK // max(1, self.source.shape[1]))
        for i in range(0, self.source.shape[0], n):
            rows = self.source[i : i + n].to(self.dtype)
            if turned:
                y[:, i : i + n].addmm_(x, rows.t())
            else:
                y.addmm_(x[:, i : i + n], rows)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the weight by their numbers."""
        first, second = self.index
        ids = ids if first is None else first[ids]
        moved = (MOVED * self.vectors[0][ids])[..., None] * self.vectors[1]
        value = moved.add_(self.source[ids])
        return value if second is None else value.index_select(-1, second)


class PermutedWeights(TorchDispatchMode):
    """Computes with weights that take no memory.

    Args:
        model: A model with stand-ins for weights, which are views of tensors with one element.
        weights: These tensors, and the weights.
    """

    def __init__(self, model: nn.Module, weights: Sequence[tuple[Tensor, Weight]]) -> None:
        super().__init__()
        self.alive = [t for t, _ in weights]
        own = {t.untyped_storage().data_ptr(): weight for t, weight in weights}
        places = ((t, t.untyped_storage().data_ptr()) for t in (*model.parameters(), *model.buffers()))  # fmt: skip
        self.weights = {id(t): own[place] for t, place in places if place in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        op: str = func.overloadpacket.__name__
        kwargs = dict[str, Any](kwargs or {})
        weight = self.weights.get(id(args[0])) if args else None
        if weight and op in ORDERS:
            out = func(*args, **kwargs)
            self.alive.append(out)
            self.weights[id(out)] = replace(weight, order=ORDERS[op](weight.order, args[1:]))
            return out
        if weight and op == "embedding" and weight.order == (0, 1):
            return weight.rows(args[1])
        k = {"mm": 1, "addmm": 2}.get(op)
        if k and (weight := self.weights.get(id(args[k]))) and id(args[k - 1]) not in self.weights:
            product = weight.times(args[k - 1])
            if op == "mm":
                return product
            beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
            return (product if alpha == 1 else alpha * product).add_(self._value(args[0]), alpha=beta)  # fmt: skip
        args, kwargs = replaced(args, self._value), replaced(kwargs, self._value)
        return func(*args, **kwargs)

    def _value(self, t: Tensor) -> Tensor:
        weight = self.weights.get(id(t))
        return t if weight is None else weight.tensor()


def _transposed(order: Sequence[int], args: Sequence[int]) -> tuple[int, ...]:
    axes = [*order]
    i, j = args
    axes[i], axes[j] = axes[j], axes[i]
    return tuple(axes)


def _permuted(order: Sequence[int], args: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(order[i] for i in args[0])


def _turned(order: Sequence[int], args: Sequence[int]) -> tuple[int, ...]:
    return tuple(reversed(order))


def _kept(order: Sequence[int], args: Sequence[int]) -> tuple[int, ...]:
    return tuple(order)


Order = Callable[[Sequence[int], Sequence[Any]], tuple[int, ...]]
ORDERS: Mapping[str, Order] = {  # view -> its axes
    "t": _turned,
    "transpose": _transposed,
    "permute": _permuted,
    "detach": _kept,
    "alias": _kept,
}
