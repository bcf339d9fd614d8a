"""Which wrapper takes a layer's place, or why none does."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from distiller.modules import BatchMatmul, Concat, EltwiseAdd, EltwiseMult, Matmul
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.clipping import ClipMode
from distiller.quantization.dataflow import LayerUse
from distiller.quantization.ptq_build import build_layer, kind_of, why_left_alone
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
        (nn.Embedding(3, 2), BOTH, "RangeLinearFakeQuantWrapper"),
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
        (EltwiseAdd(), LayerUse(), False, None),
        (EltwiseAdd(), LayerUse(), True, "without statistics the scale of their output is not known"),
        (Matmul(), LayerUse(), True, None),
    ],
)
def test_reasons_to_leave_a_layer_alone(layer, use, is_dynamic, reason) -> None:
    found = why_left_alone(layer, use, is_dynamic)
    assert found == reason or (found is not None and reason is not None and found.startswith(reason))


def test_kinds_of_layers() -> None:
    assert [kind_of(layer) for layer in (nn.Conv3d(1, 1, 1), Concat(), nn.ReLU())] == [
        "param",
        "elementwise",
        "other",
    ]
