"""Binary weights and activations against XNOR-Net's formulas in numpy, written as loops."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distiller.errors import DistillerError, QuantizationError, UsageError
from distiller.quantization.quantizer import rebuild_quantized
from distiller.quantization.training.binary import (
    BinaryQuantizer,
    BinaryWeightQuantizer,
    mean_magnitude,
    xnor_weight,
)
from distiller.quantization.training.binary_activations import BinaryActivations, HandedOn
from distiller.quantization.training.weight_quantizers import OutputChannels
from tests.quantization.training.low_bit_networks import BINARY_ENDS, FULL, gradients, low_bit_net, outputs


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 0.4


def numpy_xnor(w: np.ndarray, per_filter: bool) -> np.ndarray:
    if not per_filter:
        return np.sign(w) * np.abs(w[w != 0]).mean()
    return np.stack([np.sign(f) * np.abs(f[f != 0]).mean() for f in w])


@pytest.mark.parametrize("per_filter", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (7, 4), (3, 2, 5)])
def test_weights_are_signs_times_the_mean_magnitude(shape, per_filter):
    weight = weights(*shape)
    found = xnor_weight(weight, OutputChannels() if per_filter else None)
    assert found.numpy() == pytest.approx(numpy_xnor(weight.double().numpy(), per_filter), rel=1e-6)


@pytest.mark.parametrize("per_filter", [False, True])
def test_pruned_weights_stay_zero_and_do_not_count(per_filter):
    weight = weights(6, 5, 3, 3)
    weight[:, ::2] = 0
    found = xnor_weight(weight, OutputChannels() if per_filter else None)
    assert torch.equal(found == 0, weight == 0)
    assert found.numpy() == pytest.approx(numpy_xnor(weight.double().numpy(), per_filter), rel=1e-6)


def test_channels_of_transposed_convolutions_in_groups():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    found = xnor_weight(layer.weight.detach(), OutputChannels.of(layer))
    weight = layer.weight.detach().numpy()  # (4, 3, 3, 3): the first two rows are of outputs 0 to 2
    for group in range(2):
        for output in range(3):
            rows = slice(2 * group, 2 * group + 2)
            part = weight[rows, output]
            assert found.numpy()[rows, output] == pytest.approx(np.sign(part) * np.abs(part).mean(), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 10), st.floats(-0.5, 0.5))
def test_no_other_scale_has_a_smaller_error(seed, spread, change):
    weight = torch.randn(50, generator=torch.Generator().manual_seed(seed)).double() * spread
    best = (weight - xnor_weight(weight)).square().sum()
    other = (weight - xnor_weight(weight) * (1 + change)).square().sum()
    assert best <= other * (1 + 1e-12)


def test_all_zeros_stay_zeros():
    weight = weights(3, 4)
    weight[1] = 0
    for channels in (None, OutputChannels()):
        assert xnor_weight(weight, channels).isfinite().all()
        assert not xnor_weight(weight, channels)[1].any()
        assert not xnor_weight(torch.zeros(3, 4), channels).any()


def test_weight_gradients_pass_unless_they_are_clipped_beyond_one():
    weight = torch.tensor([-1.5, -1.0, -0.2, 0.0, 0.7, 1.0, 1.0001])
    upstream = torch.arange(1.0, 8.0)
    assert gradients(xnor_weight, weight, weights=upstream)[0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    clipped = gradients(lambda w: xnor_weight(w, None, True), weight, weights=upstream)[0]
    assert clipped.tolist() == [0, 2, 3, 4, 5, 6, 0]


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_types_and_memory_formats_are_kept(dtype):
    weight = weights(64, 64, 3, 3).to(dtype, memory_format=torch.channels_last) * 100
    found = xnor_weight(weight, OutputChannels())
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert mean_magnitude(weight).item() == pytest.approx(weight.float().abs().mean().item(), rel=1e-5)
    assert BinaryActivations()(weight).dtype == dtype


@pytest.mark.parametrize("per_filter", [False, True])
def test_grid_holds_the_weight(per_filter):
    weight = weights(5, 8)
    weight[0], weight[2, 3] = 0, 0
    quantizer = BinaryWeightQuantizer(OutputChannels() if per_filter else None)
    grid = quantizer.weight_grid(weight)
    scale = grid.scale[:, None] if per_filter else grid.scale
    assert (grid.qmin, grid.qmax) == (-1, 1)
    assert torch.equal(quantizer(weight), weight.sign() * scale)


def prepared(overrides=None, **settings_):
    model = low_bit_net()
    quantizer = BinaryQuantizer(model, overrides=BINARY_ENDS if overrides is None else overrides, **settings_)
    quantizer.prepare_model()
    return model, quantizer


def test_weights_alone_by_default_a_scale_for_each_channel():
    model, quantizer = prepared()
    assert quantizer.settings()["bits_weights"] == 1
    assert isinstance(model.relu2, nn.ReLU)
    assert not hasattr(model.fc, "parametrizations")
    original = model.conv2.parametrizations.weight.original.detach().double().numpy()
    assert model.conv2.weight.detach().numpy() == pytest.approx(numpy_xnor(original, True), rel=1e-6)
    assert model.conv2.weight.abs().unique().numel() == 8


def test_one_scale_for_a_layer_and_other_settings_by_layer():
    overrides = {**BINARY_ENDS, "conv3": {"per_channel_wts": True, "clip_gradients": False}}
    model, _ = prepared(overrides, per_channel_wts=False, clip_gradients=True)
    assert model.conv2.weight.abs().unique().numel() == 1
    assert model.conv3.weight.abs().unique().numel() == 8
    assert model.conv2.parametrizations.weight[0].clips_gradients
    assert not model.conv3.parametrizations.weight[0].clips_gradients


def test_binary_inputs_are_signs_and_relus_hand_on_theirs():
    model, _ = prepared(bits_activations=1)
    assert isinstance(model.relu1, HandedOn)
    seen: list[Tensor] = []
    model.conv3.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))  # after the quantizer's
    model.bn2.register_forward_hook(lambda layer, args, output: seen.append(output))
    outputs(model)
    before, signs = seen
    assert torch.equal(signs, torch.where(before >= 0, 1.0, -1.0))


@pytest.mark.parametrize("kind", ["plain", "strided", "grouped", "depthwise", "padded", "no batch"])
def test_the_activation_scale_of_convolutions(kind):
    conv = {
        "plain": nn.Conv2d(4, 6, 3),
        "strided": nn.Conv2d(4, 6, 3, stride=2, dilation=2, bias=False),
        "grouped": nn.Conv2d(4, 6, (2, 3), groups=2),
        "depthwise": nn.Conv2d(4, 4, 3, groups=4),
        "padded": nn.Conv2d(4, 6, 3, padding=1),
        "no batch": nn.Conv2d(4, 6, 3),
    }[kind]
    model = nn.Sequential(nn.Identity(), conv)
    x = weights(2, 4, 7, 7)
    weight = conv.weight.detach().clone().double().numpy()
    BinaryQuantizer(model, bits_activations=1, activation_scale=True).prepare_model(x)
    with torch.no_grad():
        found = model(x[0])[None] if kind == "no batch" else model(x)

    padding = conv.padding[0]
    magnitude = np.pad(np.abs(x.double().numpy()), ((0, 0), (0, 0), *[(padding, padding)] * 2))
    signs = np.pad(np.where(x.numpy() >= 0, 1.0, -1.0), ((0, 0), (0, 0), *[(padding, padding)] * 2))
    binary = numpy_xnor(weight, True)
    (stride, _), (dilation, _), groups = conv.stride, conv.dilation, conv.groups
    of_group, to_group = conv.in_channels // groups, conv.out_channels // groups
    for n, o, row, column in np.ndindex(*found.shape):
        part = slice(o // to_group * of_group, (o // to_group + 1) * of_group)
        rows = row * stride + dilation * np.arange(conv.kernel_size[0])
        columns = column * stride + dilation * np.arange(conv.kernel_size[1])
        window = np.ix_(np.arange(part.start, part.stop), rows, columns)
        expected = (signs[n][window] * binary[o]).sum() * magnitude[n][window].mean()
        expected += 0 if conv.bias is None else conv.bias[o].item()
        assert found[n, o, row, column].item() == pytest.approx(expected, abs=1e-5)


def test_the_activation_scale_of_linear_layers():
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 3))
    x = weights(2, 5, 6)
    BinaryQuantizer(model, bits_activations=1, activation_scale=True).prepare_model(x)
    expected = F.linear(torch.where(x >= 0, 1.0, -1.0), model[1].weight) * x.abs().mean(-1, keepdim=True)
    assert torch.allclose(model(x), expected + model[1].bias, atol=1e-6)


@pytest.mark.parametrize("rank, conv", [(1, nn.Conv1d), (3, nn.Conv3d)])
def test_the_activation_scale_in_other_dimensions(rank, conv):
    model = nn.Sequential(nn.Identity(), conv(2, 3, 3))
    x = torch.full((1, 2, *[4] * rank), -0.5)
    plain = conv(2, 3, 3)
    BinaryQuantizer(model, bits_activations=1, activation_scale=True).prepare_model(x)
    plain.weight, plain.bias = nn.Parameter(model[1].weight.detach()), model[1].bias
    assert torch.allclose(model(x), plain(x), atol=1e-6)  # magnitudes are all 0.5: nothing is lost


def test_gradients_of_binary_inputs_are_hard_tanhs_and_none_passes_the_scale():
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 1, bias=False))
    x = torch.tensor([[-2.0, -1.0, 0.5, 3.0]])
    BinaryQuantizer(model, bits_activations=1, activation_scale=True).prepare_model(x)
    found = gradients(model, x)[0]
    expected = model[1].weight * x.abs().mean() * torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert torch.allclose(found, expected)


def test_layers_with_the_activation_scale_keep_their_parameters_and_survive_copies():
    model, quantizer = prepared(bits_activations=1, activation_scale=True)
    assert set(low_bit_net().state_dict()) - set(model.state_dict()) == {"conv2.weight", "conv3.weight"}
    assert isinstance(model.conv2, nn.Conv2d)
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    plain, _ = prepared(bits_activations=1)
    assert not torch.allclose(outputs(plain), expected, atol=1e-3)
    twin = low_bit_net()
    rebuild_quantized(twin, quantizer.quantizer_metadata())
    assert torch.equal(outputs(twin), expected)


def test_the_activation_scale_by_layer():
    overrides = {**BINARY_ENDS, "conv3": {"activation_scale": False}}
    model, _ = prepared(overrides, bits_activations=1, activation_scale=True)
    assert len(model.conv2._forward_pre_hooks) == 0
    assert len(model.conv3._forward_pre_hooks) == 1


def test_an_input_that_is_never_negative_is_refused():
    with pytest.raises(QuantizationError) as refused:
        prepared({**BINARY_ENDS, "relu1": FULL}, bits_activations=1)
    assert str(refused.value) == (
        "conv2: its input is never negative, all its signs would be +1; set bits_activations: 1 for the ReLU "
        "before it too, which then hands on its input (a ReLU in `forward` must become a module), or "
        "bits_activations: null for the layer"
    )


def test_a_model_that_is_refused_stays_as_it_was():
    model = low_bit_net()
    before = outputs(model)
    with pytest.raises(QuantizationError):
        BinaryQuantizer(
            model, bits_activations=1, activation_scale=True, overrides={"relu1": FULL}
        ).prepare_model()
    assert torch.equal(outputs(model), before)
    assert type(model.conv2) is nn.Conv2d
    assert isinstance(model.relu2, nn.ReLU)


def test_binary_inputs_need_an_input_of_the_model():
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    with pytest.raises(DistillerError, match="BinaryQuantizer.*needs.*input"):
        BinaryQuantizer(model, bits_activations=1).prepare_model()
    BinaryQuantizer(model).prepare_model()  # weights alone do not


def test_transposed_convolutions_have_no_activation_scale():
    model = nn.Sequential(nn.Identity(), nn.ConvTranspose2d(2, 2, 3))
    quantizer = BinaryQuantizer(model, bits_activations=1, activation_scale=True)
    with pytest.raises(QuantizationError) as refused:
        quantizer.prepare_model(torch.randn(1, 2, 4, 4))
    assert str(refused.value) == (
        "1: a ConvTranspose2d has no activation scale, only plain convolutions (1d to 3d) and linear layers "
        "have; set activation_scale: false for it"
    )


@pytest.mark.parametrize(
    "given, text",
    [
        (
            {"bits_weights": 4},
            "bits_weights: must be 1, or 0, 32 or null for full precision with BinaryQuantizer, got 4",
        ),
        (
            {"bits_activations": 8},
            "bits_activations: must be 1, or 0, 32 or null for full precision with BinaryQuantizer, got 8",
        ),
        (
            {"overrides": {"conv2": {"bits_weights": 2}}},
            "conv2: bits_weights: must be 1, or 0, 32 or null for full precision with BinaryQuantizer, got 2",
        ),
    ],
)
def test_other_widths_are_refused(given, text):
    with pytest.raises(QuantizationError) as refused:
        BinaryQuantizer(low_bit_net(), **given)
    assert str(refused.value) == text


def test_flags_that_are_none_are_refused():
    for flag in ("per_channel_wts", "clip_gradients", "activation_scale"):
        with pytest.raises(UsageError, match=rf"^BinaryQuantizer: {flag}: must be true or false, got str"):
            BinaryQuantizer(low_bit_net(), **{flag: "yes"})
        with pytest.raises(UsageError, match=rf"overrides\['fc'\]\.{flag}: must be true or false, got int"):
            BinaryQuantizer(low_bit_net(), overrides={"fc": {flag: 1}})
