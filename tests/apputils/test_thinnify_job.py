from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from distiller.apputils import classifier_jobs as jobs
from distiller.apputils import thinnify_job
from distiller.apputils.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from distiller.errors import UsageError
from distiller.export.latency import Latency
from distiller.masks import MaskRules
from distiller.models import create_model
from distiller.scheduler import CompressionScheduler

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")

NET = "-a simplenet_mnist "
run_job: Any = jobs.run_job
created: Any = create_model
read: Any = read_checkpoint
loaded: Any = load_checkpoint
SCHEDULE = """
pruners:
  p: {class: L1RankedStructureParameterPruner, desired_sparsity: 0.5, group_type: Filters,
      weights: [conv1.weight, conv2.weight]}
  scores: {class: MovementPruner, initial_sparsity: 0.1, final_sparsity: 0.5, weights: [fc1.weight]}
lr_schedulers:
  lr: {class: ExponentialLR, gamma: 0.5}
policies:
  - pruner: {instance_name: p}
    epochs: [0]
  - pruner: {instance_name: scores}
    starting_epoch: 0
    ending_epoch: 3
    frequency: 1
  - lr_scheduler: {instance_name: lr}
    starting_epoch: 0
    ending_epoch: 3
    frequency: 1
"""


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    def measured(models, shape, images, device):
        return [Latency(0.2 / (index + 1), 0.1, 0.3, 3, images, 1, "cpu") for index, _ in enumerate(models)]

    monkeypatch.setattr(thinnify_job, "measure_latencies", measured)


@pytest.fixture
def schedule(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(SCHEDULE)
    return path


@pytest.fixture
def pruned(flags, open_run, schedule):
    """The checkpoint of an epoch in which half of the filters were pruned."""
    run_job(flags(NET + "--epochs 1 --compress", schedule), open_run)
    return open_run.folder / "checkpoint.pth.tar"


def thinned(open_run, name="checkpoint_thinned_checkpoint.pth.tar"):
    return open_run.folder / name


def test_the_thinned_checkpoint_is_smaller_and_has_all_that_goes_on(flags, open_run, pruned, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        assert run_job(flags(NET + "--thinnify --resume-from", pruned), open_run) is None
    assert open_run.names() == {"checkpoint_thinned_checkpoint.pth.tar"}
    before, after = read(pruned), read(thinned(open_run))
    shapes = {name: tuple(value.shape) for name, value in after.state_dict.items() if value.dim() > 1}
    assert shapes["conv1.weight"] == (10, 1, 5, 5)
    assert shapes["conv2.weight"] == (25, 10, 5, 5)
    assert shapes["fc1.weight"][1] == before.state_dict["fc1.weight"].shape[1] // 2
    assert len(after.thinning_recipes) == 1
    assert (after.epoch, after.extras["seed"]) == (0, 7)
    assert torch.equal(after.rng["torch"], before.rng["torch"])
    names = after.optimizer["param_names"][0]
    momentum = after.optimizer["state_dict"]["state"][names.index("conv2.weight")]["momentum_buffer"]
    assert momentum.shape == (25, 10, 5, 5)
    assert after.scheduler["masks"]["conv2.weight"]["pruner"].shape == (25, 10, 5, 5)
    assert "conv2.weight: (50, 20, 5, 5) -> (25, 10, 5, 5)" in caplog.text
    assert "median latency, batch 64 (cpu, 1 thread): 200.000 ms -> 100.000 ms (2.00x as fast)" in caplog.text
    assert "no --compress: masks are kept, the states of the schedule's policies are not" in caplog.text


def test_with_the_schedule_training_goes_on_where_it_was(flags, open_run, pruned, schedule):
    run_job(flags(f"{NET}--compress {schedule} --thinnify --resume-from", pruned), open_run)
    path = thinned(open_run)
    kept = read(path)
    scores = kept.scheduler["policies"][1]["state"]["scores"]["fc1.weight"]
    assert scores.shape == kept.state_dict["fc1.weight"].shape
    assert kept.optimizer["state_dict"]["param_groups"][0]["lr"] == 0.025  # after one epoch at 0.05
    card = run_job(flags(f"{NET}--compress {schedule} --epochs 2 --resume-from", path), open_run)
    assert card.is_thinned
    assert card.measured.parameters < card.reference.parameters
    assert card.measured.macs < card.reference.macs
    assert read(open_run.folder / "checkpoint.pth.tar").epoch == 1


@pytest.mark.parametrize("source", ["--resume-from", "--exp-load-weights-from"])
def test_the_thinned_checkpoint_answers_as_the_masked_one(flags, open_run, source, tmp_path):
    dense = created(False, "digits", "simplenet_mnist", parallel=False)
    for name in ("weight", "bias"):
        getattr(dense.conv1, name).data[5:9] = 0
    path = save_checkpoint(3, "simplenet_mnist", dense, name="mine", dir=tmp_path)
    run_job(flags(f"{NET}--thinnify {source}", path), open_run)
    new = thinned(open_run, "mine_checkpoint_thinned_checkpoint.pth.tar")
    thin, _, optimizer, start = loaded(None, new)
    assert (optimizer, start) == (None, 4)
    assert thin.conv1.out_channels == 16
    images = torch.randn(2, *dense.input_shape[1:])
    torch.testing.assert_close(thin.eval()(images), dense.eval()(images))


def test_what_is_masked_on_the_forward_pass_only_counts_as_zero(flags, open_run, tmp_path):
    model = created(False, "digits", "simplenet_mnist", parallel=False)
    scheduler = CompressionScheduler(model)
    mask = torch.ones_like(model.conv1.weight)
    mask[3] = 0
    scheduler.masks.put("conv1.weight", mask, rules=MaskRules(forward_only=True))
    with scheduler.masked():
        path = save_checkpoint(0, "simplenet_mnist", model, None, scheduler, dir=tmp_path)
    run_job(flags(NET + "--thinnify --resume-from", path), open_run)
    document = read(thinned(open_run))
    assert document.state_dict["conv1.weight"].shape[0] == 19
    assert document.scheduler["dense"]["conv1.weight"].shape[0] == 19


def test_it_is_evaluated_and_quantized_beside_the_whole_architecture(flags, open_run, pruned):
    run_job(flags(NET + "--thinnify --resume-from", pruned), open_run)
    path = thinned(open_run)
    card = run_job(flags(NET + "-e --resume-from", path), open_run)
    assert card.is_thinned
    assert card.reference.parameters > 2 * card.measured.parameters
    card = run_job(flags(NET + "-e --qe --resume-from", path), open_run)
    assert card.is_thinned
    assert card.before.parameters == card.measured.parameters
    assert card.reference.macs > 2 * card.before.macs == 2 * card.measured.macs
    again = run_job(
        flags(NET + "-e --resume-from", open_run.folder / "quantized_checkpoint.pth.tar"), open_run
    )
    assert again.measured.top1_correct == card.measured.top1_correct
    assert again.measured.macs == card.measured.macs


def test_where_nothing_can_go_nothing_is_written(flags, open_run, tmp_path):
    model = created(False, "digits", "simplenet_mnist", parallel=False)
    path = save_checkpoint(0, "simplenet_mnist", model, dir=tmp_path)
    with pytest.raises(UsageError) as caught:
        run_job(flags(NET + "--thinnify --resume-from", path), open_run)
    assert str(caught.value) == (
        f"--thinnify: nothing can be removed from the model of {path}\nprune whole filters or channels first"
    )
    assert open_run.calls == 0


def test_a_quantized_checkpoint_is_refused(flags, open_run, pruned):
    run_job(flags(NET + "-e --qe --resume-from", pruned), open_run)
    with pytest.raises(UsageError, match="is of a quantized model, which can be evaluated"):
        run_job(
            flags(NET + "--thinnify --resume-from", open_run.folder / "quantized_checkpoint.pth.tar"),
            open_run,
        )
