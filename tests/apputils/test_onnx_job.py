from __future__ import annotations

import logging
import re

import onnx
import pytest
import torch
from torch import nn

from distiller.apputils import classifier_jobs as jobs
from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.errors import DistillerError, GraphTraceError, QuantizationError, UsageError
from distiller.export import onnx_parity
from distiller.export.onnx_parity import open_session
from distiller.models import create_model
from distiller.quantization import PostTrainLinearQuantizer

pytestmark = pytest.mark.usefixtures("global_settings_restored")
IMAGE = (1, 28, 28)


def trained(folder, quantized: bool = False):
    """A checkpoint of weights that are no fresh ones."""
    model = create_model(False, "digits", "lenet_300_100", parallel=False).eval()
    nn.init.normal_(model.fc1.weight)
    if quantized:
        PostTrainLinearQuantizer(model, bits_activations=None).prepare_model(torch.randn(1, *IMAGE))
    return model, save_checkpoint(0, "lenet_300_100", model, dir=folder)


def test_the_weights_of_a_checkpoint_go_into_the_run_folder_and_are_compared(
    flags, open_run, tmp_path, caplog
):
    model, checkpoint = trained(tmp_path)
    args = flags("--exp-load-weights-from", checkpoint, "--export-onnx")
    with caplog.at_level(logging.INFO, logger="distiller"):
        assert jobs.run_job(args, open_run) is None
    assert open_run.names() == {"model.onnx"}
    path = open_run.folder / "model.onnx"
    images = torch.randn(4, *IMAGE)
    (output,) = open_session(path).run(None, {"input": images.numpy()})
    torch.testing.assert_close(torch.as_tensor(output), model(images).softmax(1))
    saved, facts, parity = caplog.messages[-3:]
    assert saved == f"Saved ONNX model to: {path}"
    assert facts == f"{path.stat().st_size} bytes, opset 18, input (batch, 1, 28, 28), output probabilities"
    assert re.fullmatch(
        r"onnxruntime [\d.]+, random images in batches of 1 and 3: differs from PyTorch by at most "
        r"\d\.\d\de-\d\d, \d\.\d\de-\d\d of the largest output \(allowed: 1e-04\); the same class for 100 % of "
        r"the images",
        parity,
    )


def test_a_path_is_followed_and_what_was_there_is_replaced(flags, open_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.onnx").write_bytes(b"old")
    jobs.run_job(flags("--export-onnx ./mine.onnx"), open_run)
    assert open_run.names() == set()
    onnx.checker.check_model(onnx.load(tmp_path / "mine.onnx"))


def test_a_job_that_does_not_train_has_a_fixed_seed(flags):
    args = flags("--export-onnx")
    args.seed = None
    assert ClassifierCompressor(args).seed == 0


@pytest.mark.parametrize("name, told", [("folder", "is a folder"), ("no/m.onnx", "there is no folder {}/no")])
def test_a_path_that_cannot_be_written_is_told_before_the_export(flags, open_run, tmp_path, name, told):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError) as error:
        jobs.run_job(flags("--export-onnx", tmp_path / name), open_run)
    assert str(error.value) == (
        f"--export-onnx {tmp_path / name}: {told.format(tmp_path)}; "
        "give the name of a file in a folder that is there"
    )
    assert open_run.calls == 0


def test_a_quantized_checkpoint_is_refused(flags, open_run, tmp_path):
    _, checkpoint = trained(tmp_path, quantized=True)
    with pytest.raises(QuantizationError) as error:
        jobs.run_job(flags("--resume-from", checkpoint, "--export-onnx"), open_run)
    assert str(error.value) == (
        f"--export-onnx: {checkpoint} is of a quantized model, whose quantization is simulated in floating "
        "point; write integers with --export-int8, or give the checkpoint from before"
    )
    assert open_run.calls == 0


class Branching(nn.Sequential):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def branching(num_classes: int, in_channels: int) -> nn.Module:
    return Branching(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))


def test_a_model_that_cannot_be_exported_leaves_nothing_behind(flags, open_run):
    arch = "--arch tests.apputils.test_onnx_job:branching "
    with pytest.raises(
        GraphTraceError, match="^Branching: torch.export cannot trace it for ONNX: what it does "
    ):
        jobs.run_job(flags(arch + "--export-onnx"), open_run)
    assert open_run.calls == 0


def test_a_file_that_computes_something_else_is_not_written(flags, open_run, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_parity, "TOLERANCE", -1.0)
    with pytest.raises(DistillerError, match="^ONNX model: onnxruntime differs from the model by"):
        jobs.run_job(flags("--export-onnx", tmp_path / "m.onnx"), open_run)
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_is_said_to_have_no_effect(flags, open_run, caplog, tmp_path):
    with pytest.raises(UsageError):
        jobs.run_job(flags("--compress none.yaml --export-onnx", tmp_path), open_run)
    assert "--compress none.yaml: without effect, this job does not train" in caplog.text
