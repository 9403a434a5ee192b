"""Recipes of growth with their measured savings.

Attributes:
    RECIPES: Name of a recipe -> the ``Recipe``.
    MEASURED: What the measured models were, as text.
    BUDGETS: Least and largest measured budget, as multiples of the FLOPs at the growth.
    FACTORS: Least and largest measured growth, as multiples of the parameters of the source.
"""

from growkern.recipes.measured import BUDGETS, FACTORS, MEASURED, RECIPES
from growkern.recipes.recipe import Recipe, Saved

__all__ = ["BUDGETS", "FACTORS", "MEASURED", "RECIPES", "Recipe", "Saved"]


def __dir__() -> list[str]:
    return __all__
