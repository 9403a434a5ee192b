"""Ways to grow, with what they saved where they were measured: ``growkern.recipes.RECIPES``, by name."""

from growkern.recipes.measured import BUDGETS, MEASURED, RECIPES
from growkern.recipes.recipe import Recipe, Saved

__all__ = ["BUDGETS", "MEASURED", "RECIPES", "Recipe", "Saved"]
