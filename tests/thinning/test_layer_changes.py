"""What layers are told when they become smaller."""

from __future__ import annotations

import re

import pytest
from torch import nn

from distiller.errors import DistillerError
from distiller.thinned_layers import ThinnedLayerNorm, ThinnedMultiheadAttention, ThinnedRMSNorm
from distiller.thinning.layer_changes import layer_change, thinned_class
from distiller.thinning.layer_rules import LayerChange


@pytest.mark.parametrize(
    "layer, cuts, told",
    [
        (nn.Conv2d(4, 6, 3), {"weight": {0: (0, 1), 1: (0, 2, 3)}},
         {"in_channels": 3, "out_channels": 2, "groups": 1}),
        (nn.Conv1d(4, 6, 3), {"weight": {1: (0,)}}, {"in_channels": 1, "out_channels": 6, "groups": 1}),
        # depthwise: whole groups go
        (nn.Conv2d(4, 4, 3, groups=4), {"weight": {0: (0, 3)}},
         {"in_channels": 2, "out_channels": 2, "groups": 2}),
        # two filters to a group: whole groups go
        (nn.Conv2d(4, 8, 3, groups=4), {"weight": {0: (0, 1, 6, 7)}},
         {"in_channels": 2, "out_channels": 4, "groups": 2}),
        # the same of every group: the groups stay
        (nn.Conv2d(8, 8, 3, groups=2), {"weight": {0: (0, 1, 4, 5), 1: (0, 2, 3)}},
         {"in_channels": 6, "out_channels": 4, "groups": 2}),
        (nn.ConvTranspose2d(4, 6, 3), {"weight": {0: (0, 1), 1: (2,)}},
         {"in_channels": 2, "out_channels": 1, "groups": 1}),
        (nn.ConvTranspose2d(4, 8, 3, groups=4), {"weight": {0: (1, 2, 3)}},
         {"in_channels": 3, "out_channels": 6, "groups": 3}),
        (nn.Linear(5, 3), {"weight": {0: (0, 2), 1: (4,)}}, {"in_features": 1, "out_features": 2}),
        (nn.BatchNorm2d(4), {"weight": {0: (1, 2)}}, {"num_features": 2}),
        (nn.BatchNorm1d(4, affine=False), {"running_mean": {0: (1,)}}, {"num_features": 1}),
        (nn.PReLU(4), {"weight": {0: (1, 2, 3)}}, {"num_parameters": 3}),
        (nn.Embedding(9, 4), {"weight": {1: (0, 1)}}, {"embedding_dim": 2}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_a_layer_is_told_its_new_sizes(layer, cuts, told):
    assert layer_change(layer, cuts) == LayerChange(told)


@pytest.mark.parametrize("kind, thinned", [(nn.LayerNorm, ThinnedLayerNorm), (nn.RMSNorm, ThinnedRMSNorm)])
def test_a_norm_over_channels_goes_on_counting_all_that_there_were(kind, thinned):
    cuts = {"weight": {0: (0, 1, 4)}}
    norm = kind(5)
    assert layer_change(norm, cuts, True) == LayerChange({"counted": 5, "normalized_shape": [3]}, thinned)
    norm.weight.data, norm.normalized_shape, norm.counted = norm.weight.data[:3], (3,), 5
    norm.__class__ = thinned
    again = layer_change(norm, {"weight": {0: (0,)}}, True)
    assert again == LayerChange({"counted": 5, "normalized_shape": [1]}, thinned)


def test_a_norm_without_scale_counts_too():
    assert layer_change(nn.LayerNorm(5, elementwise_affine=False), {}, True) == LayerChange(
        {"counted": 5}, ThinnedLayerNorm
    )


def test_attention_is_told_its_heads():
    cuts = {
        "in_proj_weight": {0: tuple(i for i in range(36) if i % 12 < 6)},
        "out_proj.weight": {1: range(6)},
    }
    told = LayerChange({"num_heads": 2, "_qkv_same_embed_dim": False}, ThinnedMultiheadAttention)
    assert layer_change(nn.MultiheadAttention(12, 4), cuts) == told
    separate = nn.MultiheadAttention(12, 4, kdim=5, vdim=7)
    assert layer_change(separate, {"v_proj_weight": {0: range(6)}}) == told


def test_a_layer_that_is_not_known_is_told_nothing():
    assert layer_change(nn.Sequential(nn.Linear(2, 2)), {"0.weight": {0: (0,)}}) is None


class Centred(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input - 1)


class Named(nn.LayerNorm):
    """A class of its own that computes as ever."""


@pytest.mark.parametrize(
    "layer, is_normalizing, fault",
    [
        (nn.GroupNorm(2, 4), True,
         "is a GroupNorm that takes statistics over the removed channels; nn.LayerNorm and nn.RMSNorm are understood"),
        (Centred(4), True,
         "is a Centred, whose code is its own and not that of LayerNorm; what it would be with fewer channels is not known"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), False,
         "is attention with add_bias_kv or add_zero_attn, which cannot be made smaller"),
        (nn.MultiheadAttention(4, 2, add_zero_attn=True), False,
         "is attention with add_bias_kv or add_zero_attn, which cannot be made smaller"),
    ],
)  # fmt: skip
def test_a_layer_that_cannot_do_with_less_says_so(layer, is_normalizing, fault):
    with pytest.raises(DistillerError, match=f"^{re.escape(fault)}$"):
        layer_change(layer, {}, is_normalizing)


def test_a_subclass_without_code_of_its_own_is_as_good():
    change = layer_change(Named(4), {}, True)
    assert change is not None
    assert change.new_class is ThinnedLayerNorm


def test_thinned_classes_are_found_by_name():
    assert thinned_class("ThinnedRMSNorm") is ThinnedRMSNorm
    assert thinned_class("ThinnedLayerNorm2d").__name__ == "ThinnedLayerNorm2d"
    known = (
        "ThinnedLayerNorm, ThinnedLayerNorm2d, ThinnedMultiheadAttention, ThinnedRMSNorm, "
        "ThinnedRelativePositionalMultiHeadAttention, ThinnedShiftedWindowAttention, "
        "ThinnedShiftedWindowAttentionV2"
    )
    with pytest.raises(DistillerError, match=f"^unknown thinned layer 'Conv2d'; known are {known}$"):
        thinned_class("Conv2d")
