"""`--export-int8` and `--qe-convert-pytorch`: after quantization, and of quantized and trained checkpoints."""

from __future__ import annotations

import json
import logging
import re
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch

from distiller.apputils import classifier_jobs as jobs
from distiller.apputils import image_classifier, int8_job, pytorch_int8_job, quantize_job, statistics_job
from distiller.apputils.int8_job import Int8Figures
from distiller.errors import DistillerError, QuantizationError, UsageError
from distiller.export.cpu_facts import CpuFacts
from distiller.export.integer_latency import IntegerLatency, OptimizedGraph, integer_latency
from distiller.export.integer_parity import IntegerParity
from distiller.export.latency import Latency

pytestmark = [
    pytest.mark.usefixtures("global_settings_restored", "untimed"),
    pytest.mark.filterwarnings("ignore:PyTorch .* announces that a future release"),
]
ARCH = "--arch tests.apputils.test_quantize_job:net "
QUANTIZE = ARCH + "--qe-calibration 0.05 -e --qe "
TRAINED = """
quantizers:
  q: {class: QuantAwareTrainRangeLinearQuantizer, bits_activations: 8, bits_weights: 8}
policies:
  - quantizer: {instance_name: q}
    epochs: [0]
"""


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(int8_job, "integer_latency", partial(integer_latency, min_time=0.01))


def figures(open_run) -> dict:
    return json.loads((open_run.folder / "int8.json").read_text())


def test_a_quantized_model_is_written_compared_and_timed(flags, open_run, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        jobs.run_job(flags(f"{QUANTIZE} --export-int8"), open_run)
    onnx.checker.check_model(onnx.load(open_run.folder / "model.int8.onnx"))
    found = figures(open_run)
    assert found["agreement"]["n"] == 71
    assert found["agreement"]["percent"] >= 98
    assert found["agreement_with_trained"] is None
    card = json.loads((open_run.folder / "results.json").read_text())
    assert found["top1"]["simulation"]["correct"] == card["measured"]["top1_correct"]
    assert found["top1"]["floating_point"]["correct"] == card["reference"]["top1_correct"]
    low, high = found["top1"]["integers"]["interval_95_percent"]
    assert low < found["top1"]["integers"]["percent"] < high
    size = (open_run.folder / "model.int8.onnx").stat().st_size
    assert found["bytes"]["int8"] == size
    assert found["bytes"]["ratio"] == size / found["bytes"]["float"]
    assert found["latency"]["threads"] == torch.get_num_threads()
    assert found["latency"]["cpu"]
    assert found["latency"]["verdict"] in caplog.messages
    told = [line for line in caplog.messages if line.startswith("agrees with the simulation on ")]
    assert told == [f"agrees with the simulation on {found['agreement']['agreeing']}/71 = "
                    f"{found['agreement']['percent']:.2f} % of the test images; largest difference of an output: "
                    f"{int8_job._counted(round(found['agreement']['max_steps']))}"]  # fmt: skip


def test_a_quantized_checkpoint_is_written_to_the_path_that_is_given(flags, open_run, tmp_path):
    jobs.run_job(flags(QUANTIZE), open_run)
    file = open_run.folder / "quantized_checkpoint.pth.tar"
    card = json.loads((open_run.folder / "results.json").read_text())
    jobs.run_job(flags(f"{ARCH} --export-int8 {tmp_path / 'mine.onnx'} --resume-from", file), open_run)
    onnx.checker.check_model(onnx.load(tmp_path / "mine.onnx"))
    assert open_run.names() == {"int8.json", "results.json"}
    found = figures(open_run)
    assert found["agreement"]["percent"] >= 98
    assert found["top1"]["simulation"]["correct"] == card["measured"]["top1_correct"]
    assert found["top1"]["floating_point"]["correct"] == card["reference"]["top1_correct"]


def test_a_model_that_was_trained_with_quantization_is_set_beside_itself_as_it_was_trained(
    flags, open_run, tmp_path
):
    (tmp_path / "s.yaml").write_text(TRAINED)
    jobs.run_job(flags(f"{ARCH} --epochs 1 --compress", tmp_path / "s.yaml"), open_run)
    file = open_run.folder / "checkpoint.pth.tar"
    jobs.run_job(flags(f"{ARCH} -e --export-int8 --qe-report --resume-from", file), open_run)
    found = figures(open_run)
    assert found["agreement"]["percent"] >= 98
    assert found["agreement_with_trained"]["percent"] >= 90
    assert found["top1"]["floating_point"] is None
    assert "quantization_report.csv" in open_run.names()


def test_a_model_in_floating_point_is_refused(flags, open_run, tmp_path):
    jobs.run_job(flags(f"{ARCH} --epochs 1"), open_run)
    file = open_run.folder / "checkpoint.pth.tar"
    for command, told in (
        (
            "--export-int8",
            "^--export-int8: the checkpoint is of a model in floating point; quantize it with ",
        ),
        (
            "-e --qe-convert-pytorch",
            "^--qe-convert-pytorch: the checkpoint is of a model in floating point; ",
        ),
    ):
        with pytest.raises(UsageError, match=told):
            jobs.run_job(flags(f"{ARCH} {command} --resume-from", file), open_run)
    assert open_run.calls == 1


def test_a_folder_that_is_not_there_is_told_before_anything_is_quantized(flags, open_run, tmp_path):
    with pytest.raises(UsageError, match="^--export-int8 .*: there is no folder"):
        jobs.run_job(flags(f"{QUANTIZE} --export-int8", tmp_path / "no" / "m.onnx"), open_run)
    assert open_run.calls == 0


def test_conversion_to_pytorchs_modules_after_quantization_and_of_a_checkpoint(flags, open_run):
    jobs.run_job(flags(f"{QUANTIZE} --qe-mode asym_u --qe-convert-pytorch"), open_run)
    first = json.loads((open_run.folder / "pytorch_int8.json").read_text())
    card = json.loads((open_run.folder / "results.json").read_text())["measured"]
    assert abs(first["top1_correct"] - card["top1_correct"]) <= 2
    assert first["backend"] == "fbgemm"
    file = open_run.folder / "quantized_checkpoint.pth.tar"
    jobs.run_job(flags(f"{ARCH} -e --qept --resume-from", file), open_run)
    assert json.loads((open_run.folder / "pytorch_int8.json").read_text()) == first


def test_a_backend_that_this_pytorch_has_not_is_refused_plainly(flags, open_run):
    with pytest.raises(
        QuantizationError, match="has no quantized backend 'none_such' here, it has .*--export-int8"
    ):
        jobs.run_job(flags(f"{QUANTIZE} --qept --qe-pytorch-backend none_such"), open_run)


@pytest.fixture
def untested(monkeypatch):
    """Whatever collects statistics or tests a model fails."""

    def never(*_args, **_kwargs):
        raise AssertionError("something was collected or tested before")

    for module, name in (
        (quantize_job, "collected"),
        (statistics_job, "evaluate"),
        (image_classifier, "evaluate"),
        (pytorch_int8_job, "evaluate"),
    ):
        monkeypatch.setattr(module, name, never)


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize(
    "command,told",
    [
        (
            "--qe-bits-wts 0 --export-int8",
            "--export-int8: no weight would be quantized, so that all layers would be computed in floating point; "
            "give weights 2 to 8 bits (--qe-bits-wts), or write the model as it is with --export-onnx",
        ),
        (
            "--qe-bits-accum 16 --export-int8",
            "--export-int8: accumulators of 16 bits (--qe-bits-accum) can saturate in 'conv1', those of runtimes "
            "have 32; set --qe-bits-accum to 32",
        ),
        (
            "--export-int8 /dev/full",
            "--export-int8 /dev/full: is no ordinary file; give the name of one, or of a new one",
        ),
        ("--qept --qe-pytorch-backend foo", "has no quantized backend 'foo' here, it has "),
    ],
)
def test_what_cannot_be_made_is_told_before_anything_is_collected_or_tested(command, told, flags, open_run):
    """It was told after the whole test, or a file came of it in which everything is in floating point."""
    with pytest.raises(DistillerError, match=re.escape(told)):
        jobs.run_job(flags(f"{QUANTIZE} {command}"), open_run)
    assert open_run.calls == 0


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize(
    "settings,told",
    [
        (
            "bits_activations: 8, bits_parameters: 8, overrides: {conv2: {bits_weights: 12}}",
            "'conv2' has 12 bits, an integer model has at most 8; give it fewer",
        ),
        (
            "bits_activations: 8, bits_parameters: 0",
            "no weight would be quantized, so that all layers would be ",
        ),
        (
            "bits_activations: 8, bits_parameters: 8, bits_accum: 16",
            "accumulators of 16 bits (bits_accum) can saturate in 'conv1', those of runtimes have 32; set "
            "bits_accum to 32",
        ),
        (
            "bits_activations: 8, bits_parameters: 8",
            "without model_activation_stats ranges are dynamic, those of each batch; an integer model needs ",
        ),
    ],
)
def test_so_are_settings_in_a_file(settings, told, flags, open_run, tmp_path):
    file = tmp_path / "q.yaml"
    file.write_text(f"quantizers:\n  q: {{class: PostTrainLinearQuantizer, {settings}}}\n")
    with pytest.raises(QuantizationError, match=re.escape(f"--export-int8: {file}: {told}")):
        jobs.run_job(flags(f"{ARCH} -e --qe --export-int8 --qe-config-file", file), open_run)
    assert open_run.calls == 0


@pytest.mark.parametrize(
    "quantizer,told",
    [
        (
            "class: CodebookQuantizer, bits_weights: 3",
            "folded_copy: the weight of 'conv1', by CodebookWeights, has no integers: its values are not equally ",
        ),
        (
            "class: TernaryQuantizer, learned_scales: true",
            "folded_copy: the weight of 'conv1', by LearnedTernaryWeights, has no integers: its values are not ",
        ),
        (
            "class: DorefaQuantizer, bits_activations: 8, bits_weights: 8",
            "conv1: weight: its levels are the odd numbers from -255 to 255 (so are DoReFa's); ",
        ),
        (
            "class: PACTQuantizer, bits_activations: 8, bits_weights: 8",
            "conv1: weight: its levels are the odd numbers from -255 to 255 (so are DoReFa's); ",
        ),
    ],
)
def test_checkpoints_without_integers_are_refused_before_the_test(
    quantizer, told, flags, open_run, tmp_path, request
):
    (tmp_path / "s.yaml").write_text(
        f"quantizers:\n  q: {{{quantizer}}}\npolicies:\n  - {{quantizer: {{instance_name: q}}, epochs: [0]}}\n"
    )
    jobs.run_job(flags(f"{ARCH} --epochs 1 --compress", tmp_path / "s.yaml"), open_run)
    file = open_run.folder / "checkpoint.pth.tar"
    request.getfixturevalue("untested")
    with pytest.raises(QuantizationError, match=re.escape(told)):
        jobs.run_job(flags(f"{ARCH} --export-int8 --resume-from", file), open_run)
    assert open_run.calls == 1


def test_a_quantized_checkpoint_without_quantized_weights_is_refused_before_the_test(
    flags, open_run, request
):
    jobs.run_job(flags(f"{QUANTIZE} --qe-bits-wts 0"), open_run)
    file = open_run.folder / "quantized_checkpoint.pth.tar"
    request.getfixturevalue("untested")
    with pytest.raises(
        QuantizationError, match="^Net: no weight in it is quantized, so runtimes would compute "
    ):
        jobs.run_job(flags(f"{ARCH} --export-int8 --resume-from", file), open_run)
    assert open_run.calls == 1


@pytest.mark.parametrize(
    "steps,told,warns", [(1, "1 step", False), (2, "2 steps", False), (40, "40 steps", True)]
)
def test_steps_are_counted_and_outputs_far_from_the_simulation_warned_of(steps, told, warns):
    """It read '1 steps'."""
    time = Latency(1.0, 0.9, 1.1, 5, 1, 1, "cpu")
    latency = IntegerLatency(time, time, time, CpuFacts("CPU", None), OptimizedGraph({}, {}, 0, 0))
    parity = IntegerParity(9, 9, 9, 8, 8, steps * 0.5, 0.5)
    found = Int8Figures(Path("m.onnx"), parity, None, None, 10, 40, latency)
    assert found.lines()[0].endswith(f"; largest difference of an output: {told}")
    warning = found.warning()
    assert (warning is not None) == warns
    assert warning is None or warning.startswith(
        "an output of m.onnx is 40 steps of its grid away from the simulation; "
    )
