"""Equalized models compute the same, and their ranges are equal."""

from __future__ import annotations

import copy
import re
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from distiller.errors import QuantizationError, UsageError
from distiller.quantization.refinement.channel_scaling import ChannelMagnitudes
from distiller.quantization.refinement.equalization import equalize, equalizing_scales
from tests.quantization.networks import DistillersResNet18
from tests.quantization.refinement.networks import Depthwise, calibrated


def relative(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = model(x)
        return ((other(x) - expected).abs().max() / expected.abs().max()).item()


def unbalanced(model: Any) -> Any:
    """Filters of very different size."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
                size = torch.exp(2 * torch.randn(layer.weight.shape[0]))
                layer.weight.mul_(size.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    return model


def test_two_layers_meet_at_the_geometric_mean() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[8.0, 1.0], [0.5, -0.125]]))
        model[0].bias.copy_(torch.tensor([4.0, 1.0]))
        model[2].weight.copy_(torch.tensor([[0.5, -8.0]]))
    report = equalize(model, torch.randn(1, 2))
    # r1 = 8, 0.5; r2 = 0.5, 8: s = 4, 1/4; both ranges become 2
    assert report.pairs[0].scales.tolist() == [4.0, 0.25]
    assert model[0].weight.tolist() == [[2.0, 0.25], [2.0, -0.5]]
    assert model[0].bias.tolist() == [1.0, 4.0]
    assert model[2].weight.tolist() == [[2.0, -2.0]]
    assert (report.pairs[0].first, report.pairs[0].second, report.pairs[0].through) == ("0", "2", ("1",))
    assert report.left == {"2": "the model returns its output"}
    assert (report.sweeps, report.converged) == (2, True)


class Kinds(nn.Module):
    """A chain of many kinds of layers and of what may stand between them."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Conv1d(8, 8, 3, groups=8),
            nn.PReLU(8),
            nn.Conv1d(8, 12, 3, groups=4, padding=1),
            nn.LeakyReLU(0.2),
            nn.MaxPool1d(2, padding=1),
            nn.ConvTranspose1d(12, 6, 2, stride=2, groups=3),
            nn.AvgPool1d(2),
            nn.Unflatten(2, (3, 2)),
        )
        self.flat = nn.Sequential(
            nn.Conv2d(6, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(10, 6), nn.Linear(6, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.chain(x))


def test_all_kinds_of_layers_compute_the_same() -> None:
    model = unbalanced(Kinds()).eval()
    nn.init.uniform_(model.chain[1].running_var, 0.1, 4)
    twin = copy.deepcopy(model)
    report = equalize(twin, torch.randn(1, 3, 12))
    assert [(pair.first, pair.second) for pair in report.pairs] == [
        ("chain.0", "chain.3"),
        ("chain.3", "chain.5"),
        ("chain.5", "chain.8"),
        ("chain.8", "flat.0"),
        ("flat.0", "flat.3"),
        ("flat.3", "flat.4"),
    ]
    assert report.converged
    assert relative(model, twin, torch.randn(16, 3, 12)) < 1e-5
    assert max(pair.scales.max().item() for pair in report.pairs) > 2


def test_ranges_of_a_pair_are_equal_in_the_end() -> None:
    model = unbalanced(Kinds()).eval()
    report = equalize(model, torch.randn(1, 3, 12), tolerance=1e-6)
    blocks = {"flat.3": 2}
    for pair in report.pairs:
        first: Any = model.get_submodule(pair.first)
        second: Any = model.get_submodule(pair.second)
        out = ChannelMagnitudes(first.weight, first, blocks.get(pair.first, 1)).output_ranges()
        into = ChannelMagnitudes(second.weight, second, blocks.get(pair.second, 1)).input_ranges()
        torch.testing.assert_close(out, into, rtol=1e-4, atol=0)


@hypothesis.given(st.integers(0, 10_000))
@hypothesis.settings(max_examples=5, deadline=None)
def test_a_depthwise_network_computes_the_same(seed) -> None:
    torch.manual_seed(seed)
    x = torch.randn(16, 1, 8, 8)
    model = calibrated(unbalanced(Depthwise(6)), x)
    twin = copy.deepcopy(model)
    assert len(equalize(twin, x[:1]).pairs) == 5
    assert relative(model, twin, x) < 1e-5


def test_residual_blocks_are_equalized_inside() -> None:
    x = torch.randn(16, 3, 64, 64)
    model = calibrated(unbalanced(DistillersResNet18()), x)
    twin = copy.deepcopy(model)
    report = equalize(twin, x[:1])
    assert [(pair.first, pair.second) for pair in report.pairs] == [
        (f"layer{layer}.{block}.conv1", f"layer{layer}.{block}.conv2")
        for layer in range(1, 5)
        for block in (0, 1)
    ]
    assert report.left["layer1.0.conv2"] == "'layer1.0.add' (Add) puts it together with something else"
    assert relative(model, twin, x) < 1e-5


def test_weights_are_parameters_that_others_do_not_hold() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3)).double()
    model[0].weight.requires_grad_(False)
    before = [layer.weight for layer in model]
    values = [weight.detach().clone() for weight in before]
    equalize(model, torch.randn(1, 3).double())
    assert all(torch.equal(weight, value) for weight, value in zip(before, values, strict=True))
    assert [layer.weight.requires_grad for layer in model] == [False, True]
    assert all(layer.weight.dtype == torch.float64 for layer in model)
    assert model[0].bias is None


def test_pruned_weights_stay_zero_and_empty_channels_stay_as_they_are() -> None:
    model = unbalanced(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
        model[0].weight[0, 0] = 0
    twin = copy.deepcopy(model)
    report = equalize(twin, torch.randn(1, 2, 5, 5))
    assert report.pairs[0].scales[[1, 2]].tolist() == [1, 1]
    assert torch.equal(twin[0].weight == 0, model[0].weight == 0)
    assert relative(model, twin, torch.randn(4, 2, 5, 5)) < 1e-5


def test_a_channel_of_no_consequence_is_not_blown_up() -> None:
    first, second = torch.tensor([1.0, 1e-9, 1.0]).double(), torch.tensor([1.0, 1.0, 1e-9]).double()
    # r1 r2 = 1, 1e-9, 1e-9: the second would be multiplied by 30,000, and its bias with it
    assert equalizing_scales(first, second).tolist() == pytest.approx([1, 1, 1e9**0.5])


def test_relu6_is_replaced_only_when_asked() -> None:
    x = torch.randn(8, 3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 2, 1), nn.ReLU6()).eval()
    untouched = copy.deepcopy(model)
    report = equalize(untouched, x)
    assert (report.pairs, report.replaced_relu6s, report.sweeps, report.converged) == ((), (), 0, True)
    assert relative(model, untouched, x) == 0
    twin = copy.deepcopy(model)
    report = equalize(twin, x, replace_relu6=True)
    assert report.replaced_relu6s == ("1",)
    assert [type(layer).__name__ for layer in twin] == ["Conv2d", "ReLU", "Conv2d", "ReLU6"]
    assert relative(model, twin, x) < 1e-5  # nothing was above 6


def test_too_few_sweeps_are_told() -> None:
    model = unbalanced(Kinds()).eval()
    twin = copy.deepcopy(model)
    report = equalize(twin, torch.randn(1, 3, 12), max_sweeps=1)
    assert (report.sweeps, report.converged) == (1, False)
    assert relative(model, twin, torch.randn(4, 3, 12)) < 1e-5


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"^1: its weight is not finite; training has diverged$"):
        equalize(model, torch.randn(1, 2))


def test_settings_out_of_range_are_refused() -> None:
    text = "equalize: tolerance must be > 0 and max_sweeps at least 1, got 0 and 5"
    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        equalize(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2), tolerance=0, max_sweeps=5)
