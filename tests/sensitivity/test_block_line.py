from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiller.sensitivity.block_engine import BlockScores
from distiller.sensitivity.block_line import HEADER, block_of_line, line_of_block
from distiller.sensitivity.decisions import Tally

COUNTS = st.integers(0, 10_000)
TALLIES = st.builds(Tally, COUNTS, COUNTS, COUNTS, st.floats(0, math.inf), COUNTS, COUNTS)
BLOCKS = st.builds(
    BlockScores, TALLIES, st.dictionaries(st.tuples(COUNTS, COUNTS), TALLIES, max_size=3), COUNTS
)


@given(COUNTS, BLOCKS)
def test_a_line_says_the_block_to_the_bit(index, scores):
    line = line_of_block(index, scores)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert block_of_line(line[:-1]) == (index, scores)


def test_the_form_of_a_line():
    scores = BlockScores(Tally(10, 9, 10, 0.5), {(1, 0): Tally(10, 8, 9, 0.75, 2, 1)}, 3)
    assert line_of_block(7, scores) == "39a94228 [7,[10,9,10,0.5,0,0],[[1,0,10,8,9,0.75,2,1]],3]\n"
    assert HEADER.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["", "{}", "39a94228", "0af60cba [7,[10,9,10,0.5,0,0],[[1,0,10,8,9,0.75,2,1]],4]"]
)
def test_another_line_is_no_block(line):
    with pytest.raises(ValueError, match="its checksum is another"):
        block_of_line(line)
