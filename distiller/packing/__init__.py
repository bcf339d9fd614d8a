"""Packed files: the tensors of a compressed network as small as they honestly are, with an exact round trip.

    cursor, huffman, rans, symbols, gaps    numbers and symbols as bits
    grids, values, tensors                  a tensor in its smallest form
    plain_json, header, packed_file, report the file

Knows nothing about models or checkpoints; `apputils.packed_checkpoint` does.
"""

from distiller.packing.packed_file import (
    PackedFile,
    is_packed,
    pack_tensors,
    packed_tensors,
    unpack_tensors,
)
from distiller.packing.report import PackReport, TensorReport

__all__ = [
    "PackReport",
    "PackedFile",
    "TensorReport",
    "is_packed",
    "pack_tensors",
    "packed_tensors",
    "unpack_tensors",
]
