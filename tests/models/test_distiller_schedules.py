"""The names in Distiller's own schedules and sensitivity files are names of our models."""

import re
from pathlib import Path

import pytest

from distiller.models import create_model
from distiller.names import named_parameters, resolve

COMPAT = Path(__file__).resolve().parents[2] / "../shared/compat"
ARCHS = {
    "alexnet.": "alexnet",
    "resnet18": "resnet18",
    "resnet20": "resnet20_cifar",
    "resnet50": "resnet50",
    "resnet56": "resnet56_cifar",
    "ssl_": "resnet20_cifar",
    "vgg16_cifar": "vgg16_cifar",
}


def files() -> list[tuple[Path, str]]:
    found = [*COMPAT.glob("schedules/**/*.yaml"), *COMPAT.glob("sensitivity/*.csv")]
    return [
        (file, arch) for file in sorted(found) for start, arch in ARCHS.items() if file.name.startswith(start)
    ]


pytestmark = pytest.mark.skipif(not COMPAT.exists(), reason="shared/compat is not there")


@pytest.mark.parametrize(("file", "arch"), [pytest.param(*found, id=found[0].name) for found in files()])
def test_every_parameter_named_there_is_a_parameter_here(file, arch):
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    names = set(re.findall(r"[\w.]+\.(?:weight|bias)\b", "\n".join(lines)))
    available = dict(named_parameters(create_model(False, None, arch)))
    for name in names:
        assert resolve(name, available)


def test_such_files_are_there():
    assert len(files()) >= 15
