"""`--export-int8` and `--qe-convert-pytorch`: after quantization, and of quantized and trained checkpoints."""

from __future__ import annotations

import json
import logging
from functools import partial

import onnx
import pytest
import torch

from distiller.apputils import classifier_jobs as jobs
from distiller.apputils import int8_job
from distiller.errors import QuantizationError, UsageError
from distiller.export.integer_latency import integer_latency

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
                    f"{found['agreement']['max_steps']:.0f} steps"]  # fmt: skip


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
