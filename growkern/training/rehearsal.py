"""Plan all events of a schedule when it is attached: a growth that cannot happen is refused now, not hours later at its step."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from growkern.api import expand_inplace, plan
from growkern.commit.commit import copied, shared_by
from growkern.commit.frozen import refuse_lbfgs, refuse_reentrant_blocks, trained_under
from growkern.distributed.shards import fully_sharded, has_shards, without_fsdp
from growkern.engine.live_objects import averages_of, is_average, refuse_stale_references
from growkern.engine.report import GrowthReport
from growkern.engine.sharded import refuse_plan
from growkern.errors import CommitError, GrowthError, PlanError, UnsupportedModelError
from growkern.execution.execute import NOTHING, unavailable
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.model.tracing.traced import TracedSpec
from growkern.optimizer.describe import describe_optimizers
from growkern.planning.build import unsaved
from growkern.planning.sizes import Target
from growkern.support.live_registry import Live, in_pass
from growkern.support.names import named_buffers, named_parameters
from growkern.training.ramp import of_run, width_of
from growkern.training.rewind import unable
from growkern.training.trains import Trains
from growkern.training.triggers import Event, target_of

if TYPE_CHECKING:
    from growkern.training.attachment import Attachment

OWN_STEPS = "Rprop", "ASGD"  # optimizers that keep step sizes of their own


def problems(attachment: "Attachment") -> list[str]:
    """Return why the growths of an attached schedule would fail: events in order, optimizers, and averages that would not grow."""
    model, found = attachment.model, [*_of_optimizers(attachment), *_averages(attachment)]
    schedule, place = attachment.schedule, model
    new_blocks: Sequence[str] = schedule.new_blocks
    found += [*_not_rewound(attachment), *_not_rewarmed(attachment), *of_run(attachment)]
    try:
        if any(
            who and not who.everything
            for who in (schedule.trains, *(e.trains for e in schedule.ahead))
        ):
            refuse_reentrant_blocks(model)
    except GrowthError as error:
        return [*found, f"trains=: {error}"]
    if not schedule.fired and schedule.trains is not None:
        found += _unable(schedule.trains, attachment, model, (), "from the start")
    for event in schedule.ahead:
        what = f"{target_of(event)} at {event.trigger}"
        try:
            spec = attachment.spec_of(place)
        except Exception:  # the user's function reads values of the model, which a copy lacks
            return found
        try:
            described = describe(place, spec, values=place is model)
            if event.to is None:
                found += _unable(event.trains, attachment, place, new_blocks, what)
                continue
            if place is model and _reached(event, described):
                continue
            place = _twin(model) if place is model else place
            traced = described if isinstance(described, TracedSpec) else spec
            report = _grown(place, event, event.to, traced, model)
            if event.ramp:
                describe(place, attachment.spec_of(place), values=False)
        except GrowthError as error:
            copied_wrong = isinstance(error, CommitError)  # a part of the model cannot be copied
            of_another = place is not model and isinstance(error, UnsupportedModelError)
            if copied_wrong or (of_another and not isinstance(attachment.options.get("spec"), ModelSpec)):  # fmt: skip
                return found  # such events are planned at their steps
            return [*found, f"{what}: {error}"]
        new_blocks = report.new_blocks
        found += [f"{what}: {why}" for why in unsaved(described, report.target_sizes)]
        found += _unable(event.trains, attachment, place, new_blocks, what)
    return found


def grown_copies(
    model: nn.Module, events: Sequence[Event], spec_of: Callable[[nn.Module], ModelSpec | None]
) -> Iterator[tuple[nn.Module, Sequence[str]]]:
    """Yield a copy of a model without values, as it is at first and after each event, and the blocks that the last growth added.

    Raises:
        GrowthError: An event cannot happen.
    """
    place, new_blocks = _twin(model), tuple[str, ...]()
    yield place, new_blocks
    for event in events:
        if event.to is not None:
            new_blocks = _grown(place, event, event.to, spec_of(place), model).new_blocks
        yield place, new_blocks


def _grown(
    model: nn.Module, event: Event, to: Target, spec: ModelSpec | None, live: nn.Module
) -> GrowthReport:
    """Grow a copy without values of a live model, unless the shards of the live model cannot grow so."""
    width = width_of(event, model, spec)
    with torch.no_grad():
        if has_shards(live):
            made = plan(
                model, to=to, width=width, depth=event.depth, state=event.state, dynamics=event.dynamics, spec=spec, seed=0
            )  # fmt: skip
            described = describe(model, spec, values=False)
            refuse_plan(live, described, made, fully_sharded(live))
        return expand_inplace(
            model, to=to, width=width, depth=event.depth, state=event.state, dynamics=event.dynamics, spec=spec, seed=0, ema=(),
            backend=NOTHING,
        )  # fmt: skip


def _not_rewound(attachment: "Attachment") -> Iterator[str]:
    """Yield why schedulers cannot follow the events that rewind them."""
    first = next((event for event in attachment.schedule.ahead if event.rewind is not None), None)
    if first is None:
        return
    if not attachment.schedulers:
        yield f"rewind={first.rewind} at {first.trigger}: no scheduler was passed; pass the one that drives the optimizer."
    for kind in unable(attachment.schedulers):
        yield (
            f"rewind={first.rewind} at {first.trigger}: the rates of a {kind} do not follow from its position alone; use a LambdaLR "
            "(transformers' schedules are), CosineAnnealingLR or OneCycleLR."
        )


def _not_rewarmed(attachment: "Attachment") -> Iterator[str]:
    """Yield why the rates of optimizers cannot rise from 0 after the events with ``rewarm``."""
    first = next((event for event in attachment.schedule.ahead if event.rewarm), None)
    if first is None:
        return
    for optim in attachment.optims:
        kind, what = type(optim).__name__, f"rewarm={first.rewarm} at {first.trigger}"
        if any(group.get("lr") is None for group in optim.param_groups):
            yield f"{what}: this {kind} has no learning rate (lr=None); pass one (relative_step=False), or leave rewarm out."
        if kind in OWN_STEPS:
            yield f"{what}: the steps of {kind} do not follow its learning rate; leave rewarm out."


def unheld(attachment: "Attachment") -> list[str]:
    """Return the names of parameters that require gradients and are in none of the optimizers."""
    groups = [group for optim in attachment.optims for group in optim.param_groups]
    held = {p for group in groups for p in group["params"]}
    masters = attachment.options.get("master_weights") or {}
    params = named_parameters(attachment.model)
    return [name for name, p in params if p.requires_grad and masters.get(p, p) not in held]


def _unable(
    trains: Trains, attachment: "Attachment", model: nn.Module, new_blocks: Sequence[str], what: str
) -> list[str]:
    """Return why a choice of who trains is not possible in a model, as far as the model can be described."""
    if trains.everything:
        return []
    try:
        spec = describe(model, attachment.spec_of(model), values=False)
    except Exception:  # the user's function reads values of the model, which a copy lacks
        return []
    groups = [group for optim in attachment.optims for group in optim.param_groups]
    held = {p for group in groups for p in group["params"]}
    masters = attachment.options.get("master_weights") or {}
    try:
        for chosen in trains.choices(spec, new_blocks):
            trained = trained_under(model, chosen)
            if model is attachment.model and not any(masters.get(p, p) in held for p in trained):
                return [f"{what}: none of the parameters that would train is in the optimizer."]
        refuse_lbfgs(attachment.optims)
    except PlanError as error:
        return [f"{what}: {error}"]
    return []


def problems_after_a_step(attachment: "Attachment") -> list[str]:
    """Return what only the first step tells: state without a rule, optimizers that step inside a backward, sizes that the model has."""
    found = [*_of_optimizers(attachment)]
    if not attachment.deferred and (running := in_pass(attachment.model)):
        found.append(
            f"an optimizer steps inside {running}, where no growth can happen; pass deferred=True, and call grow() of the attachment "
            "between steps."
        )
    try:
        spec = describe(attachment.model, attachment.spec_of(attachment.model))
    except GrowthError as error:
        return [*found, str(error)]
    found += [
        f"{target_of(event)} at {event.trigger}: the model has these sizes already, or larger ones; name larger sizes, or load the "
        "state of the schedule that grew it."
        for event in attachment.schedule.ahead
        if _reached(event, spec)
    ]
    return found


def _reached(event: Event, spec: ModelSpec) -> bool:
    """True when a model has the sizes of an event, as a model that is about to load a checkpoint may."""
    return isinstance(event.to, Mapping) and all(
        isinstance(n, int) and n <= spec.sizes.get(name, 0) for name, n in event.to.items()
    )


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model without values; of a sharded model, one that is not sharded."""
    tensors: Any = [*named_parameters(model), *named_buffers(model)]
    values = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors}
    with without_fsdp(model):
        return copied(model, "", values, shared_by(model))


def _of_optimizers(attachment: "Attachment") -> Iterator[str]:
    """Yield why the optimizers, or other live objects, would make the first growth fail."""
    options: Mapping[str, Any] = attachment.options
    masters, rules = options.get("master_weights"), options.get("state_rules")
    model, optims = attachment.model, attachment.optims
    drop = all(event.state == "drop" for event in attachment.schedule.ahead)
    try:
        spec = describe(model, attachment.spec_of(model))
        for described in describe_optimizers(
            model, optims, spec, drop=drop, state_rules=rules, master_weights=masters
        ):
            if described.law is None and not drop:
                yield (
                    f"the law of {described.kind} is not known, so its state cannot grow: say how each key grows by "
                    "state_rules={\"key\": order in the gradient} ({} for an optimizer without state), or grow with state='drop'."
                )
        if (backend := options.get("backend")) not in (None, NOTHING):
            yield from unavailable(backend, next(model.parameters()).device)
        averages = (
            averages_of(model, options.get("ema")) if options.get("ema") is not None else None
        )
        refuse_stale_references(model, optims, Live.now(), averages, masters)
    except GrowthError as error:
        yield str(error)


def _averages(attachment: "Attachment") -> Iterator[str]:
    """Yield averages of the model's weights that are no modules, which no growth would find."""
    if attachment.options.get("ema") is not None:
        return
    shapes = [p.shape for p in attachment.model.parameters()]
    if _lists_of(shapes):
        gc.collect()  # what is left is alive
    for name in _lists_of(shapes):
        yield (
            f"{name} is an average of the model's weights, which would not grow: use torch.optim.swa_utils.AveragedModel and pass it as "
            "ema=, or pass ema=() and build the average anew after each growth."
        )


def _lists_of(shapes: list[torch.Size]) -> list[str]:
    """Return the names of attributes of averages, other than modules, that list tensors of these shapes."""
    things: list[Any] = gc.get_objects()
    kinds: set[type] = {
        kind
        for kind in set(map(type, things))
        if is_average(kind) and not issubclass(kind, nn.Module)
    }
    found = list[str]()
    averages = [thing for thing in things if type(thing) in kinds] if kinds else []
    for thing in averages:
        held: dict[str, Any] = getattr(thing, "__dict__", {})
        for name, value in held.items():
            several: list[Any] = [*value] if isinstance(value, list | tuple) else []
            if several and [getattr(t, "shape", None) for t in several] == shapes:
                found.append(f"{type(thing).__name__}.{name}")
    return found
