"""Recipes of growth with their measured savings, by name: ``growkern.recipes.RECIPES``."""

from growkern.recipes.measured import BUDGETS, FACTORS, MEASURED, RECIPES
from growkern.recipes.recipe import Recipe, Saved

__all__ = ["BUDGETS", "FACTORS", "MEASURED", "RECIPES", "Recipe", "Saved"]


def __dir__() -> list[str]:
    return __all__
