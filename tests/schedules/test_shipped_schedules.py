"""Every schedule that is shipped loads against the model of its command, and runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import compress_classifier
from distiller.config import file_config
from distiller.dataset_facts import DATASET_FACTS, infer_dataset
from distiller.models import create_model, input_shape_for
from distiller.policy import PruningPolicy

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = sorted((ROOT / "schedules").rglob("*.yaml"))


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(
        line[1:].strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]
    )


def command(path: Path):
    """The flags of the command in a schedule's header."""
    text = header(path).replace("\\\n", " ")
    (line,) = re.findall(r"^python compress_classifier\.py (.*)$", text, re.MULTILINE)
    return compress_classifier.make_parser().parse_args(shlex.split(line))


def test_there_are_schedules():
    assert SCHEDULES


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda path: path.stem)
def test_a_schedule_opens_with_purpose_command_and_measured_result(path):
    args = command(path)
    assert (ROOT / args.compress).resolve() == path
    assert len(header(path).splitlines()[0]) > 20
    assert "Measured (" in header(path)


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda path: path.stem)
def test_a_schedule_runs_to_the_sparsity_it_promises(path):
    """One mini-batch an epoch, of random images: learning is not the point, masks and rates are."""
    args = command(path)
    dataset = args.dataset or infer_dataset(args.arch)
    facts = DATASET_FACTS[dataset]
    shape = (1, *input_shape_for(args.arch, facts.channels, facts.size))
    model = create_model(False, dataset, args.arch, parallel=False, input_shape=shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scheduler = file_config(model, optimizer, path)
    images, labels = torch.randn(2, *shape[1:]), torch.zeros(2, dtype=torch.int64)
    for epoch in range(args.epochs):
        scheduler.on_epoch_begin(epoch, optimizer)
        scheduler.on_minibatch_begin(epoch, 0, 1, optimizer)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss = scheduler.before_backward_pass(epoch, 0, 1, loss, optimizer)
        optimizer.zero_grad()
        loss.backward()
        scheduler.before_parameter_optimization(epoch, 0, 1, optimizer)
        optimizer.step()
        scheduler.on_minibatch_end(epoch, 0, 1, optimizer)
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 10.0})

    params = dict(model.named_parameters())
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    promised = [
        (pruner["weights"], pruner["final_sparsity"]) for pruner in (data.get("pruners") or {}).values()
    ]
    for names, sparsity in promised:
        for name in names:
            measured = (params[name] == 0).float().mean().item()
            assert measured == pytest.approx(sparsity, abs=1.5 / params[name].shape[0])
    assert len(promised) == sum(isinstance(entry.policy, PruningPolicy) for entry in scheduler.policies)
    assert scheduler.pruning_is_complete(args.epochs - 1)
