"""Utility of experts: how large the gradients of their weights are."""

from torch import Tensor, nn

from growkern.errors import PlanError, UnsupportedModelError
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import Optimizers, optimizers
from growkern.support.argument_types import typed_arguments
from growkern.support.wrappers import unwrapped


@typed_arguments(PlanError, "optim", model=UnsupportedModelError)
def expert_utility(
    model: nn.Module, optim: Optimizers = None, *, spec: ModelSpec | None = None
) -> tuple[float, ...]:
    """Return the sum of the squared gradients of each expert's weights, over all layers, for ``width.CopyExperts(utility=...)``.

    Args:
        model: A mixture of experts, with gradients if ``optim`` is None: call ``expert_utility`` between ``backward()`` and ``step()``.
        optim: Optimizer of the model, or a list of optimizers, with second moments (``exp_avg_sq``), which are used in place of gradients:
            averages over the last steps.
        spec: Description of the model; None for a known family.

    Returns:
        One number per expert.

    Raises:
        UnsupportedModelError: The model has no experts, or its spec names no weights of theirs.
        PlanError: The experts have no gradients, or no second moments.

    Example:
        >>> mixture(**batch).loss.backward()
        >>> utility = growkern.expert_utility(mixture)
        >>> growkern.expand_inplace(mixture, to={"experts": "2x"}, width=width.CopyExperts(utility)).target_sizes["experts"]
        8

    Reference:
        Dwivedi et al., arXiv:2604.19835, whose gradient-based scores choose the experts to duplicate. (The sum over layers is growkern's,
        because one choice of experts holds for all layers.)
    """
    model = unwrapped(model)
    described = describe(model, spec)
    if "experts" not in described.sizes:
        raise UnsupportedModelError(f"this {described.family} has no experts, so they have no utility.")  # fmt: skip
    states = [optimizer.state for optimizer in optimizers(optim)]
    total: Tensor | None = None
    for name, uses in described.tensors.items():
        if (
            len(uses) < 3
            or not uses[0].streams
            or uses[0].streams[0].partition(":")[0] != "experts"
        ):
            continue
        p = model.get_parameter(name)
        square: object = p.grad if p.grad is None else p.grad.double().square()
        if optim is not None:
            square = next((state[p].get("exp_avg_sq") for state in states if p in state), None)
        if not isinstance(square, Tensor) or square.shape != p.shape:
            what = "gradients: call expert_utility between backward() and step()"
            what = what if optim is None else "second moments (exp_avg_sq)"
            raise PlanError(f"cannot weigh the experts: {name} has no {what}.")
        own = square.double().flatten(1).sum(1).cpu()
        total = own if total is None else total + own
    if total is None:
        raise UnsupportedModelError(
            f"the spec of this {described.family} names no weights of experts: tensors whose first of three axes is experts."
        )
    return tuple(map(float, total))
