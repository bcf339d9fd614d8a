"""Copies of quantized models that torch.onnx is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError
from distiller.export.integer_view import integer_view
from distiller.export.qdq_marks import with_marks
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper
from tests.export.quantized_nets import Mixed, images, quantized


def test_every_quantizer_and_every_weight_has_a_mark_and_the_model_none():
    model = quantized(Mixed())
    before = {name: type(module) for name, module in model.named_modules()}
    copied, marks = with_marks(integer_view(model))
    assert [layer.name for layer in marks.weights] == [
        *["conv", "block.conv1", "block.conv2", "block.shortcut", "side", "fc"]
    ]
    program = torch.export.export(copied.eval(), (images(model, 2),), strict=False)
    targets = [node.args[1] for node in program.graph.nodes if "symbolic" in str(node.target)]
    assert targets.count("Weight") == 6
    # the input; conv, max pooling; three of the block and its sum; side, concatenation, average, fc
    assert targets.count("Grid") == 11
    assert not any(isinstance(module, RangeLinearQuantWrapper) for module in copied.modules())
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_model_that_is_one_layer_is_marked():
    model = nn.Sequential(nn.Linear(3, 2))
    quantized(model, torch.randn(4, 3))
    copied, marks = with_marks(integer_view(model[0]))
    assert (len(marks.grids), len(marks.weights)) == (2, 1)
    assert marks.weights[0].name == "RangeLinearQuantParamLayerWrapper"
    assert copied(torch.randn(2, 3)).shape == (2, 2)


def test_a_model_that_is_not_quantized_is_refused(tiny_cnn):
    with pytest.raises(QuantizationError) as caught:
        with_marks(integer_view(tiny_cnn))
    assert str(caught.value) == (
        "TinyCnn: nothing in it is quantized, so there are no integers to export; "
        "quantize it first, or write it in floating point (export_onnx, --export-onnx)"
    )
