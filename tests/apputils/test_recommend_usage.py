from __future__ import annotations

import pytest

from distiller.errors import UsageError
from tests.apputils.test_usage import TWO, check

NEEDS = "--recommend: needs exactly one of --max-drop, --target-sparsity, --target-macs; got "


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--recommend x", f"{NEEDS}none"),
        ("--recommend x --max-drop 1 --target-macs 0.5", f"{NEEDS}--max-drop and --target-macs"),
        ("--max-drop 1", "--max-drop: goes with --recommend"),
        ("--sense element --target-sparsity 0.8", "--target-sparsity: goes with --recommend"),
        ("-e --target-macs 0.5", "--target-macs: goes with --recommend"),
        ("--recommend-axis filter", "--recommend-axis: goes with --recommend"),
        ("--recommend-pruner agp", "--recommend-pruner: goes with --recommend"),
        ("--recommend-epochs 5", "--recommend-epochs: goes with --recommend"),
        ("--verify", "--verify: goes with --recommend"),
        ("--recommend x --max-drop 1 -e", f"--recommend and --evaluate: {TWO}"),
        ("--recommend x --max-drop 1 --sense element", f"--sense and --recommend: {TWO}"),
    ],
)  # fmt: skip
def test_a_flag_of_recommendations_without_effect_is_refused_by_name(argv, told):
    with pytest.raises(UsageError) as error:
        check(argv)
    assert str(error.value) == told


@pytest.mark.parametrize(
    "argv",
    [
        "--recommend x --max-drop 1 --verify --resume-from c",
        "--recommend x --target-sparsity 0.8 --recommend-axis element --recommend-pruner sensitivity",
        "--recommend x --target-macs 0.5 --recommend-epochs 20 --pretrained",
    ],
)
def test_what_belongs_together_is_taken(argv):
    check(argv)
