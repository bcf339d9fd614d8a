"""Codes of 1 to 8 bits, one after the other without gaps, and what a codebook takes in a file.

The first code is in the lowest bits of the first byte.
Knows nothing about layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distiller.errors import QuantizationError

__all__ = ["StoredCodebook", "codebook_bytes", "pack_codes", "unpack_codes"]


@dataclass(frozen=True, slots=True)
class StoredCodebook:
    """What has to be stored of a weight.

    Attributes:
        codes: uint8, packed, one code of each weight in the order of its elements.
        bits: width of a code.
        values: (codebooks, values), what the codes stand for.
        pruned: uint8, one bit of each weight, packed: which are exactly 0; None where no code is needed for
            that (0 is one of the values, or nothing is pruned).
    """

    codes: Tensor
    bits: int
    values: Tensor
    pruned: Tensor | None

    @property
    def num_bytes(self) -> int:
        """What the tensors take."""
        tensors = (self.codes, self.values, *(() if self.pruned is None else (self.pruned,)))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def codebook_bytes(
    elements: int, bits: int, values: int, value_bytes: int = 4, has_pruned: bool = False
) -> int:
    """ceil(elements * bits / 8) + values * value_bytes, and ceil(elements / 8) to say which are pruned.

    Args:
        elements: of the weight.
        bits: width of a code, 1 to 8.
        values: in all codebooks of the weight together; without a 0 that all of them have.
        value_bytes: of one of them.
        has_pruned: weights are exactly 0 that no code stands for.

    Raises:
        QuantizationError: the width is out of range.
    """
    _check_width(bits, "codebook_bytes")
    return -(-elements * bits // 8) + values * value_bytes + (-(-elements // 8) if has_pruned else 0)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The codes without gaps.

    Args:
        codes: integers of any shape, 0 to 2^bits - 1.
        bits: 1 to 8.

    Returns:
        uint8, (ceil(elements * bits / 8),); what is left of the last byte is 0.

    Raises:
        QuantizationError: the width is out of range, or a code is.
    """
    _check_width(bits, "pack_codes")
    flat = codes.detach().cpu().flatten()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise QuantizationError(
            f"pack_codes: codes of {bits} bits are 0 to {2**bits - 1}, got {int(flat.min())} to "
            f"{int(flat.max())}"
        )
    single = np.unpackbits(flat.to(torch.uint8).numpy()[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(single.ravel(), bitorder="little"))


def unpack_codes(packed: Tensor, bits: int, elements: int) -> Tensor:
    """What `pack_codes` has packed: uint8, (elements,).

    Raises:
        QuantizationError: the width is out of range, or the bytes are not those of so many codes.
    """
    _check_width(bits, "unpack_codes")
    expected = -(-elements * bits // 8)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise QuantizationError(
            f"unpack_codes: {elements} codes of {bits} bits are {expected} bytes (uint8), got "
            f"{packed.numel()} elements of {packed.dtype}"
        )
    single = np.unpackbits(packed.cpu().numpy(), count=elements * bits, bitorder="little")
    codes = np.packbits(single.reshape(elements, bits), axis=1, bitorder="little")
    return torch.from_numpy(codes.reshape(elements))


def _check_width(bits: int, where: str) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise QuantizationError(f"{where}: bits must be 1 to 8, got {bits!r}")
