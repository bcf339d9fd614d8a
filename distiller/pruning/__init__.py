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
from distiller.pruning.ranked_structures import (
    L1RankedStructureParameterPruner,
    L1RankedStructureParameterPruner_AGP,
    L2RankedStructureParameterPruner,
    L2RankedStructureParameterPruner_AGP,
    RankedStructurePruner,
)
from distiller.pruning.ranking import ranked_structure_mask, ranked_structures
from distiller.pruning.schedule import ConstantSparsity, GradualSparsity, SparsitySchedule, agp_sparsity

__all__ = [
    "AutomatedGradualPruner",
    "ConstantSparsity",
    "GradualSparsity",
    "L1RankedStructureParameterPruner",
    "L1RankedStructureParameterPruner_AGP",
    "L2RankedStructureParameterPruner",
    "L2RankedStructureParameterPruner_AGP",
    "MagnitudeParameterPruner",
    "RankedStructurePruner",
    "SensitivityPruner",
    "SparsityLevelParameterPruner",
    "SparsitySchedule",
    "SparsityTargetPruner",
    "agp_sparsity",
    "create_mask_level_criterion",
    "create_mask_sensitivity_criterion",
    "create_mask_threshold_criterion",
    "group_magnitudes",
    "group_threshold_mask",
    "l1_norm",
    "l2_norm",
    "max_norm",
    "ranked_structure_mask",
    "ranked_structures",
]
