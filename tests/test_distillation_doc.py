"""What docs/distillation.md shows loads, and what it lists is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from compress_classifier import make_parser
from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.usage import check_usage
from distiller.config import dict_config
from distiller.distillation.logits_cache import MOST_BYTES
from distiller.models import create_model

TEXT = (Path(__file__).resolve().parents[1] / "docs/distillation.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python compress_classifier\.py (.*)$", TEXT.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_in_order(command):
    parser = make_parser()
    assert check_usage(parser.parse_args(shlex.split(command))) == []


def test_there_are_three_commands():
    assert len(COMMANDS) == 3


def test_its_schedule_trains(tmp_path):
    (shown,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    teacher = create_model(False, "digits", "lenet5", parallel=False)
    path = save_checkpoint(0, "lenet5", teacher, dir=tmp_path)
    model = create_model(False, "digits", "lenet_300_100", parallel=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = dict_config(model, optimizer, yaml.safe_load(shown.replace("TEACHER", str(path))))
    scheduler.on_epoch_begin(0, optimizer)
    scheduler.on_minibatch_begin(0, 0, 1, optimizer)
    loss = torch.nn.functional.cross_entropy(
        model(torch.randn(2, *model.input_shape[1:])), torch.tensor([1, 2])
    )
    assert scheduler.before_backward_pass(0, 0, 1, loss, optimizer).isfinite()


def test_its_flags_are_those_of_the_program():
    known = {flag for flag in make_parser()._option_string_actions if flag.startswith("--kd-")}
    told = set(re.findall(r"`(--kd-[a-z-]+)", TEXT)) | set(re.findall(r" (--kd-[a-z-]+) ", TEXT))
    assert told <= known
    actions = make_parser()._option_string_actions
    assert {actions[flag].dest for flag in told} == {actions[flag].dest for flag in known}


def test_the_bound_of_the_answers_that_are_kept():
    assert "At most 64 MiB" in TEXT
    assert MOST_BYTES == 64 * 2**20
    assert round(MOST_BYTES / (16 + 4 * 10), -5) == 1_200_000
