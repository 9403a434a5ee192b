"""A grown copy of a traced model, whose every coordinate copies one of the source's, and its forward held against the trace.

The copy computes the source's function if the description and the attributes are right: every operation then returns the shapes that
the dimensions of the trace have at the new sizes, and the output is the source's.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from growkern.model.leaves import cached_sizes
from growkern.model.spec import AxisUse, Blocks
from growkern.model.tracing.forward import (
    Inputs,
    distance,
    evaluated,
    in_operation,
    main_output,
    modules_entered,
    tried,
)
from growkern.model.tracing.hollow import Written, hollow
from growkern.model.tracing.scalings import unscaled
from growkern.model.tracing.tape import SILENT, Step, Tape
from growkern.model.tracing.terms import Dim, coordinates, size_at
from growkern.model.tracing.values import Scaling
from growkern.support.names import (
    entry_of,
    named_buffers,
    named_modules,
    named_parameters,
    submodule,
    with_entry,
)

Values = Mapping[tuple[str, str], Any]  # (module, attribute) -> value
# largest relative difference of equal outputs; norms of transformers round to float32 in any dtype, and norms have epsilons
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
LOW = 5e-2  # in other dtypes
CONFIG = "<config>"  # in place of a module: every config of the model


class Steps(TorchDispatchMode):
    """Records the operations of a forward and the shapes that they return; takes back the scalings that grow.

    Args:
        scalings: Scalings that the writers of a stream can take back.
        sizes: Atom -> its length in the copy.
    """

    def __init__(self, scalings: Sequence[Scaling] = (), sizes: Mapping[Dim, int] | None = None) -> None:  # fmt: skip
        super().__init__()
        self.steps: list[tuple[str, list[tuple[int, ...]]]] = []
        self.scalings, self.sizes = {own.step: own for own in scalings}, sizes or {}
        self.scaled: set[Scaling] = set()
        self.written = Written()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note it."""
        out = self.written.run(func, args, kwargs or {})
        op = func.overloadpacket.__name__
        if op not in SILENT:
            scaling = self.scalings.get(len(self.steps))
            back = unscaled(scaling, op.rstrip("_"), args, out, self.sizes) if scaling else None
            if scaling and back is not None:
                self.scaled.add(scaling)
                out = back
            self.steps.append((op, [tuple(t.shape) for t in in_operation(out)]))
        return out


def tolerance(model: nn.Module) -> float:
    """Return the largest relative difference of equal outputs of a model."""
    return max((TOLERANCE.get(p.dtype, LOW) for p in model.parameters()), default=LOW)


@dataclass
class Outcome:
    """How far the forward of a copy went as the trace says.

    Attributes:
        agreed: Operations at the start that returned the expected shapes.
        finished: True when the forward returned.
        error: Largest difference of the main output, relative to its largest value; infinite without one, 0 in a copy of zeros.
        blame: The first operation that differs.
        scaled: The scalings that grew.
    """

    agreed: int
    finished: bool
    error: float
    blame: str
    scaled: set[Scaling] = field(default_factory=set[Scaling])

    @property
    def rank(self) -> tuple[int, bool, float]:
        """Better outcomes have higher ranks."""
        return self.agreed, self.finished, -self.error


def mapped(t: Tensor, dims: Sequence[Dim], maps: Mapping[Dim, Sequence[int]], row: Sequence[AxisUse] = ()) -> Tensor:  # fmt: skip
    """Return a tensor whose axes copy the coordinates of maps; axes that read are divided by the number of copies."""
    for axis, dim in enumerate(dims):
        index = coordinates(dim, maps)
        if index == [*range(t.shape[axis])]:
            continue
        t = t.index_select(axis, torch.tensor(index, device=t.device))
        if row and row[axis].role == "reader":
            count = Counter(index)
            shape = [-1 if i == axis else 1 for i in range(t.dim())]
            t = t / torch.tensor([count[j] for j in index], dtype=t.dtype).to(t.device).view(shape)
    return t


@dataclass(frozen=True)
class Tensors:
    """The tensors of a traced model.

    Attributes:
        dims: First name of every tensor -> its dimensions.
        axes: Name of every tensor -> what its axes are.
        ties: Name of a tied tensor -> its first name.
    """

    dims: Mapping[str, Sequence[Dim]]
    axes: Mapping[str, Sequence[AxisUse]]
    ties: Mapping[str, str]


def grown_copy(
    model: nn.Module,
    own: Tensors,
    maps: Mapping[Dim, Sequence[int]],
    stand_in: Callable[[str, Tensor, Sequence[int]], Tensor] | None = None,
) -> nn.Module:
    """Return a copy of a model on other coordinates; tied parameters are parameters of their own in the copy.

    Args:
        model: The source, which stays as it is; none of its weights is copied as it is.
        own: Its tensors.
        maps: Atom -> source coordinate of every coordinate.
        stand_in: Function from the name of a tensor, the tensor and the shape of its copy to a tensor in place of the copy.
    """
    live: dict[str, Tensor] = dict(named_parameters(model, remove_duplicate=False))
    live |= dict(named_buffers(model, remove_duplicate=False))
    memo: dict[int, Any] = {
        id(live[name]): nn.Parameter(live[name].detach(), False)
        if isinstance(live[name], nn.Parameter)
        else live[name].detach()
        for name in own.dims
    }
    result = copy.deepcopy(model, memo)
    lengths = {atom: len(indices) for atom, indices in maps.items()}
    for name, row in own.axes.items():
        first_name = own.ties.get(name, name)
        if first_name not in own.dims:
            continue
        path, _, leaf = name.rpartition(".")
        module = submodule(result, path)
        first = live[name].detach()
        dims = own.dims[first_name]
        shape = [size_at(dim, lengths) for dim in dims]
        t = stand_in(name, first, shape) if stand_in else mapped(first, dims, maps, row)
        kept: Any = module._parameters if leaf in module._parameters else module._buffers  # pyright: ignore[reportPrivateUsage]
        kept[leaf] = nn.Parameter(t, live[name].requires_grad) if kept is module._parameters else t  # pyright: ignore[reportPrivateUsage]
    for _, module in named_modules(result):
        weight = getattr(module, "weight", None)
        for attribute, axis in cached_sizes(type(module)).items():
            if isinstance(weight, Tensor) and axis < weight.dim() and hasattr(module, attribute):
                size = weight.shape[axis]
                sizes = isinstance(getattr(module, attribute), tuple | list)
                module.__dict__[attribute] = (size,) if sizes else size
    return result


def deepened(
    model: nn.Module,
    inputs: Inputs,
    own: Tensors,
    stack: Blocks,
    source: int,
    fields: Mapping[str, object],
    lists: Sequence[str],
    numbers: Sequence[str],
    tape: Tape,
    counted: Sequence[tuple[str, str]] = (),
) -> str | None:
    """Add a block at the end of a stack of a copy; return why the output is not the source's, None if it is.

    Args:
        model: The source.
        inputs: Its inputs.
        own: Its tensors.
        stack: The stack.
        source: Number of the block that the new one copies.
        fields: Fields of configs for one block more.
        lists: Fields that hold one entry per block.
        numbers: Attributes inside a block that hold the number of the block.
        tape: The trace of the source.
        counted: Attributes of modules that count the blocks.
    """
    grown = grown_copy(model, own, {}, hollow if tape.hollow else None)
    set_config(grown, fields)
    for config in configs_of(grown):
        for name in (name for name in lists if hasattr(config, name)):
            entries = getattr(config, name)
            setattr(config, name, [*entries, entries[source]])
    blocks = submodule(grown, stack.path)._modules  # pyright: ignore[reportPrivateUsage]
    before, new = blocks[str(len(blocks) - 1)], copy.deepcopy(blocks[str(source)])
    assert before is not None and new is not None
    for block, constants in ((new, stack.identity), (before, stack.carries)):
        live = dict(block.named_parameters())
        for name, constant in ((k, c) for k, c in constants.items() if k in live):
            path, _, leaf = name.rpartition(".")
            block.get_submodule(path)._parameters[leaf] = nn.Parameter(torch.full_like(live[name], constant), False)  # pyright: ignore  # fmt: skip
    for name in numbers:  # a cache of keys and values is by the number
        path, _, leaf = name.rpartition(".")
        new.get_submodule(path).__dict__[leaf] = len(blocks)
    set_values(grown, dict.fromkeys(counted, len(blocks) + 1))
    blocks[str(len(blocks))] = new
    entered = set[str]()
    with evaluated(grown), modules_entered(grown, [], entered), Steps():
        outputs = tried(grown, inputs)
    if isinstance(outputs, Exception):  # the model may count its blocks in other ways
        return (
            f"with a block more its forward fails ({type(outputs).__name__}: {outputs})".partition(
                "\n"
            )[0]
        )
    at = f"{stack.path}.{len(blocks) - 1}"
    if not any(name == at or name.startswith(f"{at}.") for name in entered):
        return "its forward does not run a block more"
    output, expected = main_output(outputs), tape.output
    if output is None or [*output.shape] != [d.size for d in tape.output_dims]:
        return "with a block more it returns another output"
    if expected is None:
        return None
    error = distance(output, expected)
    return None if error < tolerance(model) else f"a block more moves the output by {error:.1e}"


def configs_of(model: nn.Module) -> list[Any]:
    """Return every object that modules hold as ``config``."""
    held = [vars(m).get("config") for m in model.modules()]
    return [*{id(c): c for c in held if hasattr(c, "__dict__")}.values()]


def set_config(model: nn.Module, fields: Mapping[str, object]) -> None:
    """Set fields of the configs of a copy: of all that have the field, or of one module's (``"module.field"``)."""
    for key, value in sorted(fields.items(), key=lambda item: "." in item[0]):
        path, _, name = key.rpartition(".")
        for config in [submodule(model, path).config] if path else configs_of(model):  # pyright: ignore
            own, (leaf, index) = vars(config), entry_of(name)  # pyright: ignore
            if leaf in own:
                own[leaf] = with_entry(own[leaf], index, value)  # pyright: ignore


def fields_of(holder: Any, name: str) -> dict[str, Any]:
    """Return the dictionary of the attributes of a module or config; of the module's buffers if one has the name."""
    own: Any = holder.__dict__
    return own["_buffers"] if name in own.get("_buffers", ()) else own


def set_values(model: nn.Module, values: Values) -> list[tuple[dict[str, Any], str, Any]]:
    """Set attributes of modules, and fields of configs; return the dictionaries where they are and what they were."""
    before = list[tuple[dict[str, Any], str, Any]]()
    for (path, name), value in values.items():
        for holder in configs_of(model) if path == CONFIG else [submodule(model, path)]:
            leaf, index = entry_of(name)
            held = fields_of(holder, leaf)
            if leaf in held:
                before.append((held, leaf, held[leaf]))
                held[leaf] = with_entry(held[leaf], index, value)
    return before


def run_against(
    model: nn.Module,
    inputs: Inputs,
    steps: Sequence[Step],
    sizes: Mapping[Dim, int],
    expected: Tensor | None,
    scalings: Sequence[Scaling],
) -> Outcome:
    """Run a copy and compare every operation with the trace's at the given sizes of atoms."""
    mode, running, error = Steps(scalings, sizes), list[str](), float("inf")
    with evaluated(model), modules_entered(model, running, set()), mode:
        output = tried(model, inputs)
    failed = (
        f"{type(output).__name__}: {output}".partition("\n")[0]
        if isinstance(output, Exception)
        else ""
    )
    where = ""
    agreed, other = 0, False
    for step, (op, shapes) in zip(steps, mode.steps, strict=False):
        wanted = [
            tuple(size_at(d, sizes) for d in value.dims) if value and value.learned else shape
            for value, shape in zip(step.outputs, shapes, strict=False)
        ]
        if step.op != op or len(shapes) != len(step.outputs) or wanted != shapes:
            other = step.op != op
            where = f"{op} in {step.module or 'the model'} returns {shapes}, the description says {step.op}, {wanted}"  # fmt: skip
            break
        agreed += 1
    else:
        last = steps[min(agreed, len(steps) - 1)]
        where = f"{last.op} in {last.module or 'the model'}: {failed}" if failed else ""
    main = main_output(output) if not failed else None
    if main is not None and expected is not None and main.shape == expected.shape:
        error = distance(main, expected)
    if other and not failed and (error < tolerance(model) or expected is None):
        where = ""  # the model keeps what it computes once, such as an index of positions
    if expected is None and not failed:
        error = 0.0
    return Outcome(agreed, not failed, error, where, mode.scaled)  # fmt: skip
