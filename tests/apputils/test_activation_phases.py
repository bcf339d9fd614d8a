"""Which phases of a run are looked at, and where the figures go."""

from __future__ import annotations

import logging

import pandas as pd
import pytest
import torch
from torch import nn

from distiller.apputils import classifier_jobs
from distiller.apputils.activation_phases import ActivationPhases
from distiller.apputils.checkpoint import read_checkpoint
from distiller.apputils.classifier_training import ClassifierTraining
from distiller.apputils.image_classifier import ClassifierCompressor, Run
from distiller.data_loggers.loggers import Logger
from distiller.errors import UsageError

SUMMARIES = ["sparsity_ofm", "l1_channels", "apoz_channels", "mean_channels"]


class Statistics(Logger):
    """Keeps the statistics that it is given."""

    def __init__(self) -> None:
        self.given = []

    def log_activation_statistics(self, epoch, phase, by_statistic):
        self.given.append((epoch, phase, by_statistic))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def run_with(open_run, logger) -> Run:
    return Run(open_run().folder, (logger,))


def test_a_phase_that_is_asked_for_is_logged_and_saved(tiny_cnn, open_run):
    logger, images = Statistics(), torch.randn(4, 1, 8, 8)
    run = run_with(open_run, logger)
    with ActivationPhases(tiny_cnn, ["valid"]).collected("valid", 3, run):
        tiny_cnn(images)
    assert hooks(tiny_cnn) == 0
    [(epoch, phase, by_statistic)] = logger.given
    assert (epoch, phase) == (3, "valid")
    assert list(by_statistic) == SUMMARIES
    folder = open_run.folder / "activation_stats/valid"
    assert {path.name for path in folder.iterdir()} == {f"{name}.csv" for name in [*SUMMARIES, "records"]}
    table = pd.read_csv(folder / "l1_channels.csv")
    assert {layer: table[layer].dropna().tolist() for layer in table} == by_statistic["l1_channels"]
    assert len(pd.read_csv(folder / "records.csv")) == 2 * 4


def test_the_sparsity_of_activations_is_logged(tiny_cnn, open_run):
    """DEFECT of Distiller: collected as 'sparsity_ofm' and looked for as 'sparsity', nothing was ever logged."""
    logger = Statistics()
    seen = []
    tiny_cnn.relu1.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    with ActivationPhases(tiny_cnn, ["train"]).collected("train", 0, run_with(open_run, logger)):
        tiny_cnn(torch.randn(4, 1, 8, 8))
    [(_, _, by_statistic)] = logger.given
    zeros = seen[0].eq(0).float().mean().item()
    assert 0 < zeros < 1
    assert by_statistic["sparsity_ofm"]["relu1"] == pytest.approx(100 * zeros)


def test_another_phase_is_not_looked_at(tiny_cnn, open_run):
    logger = Statistics()
    phases = ActivationPhases(tiny_cnn, ["valid", "test"])
    with phases.collected("train", 0, run_with(open_run, logger)):
        assert hooks(tiny_cnn) == 0
        tiny_cnn(torch.randn(4, 1, 8, 8))
    assert logger.given == []
    assert not (open_run.folder / "activation_stats").exists()


def test_each_phase_begins_anew_and_overwrites_its_files(tiny_cnn, open_run):
    logger = Statistics()
    run, phases = run_with(open_run, logger), ActivationPhases(tiny_cnn, ["valid"])
    for epoch, scale in enumerate((1.0, 0.0)):
        with phases.collected("valid", epoch, run):
            tiny_cnn(scale * torch.randn(4, 1, 8, 8))
    assert len(pd.read_csv(open_run.folder / "activation_stats/valid/records.csv")) == 2 * 4
    assert logger.given[0][2] != logger.given[1][2]


def test_without_a_folder_the_figures_are_logged_and_nothing_is_written(tiny_cnn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = Statistics()
    with ActivationPhases(tiny_cnn, ["test"]).collected("test", 0, Run(None, (logger,))):
        tiny_cnn(torch.randn(4, 1, 8, 8))
    assert len(logger.given) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_phase_leaves_no_hooks_and_no_files(tiny_cnn, open_run):
    run = run_with(open_run, Statistics())
    with pytest.raises(RuntimeError), ActivationPhases(tiny_cnn, ["valid"]).collected("valid", 0, run):
        tiny_cnn(torch.randn(4, 1, 8, 8))
        tiny_cnn(torch.randn(4, 7))
    assert hooks(tiny_cnn) == 0
    assert run.loggers[0].given == []
    assert not (open_run.folder / "activation_stats").exists()


def test_what_a_model_has_no_modules_for_is_told_once(open_run, caplog):
    model, logger = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh()), Statistics()
    run, phases = run_with(open_run, logger), ActivationPhases(model, ["valid"])
    for epoch in range(2):
        with phases.collected("valid", epoch, run):
            model(torch.randn(1, 1, 2, 2))
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "--activation-stats: no sparsity_ofm, l1_channels, apoz_channels, mean_channels: the model has run no module "
        "that they are taken from (ReLU, ReLU6, LeakyReLU; for records Conv2d)"
    ]
    assert logger.given == []
    assert [path.name for path in (open_run.folder / "activation_stats/valid").iterdir()] == ["records.csv"]


def test_a_model_on_several_gpus_is_refused_only_if_it_is_to_be_looked_into(tiny_cnn):
    wrapped = nn.DataParallel(tiny_cnn)
    wrapped.device_ids = [0, 1]
    ActivationPhases(wrapped, [])
    with pytest.raises(UsageError) as caught:
        ActivationPhases(wrapped, ["train"])
    assert str(caught.value) == (
        "--activation-stats: the model is spread over 2 GPUs, and can only be looked into on one; "
        "give --load-serialized, or one GPU with --gpus"
    )


# --------------------------------------------------------------------- in the program

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")


def trained(flags, open_run, command):
    ClassifierTraining(ClassifierCompressor(flags(command), open_run)).run()
    return read_checkpoint(open_run.folder / "checkpoint.pth.tar")


def test_a_training_that_is_looked_at_ends_with_the_same_weights(flags, open_run):
    looked_at = trained(flags, open_run, "--epochs 2 --act-stats train valid test")
    plain = trained(flags, open_run, "--epochs 2")
    assert looked_at.state_dict.keys() == plain.state_dict.keys()
    assert all(torch.equal(value, plain.state_dict[name]) for name, value in looked_at.state_dict.items())
    assert looked_at.rng is not None
    assert plain.rng is not None
    assert torch.equal(looked_at.rng["torch"], plain.rng["torch"])


def test_each_phase_of_a_training_is_reported_with_its_epoch(flags, open_run):
    logger = Statistics()

    def opened() -> Run:
        return run_with(open_run, logger)

    compressor = ClassifierCompressor(flags("--epochs 2 --act-stats train valid test"), opened)
    ClassifierTraining(compressor).run()
    assert [(phase, epoch) for epoch, phase, _ in logger.given] == [
        ("train", 0), ("valid", 0), ("train", 1), ("valid", 1), ("test", 1),
    ]  # fmt: skip
    assert {tuple(by["sparsity_ofm"]) for _, _, by in logger.given} == {("relu1", "relu2")}
    saved = open_run.folder / "activation_stats"
    assert {path.name for path in saved.iterdir()} == {"train", "valid", "test"}


def test_an_evaluation_may_be_looked_at(flags, open_run):
    trained(flags, open_run, "--epochs 2")
    logger, file = Statistics(), open_run.folder / "checkpoint.pth.tar"
    for source in ("", f"--exp-load-weights-from {file}"):
        compressor = ClassifierCompressor(
            flags(f"-e --act-stats test {source}"), lambda: run_with(open_run, logger)
        )
        classifier_jobs.evaluate(compressor)
    assert [(phase, epoch) for epoch, phase, _ in logger.given] == [("test", 0), ("test", 1)]
    assert (open_run.folder / "activation_stats/test/sparsity_ofm.csv").is_file()
