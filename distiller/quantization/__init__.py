"""Quantization: how numbers are laid onto few bits, and models quantized after training or in it."""

from distiller.quantization.affine import (
    LinearQuantMode,
    get_quantized_range,
    is_linear_quant_mode_asymmetric,
    is_linear_quant_mode_symmetric,
)
from distiller.quantization.clipping import ClipMode
from distiller.quantization.codebook import CodebookQuantizer, quantize_with_codebook
from distiller.quantization.data_steps import DataSteps
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.ptq_elementwise import (
    RangeLinearQuantConcatWrapper,
    RangeLinearQuantEltwiseAddWrapper,
    RangeLinearQuantEltwiseMultWrapper,
    RangeLinearQuantEltwiseSubWrapper,
    RangeLinearQuantMatmulWrapper,
    RangeLinearQuantStackWrapper,
)
from distiller.quantization.ptq_layers import (
    RangeLinearEmbeddingWrapper,
    RangeLinearFakeQuantWrapper,
    RangeLinearQuantParamLayerWrapper,
    RangeLinearQuantWrapper,
)
from distiller.quantization.ptq_precision import FPWrapper
from distiller.quantization.q_utils import (
    approx_scale_as_mult_and_shift,
    asymmetric_linear_quantization_params,
    get_tensor_avg_max_abs,
    get_tensor_avg_min_max,
    get_tensor_max_abs,
    get_tensor_mean_n_stds_min_max,
    get_tensor_min_max,
    linear_dequantize,
    linear_quantize,
    linear_quantize_clamp,
    symmetric_linear_quantization_params,
)
from distiller.quantization.quantizer import QBits, Quantizer, rebuild_quantized
from distiller.quantization.report import QuantizationReport, quantization_report
from distiller.quantization.search import (
    mixed_precision_search,
    ptq_coordinate_search,
    ptq_greedy_search,
)
from distiller.quantization.stored import StoredParams, stored_params
from distiller.quantization.training import (
    BinaryQuantizer,
    DorefaQuantizer,
    LSQQuantizer,
    NCFQuantAwareTrainQuantizer,
    PACTQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
    SimulatedFoldedBatchNorm,
    TernaryQuantizer,
    WRPNQuantizer,
    folded_copy,
)
from distiller.quantization.with_data import QuantizedWithData, quantize_with_data

__all__ = [
    "BinaryQuantizer",
    "ClipMode",
    "CodebookQuantizer",
    "DataSteps",
    "DorefaQuantizer",
    "FPWrapper",
    "LSQQuantizer",
    "LinearQuantMode",
    "NCFQuantAwareTrainQuantizer",
    "PACTQuantizer",
    "PostTrainLinearQuantizer",
    "QBits",
    "QuantAwareTrainRangeLinearQuantizer",
    "QuantizationReport",
    "QuantizedWithData",
    "Quantizer",
    "RangeLinearEmbeddingWrapper",
    "RangeLinearFakeQuantWrapper",
    "RangeLinearQuantConcatWrapper",
    "RangeLinearQuantEltwiseAddWrapper",
    "RangeLinearQuantEltwiseMultWrapper",
    "RangeLinearQuantEltwiseSubWrapper",
    "RangeLinearQuantMatmulWrapper",
    "RangeLinearQuantParamLayerWrapper",
    "RangeLinearQuantStackWrapper",
    "RangeLinearQuantWrapper",
    "SimulatedFoldedBatchNorm",
    "StoredParams",
    "TernaryQuantizer",
    "WRPNQuantizer",
    "approx_scale_as_mult_and_shift",
    "asymmetric_linear_quantization_params",
    "folded_copy",
    "get_quantized_range",
    "get_tensor_avg_max_abs",
    "get_tensor_avg_min_max",
    "get_tensor_max_abs",
    "get_tensor_mean_n_stds_min_max",
    "get_tensor_min_max",
    "is_linear_quant_mode_asymmetric",
    "is_linear_quant_mode_symmetric",
    "linear_dequantize",
    "linear_quantize",
    "linear_quantize_clamp",
    "mixed_precision_search",
    "ptq_coordinate_search",
    "ptq_greedy_search",
    "quantization_report",
    "quantize_with_codebook",
    "quantize_with_data",
    "rebuild_quantized",
    "stored_params",
    "symmetric_linear_quantization_params",
]
