"""Thinning: units of channel groups physically removed, by recipes of plain data."""

from distiller.thinning.recipe import ThinningRecipe
from distiller.thinning.removal import apply_recipe, thinning_recipe

__all__ = ["ThinningRecipe", "apply_recipe", "thinning_recipe"]
