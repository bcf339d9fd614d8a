"""What every registered quantizer must do."""

from __future__ import annotations

import copy
import inspect
import json
import typing
from typing import Any

import pytest
import torch
from torch import nn

import distiller.quantization  # noqa: F401 - fills the registry
from distiller import interfaces
from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.errors import QuantizationError, UnknownNameError
from distiller.quantization.quantizer import Quantizer, rebuild_quantized
from distiller.registry import QUANTIZERS
from distiller.signatures import check_settings

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def settings_for(name: str, model: nn.Module) -> dict[str, Any]:
    """What the quantizer needs beside the model, if anything."""
    if name != "PostTrainLinearQuantizer":
        return {}
    with torch.no_grad():
        return {"model_activation_stats": collect_quant_stats(model, lambda model: model(IMAGES))}


@pytest.fixture(params=sorted(QUANTIZERS))
def name(request) -> str:
    return request.param


@pytest.fixture
def model(tiny_cnn) -> nn.Module:
    return tiny_cnn.eval()


@pytest.fixture
def quantizer(name, model) -> Any:
    return QUANTIZERS[name](model, **settings_for(name, model))


def test_keeps_the_interface(quantizer) -> None:
    assert isinstance(quantizer, Quantizer)
    for method, function in inspect.getmembers(interfaces.Quantizer, inspect.isfunction):
        if not method.startswith("_"):
            assert inspect.signature(function).parameters.keys() <= (
                {"self"} | inspect.signature(getattr(quantizer, method)).parameters.keys()
            )


def test_every_argument_has_a_type_that_a_schedule_can_be_checked_against(name) -> None:
    constructor = QUANTIZERS[name].__init__
    hints = typing.get_type_hints(constructor)
    assert set(inspect.signature(constructor).parameters) - {"self"} <= set(hints)


def test_its_own_settings_pass_that_check(name, quantizer) -> None:
    assert check_settings(QUANTIZERS[name], quantizer.settings()) == []


def test_prepares_a_model_once(quantizer) -> None:
    quantizer.prepare_model(IMAGES[:1])
    with pytest.raises(QuantizationError, match="the model is prepared already"):
        quantizer.prepare_model(IMAGES[:1])


def test_prepared_model_runs_and_quantizing_again_changes_nothing(quantizer, model) -> None:
    quantizer.prepare_model(IMAGES[:1])
    with torch.no_grad():
        before = model(IMAGES)
        assert before.shape == (4, 4)
        assert before.isfinite().all()
        quantizer.quantize_params()
        assert torch.equal(model(IMAGES), before)


def test_prepared_model_can_be_copied_and_rebuilt(quantizer, model, tiny_cnn) -> None:
    fresh = copy.deepcopy(tiny_cnn)
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    quantizer.prepare_model(IMAGES[:1])
    rebuild_quantized(fresh, quantizer.quantizer_metadata())
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(IMAGES)
        assert torch.equal(copy.deepcopy(model)(IMAGES), expected)
        assert torch.equal(fresh.eval()(IMAGES), expected)


def test_metadata_are_plain_data(quantizer) -> None:
    quantizer.prepare_model(IMAGES[:1])
    metadata = quantizer.quantizer_metadata()
    assert metadata["class"] in QUANTIZERS
    json.dumps(metadata)


def test_overrides_that_match_nothing_or_mean_nothing_are_refused(name, model) -> None:
    with pytest.raises(UnknownNameError, match=r"overrides: 'conv9' matches no layer of the model"):
        QUANTIZERS[name](model, overrides={"conv9": {}})
    with pytest.raises(QuantizationError, match=r"unknown key 'no_such_setting'"):
        QUANTIZERS[name](model, overrides={"conv1": {"no_such_setting": 1}})
