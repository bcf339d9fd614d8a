"""Accuracy at few bits, after training: equalization, better scales, bias correction, learned rounding."""

from distiller.quantization.refinement.adaround import AdaRoundReport, LayerRounding, adaround
from distiller.quantization.refinement.adaround_settings import AdaRoundSettings
from distiller.quantization.refinement.bias_correction import (
    BiasCorrectionReport,
    CorrectedBias,
    correct_biases,
)
from distiller.quantization.refinement.equalization import EqualizationReport, EqualizedPair, equalize
from distiller.quantization.refinement.float_twin import float_twin
from distiller.quantization.refinement.rescaling import RescaledWeight, rescale_weights
from distiller.quantization.refinement.structure import add_biases, replace_relu6s
from distiller.quantization.refinement.weight_scales import mse_scale

__all__ = [
    "AdaRoundReport",
    "AdaRoundSettings",
    "BiasCorrectionReport",
    "CorrectedBias",
    "EqualizationReport",
    "EqualizedPair",
    "LayerRounding",
    "RescaledWeight",
    "adaround",
    "add_biases",
    "correct_biases",
    "equalize",
    "float_twin",
    "mse_scale",
    "replace_relu6s",
    "rescale_weights",
]
