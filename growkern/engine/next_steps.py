"""Notes for the user in the report of a growth."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from growkern.commit.optimizer import OptimTarget
from growkern.model.describe import untied
from growkern.model.spec import ModelSpec
from growkern.model.tracing.traced import TracedSpec
from growkern.optimizer.lr_scaling import lr_factors
from growkern.optimizer.state_rules import OptimSpec
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.names import named_parameters


def notes(plan: GrowthPlan, spec: ModelSpec, targets: Sequence[OptimTarget]) -> list[str]:
    """Return the notes on the optimizers for the report."""
    held = {name for target in targets for group in target.described.groups for name in group}
    missing = [
        row.source
        for row in plan.tensors
        if targets and not row.new and row.source in spec.tensors and row.source not in held
    ]
    said = [note for target in targets for note in _on_groups(plan, target)]
    if missing:
        said.append(
            f"{len(missing)} tensors are in no param group (frozen, buffers or forgotten): {', '.join(missing[:3])}...; "
            "put those that are to train later into a param group before the growth, so that their learning rates follow."
        )
    changed = {s for s, n in plan.source_sizes.items() if plan.target_sizes[s] != n}
    if isinstance(spec, TracedSpec) and changed & spec.reload_sizes:
        said.append(
            f"a checkpoint of this model, which was described by tracing, may not load: {spec.reload_problem}. Load one before you rely on "
            "it."
        )
    for target in targets:
        said += [*_on_dynamics(plan, target), *_on_state(plan, target)]
    return [*dict.fromkeys(said)]


def on_hooks(plan: GrowthPlan, model: nn.Module) -> Iterator[str]:
    """Yield a note if parameters of the source, not yet grown, have hooks that their copies in new blocks will lack."""
    params: dict[str, Any] = dict(named_parameters(model, remove_duplicate=False))
    copied = [params.get(row.source) for row in plan.tensors if row.new]
    hooked = [p for p in copied if p is not None and (p._backward_hooks or p._post_accumulate_grad_hooks)]  # fmt: skip
    if hooked:
        yield f"{len(hooked)} parameters of new blocks are copies of parameters with hooks, and have none: register theirs."


def on_ties(model: nn.Module) -> Iterator[str]:
    """Yield a note on each pair of sharded parameters that the config of a known family ties, and the model has not tied."""
    for reader, writer in untied(model).items():
        yield (
            f"{reader} and {writer} are one parameter by the config, and two in the sharded model (parallelize_module unties), so they "
            "grew as two, and a checkpoint of both loads as one: tie them again right after parallelize_module, or set "
            "tie_word_embeddings=False in the config."
        )


def _on_groups(plan: GrowthPlan, target: OptimTarget) -> Iterator[str]:
    """Yield notes on split or merged param groups."""
    if target.split and plan.shrinks:
        yield (
            "learning rates and weight decay followed the law; groups that a growth had split are one again where they agree and "
            "no scheduler was left out."
        )
    elif target.split:
        yield "weight decay was divided by the learning-rate factor where that is not 1, so that decay per step stays."
        yield (
            "param groups were split by learning rate: before loading this optimizer's state_dict into a new one, call growkern.resume; a "
            "loop that logs one learning rate for all groups, as torchtune's get_lr, needs dynamics=None."
        )


def decayed_gains(plan: GrowthPlan, described: OptimSpec, optim: Optimizer) -> list[str]:
    """Return the norms with an offset whose weight decay ``growkern.optim.AdamW`` cannot carry, though the dynamics are exact."""
    if plan.dynamics != "exact" or described.law is None or not described.law.slices:
        return []
    decays = any(group.get("weight_decay") for group in optim.param_groups)
    return [row.name for row in plan.tensors if decays and row.offset and plan.scales(row)[0] != 1]


def _on_dynamics(plan: GrowthPlan, target: OptimTarget) -> Iterator[str]:
    """Yield notes on learning rates, epsilons and weight decay."""
    described = target.described
    law = described.law
    if target.scales:
        yield (
            f"UpdateScale carries the factors of {len(target.scales)} tensors, beside the groups, in hooks of this optimizer's "
            "step; its state_dict() contains them."
        )
        if plan.dynamics == "exact":
            kind = described.kind.rpartition(".")[2]
            yield f"the state of {kind} stays in the source's units: what the UpdateScale hands it."
    if gains := decayed_gains(plan, described, target.optim):
        yield (
            f"weight decay of {len(gains)} norms pulls their weight to 0, not their gain, and is not the source's, so the growth does not "
            "preserve every later step: leave it out for norms."
        )
    if law is None or law.lr is None:
        yield f"the learning-rate law of {described.kind} is not known, so its rates stayed."
    uneven = [f for f in lr_factors(plan, law, described).values() if f is None]
    if uneven and plan.dynamics is None:
        yield f"{len(uneven)} tensors have a learning-rate factor per element, so theirs stayed; they may want a shorter step."


def _on_state(plan: GrowthPlan, target: OptimTarget) -> Iterator[str]:
    """Yield notes on the optimizer state."""
    law, kind = target.described.law, target.described.kind.rpartition(".")[2]
    if plan.state == "drop" or (law is not None and law.resets):
        yield "optimizer state was dropped: warm the learning rate up again."
    if plan.state in ("asymmetric", "zero_pad"):
        yield (
            "new elements have a step of their own, and their learning rate warms up."
            if law is not None and law.slices
            else f"new elements start from 0 under {kind}'s old step, which makes its first updates up to 6.6 times as large: "
            "growkern.optim.AdamW gives them a step of their own."
        )
