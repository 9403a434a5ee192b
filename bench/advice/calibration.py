"""What recipes keep of their source's training, from the campaign's figures; and ``growkern/recipes/measured.py``, which holds it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor
from pathlib import Path
from statistics import mean, mode, stdev, variance

from bench.advice.figures import Figure
from bench.savings.campaign import RECIPES
from growkern.recipes.recipe import Recipe, Saved

ALONE = 0.1  # spread of a single figure
MODELS = "60 to 230 thousand parameters (bytes of Python source)"
CALIBRATION = Path(__file__).resolve().parents[2] / "growkern" / "recipes" / "measured.py"


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
