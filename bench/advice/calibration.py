"""Calibration of recipes from the campaign's figures, and the text of ``growkern/recipes/measured.py``.

A run of a recipe has a figure per budget B. The FLOPs that the target from scratch needs for the losses of one run lie on a line,
``need(B) = pace * (B - g) + kept * worth``: g FLOPs at the growth, whose worth is known from the source's annealed loss. Runs of
different seeds, setups and growth points have different lines; mean and spread over these runs are the recipe's ``kept`` and ``pace``.
Their spread is that of single runs, because advice is about a single run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from statistics import linear_regression, mean, mode, stdev, variance

from bench.advice.figures import Figure
from bench.savings.analysis import T90, TUNING
from bench.savings.campaign import RECIPES
from growkern.recipes.recipe import Recipe, Saved

ALONE = 0.1  # least spread, and the spread of a single run
Z90 = 1.645  # of the normal distribution, where T90 is Student's
MODELS = "60 to 870 thousand parameters (bytes of Python and C++ source)"
CALIBRATION = Path(__file__).resolve().parents[2] / "growkern" / "recipes" / "measured.py"


@dataclass(frozen=True)
class Run:
    """Line through the figures of one run, and the ratio of the measured to the predicted worth of its source's training."""

    setup: str
    seed: int
    label: str
    kind: str
    kept: float
    pace: float
    worth: float


def runs_of(singles: Iterable[Figure]) -> list[Run]:
    """Return the runs of figures of single seeds; a run of the tuning seed only where no other seed has run, and with two budgets."""
    grouped: dict[tuple[str, str, str, float], dict[int, dict[float, Figure]]] = {}
    for f in singles:
        key = f.setup, f.kind, f.variant.recipe, f.variant.grow_at
        (seed,) = f.saving.losses
        grouped.setdefault(key, {}).setdefault(seed, {})[f.budget] = f
    return [
        _run(seed, [*own.values()])
        for seeds in grouped.values()
        for seed, own in seeds.items()
        if len(own) > 1 and (seed != TUNING or len(seeds) == 1)
    ]


def _run(seed: int, own: Sequence[Figure]) -> Run:
    """Fit the line by least squares."""
    after = [(f.budget - f.variant.grow_at) / f.annealed for f in own]
    pace, kept = linear_regression(after, [f.need / f.annealed for f in own])
    return Run(
        own[0].setup, seed, label_of(own[0]), own[0].kind, kept, pace, mean(f.worth for f in own)
    )


def calibrate(figures: Sequence[Figure], singles: Iterable[Figure]) -> dict[str, Recipe]:
    """Return the recipes with mean and spread of ``kept`` and ``pace``.

    Args:
        figures: Figures over all seeds, the savings that a recipe states.
        singles: Figures of single seeds, of the same runs.
    """
    runs, recipes = runs_of(singles), dict[str, Recipe]()
    seeds, setups = len({(r.setup, r.seed) for r in runs}), len({r.setup for r in runs})
    student = T90[min(len(T90), max(1, seeds - setups)) - 1] / Z90
    for label in dict.fromkeys(map(label_of, figures)):
        own = [f for f in figures if label_of(f) == label]
        mine = [run for run in runs if run.label == label]
        if not mine:
            continue
        recipe, kind = RECIPES[own[0].variant.recipe], own[0].kind
        peers = [run for run in runs if run.kind == kind]
        kept, pace = ([getattr(run, name) for run in mine] for name in ("kept", "pace"))
        recipes[label] = Recipe(
            label, kind, round(mean(kept), 3), _spread(peers, mine, "kept", student), len(mine), recipe.growth,
            mode(f.variant.rate for f in own), recipe.rewarm, tuple(map(saved, own)), _worth(peers),
            (round(mean(pace), 3), _spread(peers, mine, "pace", student)),
        )  # fmt: skip
    return recipes


def _spread(peers: Sequence[Run], own: Sequence[Run], name: str, student: float) -> float:
    """Return the standard deviation of a further run of a recipe, of a normal distribution whose 90 % interval is Student's.

    Few runs underestimate a spread, so that the variance is at least the mean variance within the recipes of the kind; the mean over n
    runs is itself uncertain by 1 / n of the variance. ``student`` is the ratio of Student's to the normal interval, with the degrees of
    freedom of all seeds of all setups: recipes share the seeds of their setup.
    """
    labels = {run.label for run in peers}
    groups = [[getattr(run, name) for run in peers if run.label == label] for label in labels]
    within = [variance(values) for values in groups if len(values) > 1]
    values = [getattr(run, name) for run in own]
    most = max(ALONE**2, mean(within or [0.0]), variance(values) if len(values) > 1 else 0.0)
    return round((most * (1 + 1 / len(values))) ** 0.5 * student, 3)


def _worth(runs: Iterable[Run]) -> tuple[float, float]:
    """Return mean and spread of the ratio of the measured to the predicted worth, over the sources that grew."""
    ratios = sorted({run.worth for run in runs})
    return round(mean(ratios), 3), round(max(ALONE, stdev(ratios) if len(ratios) > 1 else 0.0), 3)


def label_of(figure: Figure) -> str:
    """Return the name of a figure's recipe, with the suffix ``, both`` if a recipe for width grew depth too."""
    name = figure.variant.recipe
    return name if figure.kind != "both" or "Stack" in name else f"{name}, both"


def saved(figure: Figure) -> Saved:
    """Convert a figure to ``growkern.recipes.Saved``."""
    saving = figure.saving
    charged, sunk = (
        (round(low, 3), round(middle, 3), round(high, 3))
        for middle, low, high in (saving.charged, saving.sunk)
    )
    at, budget = float(f"{figure.variant.grow_at:.3g}"), float(f"{figure.budget:.3g}")
    return Saved(figure.setup, at, budget, charged, sunk, round(saving.headroom, 3), saving.n_seeds)


def module(recipes: Mapping[str, Recipe], figures: Sequence[Figure]) -> str:
    """Return the text of ``growkern/recipes/measured.py``."""
    budgets = _range(f.budget / f.variant.grow_at for f in figures)
    factors = _range(f.target.n_params / f.source.n_params for f in figures)
    setups = ", ".join(dict.fromkeys(f.setup for f in figures))
    plain = [r for r in recipes.values() if _is_growth(r.name)]
    rows = "".join(map(_source, plain))
    used = ", ".join(name for name in ("depth", "width") if f" {name}." in rows)
    return f'''"""Recipes of growth, and what they saved, as measured. Written by ``python -m bench.advice --write``; not by hand.

From {len(figures)} figures (recipes, growth points, budgets) of bench/results/savings-*.csv, setups:
{setups}.
"""

from collections.abc import Mapping
{"from math import nan" + chr(10) if "nan" in rows else ""}from types import MappingProxyType

from growkern import {used}
from growkern.recipes.recipe import Recipe, Saved

MEASURED = "{MODELS}"
BUDGETS = {budgets}  # multiples of the compute at growth
FACTORS = {factors}  # multiples of the parameters of the source
RECIPES: Mapping[str, Recipe] = MappingProxyType({{
    recipe.name: recipe
    for recipe in (
{rows}    )
}})  # fmt: skip
'''


def _range(ratios: Iterable[float]) -> str:
    """Return the least and the largest ratio, rounded outwards to a tenth, as text."""
    ordered = sorted(ratios)
    return f"{floor(10 * ordered[0]) / 10:g}, {ceil(10 * ordered[-1]) / 10:g}"


def _is_growth(name: str) -> bool:
    """Return True if arguments of ``expand_inplace`` define the recipe: no intermediate sizes, no average with fresh weights."""
    recipe = RECIPES[name.removesuffix(", both")]
    return not recipe.via and recipe.keep == 1


def _source(recipe: Recipe) -> str:
    """Return a recipe as Python source, with methods named by their modules."""
    arguments = [f"{json.dumps(k)}: {_value(v)}" for k, v in recipe.growth.items()]
    short = sum(map(len, arguments)) < 100
    growth = (", " if short else ",\n             ").join(arguments)
    figures = "".join(
        f"                Saved({json.dumps(s.setup)}, {s.grown_at:.3g}, {s.budget:.3g}, {s.charged}, {s.sunk}, {s.headroom}, "
        f"{s.n_seeds}),\n"
        for s in recipe.saved
    )
    return (
        f"        Recipe(\n            {json.dumps(recipe.name)}, {json.dumps(recipe.kind)}, {recipe.kept}, {recipe.sd}, {recipe.n},"
        f"\n            {{{growth}}}, {recipe.lr_factor:g}, {recipe.rewarm},\n            (\n{figures}            ),\n"
        f"            {recipe.worth}, {recipe.pace},\n        ),\n"
    )


def _value(value: object) -> str:
    module = type(value).__module__.split(".")
    return (
        f"{module[1]}.{value!r}"
        if module[0] == "growkern"
        else json.dumps(value).replace("null", "None")
    )
