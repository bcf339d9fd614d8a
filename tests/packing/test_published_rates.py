"""The compression rates of okz12/NeuralNetworkCompression's formula, corrected, and what a packed file takes.

The formula counts, for weights of which all but a few are zero and the others have one of 16 values, a gap and a code
for each entry of a stream without row pointers. Its gaps end at 2^p (okz: p^2), where an entry of value 0 is put in.
"""

from __future__ import annotations

import heapq
from itertools import count

import numpy as np
import pytest
import torch

from distiller.packing import pack_tensors

N = 266_610
CODEBOOK_BITS = 32 * 16


def entries(gaps: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The gaps of all entries, 1 to the limit, and which of them pad."""
    padding = (gaps - 1) // limit
    ends = np.cumsum(padding + 1) - 1
    stream = np.full(int(ends[-1]) + 1, limit)
    stream[ends] = gaps - limit * padding
    pads = np.ones(stream.size, dtype=bool)
    pads[ends] = False
    return stream, pads


def huffman_bits(symbols: np.ndarray) -> int:
    number = count()
    heap = [(int(n), next(number)) for n in np.unique(symbols, return_counts=True)[1]]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap)[0] + heapq.heappop(heap)[0]
        total += merged
        heapq.heappush(heap, (merged, next(number)))
    return total


def weights_at_random(sparsity: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes 1 to 15 at random positions, in a bell around the middle one; and the gaps, from 1."""
    rng = np.random.default_rng(0)
    positions = np.sort(rng.choice(N, round(N * (1 - sparsity)), replace=False))
    codes = np.zeros(N, dtype=np.int64)
    codes[positions] = np.clip(np.rint(rng.normal(8, 1.5, positions.size)), 1, 15)
    return codes, np.diff(positions, prepend=-1)


@pytest.mark.parametrize(
    "sparsity, plain, huffman", [(0.9589, (72.2, 6), (89.4, 8)), (0.98, (133.5, 7), (162.9, 8))], ids=str
)
def test_the_file_is_smaller_than_what_the_corrected_formula_counts(sparsity, plain, huffman, tmp_path):
    codes, gaps = weights_at_random(sparsity)
    rates, coded = {}, {}
    for p in range(5, 11):
        stream, pads = entries(gaps, 2**p)
        rates[p] = 32 * N / (CODEBOOK_BITS + (4 + p) * stream.size)
        symbols = np.zeros(stream.size, dtype=np.int64)
        symbols[~pads] = codes[codes > 0]
        coded[p] = 32 * N / (CODEBOOK_BITS + huffman_bits(stream) + huffman_bits(symbols))
    best = max(rates, key=lambda p: rates[p])
    assert best == plain[1]
    assert rates[best] == pytest.approx(plain[0], rel=0.01)
    assert coded[huffman[1]] == pytest.approx(huffman[0], rel=0.01)

    values = torch.from_numpy(np.linspace(-1, 1, 16, dtype=np.float32) + np.float32(0.0123))
    weight = torch.where(torch.from_numpy(codes) > 0, values[codes], 0.0)
    report = pack_tensors({"weight": weight.view(N // 30, 30)}, tmp_path / "x.dsz")
    assert 8 * report.tensors[0].bytes <= 32 * N / coded[huffman[1]] * 1.002  # with the tables, and exact
    assert report.compression_rate >= huffman[0] * 0.97  # with header, checksums and digest, some 140 bytes
    assert report.compression_rate > 1.15 * plain[0]
