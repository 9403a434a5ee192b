"""The test of a description on the source: all coordinates of a space are permuted in all tensors, and the function must not move.

The weights are moved by equal random numbers, because weights that are 0, 1 or equal hide wrong descriptions. Moved and permuted weights
take no memory, but where the forward reads weights in other ways than by operations.
"""

from collections.abc import Mapping, Sequence
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from growkern.errors import UnsupportedModelError
from growkern.model.tracing.forward import (
    Inputs,
    distance,
    evaluated,
    main_output,
    modules_entered,
    tried,
)
from growkern.model.tracing.naming import OUTPUT
from growkern.model.tracing.permuted import PermutedWeights, Weight
from growkern.model.tracing.rounding import RandomRounding
from growkern.model.tracing.terms import Dim, atoms, coordinates, find
from growkern.model.tracing.trial import TOLERANCE, Tensors, grown_copy, mapped, tolerance
from growkern.support.names import named_modules

SEEDS = 0, 1
LOW = torch.float16, torch.bfloat16
LARGEST = 0.1  # error, relative to the largest output, that is not rounding's, however far rounding moves the output


def permutation_error(
    model: nn.Module,
    inputs: Inputs,
    own: Tensors,
    output: Sequence[Dim],
    seeds: Sequence[int] = SEEDS,
) -> float:
    """Return by how much the main output moves at most when every space is permuted, relative to its largest value.

    Args:
        model: The model; it stays as it is.
        inputs: Its inputs.
        own: Its tensors.
        output: Dimensions of the main output.
        seeds: Seeds of the permutations. Two short spaces in one axis are told apart by several permutations only.

    Returns:
        The error; infinity if a forward fails, or there is no output to compare.

    Raises:
        UnsupportedModelError: A module's forward is a function that runs modules of the model, also in a copy of the model.
    """
    every = dict.fromkeys(a for dims in own.dims.values() for d in dims for a in atoms(d))
    free = [a for a in every if not a.keeps_order.keys() - {OUTPUT}]
    entered = set[str]()
    with modules_entered(model, [], entered):
        held, before = False, _run(model, inputs, own, {}, False)
    bound = [path for path, m in named_modules(model) if isinstance(vars(m).get("forward"), FunctionType)]  # fmt: skip
    if bound and entered:
        at = ", ".join(path or "the model" for path in bound[:3])
        raise UnsupportedModelError(
            f"cannot describe {type(model).__name__} by tracing: the forward of {at} is a function that was assigned to the module and "
            f"keeps {min(entered) or 'the model'} of this model, so that growkern cannot test it on a copy; assign a method, "
            "module.forward = types.MethodType(function, module), in which modules are found by self."
        )
    if not isinstance(before, Tensor) or bool(before.isnan().any()):
        held, before = True, _run(model, inputs, own, {}, True)
    if not isinstance(before, Tensor):
        return float("inf")
    worst = 0.0
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        maps: dict[Dim, list[int]] = {a: torch.randperm(a.size, generator=generator).tolist() for a in free}  # pyright: ignore  # fmt: skip
        after = _run(model, inputs, own, maps, held)
        wanted = mapped(before, output, maps)
        if not isinstance(after, Tensor) or after.shape != wanted.shape:
            return float("inf")
        worst = max(worst, distance(after, wanted))
        if not worst < limit_of(model):
            break
    return worst


def limit_of(model: nn.Module) -> float:
    """Return the error from which a description is wrong; half precision is computed in float32."""
    low = any(p.dtype in LOW for p in model.parameters())
    return TOLERANCE[torch.float32] if low else tolerance(model)


def rounds_as_far(model: nn.Module, inputs: Inputs, error: float) -> bool:
    """True for an error that rounding makes: operations of low precision, as under autocast, or a deep model need more than ``limit_of``.

    The forward runs twice with results that are rounded at random. An error above ``LARGEST`` proves nothing either way.
    """
    with evaluated(model):
        before = main_output(tried(model, inputs))
        moved = 0.0
        for seed in SEEDS:
            with RandomRounding(seed):
                after = main_output(tried(model, inputs))
            if before is None or after is None or after.shape != before.shape:
                return False
            moved = max(moved, distance(after, before))
    return error < min(4 * moved, LARGEST)


def _run(model: nn.Module, inputs: Inputs, own: Tensors, maps: Mapping[Dim, Sequence[int]], held: bool) -> object:  # fmt: skip
    """Return the main output with moved and permuted weights, or the exception that the forward raised.

    Args:
        model: The model.
        inputs: Its inputs.
        own: Its tensors.
        maps: Atom -> source coordinate of every coordinate.
        held: True to hold the weights in memory; False to compute with the source's.
    """
    low = any(p.dtype in LOW for p in model.parameters())
    weights, known = list[tuple[Tensor, Weight]](), dict[Dim, Tensor | None]()

    def index(dim: Dim, device: torch.device) -> Tensor | None:
        if dim not in known:
            order = coordinates(dim, maps)
            known[dim] = None if order == [*range(dim.size)] else torch.tensor(order, device=device)
        return known[dim]

    def stand_in(name: str, t: Tensor, shape: Sequence[int]) -> Tensor:
        draw = torch.Generator().manual_seed(_seed(name))
        floating = t.is_floating_point()
        dtype = torch.float32 if low and floating else t.dtype
        vectors = [torch.randn(n, generator=draw).to(t.device, dtype) for n in t.shape if floating]
        where = [index(find(dim), t.device) for dim in own.dims[name]]
        weight = Weight(t, vectors, where, tuple(range(t.dim())), dtype)
        if held or not floating:
            return weight.tensor()
        own_memory = t.new_full(
            (), float("nan"), dtype=dtype
        )  # what reads it in other ways than by operations is NaN
        weights.append((own_memory, weight))
        return own_memory.expand(t.shape)

    changed = grown_copy(model, own, maps, stand_in)
    if low:
        changed, inputs = changed.float(), tree_map_only(Tensor, _float, inputs)
    with evaluated(changed), PermutedWeights(changed, weights):
        output = tried(changed, inputs)
    return output if isinstance(output, Exception) else main_output(output)


def _float(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() else t


def _seed(name: str) -> int:
    """Return a seed for a tensor, equal on every machine."""
    return sum((i + 1) * ord(c) for i, c in enumerate(name)) * 1009 % 2**31
