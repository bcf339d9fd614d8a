"""Low-rank factorization: layers as products of smaller ordinary layers, by recipes of plain data."""

from distiller.factorization.factorize import FactorizationReport, LayerReport, factorize
from distiller.factorization.input_moments import InputMoments
from distiller.factorization.layers import LowRankPlusSparse
from distiller.factorization.low_rank_policy import LowRankFactorization
from distiller.factorization.recipe import FactoredLayer, FactorizationRecipe
from distiller.factorization.replacement import apply_factorization, factorizations_of
from distiller.factorization.sensitivity import measured_points, ranks_by_sensitivity

__all__ = [
    "FactoredLayer",
    "FactorizationRecipe",
    "FactorizationReport",
    "InputMoments",
    "LayerReport",
    "LowRankFactorization",
    "LowRankPlusSparse",
    "apply_factorization",
    "factorizations_of",
    "factorize",
    "measured_points",
    "ranks_by_sensitivity",
]
