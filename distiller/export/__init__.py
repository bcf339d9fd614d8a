"""What a model costs outside of training: bytes and milliseconds."""

from distiller.export.latency import Latency, measure_latency
from distiller.export.size import dense_bytes, quantized_bytes, serialized_bytes, sparse_bytes

__all__ = [
    "Latency",
    "dense_bytes",
    "measure_latency",
    "quantized_bytes",
    "serialized_bytes",
    "sparse_bytes",
]
