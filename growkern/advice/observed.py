"""What an attached ``GrowthSchedule`` knows of its run: sizes, curve, FLOPs, and what its next event grows."""

from dataclasses import dataclass
from math import prod

from growkern.advice.choice import recipe_of
from growkern.advice.scaling import Curve
from growkern.errors import PlanError, raise_all
from growkern.recipes.recipe import Recipe
from growkern.support.names import named_parameters
from growkern.training.schedule import GrowthSchedule


@dataclass(frozen=True)
class Observed:
    """Inputs of the advice that a schedule, or a curve with its sizes, provides; None where a curve says nothing."""

    n_params: tuple[float, float]
    flops_per_token: tuple[float, float]
    curve: Curve
    spent: float | None = None
    kind: str | None = None
    recipe: Recipe | None = None
    notes: tuple[str, ...] = ()


def observed(schedule: GrowthSchedule) -> Observed:
    """Return the inputs of the advice from an attached schedule.

    Raises:
        PlanError: The schedule is not attached, has no remaining event, or has observed no tokens.
    """
    attachment, event, counts = schedule.attachment, schedule.next_event, schedule.counts
    problems = [
        text
        for wrong, text in (
            (
                attachment is None,
                "the schedule is not attached to a model: call schedule.attach(model, optim) first.",
            ),
            (
                event is None,
                "all events of the schedule have fired: add an event, or pass a curve with source= and target=.",
            ),
            (
                not counts.n_tokens,
                "the schedule has observed no tokens: call schedule.observe(tokens=..., loss=...) with every step.",
            ),
        )
        if wrong
    ]
    raise_all(
        PlanError, f"cannot advise on this schedule of {len(schedule.events)} events:", problems
    )
    assert attachment is not None and event is not None
    plan = attachment.make_plan(event)
    names = {name for name, _ in named_parameters(attachment.model)}
    target = sum(prod(plan.shapes(row)[1]) for row in plan.tensors if row.source in names)
    source = attachment.n_params
    each = (
        counts.n_flops / counts.n_tokens if counts.n_flops and not schedule.fired else 6.0 * source
    )
    grown = {name for name, size in plan.source_sizes.items() if plan.target_sizes[name] > size}
    kind = "both" if {"layers"} < grown else "depth" if "layers" in grown else "width"
    notes = (
        "how a model that has grown before differs from one that has not: its curve since then is read as that of a run from scratch.",
    )
    return Observed(
        (source, target), (each, each * target / source), counts.curve.read(), counts.n_flops, kind, recipe_of(event, kind),
        notes if schedule.fired else (),
    )  # fmt: skip
