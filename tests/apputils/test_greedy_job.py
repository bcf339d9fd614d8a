from __future__ import annotations

import csv
import json
import logging

import pytest
import torch

from distiller.apputils import classifier_jobs as jobs
from distiller.apputils import greedy_job
from distiller.apputils.checkpoint import read_checkpoint
from distiller.errors import UsageError

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")

GREEDY = "-a simplenet_mnist --greedy --greedy-pruning-step 0.4 --lr 0.02 "


@pytest.fixture
def trained(monkeypatch):
    """The calls of `train_epoch`: (epoch, mini-batches)."""
    calls = []
    train_epoch = greedy_job.train_epoch

    def recorded(model, loader, optimizer, scheduler, epoch, **more):
        calls.append((epoch, len(loader)))
        return train_epoch(model, loader, optimizer, scheduler, epoch, **more)

    monkeypatch.setattr(greedy_job, "train_epoch", recorded)
    return calls


def rows_of(open_run):
    with (open_run.folder / "greedy.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_line_and_a_checkpoint_for_each_iteration(flags, open_run, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        card = jobs.run_job(flags(GREEDY + "--greedy-target-density 0.6"), open_run)
    rows = rows_of(open_run)
    assert list(rows[0]) == ["iteration", "top1", "param_name", "normalized_macs", "total_macs", "densities"]
    assert float(rows[-1]["normalized_macs"]) <= 60
    names = {
        f"greedy__{int(r['iteration']):03d}__{float(r['normalized_macs']):.1f}__{float(r['top1']):.1f}_checkpoint.pth.tar"
        for r in rows
    }
    assert open_run.names() == {"greedy.csv", "results.json", *names}
    densities = json.loads(rows[-1]["densities"])
    assert set(densities) == {"conv1.weight", "conv2.weight"}
    checkpoint = read_checkpoint(greedy_job.latest_greedy_checkpoint(open_run.folder))
    zeros = (checkpoint.state_dict["conv2.weight"].flatten(1).abs().sum(1) == 0).sum().item()
    assert 1 - zeros / 50 == pytest.approx(densities["conv2.weight"])
    masks = checkpoint.scheduler["masks"]
    assert "conv2.weight" in str(masks.keys())
    assert "they are masked, and go with --thinnify" in caplog.text
    assert card is not None
    assert card.reference is not None


def test_a_resumed_run_ends_as_one_that_was_never_stopped(flags, open_run):
    command = GREEDY + "--greedy-target-density "
    jobs.run_job(flags(command + "0.35"), open_run)
    whole, last = rows_of(open_run), greedy_job.latest_greedy_checkpoint(open_run.folder)
    weights = read_checkpoint(last).state_dict
    assert len(whole) > 1
    first = min(open_run.folder.glob("greedy__000__*"))
    jobs.run_job(flags(command + "0.35 --resume-from", first), open_run)
    assert rows_of(open_run) == whole
    again = read_checkpoint(open_run.folder / last.name).state_dict
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_defect_the_epochs_of_fine_tuning_are_read(flags, open_run, trained):
    """DEFECT of Distiller: --greedy-ft-epochs was accepted and never read."""
    jobs.run_job(flags(GREEDY + "--greedy-target-density 0.95 --greedy-ft-epochs 3"), open_run)
    assert [epoch for epoch, _ in trained] == [0, 1, 2, 0, 1, 2]  # two candidates, one iteration


def test_without_epochs_nothing_is_trained(flags, open_run, trained):
    jobs.run_job(flags(GREEDY + "--greedy-target-density 0.95 --greedy-ft-epochs 0"), open_run)
    assert trained == []


def test_linear_grow_trains_on_the_share_that_is_pruned(flags, open_run, trained):
    command = GREEDY + "--greedy-target-density 0.5 --greedy-finetuning-policy linear-grow"
    jobs.run_job(flags(command), open_run)
    shares = [1 - float(row["normalized_macs"]) / 100 for row in rows_of(open_run)]
    batches = dict(trained)
    assert 0 not in batches  # nothing is pruned before the first iteration
    assert all(0 < count <= 5 for count in batches.values())
    assert batches[1] == -(-shares[0] * 5 // 1)


def test_a_target_out_of_reach_is_told(flags, open_run, caplog):
    with caplog.at_level(logging.WARNING, logger="distiller"):
        command = GREEDY + "--greedy-target-density 0.0001 --greedy-ft-epochs 0 --greedy-pruning-step 0.99"
        jobs.run_job(flags(command), open_run)
    assert (
        "--greedy-target-density 0.0001: not reached, each group that can be pruned has one unit left"
        in caplog.text
    )


def test_a_checkpoint_of_another_job_is_not_gone_on_with(flags, open_run):
    jobs.run_job(flags("-a simplenet_mnist --epochs 1"), open_run)
    calls = open_run.calls
    with pytest.raises(UsageError, match="is not of a greedy pruning; to begin one with its weights give"):
        jobs.run_job(
            flags(
                GREEDY + "--greedy-target-density 0.5 --resume-from", open_run.folder / "checkpoint.pth.tar"
            ),
            open_run,
        )
    assert open_run.calls == calls


def test_a_network_without_convolutions_is_refused_before_a_folder_is_made(flags, open_run):
    with pytest.raises(
        UsageError, match="greedy pruning: nothing of the network can be pruned, it has no conv"
    ):
        jobs.run_job(flags("--greedy --greedy-target-density 0.5"), open_run)
    assert open_run.calls == 0


def test_an_interrupted_run_goes_on_from_its_last_iteration(flags, tmp_path):
    args = flags(GREEDY + "--greedy-target-density 0.5")
    assert jobs.how_to_go_on(args, tmp_path) is None
    for name in ("greedy__000__90.0__50.0_checkpoint.pth.tar", "greedy__001__80.0__49.0_checkpoint.pth.tar"):
        (tmp_path / name).touch()
    told = jobs.how_to_go_on(args, tmp_path)
    assert told is not None
    assert told.endswith("greedy__001__80.0__49.0_checkpoint.pth.tar")
