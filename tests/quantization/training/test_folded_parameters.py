from __future__ import annotations

import copy

import torch
from torch import nn

from distiller.model_transforms import folded_parameters
from distiller.quantization.training.folded_parameters import FoldedParameters, affine_of, sigma_of
from distiller.quantization.training.weight_quantizers import OutputChannels


def trained_norm(channels: int, **settings) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **settings).double()
    for name, tensor in norm.state_dict().items():
        if name != "num_batches_tracked":
            nn.init.uniform_(tensor, 0.5, 2)
    return norm


def test_without_quantizers_they_are_those_of_folding_for_inference():
    for layer in (nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)):
        layer.double()
        norm = trained_norm(layer.out_channels)
        channels = OutputChannels.of(layer)
        weight, bias = folded_parameters(layer.weight, layer.bias, norm, channels.dim, channels.groups)
        folding = FoldedParameters(norm, channels, None, None)
        assert torch.allclose(folding(layer.weight), weight)
        assert torch.allclose(folding.folded_bias(layer.bias), bias)


def test_quantizers_get_the_folded_parameters():
    norm, weight, bias = trained_norm(4), torch.randn(4, 3).double(), torch.randn(4).double()
    plain = FoldedParameters(norm, OutputChannels(), None, None)
    folding = FoldedParameters(norm, OutputChannels(), lambda w: w + 1, lambda b: b + 2)
    assert torch.equal(folding(weight), plain(weight) + 1)
    assert torch.equal(folding.folded_bias(bias), plain.folded_bias(bias) + 2)
    assert torch.equal(folding.folded_bias(None), plain.folded_bias(None) + 2)
    assert folding.right_inverse(weight) is weight


def test_the_batch_norm_stays_the_models():
    model = nn.Sequential(norm := trained_norm(4), FoldedParameters(norm, OutputChannels(), None, None))
    assert list(model[1].state_dict()) == []
    copied = copy.deepcopy(model)
    assert copied[1].bn is copied[0]


def test_a_norm_without_parameters_has_factor_one_and_no_shift():
    gamma, beta = affine_of(norm := trained_norm(3, affine=False))
    assert (gamma.tolist(), beta.tolist()) == ([1, 1, 1], [0, 0, 0])
    assert torch.allclose(sigma_of(norm), (norm.running_var + 1e-5).sqrt())
