"""The result of ``growkern.advise``: options with intervals, a decision and the unknowns, as text and as a picture."""

from dataclasses import dataclass, field
from pathlib import Path

from growkern.advice.scaling import ScalingLaw, interval
from growkern.recipes.recipe import Interval, Recipe
from growkern.support.text import table

SURE = 0.8  # an option is advised if it ends lowest in this share of the draws
LEAST = 0.01  # least difference in compute, as a share, by which an option ends lowest, and by which a later growth saves more


@dataclass(frozen=True)
class Option:
    """Predicted result of one way to spend the budget. Intervals contain 90 % of the draws.

    Attributes:
        name: ``"from scratch"``, ``"never grow"``, ``"grow now"`` or ``"grow later"``.
        at: FLOPs of the source at the growth; None for an option without growth.
        loss: Loss at the end of the budget, in nats, under the learning-rate schedule of the curve.
        charged: Share of the target's compute from scratch that the option saves, with the FLOPs of both phases charged.
        sunk: Share of the target's compute from scratch that the option saves, not counting the source's FLOPs until now.
        chance: Share of the draws in which the option ends lowest by at least 1 % of the compute: from scratch, the target needs 1 %
            more FLOPs for the option's loss than for the loss of any other option. A growth option is compared with the options without
            growth, which are compared with the growth option that saves more.
    """

    name: str
    at: float | None
    loss: Interval
    charged: Interval
    sunk: Interval
    chance: float


@dataclass(frozen=True)
class Advice:
    """Result of ``growkern.advise``; ``print`` it.

    Attributes:
        decision: ``"grow now"``, ``"grow later"``, ``"never grow"``, ``"from scratch"`` or ``"cannot tell"``, if the target from
            scratch could spend the whole budget.
        decision_sunk: The decision if the source's FLOPs are sunk: the target from scratch could spend only the rest of the budget.
        options: The options from scratch, never grow, grow now and, if a later growth saves more, grow later.
        headroom: Share of the compute that a free and perfect growth now would save, both phases charged.
        recipe: The recipe that the options assume.
        n_params: Parameters of source and target.
        flops_per_token: FLOPs of a token, forward and backward, of source and target.
        spent: FLOPs until now.
        budget: FLOPs of the whole run.
        law: The fitted scaling law.
        unknown: Unknowns that limit the advice, one sentence each.
        tied: Share of the draws in which no option ends lowest by 1 % of the compute.

    Example:
        >>> curve = [(3e5 * i / 20, 1 + (i / 20) ** -0.3) for i in range(1, 21)]  # (tokens, loss) of the run so far
        >>> advice = growkern.advise(curve, source=58_656, target=217_664, budget=1.2e12)
        >>> print(advice)
        58,656 -> 217,664 parameters, 1.06e+11 of 1.2e+12 FLOPs spent.
        Cannot tell: no option ends lowest in 80% of the draws. ...
        option        grown at  loss at the end  saves, charged  saves, sunk   lowest in
        ...
    """

    decision: str
    decision_sunk: str
    options: tuple[Option, ...]
    headroom: Interval
    recipe: Recipe
    n_params: tuple[float, float]
    flops_per_token: tuple[float, float]
    spent: float
    budget: float
    law: ScalingLaw = field(repr=False, compare=False)
    unknown: tuple[str, ...]
    tied: float = 0.0

    @property
    def now(self) -> Option:
        """The ``Option`` to grow now."""
        return next(option for option in self.options if option.name == "grow now")

    def __str__(self) -> str:
        n_source, n_target = self.n_params
        rows = [
            [
                option.name, "-" if option.at is None else f"{option.at:.3g}", plus_minus(option.loss),
                *(("-", "-") if option.at is None else (percent(option.charged), percent(option.sunk))), f"{option.chance:.0%}",
            ]
            for option in self.options
        ]  # fmt: skip
        header = [
            "option",
            "grown at",
            "loss at the end",
            "saves, charged",
            "saves, sunk",
            "lowest in",
        ]
        lines = [
            f"{n_source:,.0f} -> {n_target:,.0f} parameters, {self.spent:.3g} of {self.budget:.3g} FLOPs spent.",
            self._verdict(),
            f"A free and perfect growth now, which then trains at the pace of the target from scratch, would save "
            f"{percent(self.headroom)}. Recipe: {self.recipe.name} ({self.recipe.how}). It {self.recipe.effect}.",
            "",
            table(header, rows),
            "",
            "Intervals hold 90 % of the draws. Charged: the run pays for both phases. Sunk: the source's FLOPs until now are not counted.",
            f"Lowest: by at least {LEAST:.0%} of the compute; {self.tied:.0%} of the draws are ties.",
            str(self.law),
            "Not known:",
            *(f"- {sentence}" for sentence in self.unknown),
        ]
        return "\n".join(lines)

    @property
    def likeliest(self) -> Option:
        """The ``Option`` that ends lowest in the most draws."""
        return max(self.options, key=lambda option: option.chance)

    def _verdict(self) -> str:
        best = self.likeliest
        said = REASONS[self.decision]
        if self.decision == "cannot tell" and self.tied > best.chance:
            said += f" In {self.tied:.0%} of the draws, the best options end within {LEAST:.0%} of the compute of each other."
        elif self.decision == "cannot tell":
            said += f" The likeliest is: {best.name} ({best.chance:.0%})."
        if self.decision != self.decision_sunk:
            said += (
                f" Where the source's FLOPs are gone anyway: {REASONS[self.decision_sunk].lower()}"
            )
        return f"{said} Growing now would save {percent(self.now.charged)} of the compute that the target needs from scratch."

    def draw(self, path: str | Path) -> None:
        """Draw the curve, the law's bands of source and target, and the grown run over FLOPs. Needs matplotlib.

        Args:
            path: File of the picture; the suffix sets the format.

        Example:
            >>> curve = [(3e5 * i / 20, 1 + (i / 20) ** -0.3) for i in range(1, 21)]
            >>> growkern.advise(curve, source=58_656, target=217_664, budget=1.2e12).draw("advice.png")
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5.4), dpi=150, layout="tight")
        axes = figure.add_subplot()
        read = self.law.curves[0].points
        f_source, f_target = self.flops_per_token
        first, steps = read[0][0] * f_source, 48
        flops = [first * (self.budget / first) ** (i / steps) for i in range(steps + 1)]
        for (name, n, f), color in zip(
            (
                ("never grows", self.n_params[0], f_source),
                ("target from scratch", self.n_params[1], f_target),
            ),
            ("#57606a", "#9a6700"),
            strict=True,
        ):
            bands = [interval(self.law.loss(n, c / f)) for c in flops]
            axes.plot(flops, [m for _, m, _ in bands], color=color, label=name)
            axes.fill_between(
                flops, [lo for lo, _, _ in bands], [hi for *_, hi in bands], color=color, alpha=0.15
            )
        axes.plot(
            [d * f_source for d, _ in read], [y for _, y in read], "k.", label="the curve so far"
        )
        grown = [option for option in self.options if option.at is not None]
        for option, marker in zip(grown, "sD", strict=False):
            low, middle, high = option.loss
            axes.errorbar(
                [self.budget], [middle], [[middle - low], [high - middle]], fmt=marker, capsize=4, color="#0969da",
                label=f"{option.name} ({option.at:.2g} FLOPs)",
            )  # fmt: skip
            axes.axvline(option.at or 0.0, color="#0969da", linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel="training FLOPs", ylabel="loss (nats)")
        axes.set_title(
            f"{self.decision}: growing now would save {percent(self.now.charged)}",
            loc="left",
            weight="bold",
        )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(framealpha=1, edgecolor="white")
        figure.savefig(path)


REASONS = {
    "grow now": f"Grow now: growth ends lowest in at least {SURE:.0%} of the draws.",
    "grow later": f"Grow later: growth ends lowest in at least {SURE:.0%} of the draws, and a later one saves more.",
    "never grow": f"Never grow: the source that trains on ends lowest in at least {SURE:.0%} of the draws.",
    "from scratch": f"Start the target from scratch: it ends lowest in at least {SURE:.0%} of the draws.",
    "cannot tell": f"Cannot tell: no option ends lowest in {SURE:.0%} of the draws.",
}


def percent(share: Interval) -> str:
    """Format an interval of shares, e.g. ``4 % +- 6 %``: the median, and half of the interval's width."""
    low, middle, high = share
    return f"{100 * middle:.0f} % +- {50 * (high - low):.0f} %"


def plus_minus(values: Interval) -> str:
    """Format an interval of losses: the median, and half of the interval's width."""
    low, middle, high = values
    return f"{middle:.3f} +- {(high - low) / 2:.3f}"
