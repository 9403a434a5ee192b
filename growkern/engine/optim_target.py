"""Choose what applies the learning-rate law after a growth: param groups, the optimizer itself, or step hooks."""

from collections.abc import Sequence

from torch.optim import Optimizer

from growkern.commit.optimizer import Masters, OptimTarget
from growkern.engine.request import Request
from growkern.optimizer.lr_scaling import Multiplier, lr_factors, multipliers, scales, slices
from growkern.optimizer.schedulers import follows, schedulers_of
from growkern.optimizer.state_rules import OptimSpec
from growkern.optimizer.update_scale import scale_of
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.names import named_parameters


def optim_target(
    plan: GrowthPlan,
    request: Request,
    optim: Optimizer,
    described: OptimSpec,
    unmanaged: Sequence[str],
    split: bool | None = None,
) -> OptimTarget:
    """Return the target of one of a request's optimizers.

    Args:
        plan: The plan.
        request: Request with the model, the optimizer, its schedulers and its master weights.
        optim: The optimizer.
        described: Description of the optimizer.
        unmanaged: Live schedulers that drive the optimizer and were not passed; if there are any, groups are not split.
        split: True when param groups are split, False when they are not; None to split them where a scheduler was passed. A loop
            that sets the rates of its groups by hand thus finds the groups that it made.
    """
    model, scheduler = request.model, schedulers_of(optim, request.scheduler)
    master_weights = request.master_weights
    law, apart, before = described.law, dict[str, float](), scale_of(optim)
    followed = not unmanaged and follows(scheduler)
    merge_groups = plan.shrinks and followed
    own: Masters = {} if master_weights is None else master_weights
    source = {n: own.get(p, p) for n, p in named_parameters(model, remove_duplicate=False)}
    added_factors: dict[str, Multiplier] = {}
    if law is not None and plan.dynamics is not None:
        added_factors = multipliers(plan, law, described, plan.dynamics)
    if law is not None and plan.dynamics == "mup" and not law.slices:
        if followed and (bool(scheduler) if split is None else split):
            factors = lr_factors(plan, law, described)
            apart = {name: f for name, f in factors.items() if f is not None and f != 1}
            if plan.shrinks and before is not None:  # undo a growth's UpdateScale by itself
                origin = {row.name: source.get(row.source) for row in plan.tensors}
                apart = {n: f for n, f in apart.items() if origin[n] not in before.scales}
        added_factors = {
            name: factor for name, factor in added_factors.items() if name not in apart
        }
    if law is not None and law.slices:
        states = {name: optim.state.get(p, {}) for name, p in source.items()}
        vectors = slices(plan, source, states, added_factors)
        return OptimTarget(
            optim,
            described,
            scheduler=scheduler,
            slices=vectors,
            master_weights=own,
            merge_groups=merge_groups,
        )
    hooked = scales(plan, source, added_factors, before)
    return OptimTarget(
        optim, described, apart, scheduler, hooked, master_weights=own, merge_groups=merge_groups
    )
