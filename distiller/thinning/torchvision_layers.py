"""torchvision's own layers whose code has numbers of channels or heads in it, after channels were removed.

    layer norm of images    ConvNeXt: statistics go on counting the removed channels, which were zero
    vision transformer      reshapes to the width that it was built with
    window attention        Swin, also V2: takes the width of its input for that of all heads together
    relative attention      MaxViT: likewise

Each thinned layer is a subclass of the layer that it takes the place of, has the same parameters, and
computes what that layer did with the removed channels at zero.
Knows nothing about which channels are removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.vision_transformer import VisionTransformer

from distiller.tensor_cuts import TensorCuts
from distiller.thinned_layers import ThinnedLayerNorm
from distiller.thinning.layer_rules import LayerChange, Rule, counting_norm, shape_after

_APART = (
    -100.0
)  # added to the scores of positions that are neighbours through the shift alone, as Swin was trained


class ThinnedLayerNorm2d(ThinnedLayerNorm, LayerNorm2d):
    """Layer norm over the channels of images that goes on counting removed channels as zeros."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ThinnedShiftedWindowAttention(ShiftedWindowAttention):
    """Attention within windows whose heads together may be narrower than its input.

        softmax(q k^T / sqrt(head_dim) + bias by relative position) v

    Attributes:
        num_heads: heads that are left.
        head_dim: width of each, as before.

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021.
    """

    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, channels) -> the same."""
        return _attend_in_windows(self, x)

    def projected(self, windows: Tensor) -> Tensor:
        """(..., channels) -> (..., 3 * num_heads * head_dim)."""
        return F.linear(windows, self.qkv.weight, self.qkv.bias)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(..., positions, head_dim), twice -> (..., positions, positions)."""
        return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)


class ThinnedShiftedWindowAttentionV2(ShiftedWindowAttentionV2):
    """Attention by cosine similarity within windows; its heads together may be narrower than its input.

        softmax(cos(q, k) min(exp(logit_scale), 100) + bias by relative position) v

    Attributes:
        num_heads: heads that are left.
        head_dim: width of each, as before.

    Source: Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution", 2022.
    """

    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, channels) -> the same."""
        return _attend_in_windows(self, x)

    def projected(self, windows: Tensor) -> Tensor:
        """(..., channels) -> (..., 3 * num_heads * head_dim); keys have no bias."""
        bias = cast("Tensor | None", self.qkv.bias)
        if bias is not None:
            width = self.num_heads * self.head_dim
            bias = bias.clone()
            bias[width : 2 * width].zero_()
        return F.linear(windows, self.qkv.weight, bias)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(..., heads, positions, head_dim), twice -> (..., heads, positions, positions)."""
        scale = self.logit_scale.clamp(max=math.log(100)).exp()  # (heads, 1, 1)
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale


class ThinnedRelativePositionalMultiHeadAttention(RelativePositionalMultiHeadAttention):
    """Attention with a bias by relative position whose heads together may be narrower than its input.

    Attributes:
        n_heads: heads that are left.
        head_dim: width of each, as before.

    Source: Tu et al., "MaxViT: Multi-Axis Vision Transformer", 2022.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(batch, groups, positions, channels) -> the same."""
        q, k, v = _heads(self.to_qkv(x), self.n_heads, self.head_dim)
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge(_side_by_side(scores.softmax(-1) @ v))


def into_windows(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Cut images into windows, after a cyclic shift towards the upper left.

    Args:
        x: (batch, height, width, channels); padded with zeros to whole windows.
        window: height and width of a window.
        shift: down and to the right, in positions.

    Returns:
        (batch, windows, positions in a window, channels), both row by row.
    """
    below, right = (-size % length for size, length in zip(x.shape[1:3], window, strict=True))
    x = F.pad(x, (0, 0, 0, right, 0, below))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = x.unflatten(2, (-1, window[1])).unflatten(
        1, (-1, window[0])
    )  # (batch, rows, h, columns, w, channels)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def out_of_windows(x: Tensor, window: Sequence[int], shift: Sequence[int], size: Sequence[int]) -> Tensor:
    """What `into_windows` was given, put together again: (batch, *size, channels).

    Args:
        x: (batch, windows, positions in a window, channels).
        window: height and width of a window.
        shift: as there.
        size: height and width of the images.
    """
    rows, columns = (-(-length // part) for length, part in zip(size, window, strict=True))
    x = x.unflatten(2, (window[0], window[1])).unflatten(1, (rows, columns))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if any(shift):
        x = x.roll((shift[0], shift[1]), (1, 2))
    return x[:, : size[0], : size[1]]


def seams(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Which positions of a window are neighbours only through the cyclic shift.

    Args:
        size: height and width of the images, whole windows.
        window: height and width of a window.
        shift: as in `into_windows`.

    Returns:
        (windows, positions, positions), True where they are.
    """
    rows, columns = (_regions(length, part, by) for length, part, by in zip(size, window, shift, strict=True))
    regions = 3 * rows.unsqueeze(1) + columns
    [labels] = into_windows(regions[None, :, :, None], window, (0, 0)).squeeze(-1)  # (windows, positions)
    return labels.unsqueeze(1) != labels.unsqueeze(2)


def _regions(length: int, window: int, shift: int) -> Tensor:
    """Of the positions along a side after the shift: 0 before the last window, 1 in it, 2 wrapped around."""
    position = torch.arange(length)
    if shift == 0:
        return torch.zeros_like(position)
    return (position >= length - window).long() + (position >= length - shift).long()


def _attend_in_windows(
    layer: ThinnedShiftedWindowAttention | ThinnedShiftedWindowAttentionV2, x: Tensor
) -> Tensor:
    window, size = layer.window_size, x.shape[1:3]
    padded = [length + -length % part for length, part in zip(size, window, strict=True)]
    # A window as large as the image has nothing to shift.
    shift = [
        0 if part >= length else by for length, part, by in zip(padded, window, layer.shift_size, strict=True)
    ]
    windows = into_windows(x, window, shift)
    q, k, v = _heads(layer.projected(windows), layer.num_heads, layer.head_dim)
    scores = (
        layer.scores(q, k) + layer.get_relative_position_bias()
    )  # (batch, windows, heads, positions, positions)
    if any(shift):
        apart = seams(padded, window, shift).to(scores)
        scores = scores + _APART * apart.unsqueeze(1)
    weights = F.dropout(scores.softmax(-1), layer.attention_dropout, layer.training)
    result = F.linear(_side_by_side(weights @ v), layer.proj.weight, cast("Tensor | None", layer.proj.bias))
    return out_of_windows(F.dropout(result, layer.dropout, layer.training), window, shift, size)


def _heads(qkv: Tensor, heads: int, width: int) -> list[Tensor]:
    """(..., positions, 3 * heads * width) -> three of (..., heads, positions, width)."""
    return [part.unflatten(-1, (heads, width)).transpose(-2, -3) for part in qkv.chunk(3, -1)]


def _side_by_side(heads: Tensor) -> Tensor:
    """(..., heads, positions, width) -> (..., positions, heads * width)."""
    return heads.transpose(-2, -3).flatten(-2)


def _vision_transformer(module: VisionTransformer, cuts: TensorCuts) -> LayerChange:
    return LayerChange({"hidden_dim": shape_after(module, "class_token", cuts)[-1]})


def _window_attention(module: ShiftedWindowAttention, cuts: TensorCuts) -> LayerChange:
    is_cosine = isinstance(module, ShiftedWindowAttentionV2)
    if is_cosine:
        heads = shape_after(module, "logit_scale", cuts)[0]
    else:
        heads = shape_after(module, "relative_position_bias_table", cuts)[1]
    return LayerChange(
        {"num_heads": heads, "head_dim": module.qkv.weight.shape[0] // (3 * module.num_heads)},
        ThinnedShiftedWindowAttentionV2 if is_cosine else ThinnedShiftedWindowAttention,
    )


def _relative_attention(module: RelativePositionalMultiHeadAttention, cuts: TensorCuts) -> LayerChange:
    heads = shape_after(module, "relative_position_bias_table", cuts)[1]
    return LayerChange({"n_heads": heads}, ThinnedRelativePositionalMultiHeadAttention)


LAYER_RULES: dict[type[nn.Module], Rule] = {
    LayerNorm2d: counting_norm(LayerNorm2d, ThinnedLayerNorm2d),
    VisionTransformer: _vision_transformer,
    ShiftedWindowAttention: _window_attention,
    RelativePositionalMultiHeadAttention: _relative_attention,
}
"""By class of layer what changes; the first class that a module is an instance of counts."""

THINNED_CLASSES: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        ThinnedLayerNorm2d,
        ThinnedRelativePositionalMultiHeadAttention,
        ThinnedShiftedWindowAttention,
        ThinnedShiftedWindowAttentionV2,
    )
}
"""The classes that a recipe may name."""
