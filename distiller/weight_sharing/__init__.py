"""Weights of few values, found in training: by a mixture learned beside them, or by k-means."""

from distiller.weight_sharing.components import (
    assign_to_components,
    divergence,
    fit_mixture,
    merge_components,
    start_mixture,
)
from distiller.weight_sharing.history import EpochOfSharing, SharingHistory
from distiller.weight_sharing.kmeans_sharing import KMeansWeightSharing
from distiller.weight_sharing.learned_mixture import LearnedMixture
from distiller.weight_sharing.mixture import Mixture, mixture_penalty, plain_mixture_penalty
from distiller.weight_sharing.priors import BetaPrior, GammaPrior
from distiller.weight_sharing.quantize_to_mixture import (
    QuantizeToMixture,
    mixture_of_weights,
    share_weights,
)
from distiller.weight_sharing.shared_values import SharedWeights, component_values
from distiller.weight_sharing.soft_weight_sharing import SoftWeightSharing

__all__ = [
    "BetaPrior",
    "EpochOfSharing",
    "GammaPrior",
    "KMeansWeightSharing",
    "LearnedMixture",
    "Mixture",
    "QuantizeToMixture",
    "SharedWeights",
    "SharingHistory",
    "SoftWeightSharing",
    "assign_to_components",
    "component_values",
    "divergence",
    "fit_mixture",
    "merge_components",
    "mixture_of_weights",
    "mixture_penalty",
    "plain_mixture_penalty",
    "share_weights",
    "start_mixture",
]
