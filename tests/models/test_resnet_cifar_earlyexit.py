import pytest
import torch

from distiller.early_exit import exit_names, exit_places, exits_of, stored_exits
from distiller.models import create_model


def test_the_layers_are_those_of_the_network_without_exits():
    plain, model = (
        create_model(False, "cifar10", name) for name in ("resnet20_cifar", "resnet20_cifar_earlyexit")
    )
    theirs = {name: tuple(x.shape) for name, x in plain.state_dict().items()}
    ours = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert {name: ours[name] for name in theirs} == theirs
    assert {name: ours[name] for name in ours.keys() - theirs.keys()} == {
        "layer1.2.relu2.branch_net.2.weight": (10, 1600),
        "layer1.2.relu2.branch_net.2.bias": (10,),
    }
    assert exit_names(model) == ("layer1.2.relu2",)


@pytest.mark.parametrize("dataset, features", [("cifar10", 1600), ("fashion-mnist", 1296), ("digits", 64)])
def test_the_exit_fits_the_size_of_the_images(dataset, features):
    model = create_model(False, dataset, "resnet20_cifar_earlyexit")
    assert exits_of(model)[0].branch_net[2].in_features == features
    exit_1, final = model.train()(torch.randn(2, *model.input_shape[1:]))
    assert exit_1.shape == final.shape == (2, 10)


def test_the_place_of_the_exit_is_one():
    assert "layer1.2.relu2" in exit_places(create_model(False, "digits", "resnet20_cifar")).good


def test_the_code_has_the_exits_and_not_the_checkpoint():
    assert stored_exits(create_model(False, "cifar10", "resnet32_cifar_earlyexit")) == []


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110, 1202])
def test_there_is_one_of_each_depth(depth):
    with torch.device("meta"):
        model = create_model(False, "cifar10", f"resnet{depth}_cifar_earlyexit")
    assert len(model.layer1) == (depth - 2) // 6
    assert len(exits_of(model)) == 1
