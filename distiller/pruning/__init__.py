"""Pruning: criteria (tensor -> mask) and the pruners around them.

Importing this package registers its pruners.
"""

from distiller.norms import l1_norm, l2_norm, max_norm
from distiller.pruning.activation_ranked import (
    ActivationAPoZRankedFilterPruner,
    ActivationAPoZRankedFilterPruner_AGP,
    ActivationMeanRankedFilterPruner,
    ActivationMeanRankedFilterPruner_AGP,
)
from distiller.pruning.automated_gradual import AutomatedGradualPruner, SparsityTargetPruner
from distiller.pruning.criteria import (
    create_mask_level_criterion,
    create_mask_sensitivity_criterion,
    create_mask_threshold_criterion,
    group_magnitudes,
    group_threshold_mask,
)
from distiller.pruning.fine_grained import (
    MagnitudeParameterPruner,
    SensitivityPruner,
    SparsityLevelParameterPruner,
)
from distiller.pruning.fm_reconstruction import FMReconstructionChannelPruner
from distiller.pruning.global_magnitude import GlobalMagnitudePruner, global_magnitude_masks
from distiller.pruning.gradient_ranked import (
    GradientRankedFilterPruner,
    GradientRankedFilterPruner_AGP,
    TaylorFORankedFilterPruner,
    TaylorFORankedFilterPruner_AGP,
    loss_removed,
    squared_loss_removed,
)
from distiller.pruning.movement import MovementPruner, movement_mask
from distiller.pruning.n_to_m import NMPruner, n_to_m_mask
from distiller.pruning.random_structures import (
    BernoulliFilterPruner,
    BernoulliFilterPruner_AGP,
    RandomLevelStructureParameterPruner,
    RandomRankedFilterPruner,
    RandomRankedFilterPruner_AGP,
    bernoulli_structures,
    random_structures,
)
from distiller.pruning.ranked_structures import (
    L1RankedStructureParameterPruner,
    L1RankedStructureParameterPruner_AGP,
    L2RankedStructureParameterPruner,
    L2RankedStructureParameterPruner_AGP,
    RankedStructurePruner,
)
from distiller.pruning.ranking import ranked_structure_mask, ranked_structures
from distiller.pruning.reconstruction import reconstructed_weights
from distiller.pruning.rnn import BaiduRNNPruner, rising_threshold
from distiller.pruning.schedule import ConstantSparsity, GradualSparsity, SparsitySchedule, agp_sparsity
from distiller.pruning.scored_filters import ScoredFilterPruner, filters_to_keep
from distiller.pruning.splicing import SplicingPruner, splicing_mask
from distiller.pruning.structure_pruner import StructurePruner
from distiller.pruning.structure_thresholds import StructureParameterPruner
from distiller.pruning.structured_groups import StructuredGroupPruner, StructuredGroupTaylorPruner

__all__ = [
    "ActivationAPoZRankedFilterPruner",
    "ActivationAPoZRankedFilterPruner_AGP",
    "ActivationMeanRankedFilterPruner",
    "ActivationMeanRankedFilterPruner_AGP",
    "AutomatedGradualPruner",
    "BaiduRNNPruner",
    "BernoulliFilterPruner",
    "BernoulliFilterPruner_AGP",
    "ConstantSparsity",
    "FMReconstructionChannelPruner",
    "GlobalMagnitudePruner",
    "GradientRankedFilterPruner",
    "GradientRankedFilterPruner_AGP",
    "GradualSparsity",
    "L1RankedStructureParameterPruner",
    "L1RankedStructureParameterPruner_AGP",
    "L2RankedStructureParameterPruner",
    "L2RankedStructureParameterPruner_AGP",
    "MagnitudeParameterPruner",
    "MovementPruner",
    "NMPruner",
    "RandomLevelStructureParameterPruner",
    "RandomRankedFilterPruner",
    "RandomRankedFilterPruner_AGP",
    "RankedStructurePruner",
    "ScoredFilterPruner",
    "SensitivityPruner",
    "SparsityLevelParameterPruner",
    "SparsitySchedule",
    "SparsityTargetPruner",
    "SplicingPruner",
    "StructureParameterPruner",
    "StructurePruner",
    "StructuredGroupPruner",
    "StructuredGroupTaylorPruner",
    "TaylorFORankedFilterPruner",
    "TaylorFORankedFilterPruner_AGP",
    "agp_sparsity",
    "bernoulli_structures",
    "create_mask_level_criterion",
    "create_mask_sensitivity_criterion",
    "create_mask_threshold_criterion",
    "filters_to_keep",
    "global_magnitude_masks",
    "group_magnitudes",
    "group_threshold_mask",
    "l1_norm",
    "l2_norm",
    "loss_removed",
    "max_norm",
    "movement_mask",
    "n_to_m_mask",
    "random_structures",
    "ranked_structure_mask",
    "ranked_structures",
    "reconstructed_weights",
    "rising_threshold",
    "splicing_mask",
    "squared_loss_removed",
]
