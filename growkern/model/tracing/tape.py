"""One forward of a model, operation by operation: what the dimensions of every tensor are, and which activations read and write parameters.

The forward runs on real tensors, so that control flow that depends on values takes the path that it takes in training.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from growkern.model.tracing.forward import (
    Inputs,
    TracingError,
    call_model,
    evaluated,
    floats,
    in_operation,
    main_output,
    modules_entered,
    names_of,
    tensors,
    tensors_of,
)
from growkern.model.tracing.hollow import Hollow, Written
from growkern.model.tracing.naming import INPUT, OUTPUT
from growkern.model.tracing.terms import Conflict, Dim, cut, keep_order, keep_size, same
from growkern.model.tracing.values import Norm, Role, Scaling, Statistic, Stream, Use, Value


@dataclass
class Step:
    """One operation: its name, the module that ran it, and what is known of the tensors that it returned."""

    op: str
    module: str
    outputs: list[Value | None]


Rule = Callable[["Tape", "Call"], None]
SQUARES = {
    "mean",
    "sum",
    "_to_copy",
    "clone",
    "alias",
    "detach",
    "view",
    "add",
}  # operations of norms on squares
SILENT = {"alias", "detach", "lift_fresh", "lift_fresh_copy"}  # may differ between equal forwards


class Call:
    """One call of an ATen operation."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        self.func, self.args, self.kwargs, self.out = func, args, kwargs, out
        self.op: str = func.overloadpacket.__name__
        self.overload: str = func._overloadname
        self.inputs = in_operation((args, kwargs))
        self.outputs = in_operation(out)

    @property
    def base(self) -> str:
        """Name of the operation, without the underscore of its in-place form."""
        return self.op.rstrip("_") if not self.op.startswith("_") else self.op

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or its name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def axis(self, position: int, default: int = 0) -> int:
        """Return the argument ``dim`` as an axis of the first argument, counted from the front."""
        return int(self.arg(position, "dim", default)) % max(1, self.args[0].dim())


class Tape(TorchDispatchMode):
    """Runs a rule for every operation.

    Attributes:
        names: id of a parameter or persistent buffer -> its names.
        weights: First name of every parameter and persistent buffer -> its value.
        uses: Every use of an axis of a parameter.
        norms: Every norm.
        statistics: Every mean, variance or sum of an activation.
        scalings: Products of an activation and a power of its length.
        products: Products of two activations: the dimensions of heads, and the dimension that is summed over.
        steps: Every operation.
        seen: Module -> dimensions of the tensors that its operations take and return.
        touched: First names of the parameters and buffers that an operation took.
        entered: Modules that ran.
        unknown: Operations without a rule -> the module that ran one first.
        output: The main output, and its dimensions; no output without values.
        hollow: True when the weights have no values.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, Rule], pointwise: Rule) -> None:
        super().__init__()
        self.rules, self.pointwise = rules, pointwise
        self.values: dict[int, Value] = {}
        self.alive: list[Tensor] = []
        self.written = Written()
        self.running: list[str] = []
        self.uses: list[Use] = []
        self.norms: list[Norm] = []
        self.statistics: list[Statistic] = []
        self.scalings: list[Scaling] = []
        self.products: list[tuple[list[Dim], Dim]] = []
        self.steps: list[Step] = []
        self.seen: dict[str, set[Dim]] = defaultdict(set)
        self.touched: set[str] = set()
        self.entered: set[str] = set()
        self.unknown: dict[str, str] = {}
        self.centers: dict[Stream, Stream] = {}
        self.picked: dict[int, tuple[Dim, int]] = {}
        self.output: Tensor | None = None
        self.output_dims: list[Dim] = []
        self.hollow = any(isinstance(p, Hollow) for p in model.parameters())
        self.names = names_of(model)
        self.weights: dict[str, Value] = {}
        for t in tensors_of(model):
            name = self.names[id(t)][0]
            axes = [frozenset({(name, i)}) for i in range(t.dim())]
            value = Value([Dim(n) for n in t.shape], learned=True, weight=True, axes=axes)
            self.weights[name] = self.put(t, value)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Return names of tensors in the order of their first use; those without a use come last."""
        first: dict[str, int] = {}
        for i, use in enumerate(self.uses):
            first.setdefault(use.tensor, i)
        for own in self.names.values():  # of a tie, each name may be used, or one alone
            used = [first[name] for name in own if name in first]
            first |= dict.fromkeys(set(own) - first.keys(), max(used, default=len(self.uses)))
        return sorted(names, key=lambda name: first.get(name, len(self.uses)))

    @property
    def module(self) -> str:
        """Name of the module that runs."""
        return self.running[-1] if self.running else ""

    def value(self, t: Tensor) -> Value:
        """Return what is known of a tensor; a tensor that no operation returned is a constant."""
        known = self.values.get(id(t))
        if known is None or len(known.dims) != t.dim():
            known = self.put(t, Value([Dim(n) for n in t.shape]))
        return known

    def put(self, t: Tensor, value: Value) -> Value:
        """Note what a tensor is."""
        if [d.size for d in value.dims] != [*t.shape]:
            raise Conflict(f"the rule returned {value.dims} for a tensor of shape {[*t.shape]}")
        self.values[id(t)] = value
        self.alive.append(t)
        return value

    def same(self, a: Dim, b: Dim, call: Call) -> None:
        """Make two dimensions equal; where that is impossible, both keep their order."""
        try:
            same(a, b)
        except Conflict as error:
            for dim in (a, b):
                keep_order(dim, f"{call.op}: {error}", self.module)

    def keep_order(self, dim: Dim, why: str) -> None:
        """Say why a dimension can neither be permuted nor grow."""
        keep_order(dim, why, self.module)

    def keep_size(self, dim: Dim, why: str) -> None:
        """Say why a dimension cannot grow."""
        keep_size(dim, why, self.module)

    def use(
        self,
        weight: Value,
        role: Role,
        stream: Stream,
        axes: Iterable[int] | None = None,
        norm: Norm | None = None,
    ) -> None:
        """Note that axes of a weight (default: all) read or write a stream."""
        for i in range(len(weight.axes)) if axes is None else axes:
            for name, axis in weight.axes[i]:
                self.uses.append(Use(self._here(name), axis, role, stream, self.module, norm, weight.offset))  # fmt: skip

    def _here(self, name: str) -> str:
        """Return the name of a tied parameter under which the running module uses it."""
        names = next(own for own in self.names.values() if own[0] == name)
        near = [n for n in names if n.rpartition(".")[0] == self.module]
        near += [n for n in names if n.startswith(f"{self.module}.")]
        return (near or names)[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and its rule."""
        out = self.written.run(func, args, kwargs or {})
        call = Call(func, args, kwargs or {}, out)
        for t in call.inputs:
            if id(t) in self.picked:
                dim, n = self.picked.pop(id(t))
                cut(dim, [1] * n)
            if id(t) in self.names:
                self.touched.add(self.names[id(t)][0])
            known = self.values.get(id(t))
            if known and known.squared and call.op not in SQUARES:
                known.squared.bend("its square is used")
        try:
            self._apply(call)
        except Conflict as error:
            self._opaque(call, f"{call.op}: {error}")
        except Exception as error:
            raise TracingError(
                f"growkern's rule of {call.op} failed in {self.module or 'the model'} ({type(error).__name__}: {error}), which is a bug of "
                "growkern; report it, and pass spec=ModelSpec(...) until then."
            ) from error
        values = [self.values.get(id(t)) for t in call.outputs]
        known = [self.values.get(id(t)) for t in call.inputs]
        for value in filter(None, [*values, *known]):
            for module in self.running[-3:]:
                self.seen[module].update(value.dims)
        if call.op not in SILENT:
            self.steps.append(Step(call.op, self.module, values))
        return out

    def _apply(self, call: Call) -> None:
        rule = self.rules.get(call.op) or self.rules.get(call.base)
        if rule is not None:
            rule(self, call)
        elif torch.Tag.pointwise in call.func.tags:
            self.pointwise(self, call)
        elif any(self.value(t).learned for t in call.inputs):
            self.unknown.setdefault(call.op, self.module)
            self._opaque(call, f"no rule for the operation {call.op}")
        else:
            constants(self, call)

    def _opaque(self, call: Call, why: str) -> None:
        """Keep the order of every dimension of an operation that nothing is known about."""
        values = [self.value(t) for t in call.inputs]
        learned = any(v.learned for v in values)
        for value in values:
            for dim in value.dims:
                self.keep_order(dim, why)
            if value.weight:
                self.use(value, "writer", Stream())
            value.stream.bend(call.op)
        for t in call.outputs:
            if any(t is x for x in call.inputs):
                self.value(t).learned |= learned
                continue
            value = self.put(t, Value([Dim(n) for n in t.shape], learned=learned, given=any(v.given for v in values)))  # fmt: skip
            for dim in value.dims:
                self.keep_order(dim, why)


def constants(tape: Tape, call: Call) -> None:
    """Note results that depend on no parameter, or are numbers and not activations."""
    values = [tape.value(t) for t in call.inputs]
    for t in call.outputs:
        if not any(t is x for x in call.inputs):
            given = any(v.given or v.learned for v in values)
            tape.put(t, Value([Dim(n) for n in t.shape], given=given))


def record(tape: Tape, model: nn.Module, inputs: Inputs) -> Tape:
    """Run the model once on its inputs under a tape; the axes of its output keep their order."""
    for t in tensors(inputs):
        for dim in tape.put(t, Value([Dim(n) for n in t.shape], given=True)).dims:
            keep_order(dim, INPUT, "")
    with evaluated(model), modules_entered(model, tape.running, tape.entered), tape:
        output = call_model(model, inputs)
    for t in floats(output):
        if id(t) in tape.picked:
            dim, n = tape.picked.pop(id(t))
            cut(dim, [1] * n)
    main = main_output(output)
    if main is not None:
        tape.output = None if tape.hollow else main
        tape.output_dims = tape.value(main).dims
        for dim in tape.output_dims:
            keep_order(dim, OUTPUT, "")
    return tape
