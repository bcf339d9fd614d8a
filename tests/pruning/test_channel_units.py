from __future__ import annotations

import pytest
import torch

from distiller.channel_groups import find_channel_groups
from distiller.errors import DistillerError
from distiller.pruning.channel_units import unit_l1_norms, unit_masks


@pytest.fixture
def groups(tiny_cnn):
    return find_channel_groups(tiny_cnn, torch.zeros(1, 1, 8, 8))


def test_a_unit_is_masked_in_every_parameter_that_has_a_share_of_it(tiny_cnn, groups):
    params = dict(tiny_cnn.named_parameters())
    masks = unit_masks(params, groups, {"conv1.weight": [1], "conv2.weight": [0, 5]})
    assert set(masks) == {
        "conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "conv2.bias", "fc.weight",
    }  # fmt: skip
    assert masks["bn1.bias"].tolist() == [1, 0, 1, 1]
    conv2 = torch.ones(6, 4, 3, 3)
    conv2[:, 1], conv2[0], conv2[5] = 0, 0, 0
    assert torch.equal(masks["conv2.weight"], conv2)
    assert all(masks[name].shape == params[name].shape for name in masks)


def test_no_units_no_masks(tiny_cnn, groups):
    assert unit_masks(dict(tiny_cnn.named_parameters()), groups, {"conv1.weight": []}) == {}


def test_l1_norms_are_of_the_filters(tiny_cnn, groups):
    params = dict(tiny_cnn.named_parameters())
    norms = unit_l1_norms(params, groups["conv2.weight"])
    expected = torch.tensor([params["conv2.weight"][i].abs().sum().item() for i in range(6)])
    torch.testing.assert_close(norms.float(), expected)


def test_l1_norms_of_coupled_layers_add_up():
    from torch import nn

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.head(self.a(x) + self.b(x)).flatten(1)

    model = Sum()
    params = dict(model.named_parameters())
    with torch.no_grad():
        params["a.weight"].copy_(torch.tensor([1.0, -2.0, 3.0]).reshape(3, 1, 1, 1))
        params["b.weight"].copy_(torch.tensor([10.0, 20.0, -30.0]).reshape(3, 1, 1, 1))
    groups = find_channel_groups(model, torch.zeros(1, 1, 4, 4))
    assert unit_l1_norms(params, groups["a.weight"]).tolist() == [11, 22, 33]


def test_nan_has_no_norm(tiny_cnn, groups):
    with torch.no_grad():
        tiny_cnn.conv1.weight[0] = float("nan")
    with pytest.raises(DistillerError, match="NaN"):
        unit_l1_norms(dict(tiny_cnn.named_parameters()), groups["conv1.weight"])
