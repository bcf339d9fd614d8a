"""Evaluating, collecting statistics and quantizing after training."""

from __future__ import annotations

import json
import signal

import pytest
import yaml

from tests.end_to_end.conftest import TINY
from tests.end_to_end.program import load, refused

EVALUATED = {"LOG", "results.json"}
QUANTIZED = {*EVALUATED, "quantized_checkpoint.pth.tar", "layer_quant_params.yaml"}
WITH_STATS = {*QUANTIZED, "quant_stats_after_prepare_model.yaml"}
COLLECTED = {*WITH_STATS, "acts_quantization_stats.yaml"}
LAYERS = {"conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "flatten", "dropout", "fc"}


def quantize(program, trained, flags, *more):
    """Evaluate and quantize the trained network; returns what was printed and `results.json`."""
    done = program.run(TINY + f"-e --qe -o out --exp-load-weights-from {trained} {flags}", *more).succeeded()
    card = json.loads((program.latest("out") / "results.json").read_text())
    assert card["reference"]["n"] == card["measured"]["n"] == 359
    assert any(statement.startswith("quantization is computed in float32") for statement in card["simulated"])
    return done, card


def quant_params(program):
    return yaml.safe_load((program.latest("out") / "layer_quant_params.yaml").read_text())


def points_lost(card):
    return (card["reference"]["top1_correct"] - card["measured"]["top1_correct"]) * 100 / 359


@pytest.mark.parametrize("flag", ["--exp-load-weights-from", "--resume-from"])
def test_evaluating_a_checkpoint_gives_the_result_that_training_ended_with(program, trained, flag):
    done = program.run(TINY + f"--evaluate -o out {flag} {trained}").succeeded()
    assert program.names() == {"nets.py", "out"}
    assert program.names(program.latest("out")) == EVALUATED
    cards = [json.loads(path.read_text())["measured"] for path in
             (trained.with_name("results.json"), program.latest("out") / "results.json")]  # fmt: skip
    assert cards[0]["top1_correct"] == cards[1]["top1_correct"] > 180
    assert cards[0]["loss"] == pytest.approx(cards[1]["loss"], rel=1e-6)
    assert "==> Top1: " in done.out
    assert "--- validate" not in done.out


def test_an_evaluation_looks_at_the_same_images_each_time(program):
    outs = [program.run(TINY + "-e --effective-test-size 0.1").succeeded().out for _ in range(2)]
    assert "Random seed: 0\n" in outs[0]
    assert "\n35 samples (" in outs[0]
    results = [next(line for line in out.splitlines() if line.startswith("==> ")) for out in outs]
    assert results[0] == results[1]


def test_calibration_alone_collects_statistics_of_every_layer_and_ends(program, trained):
    done = program.run(TINY + f"--qe-calibration 0.1 -o out --exp-load-weights-from {trained}").succeeded()
    assert "Collecting activation statistics on 129 training images, in two passes" in done.out
    assert "==> Top1" not in done.out
    folder = program.latest("out")
    assert program.names(folder) == {"LOG", "acts_quantization_stats.yaml"}
    stats = yaml.safe_load((folder / "acts_quantization_stats.yaml").read_text())
    assert set(stats) == LAYERS | {"bn1"}
    assert set(stats["conv1"]["inputs"][0]) == set(stats["fc"]["output"]) == {
        "min", "max", "avg_min", "avg_max", "mean", "std", "b", "shape", "total_numel",
    }  # fmt: skip
    assert stats["fc"]["output"]["total_numel"] == 129 * 10


def test_statistics_do_not_depend_on_the_size_of_the_batches(program, trained, stats):
    program.run(TINY + f"-b 7 --qe-calibration 0.2 -o out --exp-load-weights-from {trained}").succeeded()
    ours = yaml.safe_load((program.latest("out") / stats.name).read_text())["conv2"]["output"]
    theirs = yaml.safe_load(stats.read_text())["conv2"]["output"]
    assert (ours.pop("shape"), theirs.pop("shape")) == ("(7, 8, 4, 4)", "(32, 8, 4, 4)")
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_quantizing_with_a_statistics_file_keeps_the_accuracy_at_a_quarter_of_the_size(
    program, trained, stats
):
    done, card = quantize(program, trained, f"--qe-stats-file {stats}")
    assert program.names() == {"nets.py", "out"}
    assert program.names(program.latest("out")) == {*WITH_STATS, "configs"}
    assert (program.latest("out") / "configs" / stats.name).read_text() == stats.read_text()
    assert abs(points_lost(card)) < 2
    assert card["ratios"]["bytes_quantized"] > 2.5  # of so small a network the scales weigh
    assert done.out.index("--- test before quantization") < done.out.index("--- test after quantization")
    params = quant_params(program)
    assert params["conv1"]["bits_weights"] == params["conv1"]["bits_activations"] == 8
    assert params["linear_quant_params"]["conv1.output_scale"] > 0


def test_without_a_source_of_ranges_a_twentieth_of_the_training_set_calibrates(program, trained):
    done, card = quantize(program, trained, "")
    message = "no source of activation ranges given: calibrating on 5 % of the training set"
    assert done.out.index(message) < done.out.index("statistics on 64 training images")
    assert program.names(program.latest("out")) == COLLECTED
    assert abs(points_lost(card)) < 2


def test_calibration_and_evaluation_in_one_run(program, trained):
    flags = (
        "--qe-calibration 0.2 --qe-mode-acts asym_u --qe-mode-wts SYM_RESTR --qe-clip-acts n_std --qe-clip-n-stds 4 "
        "--qe-no-clip-layers conv1 --qe-no-quant-layers fc --qe-bits-wts 6 --qe-scale-approx-bits 8 --qe-bits-accum 24"
    )
    _, card = quantize(program, trained, flags)
    assert program.names(program.latest("out")) == COLLECTED
    assert abs(points_lost(card)) < 5
    params = quant_params(program)
    assert "fc" not in params
    assert params["conv1"]["bits_weights"] == 6
    assert (params["conv1"]["clip_acts"], params["conv2"]["clip_acts"]) == ("NONE", "N_STD")


def test_the_statistics_that_a_quantization_collects_are_those_that_are_collected_alone(
    program, trained, stats
):
    quantize(program, trained, "--qe-calibration 0.2")
    assert (program.latest("out") / stats.name).read_text() == stats.read_text()


def test_dynamic_quantization_needs_no_statistics(program, trained):
    _, card = quantize(program, trained, "--qe-dynamic --qe-per-channel --qe-mode asym_s")
    assert program.names(program.latest("out")) == QUANTIZED
    assert abs(points_lost(card)) < 2
    assert quant_params(program)["conv2"]["per_channel_wts"] is True


def test_weights_only_needs_no_calibration(program, trained):
    done, card = quantize(program, trained, "--qe-bits-acts 0 --qe-bits-wts 4 --qe-save-fp-weights")
    assert "Collecting" not in done.out
    assert program.names(program.latest("out")) == QUANTIZED
    assert card["ratios"]["bytes_quantized"] > 3.5
    state = load(program.latest("out") / "quantized_checkpoint.pth.tar")["state_dict"]
    assert any(name.endswith("float_weight") for name in state)


def test_a_configuration_file_decides_alone(program, trained, stats):
    program.write(
        "ptq.yaml",
        f"quantizers:\n  ptq:\n    class: PostTrainLinearQuantizer\n    bits_activations: 8\n    bits_parameters: 8\n"
        f"    mode: ASYMMETRIC_UNSIGNED\n    model_activation_stats: '{stats}'\n"
        "    overrides:\n      fc: {bits_weights: 4}\n",
    )
    _, card = quantize(program, trained, "--qe-config-file ptq.yaml --qe-bits-wts 2")
    assert program.names(program.latest("out")) == {*WITH_STATS, "configs"}
    assert program.names(program.latest("out") / "configs") == {"ptq.yaml"}
    params = quant_params(program)
    assert (params["conv1"]["bits_weights"], params["fc"]["bits_weights"]) == (8, 4)
    assert abs(points_lost(card)) < 5


def test_a_quantized_checkpoint_evaluates_to_the_same_result_and_knows_its_reference(program, trained):
    _, quantized = quantize(program, trained, "--qe-calibration 0.1 -n int8")
    file = program.latest("out") / "int8_quantized_checkpoint.pth.tar"
    assert load(file)["extras"]["quantized_top1"] == quantized["measured"]["top1_correct"] * 100 / 359
    program.run(TINY + f"-e -o again --exp-load-weights-from {file}").succeeded()
    again = json.loads((program.latest("again") / "results.json").read_text())
    assert again["measured"]["top1_correct"] == quantized["measured"]["top1_correct"]
    assert again["measured"]["bytes_quantized"] == quantized["measured"]["bytes_quantized"]
    assert again["reference"]["top1_correct"] == quantized["reference"]["top1_correct"]


def test_a_checkpoint_of_the_archived_distiller_evaluates(program, compat):
    file = compat / "checkpoints" / "checkpoint_trained_dense.pth.tar"
    done = program.run(
        f"--arch resnet20_cifar --dataset synthetic -b 16 --etes 0.1 -e -o out --exp-load-weights-from {file}"
    ).succeeded()
    assert "the optimizer state of a Distiller checkpoint is left aside" in done.out
    card = json.loads((program.latest("out") / "results.json").read_text())["measured"]
    assert (card["macs"], card["parameters"]) == (40_813_184, 272_474)


def test_a_schedule_has_no_effect_on_an_evaluation_and_that_is_told(program):
    program.write("empty.yaml", "policies: []\n")
    done = program.run(TINY + "-e --etes 0.1 --compress empty.yaml").succeeded()
    assert "--compress empty.yaml: without effect, this job does not train" in done.out


STEPS = "--qe-calibration 0.1 --qe-bits-wts 4 --qe-equalize --qe-bias-correction --qe-adaround "


def test_an_interrupted_adaround_says_how_to_go_on_and_what_comes_of_it_evaluates_alike(program, trained):
    command = TINY + f"-e --qe -o out --exp-load-weights-from {trained} {STEPS}"
    running = program.start(command + "--qe-adaround-iterations 4000")
    running.wait_for("AdaRound [1/3]")
    running.signal(signal.SIGINT)
    stopped, folder = running.wait(), program.latest("out")
    assert stopped.status == 130
    assert stopped.err == f"interrupted; go on with --qe-resume {folder}\n"

    refusal = refused(program, command + "--qe-adaround-iterations 20 --qe-resume", folder)
    assert "'steps.adaround.iterations' is 4000 there, 20 here" in refusal

    done = program.run(command + "--qe-adaround-iterations 4000 --qe-resume", folder).succeeded()
    assert "AdaRound [1/3]" not in done.out
    assert "AdaRound [3/3]" in done.out
    card = json.loads((program.latest("out") / "results.json").read_text())
    file = program.latest("out") / "quantized_checkpoint.pth.tar"
    program.run(TINY + f"-e -o again --exp-load-weights-from {file}").succeeded()
    again = json.loads((program.latest("again") / "results.json").read_text())
    for figure in ("top1_correct", "loss"):
        assert again["measured"][figure] == card["measured"][figure]


def test_a_network_in_integers(program, trained):
    done, card = quantize(program, trained, "--qe-calibration 0.2 --qe-mode asym_u --export-int8 net.onnx")
    assert {"net.onnx", "int8.json"} <= program.names(program.latest("out"))
    found = json.loads((program.latest("out") / "int8.json").read_text())
    assert found["agreement"]["percent"] >= 99.5
    assert found["top1"]["simulation"]["correct"] == card["measured"]["top1_correct"]
    assert f"agrees with the simulation on {found['agreement']['agreeing']}/359 = " in done.out
    assert "threads: 1" in done.out
