"""What a quantized model's file would hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.export.size import dense_bytes, quantized_bytes
from distiller.quantization.codebook import codebooks_of, quantize_with_codebook
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.stored import stored_params
from distiller.quantization.training import (
    BinaryQuantizer,
    DorefaQuantizer,
    LSQQuantizer,
    PACTQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
    TernaryQuantizer,
    WRPNQuantizer,
)
from tests.quantization.networks import WordModel, quantized


@pytest.fixture
def prepared(residual, residual_stats, images):
    def prepare(**kwargs):
        PostTrainLinearQuantizer(residual, model_activation_stats=residual_stats, **kwargs).prepare_model(
            images[:1]
        )
        return stored_params(residual)

    return prepare


def test_a_model_in_floating_point_is_stored_as_it_is(residual) -> None:
    stored = stored_params(residual)
    assert stored.tensors.keys() == residual.state_dict().keys()
    assert not stored.bits
    assert not stored.per_channel


def test_weights_and_biases_have_their_widths(prepared) -> None:
    stored = prepared(
        bits_parameters=4, overrides={"fc": {"bits_weights": 8, "per_channel_wts": True, "bits_bias": 16}}
    )
    assert stored.bits == {
        **{f"{name}.wrapped_module.weight": 4 for name in ("conv1", "conv2", "left", "right")},
        **{f"{name}.wrapped_module.bias": 32 for name in ("conv1", "conv2", "left", "right")},
        "fc.wrapped_module.weight": 8,
        "fc.wrapped_module.bias": 16,
    }
    assert stored.per_channel == {"fc.wrapped_module.weight"}


def test_scales_of_weights_and_kept_copies_are_not_counted_twice(prepared) -> None:
    stored = prepared(save_fp_weights=True)
    assert not [name for name in stored.tensors if "float" in name or "weight_scale" in name]
    assert "conv1.output_quant.scale" in stored.tensors


def test_size_at_8_bits_worked_by_hand(prepared) -> None:
    stored = prepared()
    weights = 8 * 3 * 9 + 8 * 4 * 9 + 4 * 8 + 4 * 8 * 9 + 5 * 32
    biases = 8 + 8 + 4 + 4 + 5
    grids = 9 + 1  # outputs, and the input of conv1: scale and zero point of 4 bytes each
    expected = weights + 5 * (4 + 1) + 4 * biases + 5 * (4 + 4) + 8 * grids
    assert quantized_bytes(stored.tensors, stored.bits, stored.per_channel) == expected


def test_weights_only_keeps_biases_in_floating_point(residual, images) -> None:
    before = dense_bytes(residual.state_dict())
    PostTrainLinearQuantizer(residual, bits_activations=None).prepare_model(images[:1])
    stored = stored_params(residual)
    assert not [name for name in stored.bits if name.endswith("bias")]
    assert quantized_bytes(stored.tensors, stored.bits) < before / 2


def test_an_embedding_has_one_scale_and_is_counted_once_where_it_is_tied() -> None:
    words = torch.zeros(2, 2, dtype=torch.int64)
    model = quantized(
        WordModel().eval(), None, words, bits_activations=None, bits_parameters=4, per_channel_wts=True
    )
    stored = stored_params(model)
    assert stored.bits["encoder.wrapped_module.weight"] == 4
    assert "encoder.wrapped_module.weight" not in stored.per_channel
    names = ["encoder.wrapped_module.weight", "decoder.wrapped_module.weight"]
    both = {name: stored.tensors[name] for name in names}
    bits = dict.fromkeys(names, 4)
    # 160 weights at 4 bits twice, as the decoder has a scale for each of its 20 rows
    assert quantized_bytes(both, bits, stored.per_channel & set(names)) == 80 + 5 + 80 + 20 * 5
    tied = stored_params(quantized(WordModel().eval(), None, words, bits_activations=None, bits_parameters=4))
    assert quantized_bytes({name: tied.tensors[name] for name in names}, bits) == 80 + 5


def test_layers_in_half_precision_take_half_of_the_bytes(residual, images) -> None:
    before = sum(p.numel() for p in residual.parameters())
    model = quantized(residual, None, images[:1], fpq_module=16)
    stored = stored_params(model)
    assert not stored.bits
    folded = 16  # two batch norms became biases
    assert dense_bytes(stored.tensors) == 2 * (before - 2 * folded + folded)


def test_scales_of_a_transposed_convolution_are_those_of_its_outputs() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False))
    twin = quantized(model, None, torch.randn(1, 4, 3, 3), bits_activations=None, per_channel_wts=True)
    stored = stored_params(twin)
    assert quantized_bytes(stored.tensors, stored.bits, stored.per_channel) == 4 * 3 * 4 + 6 * 5


def trained_net(quantizer_class, **settings) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    if quantizer_class not in (BinaryQuantizer, TernaryQuantizer):
        settings = {"bits_activations": None, **settings}
    quantizer_class(net, **settings).prepare_model(torch.rand(1, 2, 4, 4))
    net(torch.rand(5, 2, 4, 4))
    return net.eval()


BATCH_NORM = 4 * 4 * 4 + 8  # weight, bias, mean and variance of 4 channels; batches counted in 8 bytes


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [
        (QuantAwareTrainRangeLinearQuantizer, 5),
        (LSQQuantizer, 5),
        (DorefaQuantizer, 5),
        (PACTQuantizer, 5),
        (WRPNQuantizer, 5),
        (BinaryQuantizer, 1),
        (TernaryQuantizer, 2),
    ],
)
def test_weights_of_a_trained_model_are_stored_at_their_width(quantizer, bits) -> None:
    width = {} if bits < 3 else {"bits_weights": bits}
    net = trained_net(quantizer, **width)
    stored = stored_params(net)
    assert {name: stored.bits[name] for name in stored.bits} == {"0.weight": bits, "4.weight": bits}
    assert torch.equal(stored.tensors["0.weight"], net[0].weight)
    assert set(stored.tensors) == {
        *("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"),
        *("4.weight", "4.bias"),
    }
    scales = 4 + 3 if quantizer is BinaryQuantizer else 2  # its default is one for each channel
    weights = -(-72 * bits // 8) + -(-48 * bits // 8) + scales * (4 + 1)
    assert quantized_bytes(stored.tensors, stored.bits, stored.per_channel) == weights + BATCH_NORM + 3 * 4


def test_scales_per_channel_of_a_trained_model_count() -> None:
    net = trained_net(LSQQuantizer, bits_weights=4, per_channel_wts=True)
    stored = stored_params(net)
    assert stored.per_channel == {"0.weight", "4.weight"}
    size = quantized_bytes(stored.tensors, stored.bits, stored.per_channel)
    assert size == 36 + 24 + (4 + 3) * (4 + 1) + BATCH_NORM + 3 * 4


def test_pruned_weights_of_a_grid_without_zero_need_a_bit_more() -> None:
    net = trained_net(BinaryQuantizer)
    with torch.no_grad():
        net[0].parametrizations.weight.original[0, 0, 0, 0] = 0
    assert stored_params(net).bits == {"0.weight": 2, "4.weight": 1}


def test_two_learned_scales_of_ternary_weights_are_stored() -> None:
    stored = stored_params(trained_net(TernaryQuantizer, learned_scales=True))
    assert stored.bits["0.weight"] == 2
    assert "0.parametrizations.weight.positive_scale" in stored.tensors


def test_channels_of_transposed_convolutions_come_first() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
    LSQQuantizer(net, bits_activations=None, bits_weights=4, per_channel_wts=True).prepare_model(
        torch.rand(1, 3, 4, 4)
    )
    net(torch.rand(1, 3, 4, 4))
    assert stored_params(net).tensors["0.weight"].shape == (4, 12)


@pytest.mark.parametrize("per_channel", [False, True])
def test_codes_and_values_of_codebooks_are_stored(per_channel) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False))
    quantize_with_codebook(net, 3, per_channel_wts=per_channel)
    stored = stored_params(net)
    assert stored.bits == {"0.weight": 3}
    assert set(stored.tensors) == {"0.weight", "0.parametrizations.weight.values"}
    (weight, book) = codebooks_of(net)["0"]
    own = 4 + 1  # as any quantized tensor a scale and a zero point, which a codebook has no use for
    size = quantized_bytes(stored.tensors, stored.bits, stored.per_channel)
    assert size == book.stored(weight).num_bytes + own == 27 + (4 if per_channel else 1) * 8 * 4 + own


def test_pruned_weights_of_a_codebook_without_zero_are_stored_as_bits() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False))
    with torch.no_grad():
        net[0].weight[0] = 0
    quantize_with_codebook(net, 3)
    assert stored_params(net).tensors["0.parametrizations.weight.pruned"].numel() == 72 // 8
