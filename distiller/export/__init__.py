"""What a model costs outside of training, bytes and milliseconds; and how it leaves PyTorch."""

from distiller.export.latency import Latency, measure_latency
from distiller.export.onnx_export import export_img_classifier_to_onnx, export_onnx, onnx_bytes
from distiller.export.onnx_parity import OnnxParity, check_onnx
from distiller.export.size import dense_bytes, quantized_bytes, serialized_bytes, sparse_bytes

__all__ = [
    "Latency",
    "OnnxParity",
    "check_onnx",
    "dense_bytes",
    "export_img_classifier_to_onnx",
    "export_onnx",
    "measure_latency",
    "onnx_bytes",
    "quantized_bytes",
    "serialized_bytes",
    "sparse_bytes",
]
