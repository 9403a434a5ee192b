"""Triggers of growth, as data. An event reads counts and observations, and never a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, log
from typing import Any, Literal

from growkern.errors import GrowthError, PlanError, raise_all
from growkern.model.spec import ModelSpec
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.growth_record import read
from growkern.planning.options import DYNAMICS, STATES
from growkern.planning.sizes import Target, resolve_sizes, wrong_target
from growkern.support.argument_types import wrong_fields
from growkern.training.loss_curve import LossCurve


@dataclass
class Counts:
    """Counts and observations that triggers read.

    Attributes:
        n_steps: Optimizer steps that changed weights.
        n_tokens: Tokens reported.
        n_flops: FLOPs reported, or 6 x tokens x parameters.
        points: Pairs of FLOPs and value of the next event's metric since the previous event, as selected by ``Event.keep``.
        curve: Observed ``loss`` over tokens since the last growth, for ``growkern.advise``.
    """

    n_steps: int = 0
    n_tokens: float = 0.0
    n_flops: float = 0.0
    points: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    curve: LossCurve = field(default_factory=LossCurve)


@dataclass(frozen=True, kw_only=True)
class Event(ABC):
    """One growth of a schedule; a subclass defines the trigger.

    Attributes:
        to: See ``expand_inplace``.
        width: See ``expand_inplace``.
        depth: See ``expand_inplace``.
        state: See ``expand_inplace``.
        dynamics: See ``expand_inplace``.
        seed: Seed of the symmetry-breaking noise; None for the number of previous growths, so that no two growths share a seed.
    """

    to: Target = "2x"
    width: WidthMethod | None = None
    depth: DepthMethod | None = None
    state: str = "exact"
    dynamics: str | None = "mup"
    seed: int | None = None

    def __post_init__(self) -> None:
        wrong = [*wrong_target(self.to)] or [*wrong_fields(self)]
        raise_all(PlanError, f"{type(self).__name__}:", wrong)

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

    Raises:
        PlanError: Neither or both of ``step`` and ``tokens`` are given, the number is not positive, or ``step`` is not whole.

    Example:
        >>> At(step=1000, to={"hidden": 1024})
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

    Raises:
        PlanError: ``patience`` is below 1, ``min_delta`` is negative, or ``mode`` is unknown.

    Example:
        >>> WhenPlateau(metric="eval_loss", patience=5, min_delta=0.01, to="1.5x")
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


@dataclass(frozen=True, kw_only=True)
class WhenSlope(Event):
    """Grow when a loss falls too slowly for its compute: the rule of staged training.

    The slope ``-d loss / d ln(compute)`` is fitted by least squares to the last observations since the previous event. Compute is
    the sum of the ``flops`` that ``schedule.observe`` gets, or 6 x tokens x parameters.

    Attributes:
        tau: Slope below which the model grows; the slope of the target's own loss curve saves the most compute.
        window: Number of observations in the fit.
        metric: Name under which ``schedule.observe`` gets the loss.

    Raises:
        PlanError: ``tau`` is negative or not finite, or ``window`` is below 2.

    Reference:
        Shen, Walsh, Keutzer, Dodge, Peters, Beltagy, "Staged Training for Transformer Language Models", ICML 2022, arXiv:2203.06211.
    """

    tau: float
    window: int = 100
    metric: str = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau < inf or self.window < 2:
            raise PlanError(
                f"WhenSlope(tau={self.tau}, window={self.window}): pass a finite tau from 0, and a window of at least 2."
            )

    @property
    def observes(self) -> str | None:
        """Name of the metric that the trigger reads."""
        return self.metric

    @property
    def counts_tokens(self) -> bool:
        """True when the trigger needs token counts."""
        return True

    def silent(self, counts: Counts) -> bool:
        """Return True if the trigger counts tokens or FLOPs and none were reported."""
        return counts.n_flops == 0

    @property
    def trigger(self) -> str:
        """The trigger, as text."""
        return f"slope of {self.metric} over {self.window:,} below {self.tau:g}"

    def keep(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Return the last ``window`` observations."""
        return points[-self.window :]

    def due(self, counts: Counts) -> bool:
        """Return True if the event has to fire now."""
        slope = self.slope(counts)
        return len(counts.points) >= self.window and slope is not None and slope < self.tau

    def progress(self, counts: Counts) -> str:
        """Describe the progress toward the trigger, as text."""
        slope = self.slope(counts)
        seen = f"{len(counts.points):,} of {self.window:,} observed"
        return seen if slope is None else f"slope {slope:.3g}, {seen}"

    def slope(self, counts: Counts) -> float | None:
        """Return ``-d metric / d ln(compute)`` over the window; None if all observations have the same compute."""
        points = [(x, y) for x, y in counts.points if x > 0]
        n, xs, ys = max(1, len(points)), [log(x) for x, _ in points], [y for _, y in points]
        x_mean, y_mean = sum(xs) / n, sum(ys) / n
        spread = sum((x - x_mean) ** 2 for x in xs)
        both = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
        return -both / spread if spread > 0 else None


def target_of(event: Event) -> str:
    """Return the target sizes of an event, as text."""
    if isinstance(event.to, str):
        return event.to
    return ", ".join(f"{name}={value}" for name, value in event.to.items())


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
        named: dict[str, object] = dict(event.to) if not isinstance(event.to, str) else {}
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
    return problems


def unknown_sizes(events: Sequence[Event], spec: ModelSpec) -> list[str]:
    """Return the size names that a model lacks. Numbers are not checked, because the model may already have reached them.

    Raises:
        PlanError: A growth factor cannot be parsed or applied.
    """
    problems: list[str] = []
    for event in events:
        if isinstance(event.to, str):
            resolve_sizes(spec, event.to)
        elif unknown := sorted(event.to.keys() - spec.sizes.keys()):
            problems.append(
                f"this {spec.family} has no size {', '.join(unknown)}; its sizes are {', '.join(spec.sizes)}."
            )
    return problems


def read_state(
    state: Mapping[str, Any], n_events: int
) -> tuple[Counts, list[int], list[str], list[str]]:
    """Parse the ``state_dict`` of a schedule.

    Returns:
        Counts, steps of the fired events, records of the growths, and all events as text.

    Raises:
        PlanError: ``state`` is not a state dict of a schedule.
    """
    try:
        n = state["counts"]
        points = [(float(x), float(y)) for x, y in n["points"]]
        curve = LossCurve.from_state(n.get("curve", {}))  # earlier versions wrote no curve
        counts = Counts(int(n["n_steps"]), float(n["n_tokens"]), float(n["n_flops"]), points, curve)
        fired, history = (
            [int(step) for step in [*state["fired"]]],
            [*map(str, [*state["history"]])],
        )
        for record in history:
            read(record)
        bad = not (counts.n_steps >= 0 and counts.n_tokens >= 0 and counts.n_flops >= 0)
        if bad or len(fired) != len(history) or len(fired) > n_events:
            raise ValueError("counts, fired and history do not fit together")
        if isinstance(state["fired"], str) or isinstance(state["history"], str):
            raise ValueError("fired or history is a string")
        events = [*map(str, state["events"])]
    except (KeyError, TypeError, ValueError, OverflowError, GrowthError) as error:
        raise PlanError(
            f"cannot read the schedule's state: {error!r}; pass what schedule.state_dict() returned."
        ) from None
    return counts, fired, history, events
