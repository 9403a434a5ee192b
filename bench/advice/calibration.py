"""Calibration of recipes from the campaign's figures, and the text of ``growkern/recipes/measured.py``."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor
from pathlib import Path
from statistics import mean, mode, stdev, variance

from bench.advice.figures import Figure
from bench.savings.campaign import RECIPES
from growkern.recipes.recipe import Recipe, Saved

ALONE = 0.1  # least spread, and the spread of a single figure
MODELS = "60 to 870 thousand parameters (bytes of Python and C++ source)"
CALIBRATION = Path(__file__).resolve().parents[2] / "growkern" / "recipes" / "measured.py"


def calibrate(figures: Sequence[Figure]) -> dict[str, Recipe]:
    """Return the recipes with mean and spread of ``kept``.

    The spread is at least the spread within the recipes of the kind, because few figures underestimate the spread of a recipe.
    """
    if not figures:
        return {}
    kinds = {f.kind for f in figures}
    least = {grows: _spread([f for f in figures if f.kind == grows]) for grows in kinds}
    worth = {grows: _worth(f for f in figures if f.kind == grows) for grows in kinds}
    recipes: dict[str, Recipe] = {}
    for name, grows in dict.fromkeys((f.variant.recipe, f.kind) for f in figures):
        own = [f for f in figures if (f.variant.recipe, f.kind) == (name, grows)]
        shares = [f.kept for f in own]
        spread = max(least[grows], stdev(shares) if len(shares) > 1 else 0.0)
        recipe = RECIPES[name]
        label = label_of(own[0])
        recipes[label] = Recipe(
            label, grows, round(mean(shares), 3), round(spread, 3), len(shares), recipe.growth,
            mode(f.variant.rate for f in own), recipe.rewarm, tuple(map(saved, own)), worth[grows],
        )  # fmt: skip
    return recipes


def _spread(figures: Sequence[Figure]) -> float:
    """Return the spread of ``kept`` within one recipe, as the root of the mean variance over recipes."""
    names = {f.variant.recipe for f in figures}
    own = [[f.kept for f in figures if f.variant.recipe == name] for name in names]
    variances = [variance(values) for values in own if len(values) > 1]
    return max(ALONE, mean(variances) ** 0.5) if variances else ALONE


def _worth(figures: Iterable[Figure]) -> tuple[float, float]:
    """Return mean and spread of ``Figure.worth`` over setups and growth points."""
    ratios = {(f.setup, f.variant.grow_at): f.worth for f in figures}.values()
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
    ratios = [f.budget / f.variant.grow_at for f in figures]
    low, high = floor(10 * min(ratios)) / 10, ceil(10 * max(ratios)) / 10
    setups = ", ".join(dict.fromkeys(f.setup for f in figures))
    plain = [r for r in recipes.values() if _is_growth(r.name)]
    rows = "".join(map(_source, plain))
    used = ", ".join(name for name in ("depth", "width") if f" {name}." in rows)
    return f'''"""Recipes of growth, and what they saved, as measured. Written by ``python -m bench.advice --write``; not by hand.

From {len(figures)} figures (recipes, growth points, budgets) of bench/results/savings-*.csv, setups:
{setups}.
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
        f"            {recipe.worth},\n        ),\n"
    )


def _value(value: object) -> str:
    module = type(value).__module__.split(".")
    return (
        f"{module[1]}.{value!r}"
        if module[0] == "growkern"
        else json.dumps(value).replace("null", "None")
    )
