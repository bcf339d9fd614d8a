"""Means of a quantized model after its biases were corrected."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError, UsageError
from distiller.quantization.refinement.bias_correction import correct_biases
from distiller.quantization.refinement.float_twin import float_twin
from tests.quantization.refinement.networks import Depthwise, calibrated, distance, quantized, wrappers


@pytest.fixture
def x() -> Tensor:
    return torch.randn(48, 1, 8, 8) + 0.5


@pytest.fixture
def twin(x) -> Any:
    return float_twin(calibrated(Depthwise(6), x), x[:1])


def means(model: nn.Module, layers: list[str], x: Tensor) -> dict[str, Tensor]:
    """Of the outputs of (the convolution or linear layer in) each layer, before its output is quantized."""
    seen: dict[str, Tensor] = {}
    for name in layers:
        layer = model.get_submodule(name)
        inner = getattr(layer, "wrapped_module", layer)
        inner.register_forward_hook(
            lambda _module, _x, y, name=name: seen.update({name: y.mean([0, *range(2, y.dim())])})
        )
    with torch.no_grad():
        model(x)
    return seen


def test_the_mean_of_every_channel_is_that_of_the_float_model(twin, x) -> None:
    q = quantized(twin, x, bits=3)
    off = copy.deepcopy(q)
    report = correct_biases(twin, q, [x[:10], x[10:]])  # a small batch counts for less
    names = [layer.name for layer in report.layers]
    assert names == ["features.0", "features.3", "features.6", "features.9", "features.12", "fc"]
    wanted, before, after = means(copy.deepcopy(twin), names, x), means(off, names, x), means(q, names, x)
    for name, wrapper in wrappers(q).items():
        step = wrapper.accum_scale().max().item()
        assert (after[name] - wanted[name]).abs().max() <= step / 2 + 1e-4
        assert (before[name] - wanted[name]).abs().max() > 0.01
    assert distance(twin, q, x) < 0.7 * distance(twin, off, x)
    assert report.skipped == {}
    assert report.new_biases == ()


def test_the_correction_of_one_layer_is_the_difference_of_means_before(twin, x) -> None:
    q = quantized(twin, x, bits=3)
    first = next(iter(wrappers(q)))
    wanted, before = means(copy.deepcopy(twin), [first], x), means(copy.deepcopy(q), [first], x)
    report = correct_biases(twin, q, [x])
    torch.testing.assert_close(
        report.layers[0].correction.float(), wanted[first] - before[first], atol=1e-5, rtol=1e-5
    )


def test_a_linear_layer_by_hand() -> None:
    # Weights 0.4, -0.4 on a grid of 2 bits over [-1, 1] (steps of 1): they become 0. The mean of x is (1, 3).
    model: Any = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.4, -0.4]]))
    x = torch.tensor([[0.0, 2.0], [2.0, 4.0]])
    q = quantized(model, x, bits=2, bits_activations=None, weights_mode="SYMMETRIC_RESTRICTED")
    wrapper = wrappers(q)["0"]
    wrapper.wrapped_module.weight.data.zero_()
    report = correct_biases(model, q, [x])
    assert wrapper.wrapped_module.bias.tolist() == pytest.approx([0.4 * 1 - 0.4 * 3])
    assert report.new_biases == ("0",)


@pytest.mark.parametrize(
    "settings", [{"dynamic": True}, {"per_channel_wts": True}, {"bits_activations": None}]
)
def test_other_kinds_of_quantization_are_corrected_too(twin, x, settings) -> None:
    q = quantized(twin, x, bits=3, **settings)
    off = copy.deepcopy(q)
    correct_biases(twin, q, [x])
    names = list(wrappers(q))
    wanted, after, before = means(copy.deepcopy(twin), names, x), means(q, names, x), means(off, names, x)
    for name in names:
        assert (after[name] - wanted[name]).abs().max() < 0.02
    assert max((before[name] - wanted[name]).abs().max().item() for name in names) > 0.05


class Recurrent(nn.Module):
    """One layer called three times, on sequences, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.idle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.step(x)
        return self.last(x)


@pytest.mark.filterwarnings("ignore:not quantized")
def test_calls_of_one_layer_are_taken_together() -> None:
    model, x = Recurrent().eval(), torch.randn(20, 5, 4)
    q = quantized(model, x, bits=3, bits_activations=None)
    report = correct_biases(model, q, [x])
    assert [layer.name for layer in report.layers] == ["step", "last"]
    outputs: dict[str, list[Tensor]] = {"float": [], "before": []}
    for key, other in (("float", model), ("before", quantized(model, x, bits=3, bits_activations=None))):
        step = other.get_submodule("step")
        step.register_forward_hook(lambda _m, _x, y, key=key: outputs[key].append(y))
        with torch.no_grad():
            other(x)
    expected = torch.stack(outputs["float"]).mean((0, 1, 2)) - torch.stack(outputs["before"]).mean((0, 1, 2))
    torch.testing.assert_close(report.layers[0].correction.float(), expected, atol=1e-5, rtol=1e-4)


def test_a_layer_that_is_not_called_is_skipped() -> None:
    model, x = Recurrent().eval(), torch.randn(20, 5, 4)
    with pytest.warns(UserWarning, match="idle"):
        q = quantized(model, x, bits_activations=8)
    report = correct_biases(model, q, [x])
    assert [layer.name for layer in report.layers] == ["step", "last"]


def test_later_layers_are_not_run_for_earlier_ones(twin, x) -> None:
    q = quantized(twin, x)
    runs: list[str] = []
    for name, wrapper in wrappers(q).items():
        wrapper.register_forward_pre_hook(lambda _m, _x, name=name: runs.append(name))
    correct_biases(twin, q, [x])
    names = list(wrappers(q))
    assert runs == [earlier for index in range(len(names)) for earlier in names[: index + 1]]


def test_modes_of_the_models_and_the_float_model_stay(twin, x) -> None:
    q = quantized(twin, x)
    twin.train()
    before = copy.deepcopy(twin.state_dict())
    correct_biases(twin, q, lambda: [x])
    assert twin.training
    assert not q.training
    assert all(torch.equal(before[name], value) for name, value in twin.state_dict().items())
    assert not any(module._forward_hooks for model in (twin, q) for module in model.modules())


def test_outputs_that_are_not_finite_are_refused(twin, x) -> None:
    q = quantized(twin, x)
    x = x.clone()
    x[0] = float("nan")
    text = "features.0: its outputs for the batches are not finite; check the inputs"
    with pytest.raises(QuantizationError, match=f"^{re.escape(text)}$"):
        correct_biases(twin, q, [x])


def test_no_batches_are_refused(twin, x) -> None:
    with pytest.raises(UsageError, match="^batches: there are none"):
        correct_biases(twin, quantized(twin, x), [])
