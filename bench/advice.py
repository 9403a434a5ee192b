"""How often is ``growkern.advise`` right? ``python -m bench.advice`` judges it on the rows of the savings campaign.

For every recipe, growth point and budget of the campaign the adviser gets what a user has before the decision: the source's trunk curve up
to the growth point and, in a second pass, the curve of a model of another size (seed 0; never the target's). What
growth keeps comes from the other recipes of the campaign, or from the other setups alone; never from the recipe that is judged. The truth
is the campaign's own figure, ``Campaign.saving``. ``--write`` derives ``growkern/recipes/measured.py`` from the rows.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor
from pathlib import Path
from statistics import mean, mode, stdev, variance

from rich.console import Console
from rich.table import Table

import growkern
from bench.harness import RESULTS
from bench.savings.analysis import TUNING, Campaign, Saving, Variant
from bench.savings.campaign import RECIPES, SETUPS, Setup
from bench.savings.jobs import read_rows
from growkern.advice.advice import Advice, percent
from growkern.advice.adviser import pooled
from growkern.advice.scaling import Curve, ScalingLaw, fit
from growkern.recipes.recipe import Recipe, Saved

ROOT = Path(__file__).resolve().parents[1]
JUDGED = "width", "width, c++", "wider", "depth", "depth, twice", "both"
OTHER = {
    "width": ((32, 2), (32, 8)), "wider": ((32, 4),), "depth": ((32, 4),), "depth, twice": ((32, 2),), "both": ((32, 4),),
}  # sizes of the second curve, by setup: the first that has been run  # fmt: skip
VOCAB = 256
ALONE = 0.1  # spread of a single figure
MODELS = "60 to 230 thousand parameters (bytes of Python source)"
CALIBRATION = ROOT / "growkern" / "recipes" / "measured.py"


TrunkKey = tuple[str, tuple[int, int], float, int]  # text, sizes, learning rate, seed


@dataclass(frozen=True, eq=False)
class Trunk:
    """The curve of a plain run: parameters without the input embedding, FLOPs of a byte, and (bytes, held-out loss)."""

    n_params: int
    flops_per_token: float
    points: Curve

    def until(self, flops: float) -> "Trunk":
        """The curve up to a number of FLOPs."""
        return replace(
            self, points=[p for p in self.points if p[0] * self.flops_per_token <= flops * 1.001]
        )


@dataclass(frozen=True)
class Figure:
    """What the campaign measured for a recipe at a growth point and a budget."""

    setup: str
    kind: str  # what grows: "width", "depth" or "both"
    variant: Variant
    budget: float  # FLOPs
    saving: Saving
    kept: float  # of what the source is worth to the target, by annealed losses
    worth: float  # that worth over what a law of the trunks' losses says
    losses: Mapping[str, float]  # of from scratch, never grow and grow now
    source: Trunk  # of a seed that grew; the adviser sees it up to the growth
    target: Trunk  # whose size the adviser sees, and the calibration its curve

    @property
    def charged(self) -> float:
        """Share of the FLOPs that is saved, both phases charged."""
        return self.saving.charged[0]

    @property
    def sunk(self) -> float:
        """Share of the FLOPs that is saved where the source was there."""
        return self.saving.sunk[0]


@dataclass(frozen=True)
class Judged:
    """An advice beside the truth."""

    figure: Figure
    advice: Advice

    @property
    def holds(self) -> bool:
        """True when the interval holds the measured saving, both phases charged."""
        low, _, high = self.advice.now.charged
        return low <= self.figure.charged <= high

    @property
    def width(self) -> float:
        """Half of the interval's width."""
        low, _, high = self.advice.now.charged
        return (high - low) / 2

    @property
    def lowest(self) -> str:
        """What ended lowest."""
        return min(self.figure.losses, key=lambda name: self.figure.losses[name])

    @property
    def likeliest(self) -> bool:
        """True when the option that ends lowest in the most draws ended lowest."""
        return self.advice.likeliest.name.replace("later", "now") == self.lowest

    @property
    def right(self) -> bool | None:
        """True when the decision names what ended lowest; None where the adviser cannot tell."""
        decision = self.advice.decision
        if decision == "cannot tell":
            return None
        return decision.replace("later", "now") == self.lowest


class Rows:
    """The committed rows of all devices, by setup."""

    def __init__(
        self, folder: Path = RESULTS, keep: Callable[[int], bool] = lambda seed: True
    ) -> None:
        """Read the rows of a folder; ``keep`` says by its seed which rows count."""
        self.laws: dict[tuple[Trunk, Trunk | None], ScalingLaw] = {}
        self.before: dict[tuple[Trunk, float], Trunk] = {}
        self.trunks: dict[TrunkKey, Trunk] = {}
        paths = sorted(folder.glob("savings-*.csv"))
        rows = [row for p in paths if not p.stem.endswith("-curves") for row in read_rows(p)]
        rows = [row for row in rows if keep(int(row["seed"]))]
        for path in (p for p in paths if p.stem.endswith("-curves")):
            self._read_curves(read_rows(path))
        self.campaigns = {name: Campaign(SETUPS[name], rows) for name in JUDGED}

    def _read_curves(self, rows: Sequence[Mapping[str, str]]) -> None:
        points: dict[TrunkKey, list[Mapping[str, str]]] = {}
        for row in rows:
            if row["optimizer"] == "adamw":
                sizes = int(row["hidden"]), int(row["layers"])
                key = row["text"], sizes, float(row["lr"]), int(row["seed"])
                points.setdefault(key, []).append(row)
        for key, own in points.items():
            each = float(own[-1]["flops"]) / float(own[-1]["n_bytes"])
            curve = [(float(row["n_bytes"]), float(row["loss"])) for row in own]
            self.trunks.setdefault(
                key, Trunk(int(own[0]["n_params"]) - VOCAB * key[1][0], each, curve)
            )

    def trunk(
        self, text: str, sizes: tuple[int, int], lr: float | None, seeds: Iterable[int]
    ) -> Trunk | None:
        """The curve of a size at a learning rate on a text, of the first of these seeds that has one."""
        keys = [(text, sizes, lr, seed) for seed in seeds if lr is not None]
        return next((self.trunks[key] for key in keys if key in self.trunks), None)

    @cached_property
    def figures(self) -> list[Figure]:
        """Everything that the campaign has measured."""
        return [
            f for name, campaign in self.campaigns.items() for f in self._figures(name, campaign)
        ]

    def _figures(self, name: str, campaign: Campaign) -> Iterator[Figure]:
        setup = campaign.setup
        plain = setup.target_sizes, setup.source_sizes
        for b, budget in enumerate(campaign.budgets):
            for v in campaign.variants(b):
                saving = campaign.saving(v, b)
                last = campaign.best_lr(setup.target_sizes, len(campaign.budgets) - 1)
                source = self.trunk(setup.text, setup.source_sizes, v.lr, sorted(saving.losses))
                target = self.trunk(setup.text, setup.target_sizes, last, campaign.seeds)
                if source is None or target is None:
                    continue  # the curves are written with the last budget of a run
                law = self._law(source, target)
                at_growth = law.loss(source.n_params, v.grow_at / source.flops_per_token)
                worth = (
                    float(law.tokens(target.n_params, at_growth).median()) * target.flops_per_token
                )
                seeds = sorted(set(saving.losses) & set(campaign.seeds)) or None
                annealed = campaign.worth(v.grow_at, seeds)
                kept = (budget / (1 - saving.charged[0]) - budget + v.grow_at) / annealed
                ends = [*(campaign.tuned(sizes, b) for sizes in plain), saving.losses]
                losses = {
                    option: mean(found.values())
                    for option, found in zip(
                        ("from scratch", "never grow", "grow now"), ends, strict=True
                    )
                }
                yield Figure(
                    name,
                    kind(setup),
                    v,
                    budget,
                    saving,
                    kept,
                    annealed / worth,
                    losses,
                    source,
                    target,
                )

    def judge(self, figure: Figure, recipe: Recipe, *, other: bool) -> Judged | None:
        """Advise as before the growth; None where a curve that this needs has not been run."""
        source, target, at = figure.source, figure.target, figure.variant.grow_at
        text = SETUPS[figure.setup].text
        sizes = OTHER.get(figure.setup, ())
        found = [self.trunk(text, size, self._rate(text, size), [TUNING]) for size in sizes]
        more = next((trunk for trunk in found if trunk), None) if other else None
        if other and more is None:
            return None
        before = self.before.setdefault((source, at), source.until(at))
        advice = growkern.advise(
            before.points, source=source.n_params, target=target.n_params, spent=at, budget=figure.budget,
            flops_per_token=(source.flops_per_token, target.flops_per_token), recipe=recipe, law=self._law(before, more),
        )  # fmt: skip
        return Judged(figure, advice)

    def _law(self, first: Trunk, second: Trunk | None) -> ScalingLaw:
        """The law of one or two curves, fitted once."""
        if (first, second) not in self.laws:
            self.laws[first, second] = fit([(t.n_params, t.points) for t in (first, second) if t])
        return self.laws[first, second]

    def _rate(self, text: str, sizes: tuple[int, int]) -> float | None:
        """The best learning rate of a size on a text at its largest budget."""
        for campaign in self.campaigns.values():
            setup = campaign.setup
            if text == setup.text and sizes in (setup.source_sizes, setup.target_sizes):
                b = max((b for s, _, b in campaign.plain if s == sizes), default=None)
                return None if b is None else campaign.best_lr(sizes, b)
        return None


def calibrate(figures: Sequence[Figure]) -> dict[str, Recipe]:
    """What every recipe keeps. Its spread is at least that within the recipes of its kind: a few figures do not show their own."""
    if not figures:
        return {}
    kinds = {f.kind for f in figures}
    least = {grows: _spread([f for f in figures if f.kind == grows]) for grows in kinds}
    worth = {grows: _worth(f for f in figures if f.kind == grows) for grows in kinds}
    found: dict[str, Recipe] = {}
    for name, grows in dict.fromkeys((f.variant.recipe, f.kind) for f in figures):
        own = [f for f in figures if (f.variant.recipe, f.kind) == (name, grows)]
        shares = [f.kept for f in own]
        spread = max(least[grows], stdev(shares) if len(shares) > 1 else 0.0)
        recipe = RECIPES[name]
        label = label_of(own[0])
        found[label] = Recipe(
            label, grows, round(mean(shares), 3), round(spread, 3), len(shares), recipe.growth,
            mode(f.variant.rate for f in own), recipe.rewarm, tuple(map(saved, own)), worth[grows],
        )  # fmt: skip
    return found


def _spread(figures: Sequence[Figure]) -> float:
    """What the figures of one recipe differ by, on average over recipes."""
    names = {f.variant.recipe for f in figures}
    own = [[f.kept for f in figures if f.variant.recipe == name] for name in names]
    found = [variance(values) for values in own if len(values) > 1]
    return max(ALONE, mean(found) ** 0.5) if found else ALONE


def _worth(figures: Iterable[Figure]) -> tuple[float, float]:
    """Worth of a source over what the law of its trunk says, over setups and growth points, and its spread."""
    ratios = {(f.setup, f.variant.grow_at): f.worth for f in figures}.values()
    return round(mean(ratios), 3), round(max(ALONE, stdev(ratios) if len(ratios) > 1 else 0.0), 3)


def label_of(figure: Figure) -> str:
    """Name of a figure's recipe; of a recipe for width that grew depth too, with a note."""
    name = figure.variant.recipe
    return name if figure.kind != "both" or "Stack" in name else f"{name}, both"


def saved(figure: Figure) -> Saved:
    """A figure as ``growkern.recipes`` holds it."""
    one = figure.saving
    charged, sunk = (
        (round(low, 3), round(middle, 3), round(high, 3))
        for middle, low, high in (one.charged, one.sunk)
    )
    at, budget = float(f"{figure.variant.grow_at:.3g}"), float(f"{figure.budget:.3g}")
    return Saved(figure.setup, at, budget, charged, sunk, round(one.headroom, 3), one.n_seeds)


def kind(setup: Setup) -> str:
    """What grows from the source of a setup to its target."""
    wider, deeper = (a != b for a, b in zip(setup.source_sizes, setup.target_sizes, strict=True))
    return "both" if wider and deeper else "width" if wider else "depth"


def judge_seeds(folder: Path = RESULTS, *, other: bool) -> list[Judged]:
    """Every figure of a single seed, judged by what the other seeds say of its recipe."""
    seeds = range(1, 1 + max((f.saving.n_seeds for f in Rows(folder).figures), default=0))
    judged: list[Judged] = []
    for seed in seeds:
        known = calibrate(Rows(folder, lambda one, seed=seed: one != seed).figures)
        rows = Rows(folder, lambda one, seed=seed: one in (TUNING, seed))
        for figure in rows.figures:
            recipe = known.get(label_of(figure))
            if recipe is not None and not figure.saving.chose:
                found = rows.judge(figure, recipe, other=other)
                judged += [found] if found else []
    return judged


def judge_all(rows: Rows, *, other: bool, across: bool) -> list[Judged]:
    """Every figure of the campaign, judged without its recipe; with ``across``, without all of its setup.

    A figure without calibration, or without the second curve, is left out: the table says how many there were.
    """
    figures = rows.figures
    judged: list[Judged] = []
    for figure in figures:
        known = [
            f
            for f in figures
            if (f.setup != figure.setup if across else f.variant.recipe != figure.variant.recipe)
        ]
        if known:
            found = rows.judge(
                figure, pooled(calibrate(known), figure.kind, "held out"), other=other
            )
            judged += [found] if found else []
    return judged


def table(judged: Sequence[Judged], title: str) -> Table:
    """Advice beside the truth, row by row."""
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
    """Coverage, mean width and decisions in a sentence."""
    if not judged:
        return "No figure can be judged: rows of grown runs, or of the second curve, are missing."
    n, told = len(judged), [j for j in judged if j.right is not None]
    return (
        f"{sum(j.holds for j in judged)} of {n} intervals hold the measured saving; they are +- {mean(j.width for j in judged):.0%} wide "
        f"on average. Decisions: {sum(bool(j.right) for j in told)} right, {sum(not j.right for j in told)} wrong, {n - len(told)} 'cannot "
        f"tell'; the likeliest option was right in {sum(j.likeliest for j in judged)}."
    )


CURVES = "the source's curve", "the source's and another size's curve"
PASSES = {  # what the adviser was given: the second curve, and whether all of the setup was left out of the calibration
    "the source's curve; the recipe left out": (False, False),
    "the source's and another size's curve; the recipe left out": (True, False),
    "the source's curve; the setup left out": (False, True),
    "the source's and another size's curve; the setup left out": (True, True),
}


def module(recipes: Mapping[str, Recipe], figures: Sequence[Figure]) -> str:
    """Text of ``growkern/recipes/measured.py``."""
    ratios = [f.budget / f.variant.grow_at for f in figures]
    low, high = floor(10 * min(ratios)) / 10, ceil(10 * max(ratios)) / 10
    setups = ", ".join(dict.fromkeys(f.setup for f in figures))
    plain = [r for r in recipes.values() if _is_growth(r.name)]
    rows = "".join(map(_source, plain))
    used = ", ".join(name for name in ("depth", "width") if f" {name}." in rows)
    return f'''"""Recipes of growth, and what they saved, as measured. Written by ``python -m bench.advice --write``; not by hand.

From {len(figures)} figures (recipes, growth points, budgets) of bench/results/savings-*.csv, setups: {setups}.
"""

{"from math import nan" + chr(10) * 2 if "nan" in rows else ""}from growkern import {used}
from growkern.recipes.recipe import Recipe, Saved

MEASURED = "{MODELS}"
BUDGETS = {low:g}, {high:g}  # multiples of the compute at growth
RECIPES: dict[str, Recipe] = {{
    recipe.name: recipe
    for recipe in (
{rows}    )
}}  # fmt: skip
'''


def _is_growth(name: str) -> bool:
    """True for a recipe that arguments of ``expand_inplace`` say all of: no other sizes on the way, no fresh weights mixed in."""
    recipe = RECIPES[name.removesuffix(", both")]
    return not recipe.via and recipe.keep == 1


def _source(recipe: Recipe) -> str:
    """A recipe as Python; its methods by their modules."""
    growth = ", ".join(f"{json.dumps(k)}: {_value(v)}" for k, v in recipe.growth.items())
    figures = "".join(
        f"                Saved({json.dumps(one.setup)}, {one.grown_at:.3g}, {one.budget:.3g}, {one.charged}, {one.sunk}, {one.headroom}, "
        f"{one.n_seeds}),\n"
        for one in recipe.saved
    )
    return (
        f"        Recipe(\n            {json.dumps(recipe.name)}, {json.dumps(recipe.kind)}, {recipe.kept}, {recipe.sd}, {recipe.n},"
        f"\n            {{{growth}}}, {recipe.lr_factor:g}, {recipe.rewarm},\n            (\n{figures}            ),\n"
        f"            {recipe.worth},\n        ),\n"
    )


def _value(value: object) -> str:
    module = type(value).__module__.split(".")
    return (
        f"{module[1]}.{value!r}"
        if module[0] == "growkern"
        else json.dumps(value).replace("null", "None")
    )


def main(arguments: list[str] | None = None) -> int:
    """Judge the adviser and print what came out; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of savings-*.csv")
    parser.add_argument(
        "--write", action="store_true", help="write growkern/recipes/measured.py from the rows"
    )
    asked = parser.parse_args(arguments)
    console, rows = Console(width=180), Rows(asked.rows)
    for other in (False, True):
        judged = judge_seeds(asked.rows, other=other)
        console.print(f"{CURVES[other]}; the seed left out: {summary(judged)}\n", highlight=False)
    for title, (other, across) in PASSES.items():
        judged = judge_all(rows, other=other, across=across)
        if judged:
            console.print(table(judged, title))
        console.print(f"{title}: {summary(judged)}\n", highlight=False)
    figures = rows.figures
    for recipe in calibrate(figures).values():
        console.print(
            f"{recipe.kind:6} {recipe.name:24} keeps {recipe.kept:.0%} +- {recipe.sd:.0%} ({recipe.n})",
            highlight=False,
        )
    if asked.write:
        CALIBRATION.write_text(module(calibrate(figures), figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
