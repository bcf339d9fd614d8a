"""Integers and grids that are read off quantized models, against the real numbers that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError
from distiller.export.integer_view import (
    Grid,
    TensorQuantizer,
    check_arithmetic,
    grid_of,
    integer_layer,
    integer_view,
    is_tensor_quantizer,
)
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.training import (
    BinaryQuantizer,
    DorefaQuantizer,
    GridQuantizer,
    LSQQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
)
from distiller.quantization.training.fake_quant import Grid as TrainedGrid
from tests.export.quantized_nets import quantized

STATS = {"min": -1.3, "max": 2.9, "avg_min": -1.0, "avg_max": 2.0}


def wrapped(layer: nn.Module, shape: tuple[int, ...], **settings):
    model = nn.Sequential(layer)
    return quantized(model, torch.randn(2, *shape), **settings)[0]  # type: ignore[index]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("has_relu", [False, True])
def test_a_grid_is_what_the_quantizer_can_return(mode, bits, has_relu):
    settings = QuantSettings(bits, mode, clip_half_range=has_relu)
    quantizer = ActivationQuantizer(settings, STATS, "x")
    everything = quantizer(torch.linspace(-9, 9, 20001)).unique()
    for grid in (grid_of(quantizer, "x"), grid_of(quantizer, "x").unsigned):
        integers = torch.arange(grid.qmin, grid.qmax + 1)
        assert torch.equal((integers - grid.zero_point) * quantizer.scale, everything)
    unsigned = grid_of(quantizer, "x").unsigned
    assert unsigned.qmin == 0
    assert unsigned.qmax <= 255
    if has_relu:
        assert unsigned.zero_point == 0


def test_a_grid_of_other_modules_is_read_by_protocol():
    grid = TrainedGrid(torch.tensor(0.5), torch.tensor(3, dtype=torch.int32), 1, 15)
    quantizer = GridQuantizer(grid)
    assert isinstance(quantizer, TensorQuantizer)
    assert grid_of(quantizer, "x") == Grid(0.5, 3, 1, 15)
    assert not is_tensor_quantizer(nn.ReLU())


def test_grids_that_are_no_integers_of_eight_bits_are_refused():
    dynamic = ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), None, "x")
    with pytest.raises(QuantizationError) as caught:
        grid_of(dynamic, "conv1.output_quant")
    assert str(caught.value) == (
        "conv1.output_quant: its range is dynamic, that of each batch; an integer model needs fixed scales; "
        "give activation statistics (model_activation_stats, --qe-stats-file or --qe-calibration)"
    )
    wide = ActivationQuantizer(QuantSettings(9, Mode.SYMMETRIC), STATS, "x")
    with pytest.raises(QuantizationError) as caught:
        grid_of(wide, "conv1.output_quant")
    assert str(caught.value) == (
        "conv1.output_quant: its integers have 9 bits, an integer model has at most 8; "
        "give it fewer (bits_activations)"
    )


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("bits", [2, 5, 7, 8])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "layer,shape",
    [
        (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3), (4, 5, 5)),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), (4, 5, 5)),
        (nn.Linear(7, 5), (7,)),
    ],
)
def test_integers_stand_for_the_weight(mode, bits, per_channel, layer, shape):
    settings = {"activations": "SYMMETRIC", "weights": mode}
    wrapper = wrapped(layer, shape, bits_parameters=bits, mode=settings, per_channel_wts=per_channel)
    view = integer_layer(wrapper, "fc")
    assert view.name == "fc"
    assert view.weight.dtype == view.zero_point.dtype == torch.int8
    assert (view.axis is not None) == per_channel
    scale, zero_point = view.scale, view.zero_point.int()
    if view.axis is not None:
        sizes = [-1 if i == view.axis else 1 for i in range(view.weight.dim())]
        scale, zero_point = scale.reshape(sizes), zero_point.reshape(sizes)
    assert torch.equal((view.weight.int() - zero_point) * scale, wrapper.wrapped_module.weight)
    assert view.bias is not None
    assert torch.equal(view.bias, wrapper.wrapped_module.bias)
    if mode.is_symmetric or bits < 8:
        assert not view.zero_point.any()


def test_weights_without_integers_are_refused():
    with pytest.raises(QuantizationError) as caught:
        integer_layer(wrapped(nn.Linear(4, 3), (4,), bits_parameters=9), "fc")
    assert str(caught.value) == (
        "fc: weight: its integers have 9 bits, an integer model has at most 8; give it fewer (bits_weights)"
    )

    wrapper = wrapped(nn.Linear(4, 3), (4,))
    with torch.no_grad():
        wrapper.wrapped_module.weight[0, 0] += wrapper.weight_scale / 2
    with pytest.raises(QuantizationError) as caught:
        integer_layer(wrapper, "fc")
    assert str(caught.value) == (
        "fc: weight: it is not on the grid that it was rounded to, something has changed it since; "
        "quantize the model again"
    )

    with pytest.raises(QuantizationError) as caught:
        integer_layer(wrapped(nn.Linear(4, 3), (4,)).half(), "fc")
    assert str(caught.value) == (
        "fc: weight: integers are made of float32 numbers, got torch.float16; leave out fpq_module "
        "for it, or call model.float() before quantization"
    )

    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    with pytest.raises(QuantizationError) as caught:
        integer_layer(wrapped(layer, (4, 5, 5), per_channel_wts=True), "up")
    assert str(caught.value) == (
        "up: weight: a transposed convolution in 2 groups has no dimension that its scales for "
        "each channel belong to; set per_channel_wts: false for it"
    )


def test_what_runtimes_do_not_simulate_is_refused():
    with pytest.raises(QuantizationError) as caught:
        check_arithmetic(wrapped(nn.Linear(4, 3), (4,), scale_approx_mult_bits=8))
    assert str(caught.value) == (
        "0: scale_approx_mult_bits: runtimes change the scale exactly, the approximation "
        "cannot be exported; leave it out (no --qe-scale-approx-bits)"
    )
    with pytest.warns(UserWarning, match="can overflow"):
        narrow = wrapped(nn.Linear(4, 3), (4,), bits_accum=12)
    with pytest.raises(QuantizationError) as caught:
        check_arithmetic(narrow)
    assert str(caught.value) == (
        "0: bits_accum: accumulators of 12 bits can saturate here, those of runtimes have 32; "
        "set bits_accum to 32 (--qe-bits-accum)"
    )
    check_arithmetic(wrapped(nn.Linear(4, 3), (4,), bits_accum=30))


def test_a_view_is_of_a_copy(tiny_cnn):
    x = torch.randn(2, 1, 8, 8)
    model = quantized(tiny_cnn, x)
    view = integer_view(model)
    assert view.model is not model
    assert [layer.name for layer in view.layers.values()] == ["conv1", "conv2", "fc"]
    assert set(view.layers) <= set(view.model.modules())
    assert not set(view.layers) & set(model.modules())


def test_a_trained_model_has_its_batch_norms_in_the_weights(tiny_cnn):
    x = torch.randn(4, 1, 8, 8)
    settings = {"bits_activations": 8, "bits_weights": 4, "per_channel_wts": True}
    QuantAwareTrainRangeLinearQuantizer(tiny_cnn, None, **settings).prepare_model(x)
    tiny_cnn.train()(x)
    view = integer_view(tiny_cnn.eval(), [x])
    assert [layer.name for layer in view.layers.values()] == ["conv1", "conv2", "fc"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in view.model.modules())
    for module, layer in view.layers.items():
        scale = layer.scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        assert int(layer.weight.int().abs().max()) <= 64
        assert not (layer.weight % 8).any()  # 4 bits times 8, for finer biases
        torch.testing.assert_close(layer.weight * scale, module.weight, rtol=1e-6, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(view.model(x), tiny_cnn(x))


@pytest.mark.parametrize("bits,factor", [(1, 64), (3, 16), (7, 1), (8, 1)])
def test_small_integers_of_trained_weights_are_multiplied_and_stand_for_the_same_weight(bits, factor):
    model = nn.Sequential(nn.Linear(4, 3))
    kind = BinaryQuantizer if bits == 1 else LSQQuantizer
    kind(model, None, bits_weights=bits).prepare_model(torch.randn(2, 4))
    with torch.no_grad():
        model[0].parametrizations.weight.original.view(-1)[0] = -100.0  # -2 ** (bits - 1) steps
    (layer,) = integer_view(model.eval(), torch.randn(2, 4)).layers.values()
    assert int(layer.weight.int().abs().max()) == max(64, 2 ** (bits - 1))
    assert not (layer.weight % factor).any()
    scale = layer.scale.reshape(-1, 1)
    assert torch.equal(layer.weight * scale, model[0].weight)


def test_eight_bits_of_dorefa_are_refused_with_a_remedy_and_seven_are_not():
    """Its levels have none at 0: 2^8 of them need a zero point between two integers."""

    def view(bits):
        model = nn.Sequential(nn.Linear(16, 8))
        DorefaQuantizer(model, None, bits_weights=bits).prepare_model()
        return integer_view(model.eval())

    with pytest.raises(QuantizationError) as caught:
        view(8)
    assert str(caught.value) == (
        "0: weight: its levels are the odd numbers from -255 to 255 (so are DoReFa's); on integers without gaps "
        "their zero point would lie halfway between two, which ONNX has not, and with gaps they have 9 bits; "
        "train with at most 7 (bits_weights: 7)"
    )
    (layer,) = view(7).layers.values()
    assert int(layer.weight.int().abs().max()) == 127


def test_weights_only_has_no_grids(tiny_cnn):
    PostTrainLinearQuantizer(tiny_cnn, bits_activations=None).prepare_model(torch.randn(1, 1, 8, 8))
    view = integer_view(tiny_cnn.eval())
    assert len(view.layers) == 3
    assert not any(is_tensor_quantizer(module) for module in view.model.modules())
