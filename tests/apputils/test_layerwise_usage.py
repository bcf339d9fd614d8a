from __future__ import annotations

import pytest

from distiller.errors import UsageError
from tests.apputils.test_usage import TWO, check

WITH = "--layerwise prune --resume-from c"


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--layerwise prune", "--layerwise: needs trained weights: a checkpoint, given with --resume-from or "
         "--exp-load-weights-from, or --pretrained"),
        ("--fractions 0 0.5 0.1", "--fractions: goes with --layerwise"),
        ("-e --layerwise-bits 4", "--layerwise-bits: goes with --layerwise"),
        ("--sense filter --layerwise-layers fc", "--layerwise-layers: goes with --layerwise"),
        ("--layerwise-resume logs/x", "--layerwise-resume: goes with --layerwise"),
        (f"{WITH} -e", f"--layerwise and --evaluate: {TWO}"),
        (f"{WITH} --sense filter", f"--sense and --layerwise: {TWO}"),
        (f"{WITH} --layerwise-plot x", f"--layerwise and --layerwise-plot: {TWO}"),
        ("--layerwise-plot x -e", f"--layerwise-plot and --evaluate: {TWO}"),
        (f"{WITH} --confusion", "--confusion: only when training or evaluating"),
        (f"{WITH} --param-hist", "--param-hist: only when training"),
    ],
)  # fmt: skip
def test_a_flag_of_layerwise_compression_without_effect_is_refused_by_name(argv, told):
    with pytest.raises(UsageError) as error:
        check(argv)
    assert str(error.value) == told


@pytest.mark.parametrize(
    "argv",
    [
        f"{WITH} --fractions 0 0.5 0.1 --layerwise-bits 4 2 --layerwise-layers fc* -p 5",
        "--layerwise svd+prune --pretrained",
        "--layerwise quant --exp-load-weights-from c --layerwise-resume x",
        "--layerwise-plot x -o y",
    ],
)
def test_what_belongs_together_is_taken(argv):
    check(argv)
