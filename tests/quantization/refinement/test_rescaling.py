"""Weights at their best scales."""

from __future__ import annotations

import pytest
import torch

from distiller.quantization.refinement.float_twin import float_twin
from distiller.quantization.refinement.rescaling import rescale_weights
from distiller.quantization.refinement.weight_scales import mse_scale
from tests.quantization.refinement.networks import Depthwise, calibrated, quantized, wrappers


@pytest.mark.parametrize("per_channel", [False, True])
def test_every_weight_gets_nearer(per_channel) -> None:
    x = torch.randn(32, 1, 8, 8)
    twin = float_twin(calibrated(Depthwise(4), x), x[:1])
    q = quantized(twin, x, per_channel_wts=per_channel)
    errors = {
        name: (wrapper.wrapped_module.weight - twin.get_submodule(name).weight).square().mean().item()
        for name, wrapper in wrappers(q).items()
    }
    report = rescale_weights(twin, q)
    assert [layer.name for layer in report] == list(errors)
    for layer in report:
        wrapper, weight = wrappers(q)[layer.name], twin.get_parameter(f"{layer.name}.weight")
        assert layer.error_before == pytest.approx(errors[layer.name])
        assert layer.error_after == pytest.approx(
            (wrapper.wrapped_module.weight - weight).square().mean().item()
        )
        assert layer.error_after <= layer.error_before
        settings = wrapper.wts_quant_settings
        scale, _ = mse_scale(weight, settings.num_bits, settings.quant_mode, per_channel)
        assert torch.equal(wrapper.weight_scale, scale)
    assert sum(layer.error_after for layer in report) < 0.95 * sum(layer.error_before for layer in report)
