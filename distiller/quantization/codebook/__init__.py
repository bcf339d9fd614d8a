"""Codebook quantization: weights of few values, found by k-means or equally far apart, and fine-tuned."""

from distiller.quantization.codebook.codebook import CodebookWeights, look_up
from distiller.quantization.codebook.codebook_quantizer import (
    CodebookQuantizer,
    codebooks_of,
    quantize_with_codebook,
)
from distiller.quantization.codebook.linear_levels import linear_levels, quantize_by_fraction
from distiller.quantization.codebook.packing import (
    StoredCodebook,
    codebook_bytes,
    pack_codes,
    unpack_codes,
)

__all__ = [
    "CodebookQuantizer",
    "CodebookWeights",
    "StoredCodebook",
    "codebook_bytes",
    "codebooks_of",
    "linear_levels",
    "look_up",
    "pack_codes",
    "quantize_by_fraction",
    "quantize_with_codebook",
    "unpack_codes",
]
