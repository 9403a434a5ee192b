"""Triggers of growth, as data. An event reads counts and observations, and never a model."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isfinite
from typing import Any, Literal

from growkern.errors import GrowthError, PlanError, raise_all
from growkern.model.spec import ModelSpec
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.growth_record import read
from growkern.planning.options import DYNAMICS, STATES
from growkern.planning.sizes import Target, resolve_sizes, wrong_target
from growkern.support.argument_types import wrong_fields
from growkern.training.loss_curve import LossCurve
from growkern.training.trains import ALL, Trains


@dataclass
class Counts:
    """Counts and observations that triggers read.

    Attributes:
        n_steps: Optimizer steps that changed weights.
        n_tokens: Tokens reported.
        n_flops: FLOPs reported, or 6 x tokens x parameters.
        n_flops_of_size: FLOPs that a run of the present size would have spent up to the present position of the learning-rate schedule.
        points: Pairs of ``n_flops_of_size`` and value of the next event's metric since the previous event, as ``Event.keep`` selects them.
        curve: Observed ``loss`` over tokens since the last growth, for ``growkern.advise``.
    """

    n_steps: int = 0
    n_tokens: float = 0.0
    n_flops: float = 0.0
    n_flops_of_size: float = 0.0
    points: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    curve: LossCurve = field(default_factory=LossCurve)


@dataclass(frozen=True, kw_only=True)
class Event(ABC):
    """One growth of a schedule; a subclass defines the trigger. ``At`` says what its fields are."""

    to: Target | None = "2x"
    width: WidthMethod | None = None
    depth: DepthMethod | None = None
    state: str = "exact"
    dynamics: str | None = "mup"
    seed: int | None = None
    trains: Trains = ALL
    rewind: float | None = None
    rewarm: int = 0
    ramp: int = 0

    def __post_init__(self) -> None:
        wrong = [] if self.to is None else [*wrong_target(self.to)]
        raise_all(PlanError, f"{type(self).__name__}:", wrong or [*wrong_fields(self)])
        if (self.rewind is not None and not 1 <= self.rewind < inf) or self.rewarm < 0:
            raise PlanError(
                f"{type(self).__name__}(rewind={self.rewind}, rewarm={self.rewarm}): pass a finite rewind from 1, and a rewarm from "
                "0."
            )
        if self.ramp < 0 or (self.ramp and self.to is None):
            raise PlanError(
                f"{type(self).__name__}(to={self.to!r}, ramp={self.ramp}): pass a number of steps from 0, and a growth to ramp."
            )

    @property
    def observes(self) -> str | None:
        """Name of the metric that the trigger reads; None if the trigger reads no metric."""
        return None

    @property
    def counts_tokens(self) -> bool:
        """True when the trigger needs token counts."""
        return False

    def silent(self, counts: Counts) -> bool:
        """Return True if the trigger counts tokens or FLOPs and none were reported."""
        return False

    @property
    @abstractmethod
    def trigger(self) -> str:
        """The trigger, as text."""

    @abstractmethod
    def due(self, counts: Counts) -> bool:
        """Return True if the event has to fire now."""

    @abstractmethod
    def progress(self, counts: Counts) -> str:
        """Describe the progress toward the trigger, as text."""

    def keep(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Return the observations that the trigger still needs."""
        return points


@dataclass(frozen=True, kw_only=True)
class At(Event):
    """Grow after a number of steps or tokens.

    Attributes:
        step: Number of optimizer steps that changed weights, from the start of the run.
        tokens: Number of tokens, as counted by ``schedule.observe(tokens=...)``.
        to: See ``expand_inplace``; None for an event that grows nothing, and changes who trains.
        width: See ``expand_inplace``.
        depth: See ``expand_inplace``.
        state: See ``expand_inplace``.
        dynamics: See ``expand_inplace``.
        seed: Seed of the symmetry-breaking noise; None for the number of previous growths, so that no two growths share a seed.
        trains: Who trains from this event on, until the next event; see ``growkern.trains``.
        rewind: The schedulers that were passed to ``attach`` go on from their position divided by this number; None to leave them.
        rewarm: Number of steps after the event in which the learning rates rise linearly from 0 to the schedulers' rates.
        ramp: Number of steps over which the mask of what is new rises from ``1 / ramp`` to 1 (MSG); 0 for no mask. The growth draws all
            new weights, and takes ``width=width.CopyAndPad(norm="corrected")``, or a depth method that copies or draws blocks. Events
            that grow wait until the ramp has ended. See ``growkern.training.ramp``.

    Raises:
        PlanError: Neither or both of ``step`` and ``tokens`` are given, the number is not positive, or ``step`` is not whole.

    Example:
        >>> event = growkern.At(step=1000, to={"hidden": 1024})
        >>> print(growkern.GrowthSchedule([event]))
        event  to           trigger     state
        -----  -----------  ----------  ------------------------
            0  hidden=1024  step 1,000  waiting: step 0 of 1,000
    """

    step: float | None = None
    tokens: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in (self.step, self.tokens) if n is not None]
        if len(given) != 1 or not given[0] > 0 or not isfinite(given[0]):
            raise PlanError(
                f"At(step={self.step}, tokens={self.tokens}): pass either step or tokens, as a number above 0."
            )
        if self.step is not None and int(self.step) != self.step:
            raise PlanError(
                f"At(step={self.step}): pass a whole number; nearest: {round(self.step)}."
            )

    @property
    def counts_tokens(self) -> bool:
        """True when the trigger needs token counts."""
        return self.tokens is not None

    def silent(self, counts: Counts) -> bool:
        """Return True if the trigger counts tokens or FLOPs and none were reported."""
        return self.tokens is not None and counts.n_tokens == 0

    @property
    def trigger(self) -> str:
        """The trigger, as text."""
        return f"{self.tokens:,.0f} tokens" if self.tokens is not None else f"step {self.step:,}"

    def due(self, counts: Counts) -> bool:
        """Return True if the event has to fire now."""
        if self.tokens is not None:
            return counts.n_tokens >= self.tokens
        return self.step is not None and counts.n_steps >= self.step

    def progress(self, counts: Counts) -> str:
        """Describe the progress toward the trigger, as text."""
        if self.tokens is not None:
            return f"{counts.n_tokens:,.0f} of {self.tokens:,.0f} tokens"
        return f"step {counts.n_steps:,} of {self.step:,}"


@dataclass(frozen=True, kw_only=True)
class WhenPlateau(Event):
    """Grow when a metric has not improved for ``patience`` observations; counting restarts after the previous event.

    Attributes:
        metric: Name under which ``schedule.observe`` gets the metric.
        patience: Number of consecutive observations without an improvement.
        min_delta: Difference that an improvement has to exceed.
        mode: ``"min"``: a smaller value is better. ``"max"``: a larger value is better.

    Args:
        to, width, depth, state, dynamics, seed, trains, rewind, rewarm, ramp: See ``At``.

    Raises:
        PlanError: ``patience`` is below 1, ``min_delta`` is negative, or ``mode`` is unknown.

    Example:
        >>> event = growkern.WhenPlateau(metric="eval_loss", patience=5, min_delta=0.01, to="1.5x")
        >>> print(growkern.GrowthSchedule([event]))
        event  to    trigger                                             state
        -----  ----  --------------------------------------------------  ------------------------------------
            0  1.5x  eval_loss (min) not better by more than 0.01 for 5  waiting: no 'eval_loss' observed yet

    Reference:
        ``torch.optim.lr_scheduler.ReduceLROnPlateau``, which acts one observation later; ``min_delta`` is its ``threshold`` with
        ``threshold_mode="abs"``.
    """

    metric: str = "loss"
    patience: int = 10
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience < 1 or not self.min_delta >= 0 or self.mode not in ("min", "max"):
            raise PlanError(
                f"WhenPlateau(patience={self.patience}, min_delta={self.min_delta}, mode={self.mode!r}): "
                "pass patience >= 1, min_delta >= 0, and mode 'min' or 'max'."
            )

    @property
    def observes(self) -> str | None:
        """Name of the metric that the trigger reads."""
        return self.metric

    @property
    def trigger(self) -> str:
        """The trigger, as text."""
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return f"{self.metric} ({self.mode}) not better{by} for {self.patience:,}"

    def keep(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Return the best observation and all later observations."""
        gain = (points[0][1] - points[-1][1]) * (1 if self.mode == "min" else -1)
        return points[-1:] if gain > self.min_delta else points

    def due(self, counts: Counts) -> bool:
        """Return True if the event has to fire now."""
        return len(counts.points) > self.patience

    def progress(self, counts: Counts) -> str:
        """Describe the progress toward the trigger, as text."""
        if not counts.points:
            return f"no {self.metric!r} observed yet"
        return (
            f"best {counts.points[0][1]:.4g}, {len(counts.points) - 1:,} of {self.patience:,} since"
        )


def target_of(event: Event) -> str:
    """Return the target sizes of an event, and who trains from then on, as text."""
    sizes = event.to.items() if isinstance(event.to, Mapping) else ()
    parts = (
        [event.to] if isinstance(event.to, str) else [f"{name}={value}" for name, value in sizes]
    )
    if event.to is None or not event.trains.everything:
        parts.append(f"trains {event.trains}")
    if event.ramp:
        parts.append(f"ramp={event.ramp}")
    return ", ".join(parts)


def disorder(events: Sequence[Event]) -> list[str]:
    """Return the reasons why events cannot be scheduled: unknown options, or steps, tokens or sizes that decrease."""
    listed: Any = events if isinstance(events, Sequence) else (events,)  # pyright: ignore[reportUnnecessaryIsInstance]
    if listed is not events or not events or not all(isinstance(e, Event) for e in listed):
        kinds = ", ".join(type(event).__name__ for event in listed)
        return [f"expected At, WhenPlateau or WhenSlope events, in a list, got {kinds or 'none'}."]
    problems: list[str] = [
        f"event {i}: unknown {name}={value!r}; pass {', '.join(map(repr, known))}."
        for i, event in enumerate(events)
        for name, value, known in (
            ("state", event.state, STATES),
            ("dynamics", event.dynamics, DYNAMICS),
        )
        if value not in known
    ]
    reached: dict[
        str, tuple[int, float]
    ] = {}  # quantity -> last event that names the quantity, and the largest number
    for i, event in enumerate(events):
        named: dict[str, object] = dict(event.to) if isinstance(event.to, Mapping) else {}
        numbers: list[tuple[str, object]] = [(f"size {k}", n) for k, n in named.items()]
        if isinstance(event, At):
            numbers += [("step", event.step), ("tokens", event.tokens)]
        for what, n in numbers:
            if isinstance(n, int | float):
                before, least = reached.get(what, (0, n))
                if n < least:
                    problems.append(
                        f"event {i}: {what} {n:,} is below the {least:,} of event {before}; name at least {least:,}, or reorder."
                    )
                reached[what] = i, max(n, least)
    return [*problems, *_inside_ramps(events)]


def _inside_ramps(events: Sequence[Event]) -> Iterator[str]:
    """Yield a problem for each growth at a step at which the ramp of the growth before it has not ended."""
    growths = [(i, event) for i, event in enumerate(events) if isinstance(event, At) and event.to]
    for (before, ramped), (i, event) in pairwise(growths):
        end = (ramped.step or 0) + ramped.ramp - 1
        if ramped.ramp and ramped.step and event.step and event.step < end:
            yield (
                f"event {i}: at step {event.step:,}, the ramp of event {before} has not ended; name at least step {end:,}, or a shorter "
                "ramp."
            )


def unknown_sizes(events: Sequence[Event], spec: ModelSpec) -> list[str]:
    """Return the size names that a model lacks. Numbers are not checked, because the model may already have reached them.

    Raises:
        PlanError: A growth factor cannot be parsed or applied.
    """
    problems: list[str] = []
    for event in events:
        if isinstance(event.to, str):
            resolve_sizes(spec, event.to)
        elif unknown := sorted({*(event.to or ())} - spec.sizes.keys()):
            problems.append(
                f"this {spec.family} has no size {', '.join(unknown)}; its sizes are {', '.join(spec.sizes)}."
            )
    return problems


def read_state(
    state: Mapping[str, Any], events: Sequence[Event]
) -> tuple[Counts, list[int], list[str], list[str], list[str]]:
    """Parse the ``state_dict`` of a schedule of ``events``.

    Returns:
        Counts, steps of the fired events, records of the growths, names of the blocks that the last growth added, and all events as
        text.

    Raises:
        PlanError: ``state`` is not a state dict of a schedule.
    """
    try:
        n = state["counts"]
        points = [(float(x), float(y)) for x, y in n["points"]]
        curve = LossCurve.from_state(n.get("curve", {}))  # earlier versions wrote no curve
        spent = float(n["n_flops"])
        of_size = float(n.get("n_flops_of_size", spent))  # earlier versions wrote none
        counts = Counts(int(n["n_steps"]), float(n["n_tokens"]), spent, of_size, points, curve)
        fired, history = (
            [int(step) for step in [*state["fired"]]],
            [*map(str, [*state["history"]])],
        )
        for record in history:
            read(record)
        new_blocks = [*map(str, [*state.get("new_blocks", ())])]  # earlier versions wrote none
        numbers = counts.n_steps, counts.n_tokens, counts.n_flops, counts.n_flops_of_size
        bad = not all(number >= 0 for number in numbers)
        n_growths = sum(event.to is not None for event in events[: len(fired)])
        if bad or len(history) != n_growths or len(fired) > len(events):
            raise ValueError("counts, fired and history do not fit together")
        if any(isinstance(state.get(key), str) for key in ("fired", "history", "new_blocks")):
            raise ValueError("fired, history or new_blocks is a string")
        texts = [*map(str, state["events"])]
    except (KeyError, TypeError, ValueError, OverflowError, GrowthError) as error:
        raise PlanError(
            f"cannot read the schedule's state: {error!r}; pass what schedule.state_dict() returned."
        ) from None
    return counts, fired, history, new_blocks, texts
