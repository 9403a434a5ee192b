"""Forwards with moved weights whose coordinates are permuted or copied, and that no memory holds: products map the activations instead.

``W'[i, j] = (W + MOVED * u v^T)[p[i], q[j]] / c[i]``, so that ``(x W')[j] = y[q[j]]`` with ``y = z W + MOVED * (z u) v^T`` and
``z[k] = sum of x[i] / c[i] over p[i] = k``, where ``c`` counts the copies of a coordinate that a reader reads.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from growkern.model.tracing.forward import Inputs, distance, evaluated, main_output, replaced, tried
from growkern.model.tracing.terms import Dim, coordinates, find
from growkern.model.tracing.trial import Tensors, grown_copy, mapped

MOVED = 0.05  # standard deviation of what is added to the weights
# elements of a weight that are converted to another dtype at once: they stay in the cache
CHUNK = 1 << 19


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight.

    Attributes:
        source: The tensor of the source.
        vectors: Factor of what is added, for each axis of the source.
        index: Source coordinate of every coordinate, for each axis of the source; None where all stay in place.
        copies: Number of copies of every coordinate, for each axis of the source that reads several; None for others.
        order: Axis of the source that each axis is.
        dtype: Dtype of the weight.
    """

    source: Tensor
    vectors: Sequence[Tensor]
    index: Sequence[Tensor | None]
    copies: Sequence[Tensor | None]
    order: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """Return the weight in memory of its own."""
        added = torch.tensor(MOVED, device=self.source.device, dtype=self.dtype)
        for vector in self.vectors:
            added = added[..., None] * vector
        value = added.add_(self.source)
        for axis, (index, copies) in enumerate(zip(self.index, self.copies, strict=True)):
            value = value if index is None else value.index_select(axis, index)
            if copies is not None:
                value = value / copies.view([-1 if i == axis else 1 for i in range(value.dim())])
        return value.permute(self.order)

    def times(self, x: Tensor) -> Tensor:
        """Return the matrix product of activations and the weight."""
        a, b = self.order
        before, after = self.index[a], self.index[b]
        if (copies := self.copies[a]) is not None:
            x = x / copies
        if before is not None:
            x = x.new_zeros(x.shape[0], self.source.shape[a]).index_add_(1, before, x)
        moved = (MOVED * (x @ self.vectors[a]))[:, None] * self.vectors[b]
        y = self._times_source(x, moved)
        y = y if after is None else y.index_select(1, after)
        return y if (copies := self.copies[b]) is None else y / copies

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


LOW = torch.float16, torch.bfloat16


def is_low(model: nn.Module) -> bool:
    """True for a model of half precision, at least in part."""
    return any(p.dtype in LOW for p in model.parameters())


class _Axes:
    """Makes weights; the indices of a dimension are made once.

    Args:
        maps: Atom -> source coordinate of every coordinate.
    """

    def __init__(self, maps: Mapping[Dim, Sequence[int]]) -> None:
        self.maps, self.known = maps, dict[Dim, tuple[Tensor | None, Tensor | None]]()

    def weight(self, t: Tensor, first: str, own: Tensors, name: str, dtype: torch.dtype) -> Weight:
        """Return the weight in place of a tensor, of which ``first`` is the first name."""
        draw = torch.Generator().manual_seed(_seed(first))
        vectors = [torch.randn(n, generator=draw).to(t.device, dtype) for n in t.shape if t.is_floating_point()]  # fmt: skip
        axes = [self._axis(find(dim), t.device) for dim in own.dims[first]]
        reads = [use.role == "reader" for use in own.axes[name]] or [False] * t.dim()
        copies = [count if read else None for (_, count), read in zip(axes, reads, strict=True)]
        return Weight(t, vectors, [index for index, _ in axes], copies, tuple(range(t.dim())), dtype)  # fmt: skip

    def _axis(self, dim: Dim, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return the source coordinates of a dimension, and how many copies each has; None for those that do not change anything."""
        if dim not in self.known:
            index = coordinates(dim, self.maps)
            count = Counter(index)
            same, once = index == [*range(dim.size)], len(count) == len(index)
            self.known[dim] = (
                None if same else torch.tensor(index, device=device),
                None if once else torch.tensor([count[j] for j in index], device=device),
            )
        return self.known[dim]


def run_mapped(
    model: nn.Module,
    inputs: Inputs,
    own: Tensors,
    maps: Mapping[Dim, Sequence[int]],
    *,
    held: bool = False,
    prepare: Callable[[nn.Module], nn.Module | None] | None = None,
    mode: AbstractContextManager[object] | None = None,
) -> Tensor | Exception | None:
    """Return the main output of a copy with moved and mapped weights, or the exception that its forward raised.

    Args:
        model: The model; it stays as it is. Half precision is computed in float32.
        inputs: Its inputs.
        own: Its tensors.
        maps: Atom -> source coordinate of every coordinate.
        held: True to hold the weights in memory; False to compute with the source's.
        prepare: Function from the copy to the model that runs; None to run the copy.
        mode: Context of its forward.
    """
    low = is_low(model)
    weights, axes = list[tuple[Tensor, Weight]](), _Axes(maps)

    def stand_in(name: str, t: Tensor, shape: Sequence[int]) -> Tensor:
        dtype = torch.float32 if low and t.is_floating_point() else t.dtype
        weight = axes.weight(t, own.ties.get(name, name), own, name, dtype)
        if held or not t.is_floating_point():
            return weight.tensor()
        # what reads it in other ways than by operations is NaN
        own_memory = t.new_full((), float("nan"), dtype=dtype)
        weights.append((own_memory, weight))
        return own_memory.expand(tuple(shape))

    changed = grown_copy(model, own, maps, stand_in)
    changed = prepare(changed) if prepare else changed
    if changed is None:
        return None
    if low:
        changed, inputs = changed.float(), tree_map_only(Tensor, _float, inputs)
    with evaluated(changed), MappedWeights(changed, weights), mode or nullcontext():
        output = tried(changed, inputs)
    return output if isinstance(output, Exception) else main_output(output)


def mapped_distance(before: object, after: object, dims: Sequence[Dim], maps: Mapping[Dim, Sequence[int]]) -> float:  # fmt: skip
    """Return how far the output of mapped weights is from that of the source's, mapped; infinite where one is missing."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return float("inf")
    wanted = mapped(before, dims, maps)
    return distance(after, wanted) if after.shape == wanted.shape else float("inf")


def _float(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() else t


def _seed(name: str) -> int:
    """Return a seed for a tensor, equal on every machine."""
    return sum((i + 1) * ord(c) for i, c in enumerate(name)) * 1009 % 2**31


class MappedWeights(TorchDispatchMode):
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
        if (
            weight
            and op == "embedding"
            and weight.order == (0, 1)
            and not any(c is not None for c in weight.copies)
        ):
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
