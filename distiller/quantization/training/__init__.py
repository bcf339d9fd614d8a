"""Quantization-aware training: quantizers that a model is trained with, and what they are made of."""

from distiller.quantization.training.deploy import FoldedCopy, GridQuantizer, IntegerWeight, folded_copy
from distiller.quantization.training.fake_quant import Grid
from distiller.quantization.training.lsq import LSQQuantizer
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.quantization.training.range_linear import (
    NCFQuantAwareTrainQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
)
from distiller.quantization.training.range_tracking import FakeLinearQuantization, RangeTracker
from distiller.quantization.training.sim_bn_fold import SimulatedFoldedBatchNorm

__all__ = [
    "FakeLinearQuantization",
    "FoldedCopy",
    "Grid",
    "GridQuantizer",
    "IntegerWeight",
    "LSQQuantizer",
    "NCFQuantAwareTrainQuantizer",
    "QatQuantizer",
    "QuantAwareTrainRangeLinearQuantizer",
    "RangeTracker",
    "SimulatedFoldedBatchNorm",
    "folded_copy",
]
