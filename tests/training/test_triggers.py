"""An event is due after the observations that its trigger describes, and a schedule refuses events that cannot follow each other."""

import math

import pytest
import torch

from growkern.errors import PlanError
from growkern.training.schedule import GrowthSchedule
from growkern.training.slope import WhenSlope
from growkern.training.triggers import At, Event, WhenPlateau


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


def fires_at(event: WhenSlope, computes: list[float], losses: list[float]) -> int | None:
    """Return the index of the first observation at which the event is due."""
    schedule = GrowthSchedule([event])
    for i, (c, loss) in enumerate(zip(computes, losses, strict=True)):
        schedule.observe(flops=c - schedule.counts.n_flops, eval_loss=torch.tensor(loss))
        if event.due(schedule.counts):
            return i
    return None


def test_the_slope_of_a_power_law_is_its_exponent():
    event = WhenSlope(tau=0.01, window=5)
    schedule = GrowthSchedule([event])
    computes = [1e18 * 1.1**i for i in range(20)]
    for c in computes:
        schedule.observe(flops=c - schedule.counts.n_flops, eval_loss=1.7 * c**-0.05)
        slope = event.slope(schedule.counts)
        assert slope is None or slope == pytest.approx(-0.05, rel=1e-9, abs=0)

    assert event.slope(schedule.counts) is not None
    assert "-0.05" in event.progress(schedule.counts)


def test_the_rule_fires_where_a_plain_search_of_the_whole_curve_finds_it():
    """Log-log slope of the mean of 5 losses, first differences, searched after the steepest point, as the paper does it."""
    rising = [1.15**i for i in range(60)]
    losses = [4.0 - 0.2 * i if i < 4 else 3.2 * (c / rising[4]) ** -(0.15 * 0.93**i) for i, c in enumerate(rising)]  # fmt: skip
    means = [sum(losses[i - 4 : i + 1]) / 5 for i in range(4, 60)]
    slopes = [
        (math.log10(means[i]) - math.log10(means[i - 1])) / (math.log10(rising[i + 4]) - math.log10(rising[i + 3]))
        for i in range(1, len(means))
    ]  # fmt: skip
    steepest = slopes.index(min(slopes))
    expected = next(i for i in range(steepest + 1, len(slopes)) if slopes[i] > -0.0475) + 5

    assert fires_at(WhenSlope(tau=0.0475), rising, losses) == expected
    assert expected < 59


def test_a_bump_before_the_curve_was_steep_or_in_the_warm_up_fires_nothing():
    rising = [1.2**i for i in range(40)]
    flat_first = [3.0 + 0.01 * min(i, 5) for i in range(10)]
    steep = [3.05 * (c / rising[9]) ** -0.1 for c in rising[10:]]
    assert fires_at(WhenSlope(tau=0.05, window=1), rising, flat_first + steep) is None

    bump = [5.0 - i for i in range(3)] + [3.5] * 4
    after = [3.5 * (c / rising[6]) ** -0.1 for c in rising[7:]]
    assert fires_at(WhenSlope(tau=0.05, window=1), rising, bump + after) == 3
    assert fires_at(WhenSlope(tau=0.05, window=1, warmup=7), rising, bump + after) is None


def test_losses_that_have_no_logarithm_give_no_slope():
    assert fires_at(WhenSlope(tau=0.05, window=1), [1, 2, 3, 4, 5], [2.0, 1.0, 0.0, -1.0, -2.0]) is None  # fmt: skip
    assert fires_at(WhenSlope(tau=0.05, window=1), [1, 1, 1, 1, 1], [2.0, 1.0, 0.5, 0.4, 0.39]) is None  # fmt: skip


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
    "warmup": (WhenSlope, dict(tau=1, warmup=-1), "a warmup of at least 0"),
    "no tau": (WhenSlope, dict(tau=0), "tau above 0"),
    "rewind": (At, dict(step=1, rewind=0.5), "a finite rewind from 1"),
    "rewarm": (At, dict(step=1, rewarm=-1), "a rewarm from 0"),
    "tau": (WhenSlope, dict(tau=math.nan), "a finite tau"),
    "window": (WhenSlope, dict(tau=1, window=0), "a window of at least 1"),
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
