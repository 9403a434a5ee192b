"""Commit a growth to the optimizer: its parameters, their state, its param groups, and the scales of its updates."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.commit.param_groups import join_groups, split_groups
from growkern.commit.undo import Undo
from growkern.errors import CommitError
from growkern.optimizer.adamw import begin
from growkern.optimizer.factors import Scale
from growkern.optimizer.state_rules import MASTER, MASTER_GRAD, SLICES, OptimSpec
from growkern.optimizer.update_scale import UpdateScale, scale_of
from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.support.named_tensors import Tensors
from growkern.support.names import canonical

Masters = MutableMapping[nn.Parameter, nn.Parameter]


@dataclass(frozen=True)
class OptimTarget:
    """Target of an optimizer.

    Attributes:
        optim: The optimizer, changed in place.
        described: Description of the source optimizer.
        split: Parameter name -> lasting factor on its learning rate; param groups are split where factors differ.
        scheduler: The learning-rate scheduler of the optimizer, adapted to the split param groups.
        scales: Parameter name -> its ``Scale`` for ``UpdateScale``, which works without a change to the param groups.
        slices: Parameter name -> state entries with its factors, for ``growkern.optim.AdamW``.
        master_weights: Parameter of the model -> the copy in higher precision that the optimizer holds in its place.
        merge_groups: True when param groups that a growth split are merged where their factors agree, and empty groups dropped.
    """

    optim: Optimizer
    described: OptimSpec
    split: Mapping[str, float] = field(default_factory=dict[str, float])
    scheduler: object | None = None
    scales: Mapping[str, Scale] = field(default_factory=dict[str, Scale])
    slices: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict[str, Mapping[str, Tensor]]
    )
    master_weights: Masters = field(default_factory=dict[nn.Parameter, nn.Parameter])
    merge_groups: bool = False

    def held(self, params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Tensors that the optimizer holds for the parameters of a model: the masters, or the parameters themselves."""
        return {name: self.master_weights.get(p, p) for name, p in params.items()}


def grow_state(of: OptimTarget, p: nn.Parameter, grown: Mapping[str, object], undo: Undo) -> None:
    """Write the grown state of an existing parameter, and the grown values of its master weights."""
    held, state = of.master_weights.get(p, p), dict(grown)
    if isinstance(value := state.pop(MASTER, None), Tensor):
        grad = state.pop(MASTER_GRAD, None)
        undo.storage(held, value, grad if isinstance(grad, Tensor) else None)
    if state:
        undo.set_dict(of.optim.state[held], of.optim.state[held] | state)


def grow_optimizer(
    plan: GrowthPlan,
    fresh: Tensors,
    of: OptimTarget,
    source: Mapping[str, nn.Parameter],
    target: Mapping[str, nn.Parameter],
    undo: Undo,
    names: Mapping[str, str],
) -> None:
    """Write the rest of the optimizer's target: new parameters, master weights, param groups, schedulers and update scales.

    Args:
        plan: The growth plan.
        fresh: Staged tensors of new parameters.
        of: Target of the optimizer.
        source: Parameters of the source model by name.
        target: Parameters of the target model by name.
        undo: Rollback log of the writes.
        names: Names of the target's parameters in the live model, with its wrappers, by canonical name.
    """
    rows = [row for row in plan.tensors if row.source in of.described.names]
    before, stay = of.held(source), {id(p) for p in target.values()}
    dropped = {id(p) for p in source.values()} - stay
    master_weights = {p: master for p, master in of.master_weights.items() if id(p) not in dropped}
    for row in rows:
        value = fresh.states.get(row.name, {}).pop(MASTER, None)
        fresh.states.get(row.name, {}).pop(MASTER_GRAD, None)
        if row.new and source.get(row.source) in of.master_weights:
            like = of.master_weights[source[row.source]]
            p = target[row.name]
            start = value if isinstance(value, Tensor) else p.detach().to(like.dtype, copy=True)
            master_weights[p] = nn.Parameter(start, requires_grad=like.requires_grad)
    if master_weights.keys() != of.master_weights.keys():
        undo.set_dict(of.master_weights, master_weights)
    after = of.held(target)
    _optimizer(plan, rows, fresh, of, before, after, undo, names)
    law = of.described.law
    decays, rates = (law.decays, law.rates) if law else ((), ())
    split_groups(of.optim, after, of.split, of.scheduler, decays, rates, undo)
    if of.merge_groups:
        join_groups(of.optim, _places(after), of.scheduler, undo)
    _scales(of, before, after, undo)
    check_state(of.optim, of.described)


def _optimizer(
    plan: GrowthPlan,
    rows: Sequence[TensorRow],
    fresh: Tensors,
    of: OptimTarget,
    source: dict[str, nn.Parameter],
    target: dict[str, nn.Parameter],
    undo: Undo,
    live: Mapping[str, str],
) -> None:
    """Write the state of new parameters, and add each new parameter to the param group of its source."""
    optim, law = of.optim, of.described.law
    resets = law is not None and law.resets
    dropped = {id(p) for p in source.values()} - {id(p) for p in target.values()}
    states: dict[Any, Any] = {p: s for p, s in optim.state.items() if id(p) not in dropped}
    groups = {id(p): group for group in optim.param_groups for p in group["params"]}
    if resets and hasattr(optim, "_numel_cache"):
        undo.attribute(optim, "_numel_cache", None)  # LBFGS caches the number of elements
    added: dict[int, list[nn.Parameter]] = {}
    for row in rows:
        p, origin = target[row.name], source[row.source]
        if row.new:
            added.setdefault(id(origin), []).append(p)
        if plan.state == "drop" or row.state == "fresh" or resets:
            states.pop(p, None)
            together = law.together if law and groups.get(id(origin), {}).get("fused") else ()
            kept = optim.state.get(origin, {}) if plan.state != "drop" else {}
            if zeros := {key: torch.zeros_like(p) for key in together if key in kept}:
                states[p] = zeros
        elif fresh.states.get(row.name):
            states[p] = fresh.states[row.name]
        if row.name in of.slices:
            kept: dict[str, Tensor] = {
                k: v for k, v in states.get(p, {}).items() if k not in SLICES
            }
            if "exp_avg" not in kept:
                begin(groups[id(origin)], p, kept)
            states[p] = {**kept, **of.slices[row.name]}
    undo.set_dict(optim.state, states)
    place, before = _places(target), _places(source)
    for group in optim.param_groups:
        params: list[nn.Parameter] = group["params"]
        names = _own_names(group, source)
        grown = [q for p in params for q in (p, *added.get(id(p), [])) if id(q) not in dropped]
        places = [before[id(p)] for p in params if id(p) in before]
        in_order = places == sorted(places) and len(places) == len(params)
        if len(grown) > len(params) and in_order:  # keep model order
            grown.sort(key=lambda p: place[id(p)])
        undo.set_list(params, grown)
        if "param_names" in group:
            new = {id(p): live[name] for name, p in reversed(target.items())}
            undo.set_list(group["param_names"], [names.get(id(p)) or new[id(p)] for p in grown])


def _own_names(group: Mapping[str, Any], source: dict[str, nn.Parameter]) -> dict[int, str]:
    """``param_names`` of a group, by ``id``, that are not names in the model: of other parameters, or chosen by the user."""
    names = {id(p): n for p, n in zip(group["params"], group.get("param_names", []), strict=False)}
    return {i: n for i, n in names.items() if id(source.get(canonical(n))) != i}


def _places(params: dict[str, nn.Parameter]) -> dict[int, int]:
    """Position of every parameter in model order, by ``id``; a tied parameter has its first position."""
    return {id(p): i for i, p in reversed(list(enumerate(params.values())))}


def _scales(
    target: OptimTarget,
    source: Mapping[str, nn.Parameter],
    params: Mapping[str, nn.Parameter],
    undo: Undo,
) -> None:
    """Install or update the ``UpdateScale`` of the optimizer."""
    scales: dict[Tensor, Scale] = {params[n]: scale for n, scale in target.scales.items()}
    before = scale_of(target.optim)
    if before is not None:  # scales of other models' parameters stay
        own = {id(p) for p in [*source.values(), *params.values()]}
        scales |= {p: scale for p, scale in before.scales.items() if id(p) not in own}
    rules = target.described.rules.items()
    orders = {key: (rule.weight, rule.grad) for key, rule in rules if rule is not None}
    if before is not None:
        undo.attribute(before, "orders", orders)
        undo.attribute(before, "scales", scales)
    elif scales:
        undo.rollbacks.append(UpdateScale(target.optim, scales, orders=orders).detach)


def check_state(optim: Optimizer, described: OptimSpec) -> None:
    """Raise CommitError for state of a wrong shape, which corrupts memory under ``fused=True``."""
    rules = described.rules
    for group in optim.param_groups:
        for p in group["params"]:
            for key, value in optim.state.get(p, {}).items():
                if (rule := rules.get(key)) is None and key in rules:
                    continue
                shape = rule.shape(tuple(p.shape)) if rule else tuple(p.shape)
                if isinstance(value, Tensor) and value.dim() and tuple(value.shape) != shape:
                    raise CommitError(
                        f"state {key!r} has shape {tuple(value.shape)}, and its parameter has shape {tuple(p.shape)}"
                    )
