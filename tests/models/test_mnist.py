from pathlib import Path

import pytest
import torch
from torch import nn

from distiller.models import create_model

LENET = Path(__file__).resolve().parents[2] / "../shared/compat/checkpoints/mnist_lenet.pt"


@pytest.mark.parametrize(("arch", "count"), [("lenet_300_100", 266_610), ("lenet5", 431_080)])
def test_lenets_have_the_parameters_of_the_papers(arch, count):
    assert sum(p.numel() for p in create_model(False, None, arch).parameters()) == count


def test_lenet5_has_one_activation_as_in_caffe():
    model = create_model(False, None, "lenet5")
    assert [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)] == ["relu1"]


def test_simplenet_mnist_names_its_operations():
    names = [name for name, _ in create_model(False, None, "simplenet_mnist").named_children()]
    assert names == ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "fc1", "relu3", "fc2"]


def test_simplenet_v2_averages_over_any_size():
    model = create_model(False, None, "simplenet_v2_mnist")
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert model(torch.zeros(2, 1, 16, 16)).shape == model(torch.zeros(2, 1, 40, 40)).shape == (2, 10)


@pytest.mark.skipif(not LENET.exists(), reason="shared/compat/checkpoints/mnist_lenet.pt is not there")
def test_a_lenet_300_100_trained_elsewhere_can_be_loaded():
    create_model(False, None, "lenet_300_100").load_state_dict(
        torch.load(LENET, map_location="cpu", weights_only=True)
    )
