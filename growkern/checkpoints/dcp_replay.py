"""Growth of a model and its optimizer without elements: shapes, param groups, config and history of a checkpoint's target."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from growkern.api import plan as plan_growth
from growkern.checkpoints.dcp_layout import Layout, layout_of
from growkern.checkpoints.dcp_source import Source
from growkern.engine.request import Request
from growkern.engine.run import run
from growkern.errors import (
    CheckpointError,
    PlanError,
    UnsupportedOptimizerError,
    raise_all,
)
from growkern.execution.execute import NOTHING
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import describe_optimizer, optimizers
from growkern.optimizer.lr_scaling import lr_factors
from growkern.optimizer.state_rules import SLICES, Law, Rule
from growkern.optimizer.update_scale import scale_of
from growkern.planning.check import check
from growkern.planning.growth_plan import GrowthPlan

NO_FACTORS = "pass dynamics=None, which leaves learning rates as they are"


@dataclass(frozen=True)
class Replayed:
    """What a growth makes of a model and its optimizer.

    Attributes:
        plan: The plan.
        layout: Keys of the checkpoint.
        model: The grown model on the meta device.
        optim: The grown optimizer; None without one.
        rules: State key -> rule.
        kind: Qualified class name of the optimizer.
        n_params: Number of parameters of the source.
    """

    plan: GrowthPlan
    layout: Layout
    model: nn.Module
    optim: Optimizer | None
    rules: Mapping[str, Rule | None]
    kind: str
    n_params: int


def replay(
    source: Source, model: nn.Module, optim: Optimizer | None, plan: GrowthPlan | None, spec: ModelSpec | None, options: Mapping[str, Any]
) -> Replayed:  # fmt: skip
    """Grow a copy of a model and its optimizer on the meta device, with the param groups of a checkpoint.

    Args:
        source: The checkpoint.
        model: A model of the source's sizes, whose elements are not read; it stays as it is.
        optim: An optimizer of the model, whose state is not read; None to grow weights only.
        plan: The plan; None to plan by ``options``.
        spec: Description of a custom model.
        options: Arguments of ``growkern.plan``.

    Raises:
        GrowthError: The growth cannot be planned, or the checkpoint does not have the tensors of this model and optimizer.
    """
    model, optim = blank(model, optim)
    described = describe(model, spec, values=False)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    layout = layout_of(source, shapes, described.ties)
    _refuse_optimizer(source, layout, optim)
    names = {id(p): name for name, p in model.named_parameters()}
    if optim is not None:
        _fill_groups(source, layout, optim, names)
        _fill_state(source, layout, optim, dict(model.named_parameters()))
    made = plan or plan_growth(model, optim, spec=spec, **options)
    if made.drawn:
        raise PlanError(
            f"{made.depth} initializes new blocks with the code of a live model: load the checkpoint, grow the model by expand_inplace, "
            "and save it; or choose another depth method."
        )
    law, kind = None, ""
    if optim is not None:
        of = describe_optimizer(model, optim, described, drop=made.state == "drop")
        law, kind = of.law, of.kind
        raise_all(
            UnsupportedOptimizerError,
            f"cannot grow the state of {kind} on disk:",
            [*_left_out(source, layout, law)],
        )
        factors = lr_factors(made, law, of) if made.dynamics else {}
        scaled = any(factor != 1 for factor in factors.values())
        if scaled and (layout.flat is None or (law and law.rates)):
            where = (
                "in no param group" if layout.flat is None else "in the state of this optimizer too"
            )
            raise PlanError(
                f"the learning-rate factors of the growth would have to be stored {where}: {NO_FACTORS}."
            )

    def make_plan(now: ModelSpec) -> GrowthPlan:
        check(made, now)
        return made

    n_params = sum(p.numel() for p in model.parameters())
    own = () if optim is None else (optim,)
    drops, split = made.state == "drop", [True] * len(own)
    run(Request(model, own, make_plan, drops, spec=spec, backend=NOTHING, split=split, memory="stage"))  # fmt: skip
    if optim is not None:
        _refuse_factors(optim)
    rules: Mapping[str, Rule | None] = law.grown(made.state) if law else {}
    return Replayed(made, layout, model, optim, rules, kind, n_params)


def blank(model: nn.Module, optim: Optimizer | None) -> tuple[nn.Module, Optimizer | None]:
    """Copy a model and its optimizer to the meta device, without state."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    if optim is not None:
        (optim,) = optimizers(optim)
        memo[id(optim.state)] = defaultdict(dict)
    return copy.deepcopy((model, optim), memo)


def _refuse_optimizer(source: Source, layout: Layout, optim: Optimizer | None) -> None:
    """Raise where only one of checkpoint and caller has an optimizer."""
    some = next((key for own in layout.state.values() for key in own.values()), None)
    if optim is None and some is not None:
        raise CheckpointError(
            f"{source.folder} has optimizer state ({some}), which would be left out: pass optim= (--optim), an optimizer of the class that "
            "trained the model, such as torch.optim.AdamW(model.parameters())."
        )
    if optim is not None and some is None:
        raise CheckpointError(
            f"{source.folder} has no state of an optimizer's parameters (state.NAME.KEY under any prefix); leave optim= (--optim) out to "
            "grow the weights."
        )


def _fill_groups(
    source: Source, layout: Layout, optim: Optimizer, names: Mapping[int, str]
) -> None:
    """Give the param groups of an optimizer the stored options.

    Raises:
        CheckpointError: The optimizer has other param groups than the checkpoint.
    """
    values = source.values([key for keys in layout.groups.values() for key in keys.values()])
    groups = optim.param_groups if layout.groups else []
    owned = [[names[id(p)] for p in group["params"] if id(p) in names] for group in groups]
    wanted = {n for own in owned for n in own} if layout.flat else {str(i) for i, _ in enumerate(groups)}  # fmt: skip
    for index, (group, own) in enumerate(zip(groups, owned, strict=True)):
        stored = [
            {option: values[key] for option, key in layout.groups.get(at, {}).items()}
            for at in (own if layout.flat else [str(index)])
        ]
        listed = stored[0].pop("params", own) if stored else own
        apart = next((i for i, options in enumerate(stored) if not _same(options, stored[0])), None)
        if {*layout.groups} - wanted or listed != own:
            raise CheckpointError(
                f"{source.folder} stores other param groups: group {index} of the optimizer has not the parameters of the stored one; "
                "build the optimizer as in the run that saved the checkpoint."
            )
        if apart is not None:
            raise CheckpointError(
                f"{own[0]} and {own[apart]} are in one param group of the optimizer, and have other options in {source.folder}: build the "
                "optimizer with the param groups of the run that saved the checkpoint (growkern.resume, if a growth has split them)."
            )
        for option, value in stored[0].items() if stored else ():
            *outer, last = option.split(".")
            place = group
            for part in outer:
                place = place.setdefault(part, {})
            place[last] = value


def _same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(bool(left[key] == right[key]) for key in left)


def _fill_state(
    source: Source, layout: Layout, optim: Optimizer, params: Mapping[str, nn.Parameter]
) -> None:
    """Give an optimizer state of the stored shapes and dtypes, without elements."""
    held = {id(p) for group in optim.param_groups for p in group["params"]}
    stray = [
        f"{min(keys.values())}: is state of a parameter that the optimizer does not hold; build the optimizer as in the run."
        for name, keys in layout.state.items()
        if name not in params or id(params[name]) not in held
    ]
    raise_all(CheckpointError, f"{source.folder} has other state than this optimizer:", stray)
    for name, keys in layout.state.items():
        state = optim.state[params[name]]
        for option, key in keys.items():
            if key in source.tensors:
                stored = source.of(key)
                state[option] = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            else:
                state[option] = None


def _left_out(source: Source, layout: Layout, law: Law | None) -> Iterator[str]:
    """Yield a problem for state that grows in memory and not on disk."""
    coded = [
        key
        for keys in layout.state.values()
        for option, key in keys.items()
        if key in source.tensors
        and source.of(key).dtype == torch.uint8
        and not option.startswith("qmap")
    ]
    if coded:
        yield f"{coded[0]}: is stored in 8 bits; load the checkpoint, grow it by expand_inplace, and save it."
    if any(option in SLICES for keys in layout.state.values() for option in keys):
        yield "it has factors per row and column of growkern.optim.AdamW; load the checkpoint, grow it by expand_inplace, and save it."
    if law is not None and law.resets and layout.state:
        yield "its history cannot be grown; pass optim=None on a checkpoint of the model alone."


def _refuse_factors(optim: Optimizer) -> None:
    """Raise PlanError for factors that are not one number per parameter, which param groups cannot express."""
    if scale_of(optim) is not None or any(
        key in SLICES for state in optim.state.values() for key in state
    ):
        raise PlanError(
            "stored param groups cannot express the factors of this growth, which are not one learning rate per parameter: "
            f"{NO_FACTORS}; or load the checkpoint at growth by growkern.dcp.load; or grow the live run by expand_inplace."
        )
