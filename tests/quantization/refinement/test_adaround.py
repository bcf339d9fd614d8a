"""Rounding a whole model anew."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError, UsageError
from distiller.quantization.ptq_layers import filters_first
from distiller.quantization.refinement.adaround import AdaRoundReport, adaround
from distiller.quantization.refinement.adaround_settings import AdaRoundSettings
from distiller.quantization.refinement.float_twin import float_twin
from tests.quantization.refinement.networks import Depthwise, calibrated, distance, quantized, wrappers

SETTINGS = AdaRoundSettings(iterations=120, samples=512, batch_size=64)
NAMES = ["features.0", "features.3", "features.6", "features.9", "features.12", "fc"]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(48, 1, 8, 8)


@pytest.fixture
def twin(x) -> Any:
    return float_twin(calibrated(Depthwise(4), x), x[:1])


def is_on_grid(wrapper: Any) -> bool:
    rows = filters_first(wrapper.wrapped_module.weight.detach(), wrapper.wrapped_module).flatten(1)
    levels = rows / wrapper.weight_scale.reshape(-1, 1)
    shifted = levels.round() + wrapper.weight_zero_point.reshape(-1, 1)
    qmin, qmax = wrapper.wts_quant_settings.qrange
    is_integer = bool((levels - levels.round()).abs().max() < 1e-3)
    return is_integer and bool(((shifted >= qmin) & (shifted <= qmax)).all())


@pytest.mark.parametrize(
    "mode", ["SYMMETRIC", "SYMMETRIC_RESTRICTED", "ASYMMETRIC_UNSIGNED", "ASYMMETRIC_SIGNED"]
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_outputs_get_nearer_on_the_same_grids(twin, x, mode, per_channel) -> None:
    q = quantized(twin, x, bits=3, weights_mode=mode, per_channel_wts=per_channel)
    before = copy.deepcopy(q)
    settings = AdaRoundSettings(iterations=60, samples=256, batch_size=64, scales="kept")
    report = adaround(twin, q, [x], settings)
    assert [layer.name for layer in report.layers] == NAMES
    assert all(layer.loss_after <= layer.loss_before for layer in report.layers)
    assert any(layer.changed > 0.1 for layer in report.layers)
    for name, wrapper in wrappers(q).items():
        old = wrappers(before)[name]
        assert torch.equal(wrapper.weight_scale, old.weight_scale)
        assert torch.equal(wrapper.weight_zero_point, old.weight_zero_point)
        assert is_on_grid(wrapper)
        weight = twin.get_submodule(name).weight
        step = wrapper.weight_scale.reshape(-1, *[1] * (weight.dim() - 1))
        inside = (old.wrapped_module.weight - weight).abs() <= step / 2 + 1e-6  # the others were clipped
        assert ((wrapper.wrapped_module.weight - weight).abs() <= step + 1e-6)[inside].all()
    assert distance(twin, q, x) < distance(twin, before, x)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("scales", ["weights", "outputs"])
def test_better_scales_come_first(twin, x, scales, per_channel) -> None:
    q = quantized(twin, x, bits=3, per_channel_wts=per_channel)
    before = copy.deepcopy(q)
    report = adaround(twin, q, [x], dataclasses.replace(SETTINGS, scales=scales))
    assert all(layer.loss_after <= layer.loss_before for layer in report.layers)
    changed = [
        name
        for name in NAMES
        if not torch.equal(wrappers(q)[name].weight_scale, wrappers(before)[name].weight_scale)
    ]
    assert changed
    assert all(is_on_grid(wrapper) for wrapper in wrappers(q).values())
    assert distance(twin, q, x) < 0.6 * distance(twin, before, x)


def test_losses_are_of_what_the_layer_reads_and_what_is_wanted_of_it(twin, x) -> None:
    """All samples are taken: the numbers are those of the whole batch, the ReLU behind the layers included."""
    q = quantized(twin, x, bits=3)
    settings = AdaRoundSettings(iterations=60, samples=10**6, batch_size=64)
    begun = copy.deepcopy(q)
    report = adaround(twin, q, [x[:20], x[20:]], settings)

    def output(model: nn.Module, name: str, x: Tensor) -> Tensor:
        """Behind the convolution and the ReLU, before it is quantized."""
        layer, seen = model.get_submodule(name), []
        handle = getattr(layer, "wrapped_module", layer).register_forward_hook(
            lambda _m, _x, y: seen.append(y.clone())
        )
        with torch.no_grad():
            model(x)
        handle.remove()
        return seen[0] if name == "fc" else seen[0].relu()

    for layer in report.layers:
        wanted = output(twin, layer.name, x)
        after = (output(q, layer.name, x) - wanted).square().mean().item()
        assert layer.loss_after == pytest.approx(after, rel=1e-3)
        before = copy.deepcopy(q)  # the layers before it are rounded already
        new, old = wrappers(before)[layer.name], wrappers(begun)[layer.name]
        new.wrapped_module.weight, new.wrapped_module.bias = (
            old.wrapped_module.weight,
            old.wrapped_module.bias,
        )
        assert layer.loss_before == pytest.approx(
            (output(before, layer.name, x) - wanted).square().mean().item(), rel=1e-3
        )


def test_a_stopped_run_is_resumed_to_the_same_result(twin, x) -> None:
    whole = quantized(twin, x, bits=3)
    saved: list[bytes] = []

    def save(report: AdaRoundReport, layers: int) -> None:
        assert layers == 6
        buffer = io.BytesIO()
        torch.save(report.state, buffer)
        saved.append(buffer.getvalue())

    expected = adaround(twin, whole, [x], SETTINGS, on_layer=save)
    assert len(saved) == 6
    resumed = quantized(twin, x, bits=3)
    done: list[str] = []
    state = torch.load(io.BytesIO(saved[2]), weights_only=True)
    report = adaround(
        twin,
        resumed,
        [x],
        SETTINGS,
        resume_from=state,
        on_layer=lambda report, _: done.append(report.layers[-1].name),
    )
    assert done == NAMES[3:]
    assert report.layers == expected.layers
    result = resumed.state_dict()
    assert all(torch.equal(result[name], value) for name, value in whole.state_dict().items())


def test_results_depend_on_the_seed_alone(twin, x) -> None:
    models = [quantized(twin, x, bits=3) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(int(torch.randint(100, ())))
        adaround(twin, model, [x], AdaRoundSettings(iterations=60, samples=256, batch_size=64, seed=seed))
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_layer_that_cannot_get_better_keeps_all_it_had() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4)).eval()
    x = torch.randn(30, 3)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[7.0, -7, 3], [1, 2, 3], [0, 0, 5], [-4, 0, 1]]) / 8)
    q = quantized(model, x, bits_activations=None, weights_mode="SYMMETRIC_RESTRICTED")
    before = copy.deepcopy(q.state_dict())
    report = adaround(model, q, [x], SETTINGS)
    assert report.layers[0].loss_after == report.layers[0].loss_before
    assert report.layers[0].changed == 0
    assert all(torch.equal(before[name], value) for name, value in q.state_dict().items())


def test_all_kinds_of_layers_get_nearer() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2),
        nn.ReLU(),
        nn.ConvTranspose1d(8, 8, 3, stride=2, groups=2),
        nn.Unflatten(2, (1, 17)),
        nn.Conv2d(8, 4, (1, 4), groups=2, bias=False),
        nn.Flatten(2),
        nn.Linear(14, 12),
        nn.Flatten(),
        nn.Linear(48, 3),
    ).eval()
    x = torch.randn(64, 3, 8)
    q = quantized(model, x, bits=3, bits_activations=None)
    before = copy.deepcopy(q)
    report = adaround(model, q, [x], SETTINGS)
    assert [layer.name for layer in report.layers] == ["0", "2", "4", "6", "8"]
    assert all(layer.loss_after < layer.loss_before for layer in report.layers)
    assert distance(model, q, x) < 0.6 * distance(model, before, x)
    assert q[4].wrapped_module.bias is None


@pytest.mark.parametrize("settings", [{"dynamic": True}, {"save_fp_weights": True}])
def test_other_kinds_of_quantization_get_nearer(twin, x, settings) -> None:
    q = quantized(twin, x, bits=3, **settings)
    before = distance(twin, q, x)
    with torch.inference_mode():
        adaround(twin, q, [x], SETTINGS)
    assert distance(twin, q, x) < 0.6 * before


def test_state_of_another_run_is_refused(twin, x) -> None:
    q = quantized(twin, x)
    state = adaround(twin, q, [x], AdaRoundSettings(iterations=1, samples=8)).state
    with pytest.raises(UsageError) as error:
        adaround(twin, q, [x], AdaRoundSettings(iterations=2, samples=8), resume_from=state)
    assert str(error.value) == (
        "resume_from: was made with iterations=1, now it is 2; use the same settings, or begin anew"
    )
    other = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(UsageError) as error:
        adaround(
            other,
            quantized(other, torch.randn(4, 3), bits_activations=None),
            [torch.randn(4, 3)],
            AdaRoundSettings(iterations=1, samples=8),
            resume_from=state,
        )
    assert str(error.value) == "resume_from: is of another model, its layer 'features.0' is not in this one"
    with pytest.raises(UsageError, match="^resume_from: must be the state of a report of adaround"):
        adaround(twin, q, [x], resume_from={"layers": {}})


def test_outputs_that_are_not_finite_are_refused(twin, x) -> None:
    q = quantized(twin, x)
    x = x.clone()
    x[0] = float("nan")
    text = "features.0: its outputs for the batches are not finite; check the inputs"
    with pytest.raises(QuantizationError, match=f"^{re.escape(text)}$"):
        adaround(twin, q, [x], SETTINGS)
