"""What the refinements bring: handwritten digits, a depthwise network, 4 bits and one scale for each weight."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.quantization.quantizer import rebuild_quantized
from distiller.quantization.refinement import (
    AdaRoundSettings,
    adaround,
    add_biases,
    correct_biases,
    equalize,
    float_twin,
    replace_relu6s,
)
from tests.quantization.refinement.networks import Depthwise, quantized

SETTINGS = AdaRoundSettings(iterations=300, samples=2048)


def images() -> tuple[Tensor, Tensor]:
    """All digits in random order, (n, 1, 8, 8) and their classes."""
    digits: Any = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1)
    return (x / 16 - 0.3) / 0.37, torch.tensor(digits.target)[order]


def trained(x: Tensor, y: Tensor) -> Any:
    """Depthwise after 8 epochs; then its channels scaled by e^-1 to e^1, which changes nothing it computes."""
    torch.manual_seed(0)
    model = Depthwise()
    steps = 8 * (len(x) // 64)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for step in range(steps):
        if step % (len(x) // 64) == 0:
            batches = torch.randperm(len(x))[: len(x) // 64 * 64].view(-1, 64)
        chosen = batches[step % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    layers: list[Any] = list(model.features)
    with torch.no_grad():
        for norm, following in zip(layers[1::3], layers[3::3], strict=False):
            factors = torch.exp(2 * torch.rand(norm.num_features) - 1)
            norm.weight.mul_(factors)
            norm.bias.mul_(factors)
            shape = (-1, 1, 1, 1) if following.groups > 1 else (1, -1, 1, 1)
            following.weight.div_(factors.view(shape))
    return model.eval()


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Tensor, Tensor, Tensor]:
    """The network in full precision, calibration images, test images and classes."""
    x, y = images()
    with torch.random.fork_rng():
        model = trained(x[:1200], y[:1200])
    return model, x[:256], x[1200:], y[1200:]


def accuracy_and_loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    with torch.no_grad():
        output = model(x)
    return (output.argmax(1) == y).float().mean().item(), F.cross_entropy(output, y).item()


def test_every_refinement_recovers_what_four_bits_lose(digits) -> None:
    model, calibration, x, y = digits
    batches = list(calibration.split(128))

    twin = float_twin(model, calibration[:1])
    equal = copy.deepcopy(twin)
    assert len(equalize(equal, calibration[:1]).pairs) == 5
    results = {"float": accuracy_and_loss(twin, x, y), "equalized float": accuracy_and_loss(equal, x, y)}
    for start, base in (("", twin), ("equalized ", equal)):
        for name in ("nearest", "bias", "rounding", "all"):
            q = quantized(base, calibration)
            if name in ("rounding", "all"):
                adaround(base, q, batches, SETTINGS)
            if name in ("bias", "all"):
                correct_biases(base, q, batches)
            results[start + name] = accuracy_and_loss(q, x, y)

    accuracy = {name: value for name, (value, _) in results.items()}
    loss = {name: value for name, (_, value) in results.items()}
    assert accuracy["float"] > 0.94
    assert loss["equalized float"] == pytest.approx(loss["float"], rel=1e-4)
    assert accuracy["nearest"] < accuracy["float"] - 0.3
    assert accuracy["bias"] > accuracy["nearest"] + 0.15
    assert accuracy["rounding"] > accuracy["bias"] + 0.03
    assert accuracy["equalized nearest"] > accuracy["nearest"] + 0.3
    assert accuracy["equalized bias"] > accuracy["float"] - 0.03
    assert accuracy["equalized rounding"] > accuracy["float"] - 0.02
    assert accuracy["equalized all"] > accuracy["float"] - 0.02
    gained = {name: 1 - (loss[name] - loss["float"]) / (loss["nearest"] - loss["float"]) for name in loss}
    assert gained["bias"] > 0.4
    assert gained["rounding"] > 0.7
    assert gained["equalized nearest"] > 0.85
    assert gained["equalized all"] > 0.95


def test_scales_chosen_by_the_outputs_help_the_rounding(digits) -> None:
    model, calibration, x, y = digits
    twin = float_twin(model, calibration[:1])
    losses = {}
    for scales in ("kept", "weights", "outputs"):
        q = quantized(twin, calibration)
        adaround(twin, q, [calibration], dataclasses.replace(SETTINGS, scales=scales))
        losses[scales] = accuracy_and_loss(q, x, y)[1] - accuracy_and_loss(twin, x, y)[1]
    assert losses["outputs"] < 0.75 * losses["weights"]
    assert losses["outputs"] < 0.7 * losses["kept"]


def test_a_refined_model_is_built_again_from_its_description(digits) -> None:
    model, calibration, x, _ = digits
    model = copy.deepcopy(model)
    for index in (2, 5, 8, 11, 14):
        model.features[index] = nn.ReLU6()
    model.fc.bias = None
    twin = float_twin(model, calibration[:1])
    equalization = equalize(twin, calibration[:1], replace_relu6=True, absorb_bias=True)
    assert len(equalization.replaced_relu6s) == 5
    refined = quantized(twin, calibration)
    adaround(twin, refined, [calibration], AdaRoundSettings(iterations=10, samples=64))
    correction = correct_biases(twin, refined, [calibration])
    assert {*equalization.new_biases, *correction.new_biases} == {"fc"}

    again = copy.deepcopy(model)
    replace_relu6s(again, equalization.replaced_relu6s)
    add_biases(again, [*equalization.new_biases, *correction.new_biases])
    rebuild_quantized(again, refined.quantizer_metadata)
    again.load_state_dict(refined.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), refined(x))
