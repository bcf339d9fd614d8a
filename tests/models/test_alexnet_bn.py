import pytest
import torch
from torch import nn

from distiller.model_summaries import total_macs
from distiller.models import create_model


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):  # 61 million random numbers are not needed
        return create_model(False, None, "alexnet_bn")


def test_the_first_and_the_last_layer_are_where_distillers_schedule_expects_them(model):
    first, first_relu = model.get_submodule("features.0"), model.get_submodule("features.1")
    last_relu, last = model.get_submodule("classifier.5"), model.get_submodule("classifier.6")
    assert (type(first), first.in_channels) == (nn.Conv2d, 3)
    assert (type(last), last.out_features) == (nn.Linear, 1000)
    assert type(first_relu) is type(last_relu) is nn.ReLU


def test_the_network_is_alexnet_but_for_the_known_changes(model):
    alexnet = 60_965_224
    first_kernels_12x12_for_11x11 = 96 * 3 * (144 - 121)
    biases_of_alexnet = 96 + 256 + 384 + 384 + 256 + 4096 + 4096 + 1000
    biases_of_first_and_last = 96 + 1000
    norms = 2 * (256 + 384 + 384 + 256 + 4096 + 4096)
    assert sum(p.numel() for p in model.parameters()) == (
        alexnet + first_kernels_12x12_for_11x11 - biases_of_alexnet + biases_of_first_and_last + norms
    )


def test_macs_are_those_worked_by_hand(model):
    convolutions = (
        54 * 54 * 96 * 3 * 144
        + 54 * 54 * 256 * 48 * 25
        + 27 * 27 * 384 * 256 * 9
        + 14 * 14 * 384 * 192 * 9
        + 14 * 14 * 256 * 192 * 9
    )
    linear = 9216 * 4096 + 4096 * 4096 + 4096 * 1000
    assert total_macs(model, (1, 3, 224, 224)) == convolutions + linear


def test_every_layer_but_the_first_and_the_last_is_normalized_before_its_relu(model):
    for sequence in (model.features, model.classifier):
        kinds = [
            type(layer).__name__.rstrip("12d") for layer in sequence if not isinstance(layer, nn.MaxPool2d)
        ]
        layers = " ".join(kinds).replace("Conv BatchNorm ReLU", "+").replace("Linear BatchNorm ReLU", "+")
        assert layers in ("Conv ReLU + + + +", "+ + Linear")
    assert not any(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))
