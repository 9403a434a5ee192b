"""Recipes of growth, and what they saved, as measured. Written by ``python -m bench.advice --write``; not by hand.

From 18 figures (recipes, growth points, budgets) of bench/results/savings-*.csv, setups: width.
"""

from math import nan

from growkern import width
from growkern.recipes.recipe import Recipe, Saved

MEASURED = "60 to 230 thousand parameters (bytes of Python source)"
BUDGETS = 2.4, 6.7  # multiples of the compute at growth
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "default", "width", 0.95, 0.068, 3,
            {}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.319, 0.348, 0.376), (0.592, 0.609, 0.626), 0.489, 2),
                Saved("width", 1.78e+11, 7.43e+11, (0.18, 0.228, 0.271), (0.377, 0.413, 0.446), 0.364, 2),
                Saved("width", 1.78e+11, 1.19e+12, (0.024, 0.074, 0.12), (0.17, 0.213, 0.252), 0.264, 2),
            ),
        ),
        Recipe(
            "default, one rate", "width", 1.016, 0.068, 3,
            {"dynamics": None}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, 0.395, nan), (nan, 0.637, nan), 0.499, 1),
                Saved("width", 1.78e+11, 7.43e+11, (nan, 0.273, nan), (nan, 0.447, nan), 0.374, 1),
                Saved("width", 1.78e+11, 1.19e+12, (nan, 0.134, nan), (nan, 0.264, nan), 0.272, 1),
            ),
        ),
        Recipe(
            "Sparkling fresh", "width", 1.055, 0.068, 3,
            {"dynamics": None, "state": "drop", "width": width.Sparkling(fan_out='random', fan_in='zero')}, 0.5, 60,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, 0.394, nan), (nan, 0.636, nan), 0.499, 1),
                Saved("width", 1.78e+11, 7.43e+11, (nan, 0.316, nan), (nan, 0.48, nan), 0.374, 1),
                Saved("width", 1.78e+11, 1.19e+12, (nan, 0.182, nan), (nan, 0.304, nan), 0.272, 1),
            ),
        ),
        Recipe(
            "FreshFeatures", "width", 1.033, 0.068, 3,
            {"dynamics": None, "width": width.FreshFeatures()}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, 0.369, nan), (nan, 0.622, nan), 0.499, 1),
                Saved("width", 1.78e+11, 7.43e+11, (nan, 0.302, nan), (nan, 0.47, nan), 0.374, 1),
                Saved("width", 1.78e+11, 1.19e+12, (nan, 0.178, nan), (nan, 0.302, nan), 0.272, 1),
            ),
        ),
        Recipe(
            "FreshFeatures, dropped", "width", 0.96, 0.068, 3,
            {"dynamics": None, "state": "drop", "width": width.FreshFeatures()}, 0.5, 60,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, 0.286, nan), (nan, 0.572, nan), 0.421, 0),
                Saved("width", 1.78e+11, 7.43e+11, (nan, 0.192, nan), (nan, 0.386, nan), 0.304, 0),
                Saved("width", 1.78e+11, 1.19e+12, (nan, 0.082, nan), (nan, 0.22, nan), 0.214, 0),
            ),
        ),
        Recipe(
            "default, dropped", "width", 0.895, 0.068, 3,
            {"dynamics": None, "state": "drop"}, 0.5, 60,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, 0.275, nan), (nan, 0.565, nan), 0.421, 0),
                Saved("width", 1.78e+11, 7.43e+11, (nan, 0.104, nan), (nan, 0.319, nan), 0.304, 0),
                Saved("width", 1.78e+11, 1.19e+12, (nan, -0.009, nan), (nan, 0.143, nan), 0.214, 0),
            ),
        ),
    )
}  # fmt: skip
