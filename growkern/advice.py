"""What ``growkern.advise`` returns: options with intervals, a decision, what is not known; as text and as a picture."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

from growkern.scaling import ScalingLaw, interval
from growkern.support.text import table

Interval = tuple[float, float, float]  # lower end, median, upper end: 90 % of the draws
SURE = 0.8  # an option is advised when it ends lowest in as many of the draws


@dataclass(frozen=True)
class Saved:
    """What a recipe saved where it was measured: shares of the FLOPs that the tuned target needs from scratch for the same loss.

    Attributes:
        setup: Name of the sizes and the text in ``bench/savings/campaign.py``.
        grown_at: FLOPs at the growth.
        budget: FLOPs of the whole run.
        charged: Both phases are charged: lower end of the 90 % interval over seeds, mean, upper end.
        sunk: The same when the source's FLOPs are not counted.
        headroom: What a free and perfect growth would have saved, both phases charged.
        n_seeds: Number of seeds, none of which chose a learning rate; 0 for the seed that did, which has no interval.
    """

    setup: str
    grown_at: float
    budget: float
    charged: Interval
    sunk: Interval
    headroom: float
    n_seeds: int


@dataclass(frozen=True)
class Recipe:
    """A way to grow, and what it saved in measured runs; ``print`` it.

    Attributes:
        name: Name in the rows of ``bench/results/savings-*.csv``.
        kind: ``"width"``, ``"depth"`` or ``"both"``.
        efficiency: Compute that the target from scratch needs for the loss of the grown run, as a share of what it needs for
            the loss after a free and perfect growth: 1 where growth lost nothing. Mean over figures.
        sd: Standard deviation of the efficiency.
        n: Number of measured figures.
        growth: Arguments of ``expand_inplace`` and of events, beside ``to``.
        lr_factor: Factor on all learning rates from the growth on, beside those of ``dynamics``. Set it yourself, in the groups
            and in the scheduler's ``base_lrs``.
        rewarm: Steps over which the learning rate rises again from zero, with dropped state.
        saved: The figures.

    Example:
        >>> recipe = growkern.recipes.RECIPES["Stack, dropped"]
        >>> growkern.At(step=1000, to={"layers": "4x"}, **recipe.growth)
    """

    name: str
    kind: str
    efficiency: float
    sd: float
    n: int
    growth: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lr_factor: float = 1.0
    rewarm: int = 0
    saved: tuple[Saved, ...] = ()

    @property
    def how(self) -> str:
        """Arguments of ``expand_inplace``, and what else belongs to the recipe, as text."""
        if not self.n:
            return "not measured"
        said = [f"{name}={value!r}" for name, value in self.growth.items()]
        said += [f"learning rate x {self.lr_factor:g}"] if self.lr_factor != 1 else []
        said += [f"{self.rewarm} steps of warm-up"] if self.rewarm else []
        return ", ".join(said) or "the defaults of expand_inplace"

    def __str__(self) -> str:
        header = [
            "setup",
            "grown at",
            "FLOPs",
            "saves, charged",
            "saves, sunk",
            "headroom",
            "seeds",
        ]
        rows = [
            [
                one.setup, f"{one.grown_at:.3g}", f"{one.budget:.3g}", share(one.charged), share(one.sunk), f"{one.headroom:.0%}",
                one.n_seeds,
            ]
            for one in self.saved
        ]  # fmt: skip
        lines = [
            f"{self.name} ({self.kind}): {self.how}",
            f"Efficiency {self.efficiency:.0%} +- {1.645 * self.sd:.0%} of a perfect growth, in {self.n} figures.",
        ]
        return "\n".join([*lines, "", table(header, rows)] if rows else lines)


@dataclass(frozen=True)
class Option:
    """What one way of spending the budget leads to. Intervals hold 90 % of the draws.

    Attributes:
        name: ``"from scratch"``, ``"never grow"``, ``"grow now"`` or ``"grow later"``.
        at: FLOPs of the source at the growth; None where nothing grows.
        loss: Loss at the end of the budget, in nats, under the learning-rate schedule of the curve.
        charged: Share of the target's compute from scratch that is saved when the run pays for both phases.
        sunk: The same when the source's FLOPs until now are not counted.
        chance: Share of the draws in which the option ends lowest; the growth point with the larger saving stands for growth.
    """

    name: str
    at: float | None
    loss: Interval
    charged: Interval
    sunk: Interval
    chance: float


@dataclass(frozen=True)
class Advice:
    """What ``advise`` found; ``print`` it.

    Attributes:
        decision: ``"grow now"``, ``"grow later"``, ``"never grow"``, ``"from scratch"`` or ``"cannot tell"``: where the target from
            scratch could have the whole budget.
        decision_sunk: The same where the source's FLOPs are gone, and the target from scratch would get what is left.
        options: From scratch, never grow, grow now and, where a later growth saves more, grow later.
        headroom: Share of the compute that a free and perfect growth now would save, both phases charged.
        recipe: The recipe that the options assume.
        n_params: Parameters of source and target.
        flops_per_token: FLOPs of a token, forward and backward, of source and target.
        spent: FLOPs until now.
        budget: FLOPs of the whole run.
        law: The fitted law.
        unknown: What the advice does not know, in sentences.
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

    @property
    def now(self) -> Option:
        """The option to grow now."""
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
            f"A free and perfect growth now would save {percent(self.headroom)}. Recipe: {self.recipe.name} ({self.recipe.how}), with an "
            f"efficiency of {self.recipe.efficiency:.0%} +- {1.645 * self.recipe.sd:.0%} of a perfect growth.",
            "",
            table(header, rows),
            "",
            "Intervals hold 90 % of the draws. Charged: the run pays for both phases. Sunk: the source's FLOPs until now are not counted.",
            str(self.law),
            "Not known:",
            *(f"- {sentence}" for sentence in self.unknown),
        ]
        return "\n".join(lines)

    @property
    def likeliest(self) -> Option:
        """The option that ends lowest in the most draws."""
        return max(self.options, key=lambda option: option.chance)

    def _verdict(self) -> str:
        best = self.likeliest
        said = REASONS[self.decision]
        if self.decision == "cannot tell":
            said += f" The likeliest is: {best.name} ({best.chance:.0%})."
        if self.decision != self.decision_sunk:
            said += (
                f" Where the source's FLOPs are gone anyway: {REASONS[self.decision_sunk].lower()}"
            )
        return f"{said} Growing now would save {percent(self.now.charged)} of the compute that the target needs from scratch."

    def draw(self, path: str | Path) -> None:
        """Draw the curve, the law's bands of source and target, and the grown run over FLOPs. Needs matplotlib.

        Args:
            path: File of the picture; its suffix says the format.

        Example:
            >>> growkern.advise(schedule, budget=1e18).draw("advice.png")
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
    """An interval of shares in words, e.g. ``4 % +- 6 %``: the median, and half of the interval's width."""
    low, middle, high = share
    return f"{100 * middle:.0f} % +- {50 * (high - low):.0f} %"


def share(interval: Interval) -> str:
    """A measured share in words, with its interval where it has one: ``18 % [11, 24]``."""
    low, middle, high = interval
    spread = "" if isnan(low) else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{100 * middle:.0f} %{spread}"


def plus_minus(values: Interval) -> str:
    """An interval of losses in words: the median, and half of the interval's width."""
    low, middle, high = values
    return f"{middle:.3f} +- {(high - low) / 2:.3f}"
