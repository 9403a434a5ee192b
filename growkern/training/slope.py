"""Growth when a loss falls too slowly for its compute: the rule of staged training."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log

from growkern.errors import PlanError
from growkern.training.triggers import Counts, Event


@dataclass(frozen=True, kw_only=True)
class WhenSlope(Event):
    """Grow when a loss falls too slowly for its compute: the rule of staged training.

    The slope is ``d ln(loss) / d ln(compute)``: the first difference of the mean loss of ``window`` observations. It is read only after
    its steepest point, which lies below ``-tau``. Compute is that of a run of the model's present size up to the present position of the
    learning-rate schedule, not what the run has spent: at a growth, it is multiplied by the growth in parameters and divided by ``rewind``.

    The paper's thresholds are 0.0475 before a growth that doubles the width, 0.0575 before one that doubles the depth, and 0.03 before one
    that doubles both; it ends the last stage at 0.052. Its losses are validation losses.

    Attributes:
        tau: Threshold above 0; the model grows when the slope rises above ``-tau``.
        window: Number of observations in a mean.
        warmup: Number of observations at the start, and after each event, that are left out: those of a learning-rate warm-up.
        metric: Name under which ``schedule.observe`` gets the loss.

    Args:
        to, width, depth, state, dynamics, seed, trains, rewind, rewarm, ramp: See ``At``.

    Raises:
        PlanError: ``tau`` is not above 0 or not finite, ``window`` is below 1, or ``warmup`` is negative.

    Example:
        >>> event = growkern.WhenSlope(tau=0.0475, to={"hidden": "2x"}, rewind=1.776, rewarm=200)
        >>> print(growkern.GrowthSchedule([event]))
        event  to         trigger                           state
        -----  ---------  --------------------------------  ------------------------
            0  hidden=2x  slope of eval_loss above -0.0475  waiting: 0 of 7 observed

    Reference:
        Shen, Walsh, Keutzer, Dodge, Peters, Beltagy, "Staged Training for Transformer Language Models", ICML 2022, arXiv:2203.06211.
    """

    tau: float
    window: int = 5
    warmup: int = 0
    metric: str = "eval_loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau < inf or self.window < 1 or self.warmup < 0:
            raise PlanError(
                f"WhenSlope(tau={self.tau}, window={self.window}, warmup={self.warmup}): pass a finite tau above 0, a window of at least 1 "
                "and a warmup of at least 0."
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
        return f"slope of {self.metric} above -{self.tau:g}"

    def keep(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Return the observations of the warm-up, those at the steepest point, and the last ones."""
        start, n = self.warmup, self.window + 1
        if len(points) <= start + n:
            return points
        steepest, last = points[start : start + n], points[-n:]
        if (now := _slope(last)) is not None and now < (_slope(steepest) or 0.0):
            steepest = last
        return [*points[:start], *steepest, *last]

    def due(self, counts: Counts) -> bool:
        """Return True if the event has to fire now."""
        now, steepest = self.slope(counts), self._steepest(counts)
        return now is not None and steepest is not None and steepest <= -self.tau < now

    def progress(self, counts: Counts) -> str:
        """Describe the progress toward the trigger, as text."""
        now, steepest = self.slope(counts), self._steepest(counts)
        if now is None or steepest is None:
            n = self.warmup + self.window + 2
            return f"{min(n, len(counts.points)):,} of {n:,} observed"
        return f"slope {now:.3g}, {steepest:.3g} at its steepest"

    def slope(self, counts: Counts) -> float | None:
        """Return the last slope; None before there are enough observations at different compute, and where a loss is not above 0."""
        enough = len(counts.points) > self.warmup + self.window
        return _slope(counts.points[-self.window - 1 :]) if enough else None

    def _steepest(self, counts: Counts) -> float | None:
        enough = len(counts.points) > self.warmup + self.window + 1
        return _slope(counts.points[self.warmup :][: self.window + 1]) if enough else None


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the slope in the logarithms between the mean of all points but the last, and the mean of all points but the first."""
    (before, _), (now, _) = points[-2:]
    losses = [loss for _, loss in points]
    if not 0 < before < now or min(losses) <= 0:
        return None
    return log(sum(losses[1:]) / sum(losses[:-1])) / log(now / before)
