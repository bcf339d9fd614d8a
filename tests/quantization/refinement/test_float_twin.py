"""The float model beside the quantized one."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError
from distiller.quantization.refinement.float_twin import float_twin, layer_pairs
from tests.quantization.refinement.networks import Depthwise, calibrated, quantized

LAYERS = ["features.0", "features.3", "features.6", "features.9", "features.12", "fc"]


@pytest.fixture
def model() -> nn.Module:
    return calibrated(Depthwise(4), torch.randn(32, 1, 8, 8))


def test_the_twin_computes_the_same_without_batch_norms(model) -> None:
    x = torch.randn(4, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    twin = float_twin(model.train(), x[:1])
    assert not twin.training
    assert model.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in twin.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model.eval()(x), atol=1e-5, rtol=1e-5)


def test_layers_are_paired_by_name(model) -> None:
    x = torch.randn(4, 1, 8, 8)
    twin = float_twin(model, x[:1])
    pairs = layer_pairs(twin, quantized(twin, x))
    assert list(pairs) == LAYERS
    assert all(pair.float_layer.weight.shape == pair.layer.weight.shape for pair in pairs.values())
    assert [pair.has_relu for pair in pairs.values()] == [True] * 5 + [False]


def test_a_wrapped_model_is_looked_into(model) -> None:
    x = torch.randn(4, 1, 8, 8)
    twin = float_twin(nn.DataParallel(model), x[:1])
    assert list(layer_pairs(nn.DataParallel(twin), nn.DataParallel(quantized(twin, x)))) == LAYERS


def test_a_model_with_batch_norms_is_no_twin(model) -> None:
    x = torch.randn(4, 1, 8, 8)
    text = (
        "float_model: 'features.1' is a batch norm, which the quantized model has folded; "
        "make the model with float_twin(model, dummy_input)"
    )
    with pytest.raises(QuantizationError, match=f"^{re.escape(text)}$"):
        layer_pairs(model, quantized(model, x))


def test_another_model_is_no_twin(model) -> None:
    x = torch.randn(4, 1, 8, 8)
    twin = float_twin(model, x[:1])
    q = quantized(twin, x)
    remedy = "make modules of functional operations first (to_modules), if any, then the twin, and quantize a copy of it"
    twin.fc = nn.Conv2d(8, 10, 1)
    text = f"float_model: 'fc' is Linear in the quantized model, Conv2d there; {remedy}"
    with pytest.raises(QuantizationError, match=f"^{re.escape(text)}$"):
        layer_pairs(twin, q)
    twin.fc = nn.Linear(8, 11)
    text = (
        "float_model: the weight of 'fc' is (11, 8), in the quantized model (10, 8); "
        "quantize a copy of the float model"
    )
    with pytest.raises(QuantizationError, match=f"^{re.escape(text)}$"):
        layer_pairs(twin, q)
    del twin.fc
    with pytest.raises(
        QuantizationError, match="^float_model: 'fc' is Linear in the quantized model, no such layer;"
    ):
        layer_pairs(twin, q)


def test_a_model_that_is_not_quantized_is_refused(model) -> None:
    text = (
        "quantized_model: has no layer with a quantized weight; "
        "prepare it with PostTrainLinearQuantizer(model, ...).prepare_model(dummy_input)"
    )
    with pytest.raises(QuantizationError, match=f"^{re.escape(text)}$"):
        layer_pairs(model, model)
