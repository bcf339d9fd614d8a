"""Pruning: criteria (tensor -> mask) and the pruners around them.

Importing this package registers its pruners.
"""

from distiller.norms import l1_norm, l2_norm, max_norm
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
from distiller.pruning.global_magnitude import GlobalMagnitudePruner, global_magnitude_masks
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
from distiller.pruning.rnn import BaiduRNNPruner, rising_threshold
from distiller.pruning.schedule import ConstantSparsity, GradualSparsity, SparsitySchedule, agp_sparsity
from distiller.pruning.splicing import SplicingPruner, splicing_mask
from distiller.pruning.structure_pruner import StructurePruner
from distiller.pruning.structure_thresholds import StructureParameterPruner

__all__ = [
    "AutomatedGradualPruner",
    "BaiduRNNPruner",
    "BernoulliFilterPruner",
    "BernoulliFilterPruner_AGP",
    "ConstantSparsity",
    "GlobalMagnitudePruner",
    "GradualSparsity",
    "L1RankedStructureParameterPruner",
    "L1RankedStructureParameterPruner_AGP",
    "L2RankedStructureParameterPruner",
    "L2RankedStructureParameterPruner_AGP",
    "MagnitudeParameterPruner",
    "NMPruner",
    "RandomLevelStructureParameterPruner",
    "RandomRankedFilterPruner",
    "RandomRankedFilterPruner_AGP",
    "RankedStructurePruner",
    "SensitivityPruner",
    "SparsityLevelParameterPruner",
    "SparsitySchedule",
    "SparsityTargetPruner",
    "SplicingPruner",
    "StructureParameterPruner",
    "StructurePruner",
    "agp_sparsity",
    "bernoulli_structures",
    "create_mask_level_criterion",
    "create_mask_sensitivity_criterion",
    "create_mask_threshold_criterion",
    "global_magnitude_masks",
    "group_magnitudes",
    "group_threshold_mask",
    "l1_norm",
    "l2_norm",
    "max_norm",
    "n_to_m_mask",
    "random_structures",
    "ranked_structure_mask",
    "ranked_structures",
    "rising_threshold",
    "splicing_mask",
]
