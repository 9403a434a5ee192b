"""Names of tensors and modules as in the model without wrappers.

``torch.compile(block)`` and ``checkpoint_wrapper(block)`` are modules around a block, which put a part into all names inside it. Growth
compares names with a spec, with plans and with records, in which no wrapper is.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

HELD = "_orig_mod", "_checkpoint_wrapped_module"  # name of the wrapped module in its wrapper
T = TypeVar("T")
Tree = list[tuple[str, nn.Module]]  # every path of every module, canonical
# id of a model -> its modules, as far as they were asked for
_TREES: ContextVar[dict[int, Tree | None]] = ContextVar("trees", default={})  # noqa: B039  (never written)


def canonical(name: str) -> str:
    """Return a name without the parts that wrappers put into it.

    Example:
        >>> canonical("layers.0._orig_mod.weight")
        'layers.0.weight'
    """
    if not any(map(name.__contains__, HELD)):  # most names
        return name
    return ".".join(part for part in name.split(".") if part not in HELD)


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper holds, or None for a module that is no wrapper."""
    return next((held for name in HELD if (held := module._modules.get(name)) is not None), None)  # pyright: ignore[reportPrivateUsage]


@contextmanager
def same_modules(model: nn.Module) -> Generator[None]:
    """Walk the modules of a model once only until the block ends, in which no module is added, replaced or removed."""
    token = _TREES.set({id(model): None})
    try:
        yield
    finally:
        _TREES.reset(token)


def _tree(model: nn.Module) -> Tree:
    known = _TREES.get()
    if (tree := known.get(id(model))) is not None:
        return tree
    every: Tree = [*model.named_modules(remove_duplicate=False)]  # pyright: ignore[reportUnknownMemberType]
    made = [(canonical(path), module) for path, module in every]
    if id(model) in known:
        known[id(model)] = made
    return made


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:  # fmt: skip
    """Yield the modules as ``model.named_modules`` does, with their canonical names: a wrapper has the name of the module behind it."""
    tree = _tree(model)
    return unique(tree) if remove_duplicate else iter(tree)


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:  # fmt: skip
    """Yield the parameters as ``model.named_parameters`` does, with their canonical names."""
    return _members(model, "_parameters", remove_duplicate)


def named_buffers(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Yield the buffers as ``model.named_buffers`` does, with their canonical names."""
    return _members(model, "_buffers", remove_duplicate)


def _members(model: nn.Module, table: str, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
    every = [
        (f"{path}.{name}" if path else name, member)
        for path, module in _tree(model)
        if (held := getattr(module, table))
        for name, member in held.items()
        if member is not None
    ]  # a list: a growth walks them thirty times, and a generator takes longer
    return unique(every) if remove_duplicate else iter(every)


def unique(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Return every object once, under its first name."""
    first: dict[int, tuple[str, T]] = {}
    for pair in named:
        first.setdefault(id(pair[1]), pair)
    return iter(first.values())


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module of a canonical name, without its wrappers."""
    module = model.get_submodule(path)  # wrappers hand the names of submodules on
    while (held := wrapped_in(module)) is not None:
        module = held
    return module


def entry_of(name: str) -> tuple[str, int]:
    """Return the attribute and the index that ``"attribute[index]"`` names; the last entry is named by the attribute alone."""
    attribute, _, index = name.partition("[")
    return attribute, int(index[:-1]) if index else -1


def with_entry(held: Any, index: int, value: float) -> Any:
    """Return the value of an attribute after a size has changed: an entry of a tuple or list, the number in a tensor, or all of it."""
    if isinstance(held, Tensor):
        return torch.full_like(held, value)
    if isinstance(held, tuple | list):
        own: list[Any] = [*held]  # pyright: ignore[reportUnknownArgumentType]
        own[index] = with_entry(own[index], -1, value)
        return tuple(own) if isinstance(held, tuple) else own
    return int(value) if type(held) is int else value  # a quotient of sizes is a float
