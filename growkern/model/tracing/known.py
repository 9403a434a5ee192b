"""What a description follows from: the classes of a model's modules, their attributes and the shapes of their tensors, but no weights."""

import functools
import hashlib
import sys
from collections.abc import Hashable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from growkern.model.tracing.forward import tensors_of
from growkern.model.tracing.hollow import is_large
from growkern.support.names import named_buffers, named_modules, named_parameters

LARGEST = 1 << 22  # elements of a constant that are read
APART = {"_parameters", "_buffers", "_modules"}  # attributes of modules that are read in other ways
NAMES = {
    "_name_or_path",
    "_commit_hash",
    "name_or_path",
}  # attributes of configs that say where weights are from


class _Unlike(Exception):
    """Two values cannot be compared, other than by identity."""


def fingerprint(model: nn.Module) -> tuple[tuple[Hashable, ...], bool]:
    """Return what the description of a model follows from, and whether an equal fingerprint of another model means the same.

    Dtypes, devices and weights are not in it. A function that a module defines for itself, such as a closure, is like no other.
    """
    paths = {id(module): path for path, module in named_modules(model)}
    weights = {id(t) for t in tensors_of(model)}
    first: dict[int, str] = {}
    parts: list[Hashable] = [is_large(model)]
    parts += [
        (name, tuple(p.shape), first.setdefault(id(p), name))
        for name, p in named_parameters(model, remove_duplicate=False)
    ]
    shared = True
    for place, value in _values(model, weights):
        try:
            parts.append((place, _of(value, paths, ())))
        except _Unlike:
            parts.append((place, id(value)))
            shared = False
    return tuple(parts), shared


def _values(model: nn.Module, weights: set[int]) -> Iterator[tuple[Hashable, Any]]:
    """Yield the places and values of everything but weights."""
    for name, b in named_buffers(model, remove_duplicate=False):
        yield (name, "buffer"), tuple(b.shape) if id(b) in weights else b
    for path, module in named_modules(model, remove_duplicate=False):
        yield (path, type(module), type(module).forward), ()
        for name, value in vars(module).items():
            if name not in APART and "backward" not in name and "state_dict" not in name:
                # hooks are in dictionaries with a number each
                yield (path, name), [*value.values()] if name.endswith("_hooks") else value


def _of(value: Any, paths: Mapping[int, str], within: tuple[int, ...]) -> Hashable:
    """Return a value as nested tuples that equal those of an equal value."""
    kind: type = type(value)  # pyright: ignore[reportUnknownVariableType]
    if value is None or kind in (bool, int, float, complex, str, bytes):
        return kind.__name__, value
    if kind in (torch.dtype, torch.device):
        return kind.__name__
    if id(value) in paths:
        return "module", paths[id(value)]
    if id(value) in within or len(within) > 8:
        raise _Unlike
    within = (*within, id(value))
    if kind in (list, tuple, torch.Size):
        return kind.__name__, tuple(_of(x, paths, within) for x in value)
    if kind in (set, frozenset):
        return kind.__name__, frozenset(_of(x, paths, within) for x in value)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return kind.__name__, tuple((_of(k, paths, within), _of(v, paths, within)) for k, v in items)  # fmt: skip
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), _content(value)
    if isinstance(value, MethodType):
        return "method", _of(value.__func__, paths, within), _of(value.__self__, paths, within)
    if isinstance(value, functools.partial):
        own: Any = value  # pyright: ignore[reportUnknownVariableType]
        return "partial", tuple(_of(x, paths, within) for x in (own.func, own.args, own.keywords))
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return _global(value)
    if not hasattr(value, "__dict__") or isinstance(value, nn.Module):
        raise _Unlike
    held = cast(dict[str, Any], value.__dict__)
    fields = [(name, _of(x, paths, within)) for name, x in held.items() if name not in NAMES]
    return _global(kind), tuple(fields)


def _global(value: Any) -> Hashable:
    """Return a class or a function that its module holds under its name."""
    found: Any = sys.modules.get(value.__module__ or "")
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is not value:
        raise _Unlike
    return value


def _content(t: Tensor) -> str:
    if t.is_meta or t.layout is not torch.strided or t.numel() > LARGEST or type(t) is not Tensor:
        raise _Unlike
    data = t.detach().to("cpu", torch.float64 if t.is_floating_point() else t.dtype).contiguous()
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()
