"""torchvision's layers after channels were removed, held against themselves with the channels at zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from distiller.thinning.layer_changes import layer_change
from distiller.thinning.layer_rules import LayerChange
from distiller.thinning.torchvision_layers import (
    ThinnedLayerNorm2d,
    ThinnedRelativePositionalMultiHeadAttention,
    ThinnedShiftedWindowAttention,
    ThinnedShiftedWindowAttentionV2,
    into_windows,
    out_of_windows,
    seams,
)

WIDTH, HEADS = 12, 3


def random_layer(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for param in layer.parameters():
            param.normal_(0, 0.5)
    return layer.eval()


def turned(layer: nn.Module, cuts: dict) -> nn.Module:
    """The layer with these cuts made by hand, and told of them."""
    change = layer_change(layer, cuts)
    assert change is not None
    assert change.new_class is not None
    for name, kept in cuts.items():
        tensor = layer.get_parameter(name)
        for dim, indices in kept.items():
            tensor.data = tensor.data.index_select(dim, torch.tensor(indices))
    for name, value in change.attributes.items():
        setattr(layer, name, value)
    layer.__class__ = change.new_class
    return layer


def test_layer_norm_of_images_counts_the_removed_channels():
    dense, norm = random_layer(LayerNorm2d(5, eps=1e-6)), LayerNorm2d(5, eps=1e-6)
    norm.load_state_dict(dense.state_dict())
    norm = turned(norm, {"weight": {0: (0, 1, 4)}, "bias": {0: (0, 1, 4)}})
    assert isinstance(norm, ThinnedLayerNorm2d)
    x = torch.randn(2, 5, 4, 3)
    x[:, 2:4] = 0
    assert torch.allclose(norm(x[:, [0, 1, 4]]), dense(x)[:, [0, 1, 4]], atol=1e-6)


def test_a_vision_transformer_is_told_its_width():
    model = VisionTransformer(8, 4, 1, 2, 8, 16)
    cuts = {"class_token": {2: (0, 1, 5)}, "conv_proj.weight": {0: (0, 1, 5)}}
    assert layer_change(model, cuts) == LayerChange({"hidden_dim": 3})


# Images smaller than, equal to and larger than a window, with and without padding and shift.
LAYOUTS = [
    ((4, 6), (2, 3), (0, 0)), ((4, 6), (2, 3), (1, 1)), ((5, 7), (2, 3), (1, 2)), ((4, 4), (4, 2), (2, 1)),
    ((3, 5), (4, 4), (2, 2)), ((3, 8), (4, 4), (2, 2)), ((6, 6), (2, 2), (0, 1)), ((6, 6), (3, 3), (2, 0)),
]  # fmt: skip


@pytest.mark.parametrize("size, window, shift", LAYOUTS)
def test_windows_put_together_again_are_the_image(size, window, shift):
    x = torch.randn(2, *size, 3)
    windows = into_windows(x, window, shift)
    assert windows.shape[2] == window[0] * window[1]
    assert torch.equal(out_of_windows(windows, window, shift, size), x)


def test_windows_are_rows_of_rows():
    x = torch.arange(24).view(1, 4, 6, 1)
    windows = into_windows(x, (2, 3), (0, 0)).squeeze()
    assert windows.tolist() == [
        [0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11], [12, 13, 14, 18, 19, 20], [15, 16, 17, 21, 22, 23],
    ]  # fmt: skip
    assert into_windows(x, (2, 3), (1, 2)).squeeze()[0].tolist() == [8, 9, 10, 14, 15, 16]


def test_seams_are_where_the_shift_brought_the_other_side_of_the_image():
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    position = torch.stack([rows, columns], -1)[None]
    windows = into_windows(position, (2, 3), (1, 1))[
        0
    ].float()  # (windows, positions, 2), where each came from
    apart = (windows.unsqueeze(1) - windows.unsqueeze(2)).abs()
    expected = (apart[..., 0] >= 2) | (apart[..., 1] >= 3)  # not neighbours in a window of the image
    assert torch.equal(seams((4, 6), (2, 3), (1, 1)), expected)


@pytest.mark.parametrize("size, window, shift", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind, thinned",
    [
        (ShiftedWindowAttention, ThinnedShiftedWindowAttention),
        (ShiftedWindowAttentionV2, ThinnedShiftedWindowAttentionV2),
    ],
    ids=["plain", "cosine"],
)
def test_window_attention_is_that_of_torchvision(kind, thinned, bias, size, window, shift):
    dense = random_layer(kind(WIDTH, list(window), list(shift), HEADS, qkv_bias=bias, proj_bias=bias))
    layer = kind(WIDTH, list(window), list(shift), HEADS, qkv_bias=bias, proj_bias=bias).eval()
    layer.load_state_dict(dense.state_dict())
    layer = turned(layer, {})
    assert isinstance(layer, thinned)
    x = torch.randn(2, *size, WIDTH)
    assert torch.allclose(layer(x), dense(x), atol=1e-5)


def without_head(of_three: int, head: int) -> list[int]:
    width = WIDTH // HEADS
    return [i for i in range(of_three * WIDTH) if i % WIDTH // width != head]


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2], ids=["plain", "cosine"])
def test_window_attention_without_a_head_and_channels_is_that_with_them_at_zero(kind):
    dense, layer = (random_layer(kind(WIDTH, [2, 2], [1, 1], HEADS)) for _ in range(2))
    layer.load_state_dict(dense.state_dict())
    stays, channels = (0, 2), (0, 1, 4, 5, 6)
    if kind is ShiftedWindowAttention:
        bias = {"relative_position_bias_table": {1: stays}}
    else:
        bias = {"logit_scale": {0: stays}, "cpb_mlp.2.weight": {0: stays}}
    layer = turned(
        layer,
        {
            "qkv.weight": {0: without_head(3, 1), 1: channels}, "qkv.bias": {0: without_head(3, 1)},
            "proj.weight": {0: channels, 1: without_head(1, 1)}, "proj.bias": {0: channels}, **bias,
        },
    )  # fmt: skip
    assert (layer.num_heads, layer.head_dim) == (2, 4)
    with torch.no_grad():
        dense.proj.weight[:, 4:8] = 0
    x = torch.randn(2, 4, 4, len(channels))
    whole = torch.zeros(2, 4, 4, WIDTH)
    whole[..., channels] = x
    assert torch.allclose(layer(x), dense(whole)[..., channels], atol=1e-5)
    again = layer_change(layer, {"qkv.weight": {1: (0, 1)}})
    assert again == LayerChange({"num_heads": 2, "head_dim": 4}, type(layer))


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2], ids=["plain", "cosine"])
def test_dropout_of_window_attention_acts_in_training_alone(kind):
    layer = turned(random_layer(kind(WIDTH, [2, 2], [1, 1], HEADS, attention_dropout=0.5, dropout=0.5)), {})
    x = torch.randn(1, 4, 4, WIDTH)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_relative_attention_without_a_head_and_channels_is_that_with_them_at_zero():
    dense, layer = (random_layer(RelativePositionalMultiHeadAttention(WIDTH, 4, 9)) for _ in range(2))
    layer.load_state_dict(dense.state_dict())
    channels = (0, 1, 4, 5, 6)
    layer = turned(
        layer,
        {
            "to_qkv.weight": {0: without_head(3, 0), 1: channels}, "to_qkv.bias": {0: without_head(3, 0)},
            "merge.weight": {0: channels, 1: without_head(1, 0)}, "merge.bias": {0: channels},
            "relative_position_bias_table": {1: (1, 2)},
        },
    )  # fmt: skip
    assert isinstance(layer, ThinnedRelativePositionalMultiHeadAttention)
    assert layer.n_heads == 2
    with torch.no_grad():
        dense.merge.weight[:, :4] = 0
    x = torch.randn(2, 4, 9, len(channels))
    whole = F.pad(torch.zeros_like(x), (0, WIDTH - len(channels)))
    whole[..., channels] = x
    assert torch.allclose(layer(x), dense(whole)[..., channels], atol=1e-5)
