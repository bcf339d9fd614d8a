"""What only prints: help, summaries, dry runs."""

from __future__ import annotations

import pytest

from tests.end_to_end.conftest import TINY
from tests.end_to_end.test_training import AGP
from tests.test_graph_picture import needs_dot

EXPECTED = {
    "sparsity": ["| conv1.weight ", "| Total sparsity: ", "Abs-Mean"],
    "compute": ["| conv1 ", "| fc ", "Total MACs: 10,688"],
    "model": ["Tiny(", "(dropout): Dropout(p=0.3"],
    "modules": ["| conv1 ", "| BatchNorm2d ", "| dropout "],
}


@pytest.mark.parametrize("what", EXPECTED)
def test_a_summary_prints_and_writes_nothing(program, what):
    before = program.state()
    done = program.run(TINY + f"--summary {what}").succeeded()
    assert all(text in done.out for text in EXPECTED[what])
    assert program.state() == before


@needs_dot
def test_the_picture_of_a_graph_is_all_that_is_written(program):
    before = program.state()
    done = program.run(TINY + "--summary png -o pictures").succeeded()
    assert done.out == "Saved the picture of the graph to: pictures/nets_Tiny.png\n"
    assert program.state().keys() - before.keys() == {"pictures", "pictures/nets_Tiny.png"}


def test_several_summaries_come_in_the_order_asked_for(program):
    out = program.run(TINY + "--summary MODULES --summary sparsity").succeeded().out
    assert out.index("| Type ") < out.index("Total sparsity:")


def test_the_macs_of_resnet20_are_the_published_ones(program):
    out = program.run("--arch resnet20_cifar --dataset synthetic --summary compute").succeeded().out
    assert out.splitlines()[-1] == "Total MACs: 40,813,184"


def test_a_summary_shows_the_weights_of_a_checkpoint(program, trained):
    program.write("agp.yaml", AGP)
    program.run(TINY + "--epochs 3 --etrs 0.05 -o out --compress agp.yaml").succeeded()
    file = program.latest("out") / "checkpoint.pth.tar"
    line = next(
        line
        for line in program.run(TINY + f"--summary sparsity --resume-from {file}")
        .succeeded()
        .out.splitlines()
        if "| fc.weight " in line
    )
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3:5] == ["320", "64"]
    assert "80.00" in cells


def test_a_dry_run_tells_what_each_policy_touches_when(program):
    program.write("agp.yaml", AGP)
    before = program.state()
    done = program.run(TINY + "--epochs 6 --dry-run --compress agp.yaml").succeeded()
    assert done.out == (
        "agp.yaml on nets:Tiny: 2 policies, epochs 0..5\n"
        "  epoch 0:\n"
        "    pruner agp: AutomatedGradualPruner: conv2.weight, fc.weight -> sparsity 10.0%\n"
        "    lr_scheduler decay: ExponentialLR\n"
        "  epoch 1:\n"
        "    pruner agp: AutomatedGradualPruner: conv2.weight, fc.weight -> sparsity 71.2%\n"
        "    lr_scheduler decay: ExponentialLR\n"
        "  epoch 2:\n"
        "    pruner agp: AutomatedGradualPruner: conv2.weight, fc.weight -> sparsity 80.0%\n"
        "    lr_scheduler decay: ExponentialLR\n"
        "  epoch 3:\n"
        "    lr_scheduler decay: ExponentialLR\n"
        "  epochs 4..5:\n"
        "    nothing\n"
    )
    assert program.state() == before


def test_a_dry_run_tells_which_policies_begin_after_the_end_of_training(program):
    program.write(
        "agp.yaml",
        AGP.replace("starting_epoch: 0\n    ending_epoch: 3", "epochs: [7]").replace(
            "    frequency: 1\n  - lr", "  - lr"
        ),
    )
    out = program.run(TINY + "--epochs 2 --dry-run --compress agp.yaml").succeeded().out
    assert "  note: pruner agp: does nothing, it acts in epochs 7..7 and trained are epochs 0..1\n" in out
