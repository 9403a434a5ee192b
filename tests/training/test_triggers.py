"""An event is due after the observations that its trigger describes, and a schedule refuses events that cannot follow each other."""

import math

import pytest
import torch

from growkern.errors import PlanError
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import At, Event, WhenPlateau, WhenSlope


def observed(event, values, flops=1.0):
    """Return the index of the observation after which the event is due."""
    schedule = GrowthSchedule([event])
    for i, value in enumerate(values):
        schedule.observe(flops=flops, **{event.observes: value})
        if event.due(schedule.counts):
            return i
    return None


PLATEAUS = {
    "falling": (dict(patience=2), [5, 4, 3, 2, 1], None),
    "flat": (dict(patience=2), [5, 4, 4, 4], 3),
    "flat-from-the-start": (dict(patience=3), [1, 1, 1, 1], 3),
    "too-slow": (dict(patience=2, min_delta=0.5), [5, 4.6, 4.4, 4.2, 4.1], 4),
    "equal-to-min-delta": (dict(patience=2, min_delta=1), [5, 4, 4], 2),
    "recovers": (dict(patience=2), [5, 6, 4, 6, 3, 6, 6], 6),
    "nan-says-nothing": (dict(patience=2), [5, math.nan, math.inf, 6, 6], 4),
    "rising": (dict(patience=2, mode="max"), [1, 2, 3, 4], None),
    "accuracy": (dict(patience=2, mode="max", metric="acc"), [0.5, 0.75, 0.75, 0.75], 3),
}


@pytest.mark.parametrize(("options", "values", "expected"), PLATEAUS.values(), ids=PLATEAUS)
def test_a_plateau_is_patience_observations_without_an_improvement(options, values, expected):
    assert observed(WhenPlateau(**options), values) == expected


def test_a_slope_is_the_fall_of_the_loss_over_log_compute():
    event = WhenSlope(tau=0.3, window=4)
    schedule = GrowthSchedule([event])
    due = []

    # loss = 5 - ln(C) / 2 up to C = 16, then 5 - ln(16) / 2 - ln(C / 16) / 10
    for c in [1, 2, 4, 8, 16, 32, 64, 128, 256]:
        bend = min(c, 16)
        loss = 5 - math.log(bend) / 2 - math.log(c / bend) / 10
        schedule.observe(flops=c - schedule.counts.n_flops, loss=torch.tensor(loss))
        due.append(event.due(schedule.counts))
        if c == 8:
            assert event.slope(schedule.counts) == pytest.approx(0.5, rel=1e-5)

    assert event.slope(schedule.counts) == pytest.approx(0.1, rel=1e-5)
    assert due == [False] * 6 + [True] * 3  # the slope over 8, 16, 32 and 64 is below 0.3


ORDERS = {
    "steps": ([At(step=10), At(step=5)], "event 1: step 5 is below the 10 of event 0"),
    "steps-between": ([At(step=10), WhenPlateau(), At(step=5)], "event 2: step 5 is below the 10 of event 0"),
    "tokens": ([At(tokens=2e9), At(tokens=1e9)], "event 1: tokens 1,000,000,000.0 is below"),
    "sizes": (
        [At(step=1, to={"hidden": 64, "layers": 4}), At(step=2, to={"layers": 6}), At(step=3, to={"hidden": 48})],
        "event 2: size hidden 48 is below the 64 of event 0",
    ),
    "sizes-between": (
        [At(step=i, to={"hidden": n}) for i, n in enumerate([64, 48, 56], 1)],
        "event 1: size hidden 48 is below the 64 of event 0.*\n  event 2: size hidden 56 is below the 64 of event 1",
    ),
    "both": (
        [At(step=2, to={"hidden": 64}), At(step=1, to={"hidden": 48})],
        r"size hidden 48 is below the 64 of event 0.*\n  event 1: step 1 is below the 2",
    ),
    "empty": ([], "expected At, WhenPlateau or WhenSlope events, in a list, got none"),
    "no-event": ([{"step": 3}], "got dict"),
}  # fmt: skip
ARGUMENTS = {
    "neither": (At, {}, "pass either step or tokens"),
    "both": (At, dict(step=1, tokens=1), "pass either step or tokens"),
    "zero": (At, dict(step=0), "a number above 0"),
    "nan": (At, dict(tokens=math.nan), "a number above 0"),
    "half": (At, dict(step=2.5), "pass a whole number"),
    "patience": (WhenPlateau, dict(patience=0), "patience >= 1"),
    "min_delta": (WhenPlateau, dict(min_delta=-1), "min_delta >= 0"),
    "mode": (WhenPlateau, dict(mode="best"), "'min' or 'max'"),
    "tau": (WhenSlope, dict(tau=math.nan), "a finite tau"),
    "window": (WhenSlope, dict(tau=1, window=1), "a window of at least 2"),
}


@pytest.mark.parametrize(("events", "match"), ORDERS.values(), ids=ORDERS)
def test_events_that_cannot_follow_each_other_are_refused(events, match):
    with pytest.raises(PlanError, match=match):
        GrowthSchedule(events)


@pytest.mark.parametrize(("kind", "options", "match"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_trigger_that_cannot_fire_is_refused(kind, options, match):
    with pytest.raises(PlanError, match=match):
        kind(**options)


def test_events_are_frozen_and_abstract():
    with pytest.raises(AttributeError):
        At(step=1).step = 2
    with pytest.raises(TypeError):
        Event()
