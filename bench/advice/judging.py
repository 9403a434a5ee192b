"""Comparison of the advice before a growth with the measured figure, for every figure of the campaign."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from rich.table import Table

import growkern
from bench.advice.calibration import calibrate, label_of
from bench.advice.figures import Figure, Rows
from bench.savings.analysis import TUNING
from bench.savings.campaign import SETUPS
from growkern.advice.advice import Advice, percent
from growkern.advice.choice import pooled
from growkern.recipes.recipe import Recipe

OTHER = {
    "width": ((32, 2), (32, 8)), "wider": ((32, 4),), "depth": ((32, 4),), "depth, twice": ((32, 2),), "both": ((32, 4),),
}  # sizes of the second curve, by setup: the first that has been run  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """An advice and the measured figure."""

    figure: Figure
    advice: Advice

    @property
    def holds(self) -> bool:
        """True if the interval contains the measured saving, both phases charged."""
        low, _, high = self.advice.now.charged
        return low <= self.figure.charged <= high

    @property
    def width(self) -> float:
        """Half of the interval's width."""
        low, _, high = self.advice.now.charged
        return (high - low) / 2

    @property
    def lowest(self) -> str:
        """Name of the option that ended lowest."""
        return min(self.figure.losses, key=lambda name: self.figure.losses[name])

    @property
    def likeliest(self) -> bool:
        """True when the option that ends lowest in the most draws ended lowest."""
        return self.advice.likeliest.name.replace("later", "now") == self.lowest

    @property
    def right(self) -> bool | None:
        """True if the decision names the option that ended lowest; None if the adviser cannot tell."""
        decision = self.advice.decision
        if decision == "cannot tell":
            return None
        return decision.replace("later", "now") == self.lowest


def judge(rows: Rows, figure: Figure, recipe: Recipe, *, other: bool) -> Judged | None:
    """Advise as before the growth; return None if ``other`` is True and no run of another size exists."""
    source, target, at = figure.source, figure.target, figure.variant.grow_at
    text = SETUPS[figure.setup].text
    sizes = OTHER.get(figure.setup, ())
    trunks = [rows.trunk(text, size, rows.rate(text, size), [TUNING]) for size in sizes]
    more = next((trunk for trunk in trunks if trunk), None) if other else None
    if other and more is None:
        return None
    before = rows.before.setdefault((source, at), source.until(at))
    advice = growkern.advise(
        before.points, source=source.n_params, target=target.n_params, spent=at, budget=figure.budget,
        flops_per_token=(source.flops_per_token, target.flops_per_token), recipe=recipe, law=rows.law(before, more),
    )  # fmt: skip
    return Judged(figure, advice)


def judge_seeds(
    seeds: Mapping[int, Rows], figures: Sequence[Figure], *, other: bool
) -> list[Judged]:
    """Judge every figure of a single seed, with its recipe calibrated on the other seeds.

    Args:
        seeds: Result of ``single_seeds``.
        figures: Figures over all seeds, which name the recipes.
        other: Whether the adviser gets the curve of another size.
    """
    judged: list[Judged] = []
    for seed, rows in seeds.items():
        rest = [f for s, its in seeds.items() if s != seed for f in its.figures]
        known = calibrate(figures, rest)
        for figure in rows.figures:
            recipe = known.get(label_of(figure))
            if recipe is not None and not figure.saving.chose:
                verdict = judge(rows, figure, recipe, other=other)
                judged += [verdict] if verdict else []
    return judged


def judge_all(rows: Rows, singles: Sequence[Figure], *, other: bool, across: bool) -> list[Judged]:
    """Judge every figure of the campaign, calibrated without its recipe; with ``across``, calibrated without its setup.

    A figure without calibration, or without the second curve, is left out; ``summary`` states how many figures were judged.
    """
    judged: list[Judged] = []
    for figure in rows.figures:

        def apart(f: Figure, own: Figure = figure) -> bool:
            return f.setup != own.setup if across else f.variant.recipe != own.variant.recipe

        known = calibrate([f for f in rows.figures if apart(f)], [f for f in singles if apart(f)])
        if known:
            verdict = judge(rows, figure, pooled(known, figure.kind, "held out"), other=other)
            judged += [verdict] if verdict else []
    return judged


def by_kind(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    """Group by what grows: width, depth or both."""
    kinds = dict.fromkeys(j.figure.kind for j in judged)
    return {kind: [j for j in judged if j.figure.kind == kind] for kind in kinds}


def table(judged: Sequence[Judged], title: str) -> Table:
    """Return a table with a row per figure: measured and advised savings, decision and outcome."""
    shown = Table(title=title, title_justify="left")
    for name in (
        "setup",
        "recipe, grown at",
        "budget",
        "saves",
        "advised",
        "",
        "sunk",
        "advised",
        "decision",
        "lowest",
        "",
    ):
        shown.add_column(name, no_wrap=True)
    for j in judged:
        f = j.figure
        shown.add_row(
            f.setup, f"{f.variant.recipe} @{f.variant.grow_at:.3g}", f"{j.advice.budget:.3g}", f"{f.charged:+.0%}",
            percent(j.advice.now.charged), "" if j.holds else "MISSED", f"{f.sunk:+.0%}", percent(j.advice.now.sunk),
            j.advice.decision, j.lowest, {True: "right", False: "WRONG", None: ""}[j.right],
        )  # fmt: skip
    return shown


def summary(judged: Sequence[Judged]) -> str:
    """Return coverage, mean width and decisions as text."""
    if not judged:
        return "No figure can be judged: rows of grown runs, or of the second curve, are missing."
    n, told = len(judged), [j for j in judged if j.right is not None]
    kinds = "; ".join(
        f"{k} {sum(j.holds for j in js)} of {len(js)}" for k, js in by_kind(judged).items()
    )
    return (
        f"{sum(j.holds for j in judged)} of {n} intervals hold the measured saving ({kinds}); they are +- "
        f"{mean(j.width for j in judged):.0%} wide on average. Decisions: {sum(bool(j.right) for j in told)} right, "
        f"{sum(not j.right for j in told)} wrong, {n - len(told)} 'cannot tell'; the likeliest option was right in "
        f"{sum(j.likeliest for j in judged)}."
    )
