"""Searches over the settings of a quantized model after training: clip modes, scales, widths."""

from distiller.quantization.search.clip_search import CLIP_MODES, ptq_greedy_search
from distiller.quantization.search.lapq import LapqResult, coordinate_search, ptq_coordinate_search
from distiller.quantization.search.lapq_settings import LapqSettings
from distiller.quantization.search.mixed_precision import (
    MixedPrecisionResult,
    PrecisionPoint,
    mixed_precision_search,
)
from distiller.quantization.search.search_log import Progress, SearchLog, SearchProgress

__all__ = [
    "CLIP_MODES",
    "LapqResult",
    "LapqSettings",
    "MixedPrecisionResult",
    "PrecisionPoint",
    "Progress",
    "SearchLog",
    "SearchProgress",
    "coordinate_search",
    "mixed_precision_search",
    "ptq_coordinate_search",
    "ptq_greedy_search",
]
