"""Efficiency of growth recipes, as measured. Written by ``python -m bench.advice --write``; not by hand.

From 18 figures (recipes, growth points, budgets) of bench/results/savings-*.csv, setups: width.
"""

from growkern.advice import Recipe

MEASURED = "60 to 230 thousand parameters (bytes of Python source)"
BUDGETS = 2.4, 6.7  # multiples of the compute at growth
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "default", "width",
            "the defaults of expand_inplace",
            0.95, 0.068, 3,
        ),
        Recipe(
            "default, one rate", "width",
            "dynamics=None, learning rate x 0.5",
            1.016, 0.068, 3,
        ),
        Recipe(
            "Sparkling fresh", "width",
            "dynamics=None, state='drop', width=Sparkling(fan_out='random', fan_in='zero'), learning rate x 0.5, 60 steps of warm-up",
            1.055, 0.068, 3,
        ),
        Recipe(
            "FreshFeatures", "width",
            "dynamics=None, width=FreshFeatures(), learning rate x 0.5 or 1",
            1.033, 0.068, 3,
        ),
        Recipe(
            "FreshFeatures, dropped", "width",
            "dynamics=None, state='drop', width=FreshFeatures(), learning rate x 0.5, 60 steps of warm-up",
            0.96, 0.068, 3,
        ),
        Recipe(
            "default, dropped", "width",
            "dynamics=None, state='drop', learning rate x 0.5, 60 steps of warm-up",
            0.895, 0.068, 3,
        ),
    )
}  # fmt: skip
