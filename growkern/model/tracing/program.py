"""The operations of a forward without values: two models that run equal operations on equal tensors compute one function."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from growkern.model.tracing.forward import (
    distance,
    evaluated,
    in_operation,
    modules_entered,
    replaced,
)
from growkern.model.tracing.hollow import META, Hollow, Written
from growkern.model.tracing.tape import SILENT
from growkern.support.names import named_buffers, named_parameters

NEAR = 1e-5  # relative difference of equal constants, which models compute in float32
NEW = {"empty", "empty_strided", "rand", "randn"}  # operations that make tensors to be filled


@dataclass(frozen=True)
class Origin:
    """Where a tensor without values is from: the name of a weight, or the number of an operation and of its result."""

    place: object
    number: int = 0


@dataclass(frozen=True)
class Operation:
    """An operation on activations or weights.

    Attributes:
        op: Its name.
        module: The module that ran it.
        given: Its arguments, with the origins of tensors without values in place of the tensors.
        shapes: Shapes of its results.
    """

    op: str
    module: str
    given: Any
    shapes: list[tuple[int, ...]]


class Program(TorchDispatchMode):
    """Notes the operations of a model whose weights have no values.

    Args:
        model: The model.
        running: Names of its running modules.
    """

    def __init__(self, model: nn.Module, running: Sequence[str]) -> None:
        super().__init__()
        self.operations, self.running, self.written = list[Operation](), running, Written()
        named: Any = [*named_parameters(model, remove_duplicate=False), *named_buffers(model, remove_duplicate=False)]  # fmt: skip
        for name, t in named:
            if isinstance(t, Hollow):
                t.origin = Origin(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and note it if it takes a tensor without values."""
        op: str = func.overloadpacket.__name__
        read = args[1:] if op == "copy_" else args  # what is written over does not matter
        given: Any = (read, kwargs or {})
        first = next(filter(self.written.unknown, in_operation((args, kwargs or {}))), None)
        given = None if first is None else replaced(given, self._origin)
        out = self.written.run(func, args, kwargs or {})
        if first is None:
            return out
        results, n = in_operation(out), len(self.operations)
        for i, t in enumerate(results):
            if isinstance(t, Hollow):
                t.origin = self._origin(first) if op in SILENT else Origin(n, i)
        if op not in SILENT:
            at = self.running[-1] if self.running else ""
            self.operations.append(Operation(op, at, given, [tuple(t.shape) for t in results]))
        return out

    def _origin(self, t: Tensor) -> Any:
        if isinstance(t, Hollow):
            return t.origin
        unknown = self.written.unknown(t)
        return Origin((t.shape, t.stride(), t.storage_offset())) if unknown else t.clone()


class Unfilled(TorchDispatchMode):
    """Makes tensors without values where a model makes weights that it fills with random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        given, op = dict[str, Any](kwargs or {}), func.overloadpacket.__name__
        if op == "_local_scalar_dense" and isinstance(args[0], Hollow):
            # whether numbers are to be drawn again: no
            return torch.zeros((), dtype=args[0].dtype).item()
        if op not in NEW:
            return Written().run(func, args, given)
        device = torch.device(given.get("device") or "cpu")
        return Hollow(func(*args, **{**given, "device": META}), device)


def program_of(model: nn.Module, call: Callable[[nn.Module], object]) -> list[Operation]:
    """Return the operations of a call of a model whose weights have no values."""
    running = list[str]()
    own = Program(model, running)
    with evaluated(model), modules_entered(model, running, set()), own:
        call(model)
    return own.operations


def first_difference(before: Sequence[Operation], after: Sequence[Operation]) -> str | None:
    """Return the first operation of a program that another does not run equally; None if there is none."""
    for a, b in zip(before, after, strict=False):
        if a.op != b.op or a.shapes != b.shapes or not _equal(a.given, b.given):
            return f"{b.op} in {b.module or 'the model'}"
    return None if len(before) == len(after) else "its last operation"


def _equal(a: Any, b: Any) -> bool:
    """True for equal arguments: constants up to rounding."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and (torch.equal(a, b) or (a.is_floating_point() and distance(a, b) < NEAR))
    if isinstance(a, float):
        return a == b or isclose(a, b, rel_tol=NEAR)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))  # pyright: ignore
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal(v, b[k]) for k, v in a.items())  # pyright: ignore
    return bool(a == b)
