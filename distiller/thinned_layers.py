"""Layers whose own arithmetic or code counts their channels, after channels were removed.

    layer norm, RMS norm    statistics go on counting the removed channels, which were zero
    attention               fewer heads than the width of its input has room for

Each is a subclass of the layer that it takes the place of, has the same parameters, and computes what that
layer did with the removed channels at zero. Thinning turns a layer into one in place (`__class__`).
Knows nothing about which channels are removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.errors import UsageError

__all__ = [
    "COUNTING_NORMS",
    "ThinnedLayerNorm",
    "ThinnedMultiheadAttention",
    "ThinnedRMSNorm",
    "zero_counting_layer_norm",
]


def zero_counting_layer_norm(
    x: Tensor, dims: Sequence[int], counted: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Layer norm over `counted` elements of which only those in `x` are not zero.

        mean = sum(x) / counted
        var = sum(x^2) / counted - mean^2, taken as (sum((x - mean)^2) + (counted - n) mean^2) / counted
        y = (x - mean) / sqrt(var + eps) * weight + bias

    Args:
        x: any shape; n elements along `dims` together.
        dims: the dimensions that statistics are taken over.
        counted: at least n.
        weight: scale, of a shape that broadcasts with `x`; None: 1.
        bias: shift, likewise; None: 0.
        eps: added to the variance.
    """
    dims = [dim % x.dim() for dim in dims]
    n = math.prod(x.shape[dim] for dim in dims)
    mean = x.sum(dims, keepdim=True) / counted
    centred = x - mean
    var = (centred.square().sum(dims, keepdim=True) + (counted - n) * mean.square()) / counted
    y = centred * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


class ThinnedLayerNorm(nn.LayerNorm):
    """Layer norm that goes on counting removed channels as zeros.

    Attributes:
        counted: how many elements the statistics are taken over, removed ones included.
    """

    counted: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last dimensions of `input`, as many as `normalized_shape` has."""
        dims = range(-len(self.normalized_shape), 0)
        return zero_counting_layer_norm(input, list(dims), self.counted, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"{super().extra_repr()}, counted={self.counted}"


class ThinnedRMSNorm(nn.RMSNorm):
    """RMS norm that goes on counting removed channels as zeros.

        y = x / sqrt(sum(x^2) / counted + eps) * weight

    Attributes:
        counted: how many elements the mean square is taken over, removed ones included.
    """

    counted: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last dimensions of `input`, as many as `normalized_shape` has."""
        dims = list(range(-len(self.normalized_shape), 0))
        eps = torch.finfo(input.dtype).eps if self.eps is None else self.eps
        y = input * torch.rsqrt(input.square().sum(dims, keepdim=True) / self.counted + eps)
        return y if self.weight is None else y * self.weight

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"{super().extra_repr()}, counted={self.counted}"


class ThinnedMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention whose heads together may be narrower than its input.

    PyTorch's own takes the width of the input, of the heads together and of the output for one number.

    Attributes:
        num_heads: heads that are left.
        head_dim: width of each, as before.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: the same arguments, shapes and results.

        Raises:
            UsageError: `is_causal`, which is a hint about `attn_mask`, without one.
        """
        if is_causal and attn_mask is None:
            raise UsageError("attention: is_causal says what attn_mask is, got no attn_mask; give it too")
        is_batched = query.dim() == 3
        projected = self._projected(query, key, value)
        if not is_batched:
            projected = [x.unsqueeze(0 if self.batch_first else 1) for x in projected]
        if not self.batch_first:
            projected = [x.transpose(0, 1) for x in projected]
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (N, heads, length, head_dim)
            for x in projected
        )
        bias = _attention_bias(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if bias is None else scores + bias).softmax(-1), dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        result = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not self.batch_first:
            result = result.transpose(0, 1)
        if not is_batched:
            result = result.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        if weights is not None and average_attn_weights:
            weights = weights.mean(-3)
        return result, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        if self.in_proj_weight is not None and query is key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self.in_proj_weight is not None:
            weights: Sequence[Tensor] = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Sequence[Any] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


COUNTING_NORMS = (ThinnedLayerNorm, ThinnedRMSNorm)
"""The norms that count removed channels."""


def _attention_bias(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> Tensor | None:
    """What is added to the scores, (N, heads or 1, queries, keys): -inf where a mask is True."""
    parts = []
    if attn_mask is not None:
        if attn_mask.dim() == 3:  # (N * heads, queries, keys)
            attn_mask = attn_mask.view(q.shape[0], -1, *attn_mask.shape[1:])
        parts.append(attn_mask)
    if key_padding_mask is not None:
        parts.append(key_padding_mask.view(-1, 1, 1, k.shape[-2]))
    total: Tensor | None = None
    for part in parts:
        if part.dtype == torch.bool:
            part = torch.zeros_like(part, dtype=q.dtype).masked_fill(part, -math.inf)
        total = part if total is None else total + part
    return total
