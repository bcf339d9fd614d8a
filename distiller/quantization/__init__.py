"""Quantization: how numbers are laid onto few bits, and models quantized after training."""

from distiller.quantization.affine import (
    LinearQuantMode,
    get_quantized_range,
    is_linear_quant_mode_asymmetric,
    is_linear_quant_mode_symmetric,
)
from distiller.quantization.clipping import ClipMode
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
from distiller.quantization.stored import StoredParams, stored_params

__all__ = [
    "ClipMode",
    "FPWrapper",
    "LinearQuantMode",
    "PostTrainLinearQuantizer",
    "QBits",
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
    "StoredParams",
    "approx_scale_as_mult_and_shift",
    "asymmetric_linear_quantization_params",
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
    "rebuild_quantized",
    "stored_params",
    "symmetric_linear_quantization_params",
]
