"""The names in Distiller's own schedules and sensitivity files are names of our models."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from distiller.models import RNNModel, create_model
from distiller.names import named_modules, named_parameters, resolve

COMPAT = Path(__file__).resolve().parents[2] / "../shared/compat"
ARCHS = {
    "alexnet.": "alexnet",
    "alexnet_bn": "alexnet_bn",
    "mobilenet.": "mobilenet",
    "plain20_cifar": "plain20_cifar",
    "preact_resnet20_cifar": "preact_resnet20_cifar",
    "preact_resnet_cifar": "preact_resnet20_cifar",
    "resnet18": "resnet18",
    "resnet20": "resnet20_cifar",
    "resnet50": "resnet50",
    "resnet56": "resnet56_cifar",
    "ssl_": "resnet20_cifar",
    "vgg16_cifar": "vgg16_cifar",
    "word_lang_model": "word language model",
}
# A row of the table of weights that Distiller logs before it prunes: | 0 | module.x.weight | (16, 3, 3, 3) |
ROW = re.compile(r"^# \|\s*\d+ \| module\.(\S+)\s*\| \(([\d, ]+)\)", re.MULTILINE)


def files(*patterns: str) -> list:
    found = sorted(file for pattern in patterns for file in COMPAT.glob(pattern))
    return [
        pytest.param(file, arch, id=file.name)
        for file in found
        for start, arch in ARCHS.items()
        if file.name.startswith(start)
    ]


@cache
def model_of(arch: str) -> torch.nn.Module:
    with torch.device("meta"):  # only names and shapes are asked for
        if arch == "word language model":
            return RNNModel(33_278, 1500, 1500, dropout=0.65, tied=True)
        return create_model(False, None, arch)


pytestmark = pytest.mark.skipif(not COMPAT.exists(), reason="shared/compat is not there")


@pytest.mark.parametrize(("file", "arch"), files("schedules/**/*.yaml", "sensitivity/*.csv"))
def test_every_parameter_named_there_is_a_parameter_here(file, arch):
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    names = set(re.findall(r"[\w.]+\.(?:weight|bias)(?:_\w+)?\b", "\n".join(lines)))
    available = dict(named_parameters(model_of(arch)))
    for name in names:
        assert resolve(name, available)


@pytest.mark.parametrize(("file", "arch"), files("schedules/quantization/**/*.yaml"))
def test_every_layer_that_an_override_names_is_a_layer_here(file, arch):
    names = [name for name, _ in named_modules(model_of(arch))]
    for quantizer in yaml.safe_load(file.read_text())["quantizers"].values():
        for pattern in quantizer.get("overrides", ()):
            assert [name for name in names if re.fullmatch(pattern, name)], pattern


@pytest.mark.parametrize(
    ("file", "arch"), files("schedules/**/plain20_cifar_baseline*.yaml", "schedules/**/mobilenet*.yaml")
)
def test_weights_have_the_names_order_and_shapes_of_the_table_in_the_header(file, arch):
    theirs = {name: tuple(map(int, shape.split(","))) for name, shape in ROW.findall(file.read_text())}
    ours = {
        name: tuple(weight.shape) for name, weight in named_parameters(model_of(arch)) if weight.dim() > 1
    }
    assert list(ours.items()) == list(theirs.items())


def test_such_files_are_there():
    assert len(files("schedules/**/*.yaml", "sensitivity/*.csv")) >= 25
    assert len(files("schedules/quantization/**/*.yaml")) == 3
