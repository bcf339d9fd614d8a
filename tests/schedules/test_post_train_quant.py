"""The shipped files of quantization after training: the command in each header is right, and it can be done."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from compress_classifier import make_parser
from distiller.apputils.usage import check_usage
from distiller.config import config_component_from_file_by_class, file_config, post_training_steps
from distiller.errors import ScheduleError
from distiller.models import create_model
from distiller.quantization.refinement import equalize

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "schedules/quantization/post_train_quant").glob("*.yaml"))


def arguments(file: Path):
    header = "\n".join(
        line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    )
    (line,) = re.findall(r"^python compress_classifier\.py (.*)$", header.replace("\\\n", " "), re.MULTILINE)
    return make_parser().parse_args(shlex.split(line))


def model_of(file: Path):
    return create_model(False, "fashion-mnist", arguments(file).arch, parallel=False).eval()


def test_there_are_files():
    assert len(FILES) >= 2


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_command_in_the_header_is_of_this_file_and_no_flag_of_it_is_ignored(file):
    args = arguments(file)
    assert check_usage(args) == []
    assert (ROOT / args.qe_config_file).resolve() == file
    baselines = re.findall(r"schedules/baseline_networks/\w+\.yaml", file.read_text(encoding="utf-8"))
    assert len(baselines) == 1
    assert (ROOT / baselines[0]).is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_its_settings_and_steps_are_of_the_model_of_its_command(file):
    model = model_of(file)
    quantizer = config_component_from_file_by_class(model, file, "PostTrainLinearQuantizer")
    assert quantizer.default_qbits.wts == 4
    steps = post_training_steps(file)
    assert steps.names
    if steps.cross_layer_equalization is not None:
        assert equalize(model, torch.zeros(1, *model.input_shape[1:]), **steps.cross_layer_equalization).pairs


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_to_train_under_it_is_refused_with_the_flag_that_takes_it(file):
    with pytest.raises(
        ScheduleError, match="give such a file with --evaluate --quantize-eval --qe-config-file"
    ):
        file_config(model_of(file), None, file)
