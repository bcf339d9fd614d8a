"""Which wrapper takes a layer's place, or why none does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distiller.modules import (
    BatchMatmul,
    Concat,
    EltwiseAdd,
    EltwiseDiv,
    EltwiseMult,
    EltwiseSub,
    Matmul,
    Mean,
    Stack,
)
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.clipping import ClipMode
from distiller.quantization.dataflow import LayerUse
from distiller.quantization.ptq_build import build_layer, kind_of, why_left_alone
from distiller.quantization.ptq_precision import FPWrapper
from distiller.quantization.ptq_prepare import LayerStats
from distiller.quantization.ptq_settings import LayerSettings, ModePair
from distiller.quantization.quantizer import QBits

ENTRY = {"min": -1.0, "max": 3.0, "avg_min": 0.0, "avg_max": 2.0, "mean": 0.5, "std": 1.0, "b": 0.7}
BEFORE = {**ENTRY, "mean": 0.2, "std": 2.0, "b": 1.5}
STATS = LayerStats({"x": {"inputs": {0: BEFORE, 1: BEFORE}, "output": ENTRY}}, "statistics")
MODES = ModePair(Mode.ASYMMETRIC_UNSIGNED, Mode.SYMMETRIC)
BOTH, WEIGHTS, ACTIVATIONS, NEITHER = QBits(8, 8, 32), QBits(None, 8, 32), QBits(8, None, 32), QBits()


def built(layer: nn.Module, bits: QBits, **settings: Any) -> Any:
    return build_layer(layer.eval(), "x", LayerSettings(bits, MODES, **settings), STATS, 32, False)


@pytest.mark.parametrize(
    ("layer", "bits", "wrapper"),
    [
        (nn.Conv2d(1, 1, 1), BOTH, "RangeLinearQuantParamLayerWrapper"),
        (nn.ConvTranspose1d(1, 1, 1), WEIGHTS, "RangeLinearQuantParamLayerWrapper"),
        (nn.Linear(1, 1), ACTIVATIONS, "RangeLinearFakeQuantWrapper"),
        (nn.Linear(1, 1), NEITHER, "NoneType"),
        (EltwiseAdd(), ACTIVATIONS, "RangeLinearQuantEltwiseAddWrapper"),
        (EltwiseMult(), ACTIVATIONS, "RangeLinearQuantEltwiseMultWrapper"),
        (Concat(), ACTIVATIONS, "RangeLinearQuantConcatWrapper"),
        (Matmul(), ACTIVATIONS, "RangeLinearQuantMatmulWrapper"),
        (BatchMatmul(), ACTIVATIONS, "RangeLinearQuantMatmulWrapper"),
        (EltwiseAdd(), NEITHER, "NoneType"),
        (nn.MaxPool2d(2), ACTIVATIONS, "RangeLinearFakeQuantWrapper"),
        (nn.MaxPool2d(2), NEITHER, "NoneType"),
        (Stack(), ACTIVATIONS, "RangeLinearQuantStackWrapper"),
        (EltwiseSub(), ACTIVATIONS, "RangeLinearQuantEltwiseSubWrapper"),
        (EltwiseDiv(), ACTIVATIONS, "RangeLinearFakeQuantWrapper"),
        (Mean(), ACTIVATIONS, "RangeLinearFakeQuantWrapper"),
        (nn.Embedding(3, 2), BOTH, "RangeLinearEmbeddingWrapper"),
        (nn.Embedding(3, 2), WEIGHTS, "RangeLinearEmbeddingWrapper"),
        (nn.Embedding(3, 2), ACTIVATIONS, "RangeLinearFakeQuantWrapper"),
        (nn.Embedding(3, 2), NEITHER, "NoneType"),
    ],
)
def test_wrapper_by_layer_and_bits(layer, bits, wrapper) -> None:
    assert type(built(layer, bits)).__name__ == wrapper


def test_a_layer_with_unquantized_weight_has_its_inputs_quantized() -> None:
    assert built(nn.Linear(1, 1), ACTIVATIONS).quantizes_inputs
    assert not built(nn.MaxPool2d(2), ACTIVATIONS).quantizes_inputs
    assert built(nn.MaxPool2d(2), ACTIVATIONS, quantize_inputs=True).quantizes_inputs


@pytest.mark.parametrize(
    ("clip", "range_end"), [(ClipMode.GAUSS, 4.2 * 2.0), (ClipMode.LAPLACE, 11.16 * 1.5)]
)
def test_relu_takes_half_of_the_distribution_before_it(clip, range_end) -> None:
    scale = built(nn.ReLU(), ACTIVATIONS, clip_acts=clip).output_quant.scale.item()
    assert scale == pytest.approx(range_end / 255)


def test_relu_takes_its_own_statistics_otherwise() -> None:
    scale = built(nn.ReLU(), ACTIVATIONS, clip_acts=ClipMode.AVG).output_quant.scale.item()
    assert scale == pytest.approx(2.0 / 255)


@pytest.mark.parametrize(
    ("layer", "use", "is_dynamic", "reason"),
    [
        (nn.Linear(1, 1), LayerUse(), False, None),
        (nn.Linear(1, 1), None, False, "the model does not call them in evaluation"),
        (nn.Linear(1, 1), LayerUse(returns_tensor=False), False, "they return something else"),
        (nn.LSTMCell(1, 1), LayerUse(), False, "layers of their kind cannot be quantized"),
        (nn.GRU(1, 1), LayerUse(returns_tensor=False), False, "layers of their kind cannot be quantized"),
        (nn.LSTM(1, 1), LayerUse(), False, "they are quantized piece by piece, after convert_model_to_"),
        (
            nn.MultiheadAttention(1, 1),
            LayerUse(),
            False,
            "they are quantized piece by piece, after to_modules",
        ),
        (
            nn.EmbeddingBag(1, 1),
            LayerUse(),
            False,
            "sums and means of a weight's rows are not on the weight's grid",
        ),
        (
            nn.Embedding(1, 1, max_norm=1.0),
            LayerUse(),
            False,
            "their max_norm changes the weight while they run",
        ),
        (nn.Embedding(1, 1), LayerUse(), True, None),
        (EltwiseAdd(), LayerUse(), False, None),
        (EltwiseAdd(), LayerUse(), True, "without statistics the scale of their output is not known"),
        (Matmul(), LayerUse(), True, None),
    ],
)
def test_reasons_to_leave_a_layer_alone(layer, use, is_dynamic, reason) -> None:
    found = why_left_alone(layer, use, is_dynamic)
    assert found == reason or (found is not None and reason is not None and found.startswith(reason))


def test_kinds_of_layers() -> None:
    layers = (nn.Conv3d(1, 1, 1), nn.Embedding(1, 1), Concat(), nn.ReLU(), nn.EmbeddingBag(1, 1))
    assert [kind_of(layer) for layer in layers] == ["param", "embedding", "elementwise", "other", "other"]


@pytest.mark.parametrize("bits", [BOTH, WEIGHTS, ACTIVATIONS, NEITHER])
@pytest.mark.parametrize(
    "layer", [nn.Linear(1, 1), nn.Embedding(1, 1), EltwiseAdd(), nn.LSTM(1, 1), nn.ReLU()]
)
def test_a_layer_in_another_floating_point_type_is_not_quantized(layer, bits) -> None:
    wrapper = built(layer, bits, fpq_module="bf16")
    assert type(wrapper) is FPWrapper
    assert wrapper.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "wrapper"),
    [
        (nn.Linear(1, 1), "RangeLinearQuantParamLayerWrapper"),
        (EltwiseMult(), "RangeLinearQuantEltwiseMultWrapper"),
        (nn.Tanh(), "RangeLinearFakeQuantWrapper"),
        (nn.Embedding(1, 1), "RangeLinearEmbeddingWrapper"),
    ],
)
def test_a_fake_layer_is_quantized_around_its_own_floating_point_type(layer, wrapper) -> None:
    found = built(layer, BOTH, fake=True, fpq_module=16, scale_approx_mult_bits=8)
    assert type(found).__name__ == wrapper
    assert (found.is_fake, found.precision, found.scale_approx_mult_bits) == (True, torch.float16, None)
    assert built(layer, BOTH, fake=True).precision is None


def test_a_module_that_keeps_the_grid_of_its_input_needs_no_statistics() -> None:
    settings = LayerSettings(ACTIVATIONS, MODES)
    wrapper: Any = build_layer(nn.MaxPool2d(2), "pool", settings, STATS, 32, False, keeps_grid=True)
    assert type(wrapper).__name__ == "RangeLinearFakeQuantWrapper"
    assert wrapper.output_quant is None
