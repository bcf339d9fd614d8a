"""Early exit in the program's jobs: trained, tested, chosen, saved, resumed, refused."""

from __future__ import annotations

import csv
import json
import shlex

import pytest
import torch

from compress_classifier import make_parser
from distiller.apputils import classifier_jobs, early_exit_job
from distiller.apputils.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.early_exit import exit_names, exits_of
from distiller.errors import CheckpointError, UsageError
from distiller.export.latency import Latency
from distiller.models import create_model

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")
NET = "--arch lenet_300_100 --dataset digits -b 64 --etrs 0.5 --seed 7 --lr 0.05 --cpu "
EXITS = "--earlyexit-layers relu1 relu2 "
TRAIN = NET + EXITS + "--earlyexit-lossweights 0.3 0.2 --epochs 1 "


def flags(command: str):
    return make_parser().parse_args(shlex.split(command))


@pytest.fixture(autouse=True)
def untimed_exits(monkeypatch):
    latency = Latency(1.0, 1.0, 1.0, 1, 1, 1, "cpu")
    monkeypatch.setattr(early_exit_job, "_timed", lambda *_: (latency, latency))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a network with two exits."""
    from distiller.apputils.experiment import create_run_folder
    from distiller.apputils.image_classifier import Run

    folder = create_run_folder(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "distiller.apputils.measurement.measure_latencies", lambda models, *_, **__: [None] * len(models)
        )
        classifier_jobs.run_job(flags(TRAIN), lambda: Run(folder))
    return folder.path / "checkpoint.pth.tar"


def evaluated(open_run, trained, more: str):
    card = classifier_jobs.run_job(flags(f"{NET} -e --resume-from {trained} {more}"), open_run)
    assert card is not None
    return card


def test_the_accuracy_of_every_exit_is_logged_when_training_and_testing(open_run, caplog):
    caplog.set_level("INFO")
    card = classifier_jobs.run_job(flags(TRAIN), open_run)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("exit ")]
    assert [line.split(" ==>")[0] for line in lines] == ["exit 1 (relu1)", "exit 2 (relu2)"] * 2
    assert card is not None
    assert card.early_exit is None
    assert "early_exit" not in card.to_json()


def test_a_training_moves_the_branches_too(trained):
    model = create_model(False, "digits", "lenet_300_100")
    compressor = ClassifierCompressor(flags(NET + EXITS + "-e"))
    fresh = compressor.model.state_dict()
    stored = read_checkpoint(trained).state_dict
    assert {name for name in stored if "branch_net" in name} == {
        name for name in fresh if name not in model.state_dict()
    }
    assert all(not torch.equal(stored[name], fresh[name]) for name in stored if "branch_net" in name)


def test_images_leave_by_given_thresholds_and_the_card_tells(open_run, trained):
    card = evaluated(open_run, trained, "--earlyexit-thresholds 1.5 1.5")
    report = card.early_exit
    assert report is not None
    assert report.layers == ("relu1", "relu2")
    assert report.n == card.measured.n == 359
    assert report.all_correct[-1] == card.measured.top1_correct
    assert all(right <= left for right, left in zip(report.left_correct, report.left, strict=True))
    assert 0 < report.left[0] < 359
    assert report.whole_macs == card.measured.macs
    saved = json.loads((open_run.folder / "results.json").read_text())["early_exit"]
    assert saved["left"] == list(report.left)
    assert saved["top1_correct"] == report.top1_correct
    assert "exit 1 (relu1)" in card.to_text()
    assert not (open_run.folder / "early_exit_curve.csv").exists()


def test_shuffled_labels_change_who_is_right_and_not_who_leaves(open_run, trained, monkeypatch):
    """Distiller let an image leave when the loss, which takes its label, was below the threshold: an oracle."""
    card = evaluated(open_run, trained, "--earlyexit-thresholds 1.5 1.5")
    arguments = flags(f"{NET} -e --resume-from {trained} --earlyexit-thresholds 1.5 1.5")
    compressor = ClassifierCompressor(arguments, open_run)
    loader = compressor.data.test
    batches = [(images, labels.roll(1)) for images, labels in loader]
    monkeypatch.setattr(type(loader), "__iter__", lambda self: iter(batches))
    shuffled = early_exit_job.with_early_exit(compressor, card).early_exit
    assert card.early_exit is not None
    assert shuffled is not None
    assert shuffled.left == card.early_exit.left
    assert shuffled.left_correct != card.early_exit.left_correct


@pytest.mark.parametrize("criterion", ["entropy", "confidence"])
def test_thresholds_are_chosen_on_the_validation_set_and_given_they_do_the_same(
    open_run, trained, criterion, caplog
):
    caplog.set_level("INFO")
    how = f"--earlyexit-criterion {criterion} "
    chosen = evaluated(open_run, trained, how + "--earlyexit-shares 0.4 0.2").early_exit
    assert chosen is not None
    assert chosen.chosen_on.startswith("for shares of 0.4 0.2, on 143 validation images: top-1 ")
    assert {"early_exit_curve.csv", "early_exit_curve.png"} <= open_run.names()
    with (open_run.folder / "early_exit_curve.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["share_exit_1"]) == pytest.approx(0.4, abs=0.01)
    given = evaluated(open_run, trained, how + f"--earlyexit-thresholds {chosen.rule.text()}").early_exit
    assert given is not None
    assert given.left == chosen.left
    assert given.chosen_on == ""


def test_a_drop_is_asked_for_when_training(open_run):
    card = classifier_jobs.run_job(flags(TRAIN + "--earlyexit-max-drop 2"), open_run)
    assert card is not None
    assert card.early_exit is not None
    assert card.early_exit.chosen_on.startswith("for a drop of at most 2 points, on 143 validation images")


def test_a_checkpoint_puts_its_exits_on_any_copy(trained):
    model, *_ = load_checkpoint(None, trained)
    assert exit_names(model) == ("relu1", "relu2")
    plain = create_model(False, "digits", "lenet_300_100")
    load_checkpoint(plain, trained)
    for name, value in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)


def test_a_checkpoint_that_does_not_fit_leaves_the_model_without_exits(trained, tmp_path):
    document = torch.load(trained, weights_only=True)
    document["state_dict"]["fc1.weight"] = torch.zeros(3)
    torch.save(document, tmp_path / "bad.pth.tar")
    model = create_model(False, "digits", "lenet_300_100")
    with pytest.raises(CheckpointError):
        load_checkpoint(model, tmp_path / "bad.pth.tar")
    assert exits_of(model) == ()
    assert isinstance(model.train()(torch.randn(2, *model.input_shape[1:])), torch.Tensor)


@pytest.mark.parametrize(
    "exits, told",
    [
        ([{"layer": "relu9", "pool": None}], "early_exits: the model cannot have the checkpoint's exits: no module 'relu9' in "
         "the model; did you mean 'relu2'?"),
        ([{"layer": "relu1", "pool": [4, 4]}], "early_exits: the model cannot have the checkpoint's exits: early exit: "
         "'relu1' of shape (2, 300) cannot be pooled to [4, 4]"),
        ([{"layer": "relu1"}], "'early_exits[0].pool' is missing"),
        ([{"layer": 3, "pool": None}], "'early_exits[0].layer' must be text, got int 3"),
        ([{"layer": "relu1", "pool": [-1, 2]}], "'early_exits[0].pool[0]' must be at least 0, got int -1"),
    ],
)  # fmt: skip
def test_exits_that_are_forged_are_refused(trained, tmp_path, exits, told):
    document = torch.load(trained, weights_only=True)
    document["early_exits"] = exits
    path = tmp_path / "forged.pth.tar"
    torch.save(document, path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(create_model(False, "digits", "lenet_300_100"), path)
    assert str(caught.value) == f"{path}: {told}"


def test_a_trained_network_gets_exits_with_its_weights(open_run, tmp_path):
    classifier_jobs.run_job(flags(NET + "--epochs 1"), open_run)
    plain = open_run.folder / "checkpoint.pth.tar"
    assert "early_exits" not in torch.load(plain, weights_only=True)
    compressor = ClassifierCompressor(flags(TRAIN + f"--exp-load-weights-from {plain}"))
    assert exit_names(compressor.model) == ("relu1", "relu2")
    assert torch.equal(compressor.model.fc1.weight, read_checkpoint(plain).state_dict["fc1.weight"])
    with pytest.raises(UsageError) as caught:
        ClassifierCompressor(flags(NET + EXITS + f"--epochs 2 --resume-from {plain}"))
    assert str(caught.value) == (
        "--earlyexit-layers: the run that is resumed has no exits; take its weights only, with "
        "--exp-load-weights-from, or add --reset-optimizer"
    )


@pytest.mark.parametrize(
    "command, told",
    [
        (NET + "--earlyexit-lossweights 0.3", "--earlyexit-lossweights: 'lenet_300_100' has no early exits; give "
         "--earlyexit-layers, or an architecture that has some, as resnet20_cifar_earlyexit"),
        (NET + "-e --earlyexit-max-drop 1", "--earlyexit-max-drop: 'lenet_300_100' has no early exits; give "
         "--earlyexit-layers, or an architecture that has some, as resnet20_cifar_earlyexit"),
        (NET + EXITS + "--earlyexit-lossweights 0.3", "early exit: the model has 2 exits, got 1 lossweights; give one for each "
         "exit, none for the final output"),
        (NET + EXITS + "-e --earlyexit-thresholds 0.3", "early exit: the model has 2 exits, got 1 thresholds; give one for "
         "each exit, none for the final output"),
        (NET + EXITS + "-e --earlyexit-thresholds 0.3 2.5", "early exit: no entropy of 10 classes is above ln(10) = 2.303 "
         "nats, got the threshold 2.5, at which every image would leave"),
        (NET + EXITS, "the model has early exits (relu1, relu2), whose losses need weights: give --earlyexit-lossweights W W, "
         "as 0.2 0.2"),
        (NET + "--earlyexit-layers fc3", "early exit: 'fc3' is no place for one, the network has another way past it, or ends "
         "there; name 'relu2'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(open_run, command, told):
    with pytest.raises(UsageError) as caught:
        classifier_jobs.run_job(flags(command), open_run)
    assert str(caught.value) == told
    assert open_run.calls == 0


def test_other_layers_than_the_checkpoints_are_refused(trained):
    with pytest.raises(UsageError) as caught:
        ClassifierCompressor(flags(NET + f"-e --resume-from {trained} --earlyexit-layers relu1"))
    assert str(caught.value) == (
        "--earlyexit-layers relu1: the model has exits already, behind relu1 relu2; leave the flag out"
    )
    ClassifierCompressor(flags(NET + EXITS + f"-e --resume-from {trained}"))


def test_the_onnx_file_has_all_outputs(open_run, trained):
    import onnx

    classifier_jobs.run_job(flags(f"{NET} --export-onnx --resume-from {trained}"), open_run)
    graph = onnx.load(open_run.folder / "model.onnx").graph
    assert [output.name for output in graph.output] == ["exit1", "exit2", "output"]


def test_the_summaries_are_of_the_whole_network(trained):
    (text,) = classifier_jobs.summaries(flags(f"{NET} --summary compute --resume-from {trained}"))
    assert "branch_net" not in text
    assert "Total MACs: " in text


PRUNED = """
pruners:
  p: {class: L1RankedStructureParameterPruner, group_type: Filters, desired_sparsity: 0.5, weights: [conv1.weight]}
  e: {class: SparsityLevelParameterPruner, levels: {"*branch_net*.weight": 0.5}}
extensions:
  thin: {class: FilterRemover}
policies:
  - pruner: {instance_name: p}
    epochs: [0]
  - pruner: {instance_name: e, args: {keep_mask: true}}
    epochs: [0, 1]
  - extension: {instance_name: thin}
    epochs: [1]
"""
QUANTIZED = """
quantizers:
  q: {class: LSQQuantizer, bits_activations: 8, bits_weights: 4}
policies:
  - quantizer: {instance_name: q}
    starting_epoch: 0
    ending_epoch: 2
    frequency: 1
"""


@pytest.mark.parametrize("schedule", [PRUNED, QUANTIZED], ids=["pruned and thinned", "quantized"])
def test_exits_are_compressed_with_the_network_and_reload(open_run, tmp_path, schedule):
    path = tmp_path / "schedule.yaml"
    path.write_text(schedule)
    net = "--arch lenet5 --dataset digits -b 128 --etrs 0.3 --etes 0.3 --seed 7 --lr 0.02 --cpu "
    card = classifier_jobs.run_job(
        flags(net + f"--earlyexit-layers pool1 relu1 --earlyexit-lossweights 0.3 0.2 --epochs 2 --compress {path} "
              "--earlyexit-thresholds 1.5 1.5"), open_run)  # fmt: skip
    assert card is not None
    assert card.early_exit is not None
    checkpoint = open_run.folder / "checkpoint.pth.tar"
    again = classifier_jobs.run_job(
        flags(net + f"-e --resume-from {checkpoint} --earlyexit-thresholds 1.5 1.5"), open_run
    )
    assert again is not None
    assert again.early_exit is not None
    assert again.early_exit.left == card.early_exit.left
    assert again.early_exit.left_correct == card.early_exit.left_correct
    assert again.early_exit.mean_macs == card.early_exit.mean_macs
    if schedule == PRUNED:
        state = read_checkpoint(checkpoint).state_dict
        columns = state["pool1.branch_net.2.weight"].shape[1]
        assert columns == state["conv1.weight"].shape[0] * 16
        assert state["conv1.weight"].shape[0] == 10


def test_without_a_validation_set_the_card_says_that_test_images_chose(open_run, trained):
    card = evaluated(open_run, trained, "--earlyexit-shares 0.4 0.2 --validation-split 0")
    assert card.early_exit is not None
    assert card.early_exit.chosen_on.startswith("for shares of 0.4 0.2, on 359 test images: top-1 ")


def test_exits_that_were_never_trained_are_not_tested(open_run, tmp_path):
    model = create_model(False, "digits", "lenet_300_100", parallel=False)
    path = save_checkpoint(0, "lenet_300_100", model, name="plain", dir=tmp_path)
    with pytest.raises(UsageError) as error:
        classifier_jobs.run_job(
            flags(f"{NET} {EXITS} -e --exp-load-weights-from {path} --earlyexit-thresholds 1 1"), open_run
        )
    assert str(error.value) == (
        f"--earlyexit-layers: {path} has no exits, and untrained ones say nothing; train them first, with "
        "--earlyexit-lossweights and without --evaluate"
    )
