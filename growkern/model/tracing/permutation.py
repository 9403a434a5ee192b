"""The test of a description on the source: all coordinates of a space are permuted in all tensors, and the function must not move.

The weights are moved by equal random numbers, because weights that are 0, 1 or equal hide wrong descriptions. Moved and permuted weights
take no memory, but where the forward reads weights in other ways than by operations.
"""

from collections.abc import Sequence
from types import FunctionType

import torch
from torch import Tensor, nn

from growkern.errors import UnsupportedModelError
from growkern.model.tracing.forward import (
    Inputs,
    distance,
    modules_entered,
)
from growkern.model.tracing.mapped_weights import is_low, mapped_distance, run_mapped
from growkern.model.tracing.naming import OUTPUT
from growkern.model.tracing.rounding import RandomRounding
from growkern.model.tracing.terms import Dim, atoms
from growkern.model.tracing.trial import TOLERANCE, Tensors, tolerance
from growkern.support.names import named_modules
from growkern.support.progress import stage

SEEDS = 0, 1
LARGEST = 0.1  # error, relative to the largest output, that is not rounding's, however far rounding moves the output


def permutation_error(
    model: nn.Module,
    inputs: Inputs,
    own: Tensors,
    output: Sequence[Dim],
    seeds: Sequence[int] = SEEDS,
    before: object = None,
) -> float:
    """Return by how much the main output moves at most when every space is permuted, relative to its largest value.

    Args:
        model: The model; it stays as it is.
        inputs: Its inputs.
        own: Its tensors.
        output: Dimensions of the main output.
        seeds: Seeds of the permutations. Two short spaces in one axis are told apart by several permutations only.
        before: The output of the source with moved weights; None to compute it.

    Returns:
        The error; infinity if a forward fails, or there is no output to compare.

    Raises:
        UnsupportedModelError: A module's forward is a function that runs modules of the model, also in a copy of the model.
    """
    every = dict.fromkeys(a for dims in own.dims.values() for d in dims for a in atoms(d))
    free = [a for a in every if not a.keeps_order.keys() - {OUTPUT}]
    entered = set[str]()
    stage("permuting coordinates", 0.6)
    bound = [path for path, m in named_modules(model) if isinstance(vars(m).get("forward"), FunctionType)]  # fmt: skip
    held = False
    if before is None or bound:
        with modules_entered(model, [], entered):
            before = run_mapped(model, inputs, own, {})
    if bound and entered:
        at = ", ".join(path or "the model" for path in bound[:3])
        raise UnsupportedModelError(
            f"cannot describe {type(model).__name__} by tracing: the forward of {at} is a function that was assigned to the module and "
            f"keeps {min(entered) or 'the model'} of this model, so that growkern cannot test it on a copy; assign a method, "
            "module.forward = types.MethodType(function, module), in which modules are found by self."
        )
    if not isinstance(before, Tensor) or bool(before.isnan().any()):
        held, before = True, run_mapped(model, inputs, own, {}, held=True)
    if not isinstance(before, Tensor):
        return float("inf")
    worst = 0.0
    for i, seed in enumerate(seeds, 1):
        stage("permuting coordinates", 0.6 + 0.4 * i / (len(seeds) + 1))
        generator = torch.Generator().manual_seed(seed)
        maps: dict[Dim, list[int]] = {a: torch.randperm(a.size, generator=generator).tolist() for a in free}  # pyright: ignore  # fmt: skip
        after = run_mapped(model, inputs, own, maps, held=held)
        worst = max(worst, mapped_distance(before, after, output, maps))
        if not worst < limit_of(model):
            break
    return worst


def limit_of(model: nn.Module) -> float:
    """Return the error from which a description is wrong; half precision is computed in float32."""
    low = is_low(model)
    return TOLERANCE[torch.float32] if low else tolerance(model)


def rounds_as_far(
    model: nn.Module, inputs: Inputs, own: Tensors, before: object, error: float
) -> bool:
    """True for an error that rounding makes: operations of low precision, as under autocast, or a deep model need more than ``limit_of``.

    The forward with moved weights, whose output is ``before``, runs twice with results that are rounded at random. An error above
    ``LARGEST`` proves nothing.
    """
    moved = 0.0
    for seed in SEEDS:
        after = run_mapped(model, inputs, own, {}, mode=RandomRounding(seed))
        if (
            not isinstance(before, Tensor)
            or not isinstance(after, Tensor)
            or after.shape != before.shape
        ):
            return False
        moved = max(moved, distance(after, before))
    return error < min(4 * moved, LARGEST)
