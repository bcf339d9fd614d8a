"""Regularization: penalties of a tensor and the regularizers around them.

Importing this package registers its regularizers (and `L0Regularizer`, which is an extension).
"""

from distiller.regularization.l0 import L0Regularizer
from distiller.regularization.penalties import group_lasso, group_mask, group_variance, l1
from distiller.regularization.regularizers import (
    GroupLassoRegularizer,
    GroupVarianceRegularizer,
    L1Regularizer,
)

__all__ = [
    "GroupLassoRegularizer",
    "GroupVarianceRegularizer",
    "L0Regularizer",
    "L1Regularizer",
    "group_lasso",
    "group_mask",
    "group_variance",
    "l1",
]
