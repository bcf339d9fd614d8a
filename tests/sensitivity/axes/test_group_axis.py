import copy
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distiller.errors import DistillerError
from distiller.macs import count_macs
from distiller.models import create_model
from distiller.replay import applied
from distiller.sensitivity.axes import AXES, AxisContext
from distiller.thinning import remove_filters
from tests.channel_groups.cutting import randomize


class Branches(nn.Module):
    """Branches that are concatenated, a depthwise convolution behind them, a norm without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 3, 8, 8)
        self.left = nn.Conv2d(3, 5, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.depthwise = nn.Conv2d(9, 9, 3, padding=1, groups=9)
        self.norm = nn.BatchNorm2d(9, affine=False)
        self.point = nn.Conv2d(9, 6, 1, bias=False)
        self.fc = nn.Linear(6 * 4, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        x = self.point(self.norm(self.depthwise(x)).relu()).relu()
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Square(nn.Module):
    """A layer whose filters and inputs are of one group, since they are added; a norm over it."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 5)
        self.stem = nn.Linear(5, 8)
        self.square = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(x + self.square(x).relu()))


def residual() -> nn.Module:
    return randomize(create_model(False, "cifar10", "resnet20_cifar"))


def plain() -> nn.Module:
    return create_model(False, "cifar10", "simplenet_cifar")


MODELS = {"residual": residual, "plain": plain, "branches": Branches, "square": Square}


@pytest.fixture(scope="module")
def resnet20() -> nn.Module:
    torch.manual_seed(0)
    return residual()


def macs_of(model: nn.Module) -> int:
    return sum(layer.macs for layer in count_macs(model, torch.zeros(model.input_shape)))


@pytest.mark.parametrize("build", MODELS.values(), ids=list(MODELS))
def test_a_variant_answers_as_the_thinned_network_and_its_note_counts_what_that_lacks(build):
    model = build().eval()
    x = torch.randn(2, *model.input_shape[1:])
    units = AXES["group"].units(model, ["*"], [0.3, 0.8], AxisContext())
    parameters, macs = sum(param.numel() for param in model.parameters()), macs_of(model)

    assert units
    for unit in (units[0], units[-1]):
        for level in unit.levels:
            with torch.no_grad(), applied(model, unit.make(level)):
                expected = model(x)
                thinned = copy.deepcopy(model)
            report = remove_filters(thinned, None, None, None, None)
            (before, after) = report.groups[unit.parameter]

            with torch.no_grad():
                torch.testing.assert_close(thinned(x), expected, rtol=1e-4, atol=1e-5)
            fewer_parameters = parameters - sum(param.numel() for param in thinned.parameters())
            fewer_macs = macs - macs_of(thinned)
            assert list(report.groups) == [unit.parameter]
            assert before - after == int(level * before)
            assert unit.note(level).startswith(f"{before - after} of {before} channels of ")
            assert unit.note(level).endswith(
                f": {fewer_parameters:,} parameters ({100 * fewer_parameters / parameters:.1f} %), "
                f"{fewer_macs:,} MACs ({100 * fewer_macs / macs:.1f} %)"
            )


def test_a_residual_network_has_curves_of_its_coupled_stages_and_of_each_block(resnet20):
    units = AXES["group"].units(resnet20, ["*"], [0.5], AxisContext())

    assert [unit.parameter for unit in units if ".conv1" not in unit.parameter] == [
        "conv1.weight",
        "layer2.0.conv2.weight",
        "layer3.0.conv2.weight",
    ]
    assert len(units) == 3 + 9
    assert re.fullmatch(
        r"8 of 16 channels of conv1, layer1\.0\.conv2, layer1\.1\.conv2, layer1\.2\.conv2: "
        r"[\d,]+ parameters \(\d+\.\d %\), [\d,]+ MACs \(\d+\.\d %\)",
        units[0].note(0.5),
    )


def test_a_group_is_swept_when_one_of_its_layers_is_named(resnet20):
    (unit,) = AXES["group"].units(resnet20, ["layer1.1.conv2.weight"], [0.5], AxisContext())

    assert unit.parameter == "conv1.weight"
    assert "layer1.1.conv2.weight" in unit.tensors


def test_the_least_channels_are_those_of_numpys_least_mean_magnitude_over_all_layers_that_make_them(resnet20):
    (unit,) = AXES["group"].units(resnet20, ["conv1.weight"], [0.5], AxisContext())
    makers = ["conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"]
    filters = [resnet20.get_submodule(name).weight.detach().double().numpy() for name in makers]
    every = np.concatenate([weight.reshape(16, -1) for weight in filters], axis=1)
    expected = np.sort(np.argsort(np.abs(every).mean(1), kind="stable")[:8])

    variant = unit.make(0.5)

    for name in makers:
        zero = (variant.tensors[f"{name}.weight"].flatten(1) == 0).all(1).nonzero().flatten()
        np.testing.assert_array_equal(zero.numpy(), expected)


def test_one_channel_of_a_group_stays_whatever_the_level_and_the_note_says_so():
    model = Branches()
    (unit,) = AXES["group"].units(model, ["left.weight"], [0.9, 1.0], AxisContext())

    kept = [
        int((unit.make(level).tensors["left.weight"].flatten(1) != 0).any(1).sum()) for level in (0.9, 1.0)
    ]

    assert kept == [1, 1]
    assert unit.note(0.9).startswith("4 of 5 channels of left, depthwise: ")
    assert unit.note(1.0).startswith("4 of 5 channels (one has to stay) of left, depthwise: ")


def test_a_level_of_less_than_one_channel_removes_nothing_and_says_so():
    (unit,) = AXES["group"].units(Branches(), ["left.weight"], [0.1], AxisContext())

    assert not unit.make(0.1).tensors
    assert unit.note(0.1) == ("0 of 5 channels of left, depthwise: 0 parameters (0.0 %), 0 MACs (0.0 %)")


def test_an_example_input_takes_the_place_of_the_models_own_shape():
    model = Branches()
    del model.input_shape

    units = AXES["group"].units(model, ["*"], [0.5], AxisContext(dummy_input=torch.zeros(1, 3, 8, 8)))

    assert [unit.parameter for unit in units] == ["left.weight", "right.weight", "point.weight"]
    with pytest.raises(DistillerError) as error:
        AXES["group"].units(model, ["*"], [0.5], AxisContext())
    assert str(error.value) == (
        "'sensitivity of channel groups' needs the shape of the model's input: set model.input_shape, "
        "as (1, 3, 32, 32)"
    )
