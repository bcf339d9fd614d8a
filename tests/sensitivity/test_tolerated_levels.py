import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.plot_labels import find_metric, level_scale
from distiller.sensitivity.tolerated_levels import Tolerated, tolerated_levels


def tolerated(axis, top1_by_level, reference=91.71):
    curve = [
        SensitivityPoint(axis, "w", level, Score(top1, 99.0, 0.1)) for level, top1 in top1_by_level.items()
    ]
    return tolerated_levels(curve, level_scale(axis), find_metric("top1"), reference)


@pytest.mark.parametrize(
    "axis, scores, levels, swept",
    [
        ("element", {0.0: 91.71, 0.5: 91.0, 0.9: 90.0}, (0.5,), 2),
        ("element", {0.9: 91.0, 0.5: 91.8}, (0.5, 0.9), 2),  # in any order, better than dense
        ("element", {0.5: 90.71}, (0.5,), 1),  # 91.71 - 90.71 is 1.0000000000000... in floats
        ("element", {0.5: 90.70}, (), 1),
        ("element", {0.3: 91.0, 0.5: 80.0, 0.7: 91.0}, (0.3,), 3),  # luck behind a drop does not count
        ("element", {0.5: math.nan}, (), 1),
        ("element", {0.0: 91.71}, (), 0),
        ("weight-bits", {32.0: 91.71, 2.0: 10.0, 8.0: 91.7, 4.0: 91.0}, (8.0, 4.0), 3),
    ],
)
def test_levels_are_tolerated_until_one_costs_more_than_a_point(axis, scores, levels, swept):
    assert tolerated(axis, scores) == Tolerated(levels, swept)


@given(st.dictionaries(st.sampled_from([0.1, 0.2, 0.3, 0.4]), st.floats(80, 100), min_size=1))
def test_no_tolerated_level_costs_more_than_a_point_and_the_next_one_does(scores):
    found = tolerated("rank", scores, 90.0)

    drops = {level: 90.0 - scores[level] for level in sorted(scores)}
    assert all(drops[level] <= 1 + 1e-9 for level in found.levels)
    behind = [level for level in drops if level not in found.levels]
    assert not behind or drops[behind[0]] > 1
