"""Quantization-aware training: quantizers that a model is trained with, and what they are made of."""

from distiller.quantization.training.binary import BinaryQuantizer
from distiller.quantization.training.deploy import FoldedCopy, GridQuantizer, IntegerWeight, folded_copy
from distiller.quantization.training.dorefa import DorefaQuantizer
from distiller.quantization.training.fake_quant import Grid
from distiller.quantization.training.lsq import LSQQuantizer
from distiller.quantization.training.pact import PACTQuantizer
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.quantization.training.range_linear import (
    NCFQuantAwareTrainQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
)
from distiller.quantization.training.range_tracking import FakeLinearQuantization, RangeTracker
from distiller.quantization.training.sim_bn_fold import SimulatedFoldedBatchNorm
from distiller.quantization.training.ternary import TernaryQuantizer
from distiller.quantization.training.wrpn import WRPNQuantizer

__all__ = [
    "BinaryQuantizer",
    "DorefaQuantizer",
    "FakeLinearQuantization",
    "FoldedCopy",
    "Grid",
    "GridQuantizer",
    "IntegerWeight",
    "LSQQuantizer",
    "NCFQuantAwareTrainQuantizer",
    "PACTQuantizer",
    "QatQuantizer",
    "QuantAwareTrainRangeLinearQuantizer",
    "RangeTracker",
    "SimulatedFoldedBatchNorm",
    "TernaryQuantizer",
    "WRPNQuantizer",
    "folded_copy",
]
