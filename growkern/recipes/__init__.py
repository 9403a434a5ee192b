"""Recipes of growth with their measured savings, by name: ``growkern.recipes.RECIPES``."""

from growkern.recipes.measured import BUDGETS, MEASURED, RECIPES
from growkern.recipes.recipe import Recipe, Saved

__all__ = ["BUDGETS", "MEASURED", "RECIPES", "Recipe", "Saved"]
