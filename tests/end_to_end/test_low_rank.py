"""The program on factored networks: training, its card, what follows in other runs, and what is refused."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end.conftest import TINY, make_program
from tests.end_to_end.program import load

SCHEDULE = """
extensions:
  low_rank: {class: LowRankFactorization, layers: {conv2: {form: spatial, rank: 4}, fc: {rank: 3}}}
policies:
  - extension: {instance_name: low_rank}
    epochs: [1]
"""
QUANTIZED = """
quantizers:
  q: {class: DorefaQuantizer, bits_weights: 4}
policies:
  - quantizer: {instance_name: q}
    starting_epoch: 0
    ending_epoch: 1
    frequency: 1
"""


@pytest.fixture(scope="module")
def factored(server, trained, tmp_path_factory):
    """The run folder of a training that factors the trained network in its second epoch."""
    program = make_program(server, tmp_path_factory.mktemp("factored"))
    program.write("schedule.yaml", SCHEDULE)
    flags = "--epochs 3 --lr 0.02 --seed 1 -o out --compress schedule.yaml --reset-optimizer --resume-from"
    program.run(TINY + flags, trained).succeeded()
    return program.latest("out")


def test_the_card_is_of_the_smaller_network_beside_the_whole_one(factored):
    card = json.loads((factored / "results.json").read_text())
    assert (card["is_factored"], card["is_thinned"]) == (True, False)
    assert card["ratios"]["macs"] > 1
    assert card["ratios"]["parameters"] > 1
    assert card["ratios"]["bytes_checkpoint"] > 1
    assert card["measured"]["latency_single"]["median_s"] > 0
    assert card["reference"]["top1_correct"] is not None


def test_the_checkpoint_is_evaluated_and_says_that_it_is_factored(program, factored):
    done = program.run(TINY + "--evaluate -o out --resume-from", factored / "checkpoint.pth.tar").succeeded()
    assert "real: layers were replaced by products of smaller ones (low rank)" in done.out
    card = json.loads((program.latest("out") / "results.json").read_text())
    kept = json.loads((factored / "results.json").read_text())
    assert card["measured"]["macs"] == kept["measured"]["macs"]
    assert card["measured"]["top1_correct"] == kept["measured"]["top1_correct"]


def test_it_is_exported(program, factored):
    done = program.run(
        TINY + "--export-onnx -o out --resume-from", factored / "checkpoint.pth.tar"
    ).succeeded()
    assert "onnx" in done.out.lower()


def test_a_second_run_quantizes_it_and_is_resumed(program, factored):
    program.write("quantized.yaml", QUANTIZED)
    flags = "--epochs 1 --lr 0.01 --seed 1 -o out --compress quantized.yaml --exp-load-weights-from"
    program.run(TINY + flags, factored / "checkpoint.pth.tar").succeeded()
    left = program.latest("out") / "checkpoint.pth.tar"
    checkpoint = load(left)
    assert checkpoint["quantizer"]["class"] == "DorefaQuantizer"
    assert list(checkpoint["factorization_recipes"][0]["layers"]) == ["conv2", "fc"]
    program.run(TINY + "--evaluate -o again --resume-from", left).succeeded()


def test_a_quantized_network_is_not_factored(program, factored):
    program.write("both.yaml", SCHEDULE.split("policies:")[0] + QUANTIZED + SCHEDULE.split("policies:\n")[1])
    done = program.run(TINY + "--epochs 3 -o out --compress both.yaml")
    assert done.status == 2
    assert "do it in two runs" in done.err


def test_the_summary_and_the_dry_run_tell_of_it(program):
    assert "Break-even rank" in program.run(TINY + "--summary low-rank").succeeded().out
    program.write("schedule.yaml", SCHEDULE)
    done = program.run(TINY + "--epochs 3 --compress schedule.yaml --dry-run").succeeded()
    assert "LowRankFactorization: factors conv2, fc before the first mini-batch" in done.out
