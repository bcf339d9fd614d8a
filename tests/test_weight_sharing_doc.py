"""What docs/weight_sharing.md shows loads and runs, and what it lists is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from compress_classifier import make_parser
from distiller.apputils.usage import check_usage
from distiller.config import dict_config
from distiller.models import create_model
from distiller.signatures import takes
from distiller.weight_sharing import QuantizeToMixture, SoftWeightSharing

TEXT = (Path(__file__).resolve().parents[1] / "docs/weight_sharing.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python compress_classifier\.py (.*)$", TEXT.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_in_order(command):
    parser = make_parser()
    assert check_usage(parser.parse_args(shlex.split(command))) == []


def test_there_are_two_commands():
    assert len(COMMANDS) == 2


def test_its_schedule_loads():
    (shown,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    model = create_model(False, "digits", "lenet_300_100", parallel=False)
    scheduler = dict_config(model, None, yaml.safe_load(shown))
    assert [type(entry.policy) for entry in scheduler.policies] == [SoftWeightSharing, QuantizeToMixture]


def test_its_python_runs(capsys):
    (shown,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    torch.manual_seed(0)
    exec(shown, {"model": create_model(False, "digits", "lenet_300_100", parallel=False)})
    assert float(capsys.readouterr().out.split()[0]) > 0


def test_its_settings_are_those_of_the_classes():
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert told
    assert told <= takes(SoftWeightSharing) | takes(QuantizeToMixture)
