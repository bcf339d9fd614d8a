"""Thinning: units of channel groups physically removed, by recipes of plain data."""

from distiller.thinning.recipe import ThinningRecipe
from distiller.thinning.removal import apply_recipe, thinning_recipe
from distiller.thinning.removers import ChannelRemover, FilterRemover, StructureRemover
from distiller.thinning.thin_model import ThinningReport, contract_model, remove_channels, remove_filters
from distiller.thinning.zero_structures import KeptZeros, ZeroUnits, find_zero_units

__all__ = [
    "ChannelRemover",
    "FilterRemover",
    "KeptZeros",
    "StructureRemover",
    "ThinningRecipe",
    "ThinningReport",
    "ZeroUnits",
    "apply_recipe",
    "contract_model",
    "find_zero_units",
    "remove_channels",
    "remove_filters",
    "thinning_recipe",
]
