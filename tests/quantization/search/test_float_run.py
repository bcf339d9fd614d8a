from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.quantization.search.float_run import ValueSample, in_float, sampled_inputs, with_weight
from distiller.quantization.search.grids import own_quantizers, quantized_layers


def outputs(model, digits):
    with torch.no_grad():
        return model(digits[0])


def test_within_the_block_the_model_is_in_floating_point_and_afterwards_as_before(
    prepared, network, digits, dummy
):
    layers = quantized_layers(prepared.model, dummy)
    before = outputs(prepared.model, digits)
    with in_float(layers):
        inside = outputs(prepared.model, digits)
    torch.testing.assert_close(inside, outputs(network, digits), rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(prepared.model, digits), before)
    assert not torch.allclose(inside, before, atol=1e-2)


def test_an_error_in_the_block_leaves_nothing_behind(prepared, digits, dummy):
    layers = quantized_layers(prepared.model, dummy)
    before = outputs(prepared.model, digits)
    with pytest.raises(KeyboardInterrupt), in_float(layers):
        raise KeyboardInterrupt
    assert torch.equal(outputs(prepared.model, digits), before)


def test_one_layers_activations_can_be_quantized_alone(prepared, network, digits, dummy):
    layers = quantized_layers(prepared.model, dummy)
    quantizer = own_quantizers(layers["fc"])["output"]
    with in_float(layers, [quantizer]):
        found = outputs(prepared.model, digits)
    expected = quantizer(outputs(network, digits))
    # float32 sums differ with batch norms folded: a value at the border between two levels may go either way
    assert ((found - expected).abs() > 1e-4).float().mean() < 0.01


def test_one_layers_weight_can_be_another(digits):
    layer = nn.Linear(2, 2)
    before = layer.weight
    with with_weight(layer, torch.eye(2)):
        assert layer.weight.tolist() == [[1, 0], [0, 1]]
    assert layer.weight is before


def test_small_samples_are_all_values_behind_the_relu(prepared, network, digits, dummy):
    layers = quantized_layers(prepared.model, dummy)
    quantizers = {name: own_quantizers(layers[name])["output"] for name in ("conv1", "fc")}
    with in_float(layers):
        samples = sampled_inputs(quantizers, lambda: outputs(prepared.model, digits))
    logits = outputs(network, digits)
    torch.testing.assert_close(samples["fc"], logits.flatten(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        features = network.relu1(network.bn1(network.conv1(digits[0]))).flatten()
    assert samples["conv1"].min() == 0
    torch.testing.assert_close(samples["conv1"].mean(), features.mean(), rtol=1e-2, atol=1e-3)


def test_a_sample_is_bounded_uniform_and_always_the_same():
    stream = [torch.full((1000,), float(i)) for i in range(50)] + [torch.full((7,), 50.0)]
    samples = []
    for _ in range(2):
        sample = ValueSample(2000)
        for x in stream:
            sample.add(x)
        samples.append(sample.values)
    assert 500 <= len(samples[0]) <= 2000
    assert torch.equal(samples[0], samples[1])
    assert abs(float(samples[0].mean()) - 24.5) < 1.5
    assert len(samples[0].unique()) >= 40


def test_one_tensor_larger_than_the_sample_is_sampled():
    sample = ValueSample(100)
    sample.add(torch.arange(10_000.0))
    sample.add(torch.empty(0))
    assert 25 <= len(sample.values) <= 100
    assert sample.values.max() > 5000 > sample.values.min()
