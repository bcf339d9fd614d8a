"""What a compressed weight takes when it is stored as compressed: the honest axis of a layer-wise sweep.

    pruned     the values that are not zero, and where they are: a bitmap or the gaps between them
    quantized  ceil(log2 levels) bits a value, and a table of the levels (two ends of equally spaced ones)
    low rank   r (m + n) values, below the break-even rank m n / (m + n)

Of all forms of a tensor the smallest counts, dense among them: nothing is stored larger than it was.
What names and shapes take is left out, as in `export.size`.
Knows nothing about models.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from distiller.errors import DistillerError
from distiller.layerwise.techniques import break_even_rank, rank_left

__all__ = ["code_bits", "gap_bytes", "part_bytes", "payload_bytes"]

_MOST_GAP_BITS = 16
_VALUES_SHARED = ("quant", "kmeans")


def code_bits(levels: int) -> int:
    """ceil(log2 levels): the bits of a code for one of so many levels; 0 for one level.

    Raises:
        DistillerError: there is no level.
    """
    if levels < 1:
        raise DistillerError(f"code_bits: at least one level is needed, got {levels}")
    return (levels - 1).bit_length()


def gap_bytes(kept: Tensor) -> int:
    """Where the kept elements are, as the number of elements left out before each: codes of p bits.

    The largest code, 2^p - 1, means so many elements left out and no value yet. p is the best of 1 to 16.

    Args:
        kept: booleans, any shape, in the order of the elements.
    """
    places = torch.nonzero(kept.flatten()).flatten()
    if not len(places):
        return 0
    gaps = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    found, counts = torch.unique(gaps, return_counts=True)
    bits = min(
        width * int((counts * (1 + found // (2**width - 1))).sum()) for width in range(1, _MOST_GAP_BITS + 1)
    )
    return -(-bits // 8)


def part_bytes(
    part: Tensor, *, is_pruned: bool = False, levels: int | None = None, table_bytes: int = 0
) -> int:
    """The bytes of one tensor in the smallest form that holds it.

    Args:
        part: as it is when nothing is compressed any more.
        is_pruned: zeros may be left out.
        levels: how many values there are, with `is_pruned` besides 0; None: any.
        table_bytes: what these levels take.
    """
    elements, width = part.numel(), 8 * part.element_size()
    forms = [elements * part.element_size()]
    if levels is not None and not is_pruned:
        forms.append(_packed(elements, code_bits(levels)) + table_bytes)
    if is_pruned:
        kept = part != 0
        nonzeros = int(kept.sum())
        where = min(-(-elements // 8), gap_bytes(kept))
        forms.append(_packed(nonzeros, width) + where)
        if levels is not None:
            forms.append(_packed(nonzeros, code_bits(levels)) + where + table_bytes)
            # 0 as one level more, and no positions
            forms.append(_packed(elements, code_bits(levels + 1)) + table_bytes)
    return min(forms)


def payload_bytes(
    shape: Sequence[int], techniques: Collection[str], fraction: float, value_bytes: int = 4
) -> int:
    """What the values alone take, by the shape: the shares of the techniques multiplied.

        n bytes * share of the rank * share not pruned * bits of a code / bits of a value

    Positions and tables come on top: the price of each technique that the product leaves out.

    Args:
        shape: of the weight, (m, ...).
        techniques: of `prune`, `quant`, `kmeans` and `svd`.
        fraction: of all of them.
        value_bytes: of one uncompressed value. All values are taken to be different.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    rank = rank_left(rows, columns, fraction)
    is_factored = "svd" in techniques and rank < break_even_rank(rows, columns)
    total = 0
    for elements in (rows * rank, rank * columns) if is_factored else (rows * columns,):
        values = elements - round(fraction * elements) if "prune" in techniques else elements
        bits = 8 * value_bytes
        if values and not {*_VALUES_SHARED}.isdisjoint(techniques):
            count = values - round(fraction * values)
            levels = count if count >= values or "kmeans" in techniques else count - 1
            bits = min(bits, code_bits(max(levels, 1))) if count < values else bits
        total += _packed(values, bits)
    return total


def _packed(elements: int, bits: int) -> int:
    return -(-elements * bits // 8)
