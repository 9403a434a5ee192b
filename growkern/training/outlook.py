"""The run to come, for ``schedule.plot()``: sizes and FLOPs between the growths of a schedule, without growing the model."""

from collections.abc import Callable, Iterator, Sequence
from math import inf, isfinite
from typing import TYPE_CHECKING

from torch import nn

from growkern.errors import PlanError
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.training.rehearsal import grown_copies
from growkern.training.trains import ALL, Trains, flops_per_token
from growkern.training.triggers import At, Event, target_of

if TYPE_CHECKING:
    from growkern.pictures.figure import Picture
    from growkern.training.schedule import GrowthSchedule

BEYOND = (
    1.15  # end of the picture over the step of the last event, where no number of steps is given
)


def costs(
    model: nn.Module, events: Sequence[Event], trains: Trains | None, spec_of: Callable[[nn.Module], ModelSpec | None]
) -> Iterator[tuple[int, float]]:  # fmt: skip
    """Yield the number of parameters and the FLOPs of a token, before the first event and after each event.

    Args:
        model: Model before the first event.
        events: Events in order.
        trains: Who trains before the first event; None for everything.
        spec_of: Function from a model to its description, or to None for a model that growkern describes.

    Raises:
        GrowthError: An event cannot happen.
    """
    places = grown_copies(model, events, spec_of)
    chosen = [trains or ALL, *(event.trains for event in events)]
    for who, (place, new_blocks) in zip(chosen, places, strict=True):
        described = describe(place, spec_of(place), values=False)
        flops = [
            flops_per_token(place, described, one) for one in who.choices(described, new_blocks)
        ]
        yield sum(p.numel() for p in place.parameters()), sum(flops) / len(flops)


def starts_of(
    events: Sequence[Event], now: float, end: float, per_step: float | None
) -> list[tuple[float, float]]:
    """Return the first and the last step at which each event may fire; the two are equal where a fixed step decides.

    Args:
        events: Events that have not fired, in order.
        now: Step at the start.
        end: Last step of the run.
        per_step: Tokens of a step; None where they are not known.
    """
    fixed = [_step(event, per_step) for event in events]
    starts = list[tuple[float, float]]()
    for i, step in enumerate(fixed):
        low = max(now, starts[-1][0] if starts else now)
        high = next((later for later in fixed[i:] if later is not None), end)
        start = (low, high) if step is None else (step, step)
        starts.append((max(low, start[0]), max(low, start[1])))
    return starts


def _step(event: Event, per_step: float | None) -> float | None:
    """Return the step at which an event fires; None where it depends on a metric, or on a number of tokens that is not known."""
    if not isinstance(event, At):
        return None
    if event.step is not None:
        return event.step
    return event.tokens / per_step if event.tokens is not None and per_step else None


def outlook(
    schedule: "GrowthSchedule", model: nn.Module | None, total_steps: int | None, tokens_per_step: float | None,
    spec_of: Callable[[nn.Module], ModelSpec | None] | None,
) -> "Picture":  # fmt: skip
    """Draw the run to come; see ``GrowthSchedule.plot``."""
    attachment, counts, events = schedule.attachment, schedule.counts, schedule.ahead
    if attachment is not None:
        model, spec_of = model or attachment.model, spec_of or attachment.spec_of
    if model is None:
        raise PlanError("cannot draw this schedule: pass the model, or attach the schedule first.")
    if tokens_per_step is None and counts.n_tokens and counts.n_steps:
        tokens_per_step = counts.n_tokens / counts.n_steps
    if tokens_per_step is not None and not 0 < tokens_per_step < inf:
        raise PlanError(f"cannot draw this schedule: tokens_per_step={tokens_per_step}; pass a finite number above 0.")  # fmt: skip
    steps = [_step(event, tokens_per_step) for event in events]
    last = max([float(counts.n_steps), *(step for step in steps if step is not None)])
    if total_steps is None and steps and steps[-1] is None:
        raise PlanError(
            f"cannot draw this schedule: no fixed step decides about the growth to {target_of(events[-1])} ({events[-1].trigger}); pass "
            "total_steps=, the end of the window in which it may happen."
        )
    end = BEYOND * max(last, 1.0) if total_steps is None else float(total_steps)
    if not (isfinite(end) and last < end):
        raise PlanError(
            f"cannot draw this schedule: it has an event at step {last:,.0f}, and total_steps={total_steps}; pass a larger number."
        )
    values = [*costs(model, events, schedule.who_trains, spec_of or (lambda _: None))]
    now = float(counts.n_steps)
    starts = [(now, now), *starts_of(events, now, end, tokens_per_step)]
    return run_picture("growth schedule", [None, *events], starts, values, end, tokens_per_step)


def run_picture(
    title: str, events: Sequence[Event | None], starts: Sequence[tuple[float, float]], values: Sequence[tuple[int, float]], end: float,
    per_step: float | None,
) -> "Picture":  # fmt: skip
    """Draw a run.

    Args:
        title: Title.
        events: None for the start, and the events.
        starts: First and last step at which each part of the run may start.
        values: Number of parameters, and FLOPs of a token, of each part.
        end: Last step.
        per_step: Tokens of a step; None where they are not known.
    """
    from growkern.pictures.schedule import Leg, draw

    legs = [
        Leg(start, n, flops * (per_step or 1.0), _label(event, *start) if event else "")
        for event, start, (n, flops) in zip(events, starts, values, strict=True)
    ]  # fmt: skip
    return draw(title, legs, end, "FLOPs per step" if per_step else "FLOPs per token")


def _label(event: Event, low: float, high: float) -> str:
    return f"{target_of(event)}: {event.trigger if low < high else f'step {low:,.0f}'}"
