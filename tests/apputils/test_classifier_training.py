from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import nn

from distiller.apputils.checkpoint import read_checkpoint, save_checkpoint
from distiller.apputils.classifier_training import ClassifierTraining, kernel_sparsity, weight_sparsity
from distiller.apputils.image_classifier import ClassifierCompressor, Run
from distiller.apputils.meters import EvalResult
from distiller.data_loggers.loggers import Logger
from distiller.errors import CheckpointError, DivergenceError, UsageError

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")

SCHEDULE = """
pruners:
  p: {class: SparsityLevelParameterPruner, levels: {fc1.weight: 0.5}}
policies:
  - {pruner: {instance_name: p}, epochs: [1]}
"""


@pytest.fixture
def schedule(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(SCHEDULE)
    return file


def trained(flags, open_run, command: str, *more):
    """The run's checkpoint, and its results card."""
    card = ClassifierTraining(ClassifierCompressor(flags(command, *more), open_run)).run()
    return open_run.folder / "checkpoint.pth.tar", card


def test_weight_sparsity_is_of_weights_and_nonzeros_of_all_parameters():
    conv, linear = nn.Conv2d(1, 2, 2), nn.Linear(4, 2)
    model = nn.Sequential(conv, linear)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1)
        conv.weight[0] = 0  # 4 of 8
        linear.bias[0] = 0
    by_param, total, nonzeros = weight_sparsity(model)
    assert by_param == {"0.weight": 0.5, "1.weight": 0.0}
    assert total == 4 / 16
    assert nonzeros == 8 + 2 + 8 + 2 - 4 - 1


def test_weight_sparsity_of_a_model_without_weights_is_0():
    assert weight_sparsity(nn.ReLU()) == ({}, 0.0, 0)


def test_kernel_sparsity_is_of_whole_kernels_and_rows():
    conv, linear = nn.Conv2d(2, 2, 2), nn.Linear(4, 2)
    model = nn.Sequential(conv, linear)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1)
        conv.weight[0, 1] = 0  # a kernel of 4
        conv.weight[1, 0, 0] = 0  # half of one
        linear.weight[:, :3] = 0
        linear.weight[1] = 0  # a row of 2
    assert kernel_sparsity(model) == {"0.weight": 0.25, "1.weight": 0.5}


def test_training_without_a_run_folder_writes_nothing(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = ClassifierTraining(ClassifierCompressor(flags("--epochs 1"))).run()
    assert card.measured.n == 71
    assert list(tmp_path.iterdir()) == []


def test_each_epoch_is_logged_validated_and_saved(flags, open_run, schedule):
    file, card = trained(flags, open_run, "--epochs 3 -p 2 --compress", schedule)
    logger = open_run.logger
    assert [(epoch, done) for epoch, done, _, _ in logger.steps] == [
        (epoch, done) for epoch in range(3) for done in (2, 4, 5)
    ]  # 258 images in 5 mini-batches
    assert (
        [record.epoch for record in logger.epochs] == [epoch for epoch, *_ in logger.validations] == [0, 1, 2]
    )
    assert [sparsity["fc1.weight"] for _, sparsity, _ in logger.sparsities] == [0.0, 0.5, 0.5]
    assert [sorted(kernels) for _, kernels in logger.kernels] == [
        ["fc1.weight", "fc2.weight", "fc3.weight"]
    ] * 3
    assert logger.epochs[2].sparsity == pytest.approx(0.5 * 784 * 300 / 266_200)
    assert logger.epochs[1].valid_top1 == logger.validations[1][2]
    checkpoint = read_checkpoint(file)
    assert (checkpoint.epoch, checkpoint.extras["seed"]) == (2, 7)
    assert checkpoint.extras["best_epoch"] == read_checkpoint(file.with_name("best.pth.tar")).epoch
    assert card.measured.nonzeros == 266_610 - 784 * 150
    assert card.reference is None


def test_best_is_among_the_epochs_in_which_pruning_is_complete(
    flags, open_run, schedule, monkeypatch, caplog
):
    compressor = ClassifierCompressor(flags("--epochs 3 --compress", schedule), open_run)
    scores = iter([90, 40, 30])
    monkeypatch.setattr(compressor, "validate", lambda epoch: EvalResult(1.0, next(scores), 95, 100))
    with caplog.at_level(logging.INFO, logger="distiller"):
        ClassifierTraining(compressor).run()
    best = read_checkpoint(open_run.folder / "best.pth.tar")
    assert (best.epoch, best.extras["best_top1"]) == (1, 40.0)
    assert any(message.startswith("best: the epoch with the highest Top1") for message in caplog.messages)


def test_policies_that_will_do_nothing_are_told_before_training(flags, open_run, schedule, caplog):
    note = "pruner p: does nothing, it acts in epochs 1..1 and trained are epochs 0..{}"
    for epochs, is_told in ((2, False), (1, True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="distiller"):
            trained(flags, open_run, f"--epochs {epochs} --etrs 0.05 --compress", schedule)
        assert (note.format(epochs - 1) in caplog.messages) == is_told


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_validation_loss_that_is_not_finite_keeps_the_last_checkpoint(flags, open_run, monkeypatch, loss):
    compressor = ClassifierCompressor(flags("--epochs 3"), open_run)
    losses = iter([1.0, loss])
    monkeypatch.setattr(compressor, "validate", lambda epoch: EvalResult(next(losses), 1, 1, 1))
    with pytest.raises(DivergenceError, match=f"epoch 1: the validation loss is {loss}; training stops here"):
        ClassifierTraining(compressor).run()
    assert read_checkpoint(open_run.folder / "checkpoint.pth.tar").epoch == 0
    assert len(open_run.logger.epochs) == 1


def diverging(monkeypatch, compressor):
    monkeypatch.setattr(compressor, "validate", lambda epoch: EvalResult(float("nan"), 1, 1, 1))
    with pytest.raises(DivergenceError) as error:
        ClassifierTraining(compressor).run()
    return str(error.value).partition("is nan; ")[2]


def test_a_divergence_speaks_of_a_checkpoint_only_where_there_is_one(flags, open_run, monkeypatch):
    stops = "training stops here"
    assert (
        diverging(monkeypatch, ClassifierCompressor(flags("--epochs 2"), open_run))
        == f"{stops}. Try a lower --lr"
    )
    file, _ = trained(flags, open_run, "--epochs 1")
    resumed = ClassifierCompressor(flags("--epochs 2 --resume-from", file), open_run)
    assert diverging(monkeypatch, resumed) == (
        f"{stops} and the last checkpoint stays as it is. "
        "Resume from an earlier checkpoint, or --reset-optimizer with a lower --lr"
    )
    anew = ClassifierCompressor(flags("--epochs 2 --reset-optimizer --resume-from", file), open_run)
    assert diverging(monkeypatch, anew) == f"{stops}. Try a lower --lr"


def test_a_checkpoint_without_optimizer_and_schedule_is_told(flags, tmp_path, schedule, caplog):
    model = ClassifierCompressor(flags()).model
    file = save_checkpoint(0, "lenet_300_100", model, dir=tmp_path)
    with caplog.at_level(logging.INFO, logger="distiller"):
        ClassifierTraining(
            ClassifierCompressor(flags("--epochs 3 --compress", schedule, "--resume-from", file))
        )
    assert (
        "the checkpoint has no schedule to go on with: the policies begin without a state" in caplog.messages
    )
    assert caplog.messages[-1] == (
        "resumed after epoch 0; the checkpoint has no optimizer: a new one begins, with learning rate 0.05"
    )
    assert "as it was saved" not in caplog.text


def test_a_resumed_training_begins_after_the_epoch_of_the_checkpoint(flags, open_run):
    file, _ = trained(flags, open_run, "--epochs 2")
    training = ClassifierTraining(ClassifierCompressor(flags("--epochs 3 --lr 9 --resume-from", file)))
    assert training.start == 2
    assert training.optimizer.param_groups[0]["lr"] == 0.05
    assert len(training.tracker.best()) == 1
    assert all("momentum_buffer" in state for state in training.optimizer.state.values())


@pytest.mark.parametrize("flag", ["--reset-optimizer --resume-from", "--exp-load-weights-from"])
def test_a_reset_or_weights_alone_begin_at_epoch_0_with_a_new_optimizer(flags, open_run, flag):
    file, _ = trained(flags, open_run, "--epochs 1")
    training = ClassifierTraining(ClassifierCompressor(flags(f"--epochs 1 --lr 0.01 {flag}", file)))
    assert (training.start, training.optimizer.param_groups[0]["lr"]) == (0, 0.01)
    assert training.tracker.best() == ()
    assert not training.optimizer.state


def test_a_reset_keeps_the_masks_and_weights_alone_bring_none(flags, open_run, schedule):
    file, _ = trained(flags, open_run, "--epochs 2 --compress", schedule)
    for flag, masked in (
        ("--reset-optimizer --resume-from", ["fc1.weight"]),
        ("--exp-load-weights-from", []),
    ):
        training = ClassifierTraining(ClassifierCompressor(flags(f"--epochs 1 {flag}", file)))
        assert list(training.scheduler.masks.masked()) == masked


def test_there_must_be_an_epoch_left(flags, open_run):
    file, _ = trained(flags, open_run, "--epochs 2")
    with pytest.raises(UsageError) as error:
        ClassifierTraining(ClassifierCompressor(flags("--epochs 2 --resume-from", file)))
    assert str(error.value) == (
        "--epochs 2: nothing to do, the checkpoint has finished epoch 1; "
        "give an ending epoch above 2, or --reset-optimizer to begin at 0"
    )


def test_a_checkpoint_of_another_schedule_or_optimizer_is_refused(flags, open_run, schedule):
    file, _ = trained(flags, open_run, "--epochs 1 --compress", schedule)
    with pytest.raises(CheckpointError, match="its optimizer is SGD, got Adam; use SGD"):
        ClassifierTraining(
            ClassifierCompressor(
                flags("--epochs 3 --optimizer adam --compress", schedule, "--resume-from", file)
            )
        )
    schedule.write_text(SCHEDULE.replace("p:", "q:").replace("name: p", "name: q"))
    with pytest.raises(CheckpointError, match="was written under a schedule with policies"):
        ClassifierTraining(
            ClassifierCompressor(flags("--epochs 3 --compress", schedule, "--resume-from", file))
        )


def test_the_reference_is_the_trained_network_that_training_begins_with(flags, open_run, schedule):
    dense, before = trained(flags, open_run, "--epochs 1")
    assert before.reference is None
    flag = "--reset-optimizer --resume-from"
    pruned, after = trained(flags, open_run, "--epochs 2 --compress", schedule, *flag.split(), dense)
    assert after.reference is not None
    assert after.reference.top1_correct == before.measured.top1_correct
    assert after.reference.nonzeros == 266_610
    again, resumed = trained(flags, open_run, "--epochs 3 --compress", schedule, "--resume-from", pruned)
    assert resumed.reference is not None
    assert resumed.reference.top1_correct == before.measured.top1_correct
    assert resumed.reference.source == str(pruned)
    assert again != pruned


@pytest.mark.parametrize("flag", ["--exp-load-weights-from", "--reset-optimizer --resume-from"])
def test_pruned_weights_without_a_known_reference_are_not_called_uncompressed(
    flags, open_run, schedule, flag
):
    pruned, card = trained(flags, open_run, "--epochs 2 --compress", schedule)
    assert card.reference is None
    _, again = trained(flags, open_run, "--epochs 1", *flag.split(), pruned)
    assert again.reference is None


def test_penalties_are_in_the_overall_loss_of_the_record_and_not_in_the_objective(flags, open_run, tmp_path):
    file = tmp_path / "l1.yaml"
    file.write_text(
        "regularizers:\n  r: {class: L1Regularizer, reg_regims: {fc1.weight: 0.01}}\n"
        "policies:\n  - {regularizer: {instance_name: r}, epochs: [0]}\n"
    )
    trained(flags, open_run, "--epochs 1 -p 1 --compress", file)
    last = open_run.logger.steps[-1][3]
    assert last["Overall Loss"] == pytest.approx(
        last["Objective Loss"] + last["L1Regularizer_loss"], rel=1e-5
    )
    assert last["L1Regularizer_loss"] > 10
    assert open_run.logger.epochs[0].train_overall_loss == last["Overall Loss"]


def test_a_best_checkpoint_evaluates_to_the_score_it_was_chosen_for(flags, open_run, schedule):
    command = "--vs 0 -p 1 --epochs {} --compress"  # validation on the test set, so that both can be compared
    file, _ = trained(flags, open_run, command.format(2), schedule)
    folders = [file.parent]
    file, _ = trained(flags, open_run, command.format(4), schedule, "--resume-from", file)
    folders.append(file.parent)
    for folder in folders:
        best = folder / "best.pth.tar"
        extras = read_checkpoint(best).extras
        compressor = ClassifierCompressor(flags("-e --exp-load-weights-from", best))
        assert compressor.test().top1 == extras["best_top1"]
        assert read_checkpoint(best).epoch == extras["best_epoch"]


@pytest.mark.parametrize("is_of_this_run", [True, False])
def test_a_resumed_run_takes_over_the_best_checkpoint_of_the_interrupted_one(
    flags, open_run, monkeypatch, is_of_this_run
):
    file, _ = trained(flags, open_run, "--epochs 2")
    best = file.with_name("best.pth.tar").read_bytes()
    monkeypatch.setattr("distiller.apputils.classifier_training.ScoreTracker.step", lambda *args: False)
    if not is_of_this_run:  # as when the interrupted run went on after this copy of its checkpoint
        monkeypatch.setattr(
            "distiller.apputils.classifier_training.read_checkpoint",
            lambda path: dataclasses.replace(read_checkpoint(path), epoch=99),
        )
    file, _ = trained(flags, open_run, "--epochs 3 --resume-from", file)
    copied = file.with_name("best.pth.tar")
    assert copied.exists() == is_of_this_run
    if is_of_this_run:
        assert copied.read_bytes() == best


# ------------------------------------------------------------- what is asked for besides


class Histograms(Logger):
    """Keeps the values that it is given."""

    def __init__(self):
        self.given = []

    def log_parameter_histograms(self, epoch, by_param):
        self.given.append((epoch, by_param))


@pytest.mark.parametrize("flag, expected", [("--param-hist", ["fc1.weight", "fc1.bias"]), ("", [])])
def test_the_values_of_parameters_are_logged_each_epoch_when_asked_for(
    flags, open_run, schedule, flag, expected
):
    logger = Histograms()

    def opened():
        return Run(open_run().folder, (logger,))

    args = flags(f"--epochs 2 {flag} --compress", schedule)
    ClassifierTraining(ClassifierCompressor(args, opened)).run()
    assert [epoch for epoch, _ in logger.given] == [0, 1]
    assert list(logger.given[1][1])[:2] == expected
    if expected:
        state = read_checkpoint(open_run.folder / "checkpoint.pth.tar").state_dict
        assert all((state[name].numpy() == values).all() for name, values in logger.given[1][1].items())
        assert (logger.given[1][1]["fc1.weight"] == 0).mean() == 0.5


def test_the_table_of_masks_is_logged_after_each_epochs_training(flags, open_run, schedule, caplog):
    caplog.set_level(logging.INFO)
    trained(flags, open_run, "--epochs 2 --masks-sparsity --compress", schedule)
    lines = [record.message for record in caplog.records]
    tables = [line for line in lines if line.startswith("Sparsity of the masks after epoch ")]
    totals = [table.splitlines()[-2].split("|")[-2].strip() for table in tables]
    assert totals == ["0.00", f"{50 * 784 * 300 / 266_200:.2f}"]
    assert lines.index(tables[1]) < lines.index("--- validate (epoch=1) -----------")


def test_the_untrained_model_is_saved_when_asked_for(flags, open_run):
    compressor = ClassifierCompressor(flags("--epochs 1 -n exp --save-untrained-model"), open_run)
    before = {name: value.clone() for name, value in compressor.model.state_dict().items()}
    ClassifierTraining(compressor).run()
    saved = read_checkpoint(open_run.folder / "exp_untrained_checkpoint.pth.tar")
    assert all(torch.equal(value, before[name]) for name, value in saved.state_dict.items())
    assert saved.extras == {"seed": 7, "validation_split": 0.1, "is_untrained": True}
    assert saved.optimizer is None
    ClassifierTraining(ClassifierCompressor(flags("--epochs 1"), open_run)).run()
    assert open_run.names().isdisjoint({"untrained_checkpoint.pth.tar"})


def test_without_a_run_folder_no_untrained_model_is_saved(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ClassifierTraining(ClassifierCompressor(flags("--epochs 1 --save-untrained-model"))).run()
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_takes_the_untrained_model_along(flags, open_run, caplog):
    file, _ = trained(flags, open_run, "--epochs 1 --save-untrained-model")
    kept = (file.parent / "untrained_checkpoint.pth.tar").read_bytes()
    resumed = "--epochs 2 --save-untrained-model -n exp --resume-from"
    trained(flags, open_run, resumed, file)
    assert (open_run.folder / "exp_untrained_checkpoint.pth.tar").read_bytes() == kept
    (file.parent / "untrained_checkpoint.pth.tar").unlink()
    caplog.clear()
    ClassifierTraining(ClassifierCompressor(flags(resumed, file), open_run)).run()
    assert "exp_untrained_checkpoint.pth.tar" not in open_run.names()
    assert (
        "--save-untrained-model: without effect, this run goes on after epoch 0, and there is no "
        "untrained_checkpoint.pth.tar beside its checkpoint"
    ) in [record.message for record in caplog.records]


def test_an_untrained_model_is_no_training_to_go_on_with(flags, open_run):
    file, _ = trained(flags, open_run, "--epochs 1 --save-untrained-model")
    untrained = file.parent / "untrained_checkpoint.pth.tar"
    with pytest.raises(UsageError) as error:
        ClassifierTraining(ClassifierCompressor(flags("--epochs 2 --resume-from", untrained), open_run))
    assert str(error.value) == (
        f"--resume-from {untrained}: is not trained yet, there is no epoch to go on after; "
        "add --reset-optimizer to begin at epoch 0"
    )
    again, _ = trained(flags, open_run, "--epochs 1 --reset-optimizer --resume-from", untrained)
    first, second = read_checkpoint(file).state_dict, read_checkpoint(again).state_dict
    assert all(torch.equal(value, second[name]) for name, value in first.items())  # the same training


def test_an_epoch_that_would_end_with_one_image_is_refused_before_it_begins(flags, open_run):
    """A batch norm over maps of 1x1 failed there, after an epoch of training, with a traceback."""
    args = flags("--epochs 1")
    args.arch, args.dataset, args.batch_size, args.seed = "resnet18", "synthetic", 8, 1
    args.effective_train_size, args.effective_valid_size, args.effective_test_size = 0.002, 0.01, 0.01
    training = ClassifierTraining(ClassifierCompressor(args, open_run))
    loader = training.compressor.data.train
    assert loader is not None
    assert loader.num_samples % 8 == 1
    with pytest.raises(UsageError, match="training: a mini-batch of one image is left over"):
        training.run()
    assert open_run.calls == 0
