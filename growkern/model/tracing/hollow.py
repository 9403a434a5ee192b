"""Weights and activations that have shapes and no values, for forwards of large models that are run for the shapes of their operations.

What depends on no weight, such as a rotary table or a mask, has values. An operation that asks for a value that is not known raises.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growkern.model.tracing.forward import in_operation, replaced, tensors_of

LARGE = 20_000_000  # parameters above which weights have no values in trials
FILLED = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}  # fmt: skip
# operation that chooses coordinates, as a router of experts does -> its axis
CHOICES: Mapping[str, Callable[[Sequence[Any], Mapping[str, Any]], int]] = {
    "topk": lambda args, kwargs: args[2] if len(args) > 2 else kwargs.get("dim", -1),
    "argmax": lambda args, kwargs: args[1] if len(args) > 1 else kwargs.get("dim", -1),
}
META = torch.device("meta")
REMEMBERED = 4096  # operations
# operation and shapes of its arguments -> its results on the meta device, the last used last
_SHAPES = OrderedDict[Hashable, Any]()


class Hollow(Tensor):
    """A tensor with a device, a shape and strides, and no values.

    Args:
        meta: A tensor on the meta device.
        device: The device of the tensor that the hollow tensor stands for.

    Attributes:
        meta: The tensor on the meta device.
        origin: Where the tensor is from, in a program that notes it.
    """

    meta: Tensor
    origin: object = None

    @staticmethod
    def __new__(cls: type[Any], meta: Tensor, device: torch.device) -> Any:
        """Make the tensor."""
        own: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportPrivateUsage]
            cls, meta.shape, strides=meta.stride(), storage_offset=int(meta.storage_offset()), dtype=meta.dtype, layout=meta.layout,
            device=device,
        )  # fmt: skip
        own.meta = meta
        return own

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation outside of a trace."""
        return Written().run(func, args, kwargs or {})


def is_large(model: nn.Module) -> bool:
    """True for a model whose copies and forwards cost more than they tell."""
    return sum(p.numel() for p in model.parameters()) > LARGE


def hollow(name: str, t: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor without values like a tensor of the model, in another shape."""
    return Hollow(torch.empty(tuple(shape), dtype=t.dtype, device=META), t.device)


def zeros(name: str, t: Tensor, shape: Sequence[int]) -> Tensor:
    """Return zeros that take no memory."""
    return t.new_zeros(()).expand(tuple(shape))


def hollow_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters and persistent floating-point buffers have no values; ties are kept."""
    memo: dict[int, Any] = {}
    for t in tensors_of(model):
        own = Hollow(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META), t.device)
        memo[id(t)] = nn.Parameter(own, t.requires_grad) if isinstance(t, nn.Parameter) else own
    return copy.deepcopy(model, memo)


class Written:
    """Runs operations; a tensor into which values are written that are not known has no known values from then on."""

    def __init__(self) -> None:
        self.storages: dict[int, Tensor] = {}

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one operation: by shapes only, if it takes a tensor without values."""
        given = in_operation((args, kwargs))
        first = next((t for t in given if self.unknown(t)), None)
        out = func(*args, **kwargs) if first is None else _by_shapes(func, args, kwargs, first.device)  # fmt: skip
        if first is None or not func._schema.is_mutable:
            return out
        places = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]  # fmt: skip
        written = [args[i] if i < len(args) else kwargs.get(name) for i, name in places]
        real = [t for t in in_operation(written) if not isinstance(t, Hollow)]
        self.storages |= {t.untyped_storage().data_ptr(): t for t in real}
        return written[0] if isinstance(out, Tensor) else out

    def unknown(self, t: Tensor) -> bool:
        """True for a tensor whose values are not known."""
        if isinstance(t, Hollow):
            return True
        return bool(self.storages) and t.untyped_storage().data_ptr() in self.storages


def _by_shapes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Any:  # fmt: skip
    """Run an operation on tensors without values."""
    op = func.overloadpacket.__name__
    if op in FILLED or op == "_fused_sdp_choice":  # the values of the arguments do not matter
        return func(*replaced(args, _uninitialized), **kwargs)
    if op == "_grouped_mm":  # its own computation of shapes takes bfloat16 only
        return _grouped_mm(*args)
    if kwargs.get("device") is not None:
        device, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": META}
    key = None if func._schema.is_mutable else (func, _key((args, kwargs)))
    out = _SHAPES.pop(key, None)
    if out is None:
        out = func(*replaced(args, _meta), **replaced(kwargs, _meta))
    if key is not None:
        _SHAPES[key] = out
        if len(_SHAPES) > REMEMBERED:
            _SHAPES.popitem(last=False)
    if op in CHOICES:  # all coordinates are chosen in turn
        numbers, n = in_operation(out)[-1], args[0].shape[CHOICES[op](args, kwargs)]
        chosen = torch.arange(numbers.numel(), device=device).view(numbers.shape) % n
        return (Hollow(out[0], device), chosen) if op == "topk" else chosen
    return replaced(out, lambda t: Hollow(t.detach(), device))


def _key(tree: Any) -> Hashable:
    """Return what the shapes of the results of an operation follow from: its arguments, without the values of tensors."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.storage_offset(), tree.dtype
    if isinstance(tree, dict):
        return tuple((name, _key(x)) for name, x in tree.items())  # pyright: ignore
    return tuple(map(_key, tree)) if isinstance(tree, list | tuple) else (type(tree), tree)  # pyright: ignore


def _meta(t: Tensor) -> Tensor:
    if isinstance(t, Hollow):
        return t.meta
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META)


def _uninitialized(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def _grouped_mm(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return hollow("", a, (*a.shape[:-1], b.shape[-1]))
