"""A block of a sweep as a line of text, with a checksum of what it says.

    CHECKSUM [index, TALLY of the dense network, [[unit, level, *TALLY] of each point], flipped]

TALLY is n, top1, top5, loss, lost, won; CHECKSUM is the CRC-32 of what follows it, in hexadecimal digits.
Knows nothing about files.
"""

from __future__ import annotations

import json
import zlib

from distiller.sensitivity.block_engine import BlockScores
from distiller.sensitivity.decisions import Tally

__all__ = ["HEADER", "block_of_line", "line_of_block"]

HEADER = (
    "CRC-32 [index, tally of the dense network, [unit, level, tally] of each point, flipped]; "
    "tally: n, top1, top5, loss, lost, won\n"
)


def line_of_block(index: int, scores: BlockScores) -> str:
    """The line of a block, with its end."""
    points = [[*place, *_plain(tally)] for place, tally in sorted(scores.points.items())]
    text = json.dumps([index, _plain(scores.dense), points, scores.flipped], separators=(",", ":"))
    return f"{_checksum(text)} {text}\n"


def block_of_line(line: str) -> tuple[int, BlockScores]:
    """(index, scores) of a line without its end.

    Raises:
        ValueError: it is not as it was written.
    """
    checksum, _, text = line.partition(" ")
    if checksum != _checksum(text):
        raise ValueError("its checksum is another")
    index, dense, points, flipped = json.loads(text)
    found = {(unit, level): Tally(*tally) for unit, level, *tally in points}
    return index, BlockScores(Tally(*dense), found, flipped)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _plain(tally: Tally) -> list[float]:
    return [tally.n, tally.top1, tally.top5, tally.loss, tally.lost, tally.won]
