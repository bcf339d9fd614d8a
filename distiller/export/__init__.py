"""What a model costs outside of training, bytes and milliseconds; and how it leaves PyTorch."""

from distiller.export.integer_parity import IntegerParity, compare_integer
from distiller.export.latency import Latency, measure_latency
from distiller.export.onnx_export import export_img_classifier_to_onnx, export_onnx, onnx_bytes
from distiller.export.onnx_parity import OnnxParity, check_onnx
from distiller.export.pytorch_int8 import convert_distiller_ptq_model_to_pytorch
from distiller.export.pytorch_qparams import (
    distiller_qparams_to_pytorch,
    distiller_quantized_tensor_to_pytorch,
)
from distiller.export.qdq_export import Int8Onnx, export_int8_onnx, int8_onnx, int8_onnx_bytes
from distiller.export.size import dense_bytes, quantized_bytes, serialized_bytes, sparse_bytes

__all__ = [
    "Int8Onnx",
    "IntegerParity",
    "Latency",
    "OnnxParity",
    "check_onnx",
    "compare_integer",
    "convert_distiller_ptq_model_to_pytorch",
    "dense_bytes",
    "distiller_qparams_to_pytorch",
    "distiller_quantized_tensor_to_pytorch",
    "export_img_classifier_to_onnx",
    "export_int8_onnx",
    "export_onnx",
    "int8_onnx",
    "int8_onnx_bytes",
    "measure_latency",
    "onnx_bytes",
    "quantized_bytes",
    "serialized_bytes",
    "sparse_bytes",
]
