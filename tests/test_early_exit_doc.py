"""What docs/early_exit.md shows runs, and its command lines are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from compress_classifier import make_parser
from distiller.apputils.usage import check_usage
from distiller.early_exit import exit_names
from distiller.models import create_model

TEXT = (Path(__file__).resolve().parents[1] / "docs/early_exit.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python compress_classifier\.py (.*)$", TEXT, re.MULTILINE)


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    found: dict = {}
    exec(compile(code, "docs/early_exit.md", "exec"), found)
    assert found["loss"].dim() == 0
    assert found["logits"].shape == (8, 10)
    assert exit_names(found["model"]) == ("layer1.2.relu2", "layer2.2.relu2")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_is_understood(command):
    parser = make_parser()
    args = parser.parse_args(shlex.split(command))
    assert check_usage(args) == []
    assert args.compress is None or (Path(__file__).resolve().parents[1] / args.compress).is_file()


def test_there_are_commands_for_training_testing_and_attaching():
    assert len(COMMANDS) == 3


def test_the_refusal_that_is_shown_is_the_one_that_is_told():
    from distiller.early_exit import exit_places
    from distiller.errors import UsageError

    (message,) = re.findall(r"```\n(early exit: .*)\n```", TEXT)
    with pytest.raises(UsageError) as caught:
        exit_places(create_model(False, "mnist", "resnet20_cifar")).check("layer1.1.conv1")
    assert str(caught.value) == message


def test_the_flags_that_are_named_are_there():
    known = set(make_parser()._option_string_actions)
    assert set(re.findall(r"`(--[\w-]+)", TEXT)) <= known
