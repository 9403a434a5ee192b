"""The forward of a model: its inputs and outputs, the modules that run, and the tensors that belong to the model."""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_is_leaf, tree_leaves

from growkern.support.names import named_buffers, named_modules, named_parameters


class TracingError(Exception):
    """A rule of growkern failed, which is a bug of growkern and not of a model."""


# a tensor, positional or keyword arguments, or a function from the model to its outputs that may call the model several times
Inputs = Tensor | Mapping[str, object] | Sequence[object] | Callable[[nn.Module], object]


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a nested structure with their places, such as ``"parts.0"``; dataclasses are no structures to torch."""
    own: Any = ()
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        own = tree.items()  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    elif isinstance(tree, list | tuple):
        own = enumerate(tree)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    elif is_dataclass(tree) and hasattr(tree, "__dict__"):
        own = () if isinstance(tree, type) else vars(tree).items()
    elif not tree_is_leaf(tree):
        own = enumerate(tree_leaves(tree))
    for key, value in own:
        yield from named_tensors(value, f"{name}.{key}".lstrip("."))


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a nested structure."""
    return [t for _, t in named_tensors(tree)]


def replaced(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return the arguments or results of an operation with changed tensors: tree_map takes longer than an operation without values."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in (list, tuple):
        kind: Any = list if isinstance(tree, list) else tuple
        return kind([replaced(x, change) for x in tree])  # pyright: ignore[reportUnknownVariableType]
    return {k: replaced(x, change) for k, x in tree.items()} if isinstance(tree, dict) else tree  # pyright: ignore


def in_operation(tree: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operation."""
    found = list[Tensor]()
    replaced(tree, found.append)
    return found


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Return the parameters and the persistent floating-point buffers, each once."""
    buffers = [b for b in persistent_buffers(model).values() if b.is_floating_point()]
    found = [*(p for _, p in named_parameters(model, remove_duplicate=False)), *buffers]
    return [*{id(t): t for t in found}.values()]


@contextmanager
def not_nan(model: nn.Module) -> Generator[None]:
    """Give random values to tensors of NaN only, which a resumed model has until its checkpoint is loaded, and make them NaN again."""
    started = [t for t in tensors_of(model) if t.numel() and bool(t[(0,) * t.dim()].isnan())]
    empty = [t for t in started if bool(t.isnan().all())]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in empty:
            t.copy_(0.1 * torch.randn(t.shape, generator=generator))
        try:
            yield
        finally:
            for t in empty:
                t.fill_(float("nan"))


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every tensor of ``tensors_of``, by its id."""
    own = {id(t) for t in tensors_of(model)}
    names: dict[int, list[str]] = defaultdict(list)
    for name, t in [*named_parameters(model, remove_duplicate=False), *named_buffers(model, remove_duplicate=False)]:  # fmt: skip
        if id(t) in own:
            names[id(t)].append(name)
    return dict(names)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a state dict holds, by all their names."""
    return {
        f"{path}.{name}".lstrip("."): b
        for path, m in named_modules(model, remove_duplicate=False)
        for name, b in m._buffers.items()  # pyright: ignore[reportPrivateUsage]
        if b is not None and name not in m._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    }


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model on its inputs."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, Sequence) else inputs(model)


def expanded(t: Tensor) -> bool:
    """True for a tensor with several elements in one place, which no operation can write."""
    return any(n > 1 and not stride for n, stride in zip(t.shape, t.stride(), strict=True))


def tried(model: nn.Module, inputs: Inputs) -> Any:
    """Return the outputs of a model, or the exception that its forward raised: what is tried may raise anything."""
    try:
        return call_model(model, inputs)
    except TracingError:
        raise
    except Exception as error:
        return error


@contextmanager
def evaluated(model: nn.Module) -> Generator[None]:
    """Put a model into evaluation mode without gradients, and put the modes and buffers back."""
    modes = {m: m.training for m in model.modules()}
    buffers = [(b, b.clone()) for _, b in named_buffers(model) if not b.is_meta and not expanded(b)]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        kind = next((p.device.type for p in model.parameters()), "cpu")
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            torch.autocast(kind, enabled=False),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)


@contextmanager
def modules_entered(
    model: nn.Module, running: list[str], entered: set[str], *, each: Callable[[], object] = int, unwind: bool = True
) -> Generator[None]:  # fmt: skip
    """Keep the names of the running modules, outermost first, and of all that ran.

    Args:
        model: The model.
        running: Filled with the names of the running modules.
        entered: Filled with the names of all modules that ran.
        each: Called where a module of the model begins to run.
        unwind: False to keep the names of the modules in which an exception was raised.
    """
    names, own = {id(m): name for name, m in named_modules(model)}, get_ident()

    def enter(module: nn.Module, args: object) -> None:
        if (
            get_ident() == own and id(module) in names
        ):  # the hooks are of all modules, in all threads
            each()
            running.append(names[id(module)])
            entered.add(running[-1])

    def leave(module: nn.Module, args: object, output: object) -> None:
        if get_ident() == own and id(module) in names:
            running.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=unwind)  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def floats(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output."""
    return [t for t in tensors(output) if t.is_floating_point()]


def distance(after: Tensor, before: Tensor) -> float:
    """Return the largest change of a tensor, relative to its largest finite value; infinite where infinities moved, or NaN came."""
    both = before.isfinite() & after.isfinite()
    if not bool(both.any()) or bool((~both & (after != before)).any()):
        return float("inf")
    moved, size = ((x if both.all() else x.where(both, 0)).abs_().max() for x in (after - before, before.clone()))  # fmt: skip
    return float(moved / size.clamp_min(1e-30))


def main_output(output: Any) -> Tensor | None:
    """Return the logits of an output, or its first floating-point tensor that is no single number, such as a loss, if it has any."""
    logits, found = getattr(output, "logits", None), floats(output)
    first = next((t for t in found if t.dim()), next(iter(found), None))
    return logits if isinstance(logits, Tensor) else first
