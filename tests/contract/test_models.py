"""What every registered model must do, on data of any shape; a few of torchvision's among them."""

import pytest
import torch

from distiller.branch_points import final_output
from distiller.dataset_facts import DATASET_FACTS
from distiller.models import create_model, find_spec, input_shape_for
from distiller.names import canonical, named_parameters
from distiller.registry import MODELS

# Minutes for its 1202 layers, which are those of resnet110_cifar_earlyexit: its own test counts them.
ARCHS = [*sorted(set(MODELS) - {"resnet1202_cifar_earlyexit"}), "resnet18", "mobilenet_v2", "squeezenet1_1"]
# ImageNet's models scale 8x8 images to 224x224: too slow here, and the same path as their native size.
CASES = [
    (arch, dataset)
    for arch in ARCHS
    for dataset in ("mnist", "cifar10", "digits")
    if dataset != "digits" or find_spec(arch).dataset != "imagenet"
]
# Tens of millions of weights: shapes and names are checked on the meta device, which computes nothing.
LARGE = (
    "alexnet_bn",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "resnet50_earlyexit",
)
# Of those that differ in the number of blocks only, one of each kind of block has its values checked.
SAME_CODE = {
    "preact_resnet34": "preact_resnet18",
    "preact_resnet101": "preact_resnet50",
    "preact_resnet152": "preact_resnet50",
} | {f"resnet{depth}_cifar_earlyexit": "resnet20_cifar_earlyexit" for depth in (32, 44, 56, 110)}
WITH_VALUES = [
    pytest.param(arch, marks=pytest.mark.skip(reason=f"slow, and the code of {SAME_CODE[arch]}"))
    if arch in SAME_CODE
    else arch
    for arch in ARCHS
]


def device_for(arch):
    return torch.device("meta" if arch in LARGE else "cpu")


@pytest.mark.parametrize(("arch", "dataset"), CASES)
def test_model_gives_a_score_for_each_class(arch, dataset):
    facts = DATASET_FACTS[dataset]
    shape = input_shape_for(arch, facts.channels, facts.size)
    with torch.no_grad(), device_for(arch):
        model = create_model(False, dataset, arch)
        assert model.input_shape == (1, *shape)
        assert final_output(model.train()(torch.randn(2, *shape))).shape == (2, facts.num_classes)
        assert model.eval()(torch.randn(2, *shape)).shape == (2, facts.num_classes)


@pytest.mark.parametrize("arch", WITH_VALUES)
def test_state_round_trips_into_a_second_model(arch):
    first, second = (create_model(False, "cifar10", arch).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, *first.input_shape[2:])
    with torch.no_grad():
        assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_name_is_canonical(arch):
    with device_for(arch):
        model = create_model(False, "cifar10", arch)
    raw = [name for name, _ in model.named_parameters()]
    assert raw == [name for name, _ in named_parameters(model)] == [canonical(name, model) for name in raw]


@pytest.mark.parametrize("arch", WITH_VALUES)
def test_weights_depend_on_the_seed_alone(arch):
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(create_model(False, "mnist", arch).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
