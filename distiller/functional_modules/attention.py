"""Attention made of modules that quantizers, statistics and pruners see one by one.

    weights = softmax(scale * q k^T + mask);   output = weights v

A masked position's score is minus infinity, and a mask is no activation: scale and mask are the softmax
module's own affair, and what is measured and quantized are the products.
Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distiller.errors import UsageError
from distiller.modules import BatchMatmul, Matmul

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class MaskedSoftmax(nn.Softmax):
    """Softmax over the last dimension of scaled scores, some of them masked.

    Args:
        scale: what the scores are multiplied by.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(dim=-1)
        self.scale = scale

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """`softmax(scale * input + mask)`, (..., queries, keys).

        Args:
            input: scores.
            mask: added to the scaled scores, minus infinity where a position is not to be attended to.
        """
        scores = input * self.scale
        return super().forward(scores if mask is None else scores + mask)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"dim={self.dim}, scale={self.scale:.6g}"


class ScaledDotProductAttention(nn.Module):
    """`torch.nn.functional.scaled_dot_product_attention` without dropout, as modules.

    Within 1e-6 of it, relative to the largest value.

    Args:
        scale: what q k^T is multiplied by.
        is_causal: whether a query sees only the keys up to its own position; default False.
    """

    def __init__(self, scale: float, is_causal: bool = False) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.scores = Matmul()
        self.softmax = MaskedSoftmax(scale)
        self.context = Matmul()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Shapes (..., queries, d), (..., keys, d), (..., keys, e) -> (..., queries, e).

        Args:
            query: the queries.
            key: the keys.
            value: the values.
            attn_mask: True where a query attends to a key; or numbers that are added to the scores.
        """
        if self.is_causal:
            attn_mask = torch.ones(
                query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
            ).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        mask = None if attn_mask is None else _added(attn_mask, query.dtype)
        return self.context(self.softmax(self.scores(query, key.transpose(-2, -1)), mask=mask), value)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"is_causal={self.is_causal}"


class DecomposedAttention(nn.Module):
    """What an nn.MultiheadAttention computes, made of linear layers, matrix products and a softmax.

    Takes the same arguments and gives the same results, within 1e-6 relative to the largest value. The
    keys of its `state_dict` are others: `q_proj.weight`, `k_proj.weight`, `v_proj.weight` and their biases
    in place of `in_proj_weight` and `in_proj_bias`; `load_state_dict` takes either. The parameters split
    off these two are new, the others the attention's own: make the optimizer afterwards.

    Args:
        attention: without `add_bias_kv` and `add_zero_attn`, its parameters not parametrized.

    Raises:
        UsageError: it has one of these.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    # What nn.TransformerEncoderLayer asks before it takes PyTorch's fused kernel, past the modules.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        reason = why_not_decomposed(attention)
        if reason is not None:
            raise UsageError(f"DecomposedAttention: the attention {reason}; leave it as it is")
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.head_dim, self.batch_first = attention.head_dim, attention.batch_first
        parameters = self.from_attention(dict(attention.named_parameters()))
        self.q_proj = _linear("q_proj", parameters)
        self.k_proj = _linear("k_proj", parameters)
        self.v_proj = _linear("v_proj", parameters)
        self.out_proj = _linear("out_proj", parameters)
        self.scores = BatchMatmul()
        self.softmax = MaskedSoftmax(self.head_dim**-0.5)
        self.dropout = nn.Dropout(attention.dropout)
        self.context = BatchMatmul()
        self.train(attention.training)

    @staticmethod
    def from_attention(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """The state of an nn.MultiheadAttention under the names that it has here.

        Args:
            state: a `state_dict`, or parameters by name; what is not of the attention stays as it is.
            prefix: what the names of the attention's parameters begin with, as `encoder.self_attention.`.
        """
        named: dict[str, Tensor] = {}
        for key, value in state.items():
            name = key.removeprefix(prefix) if key.startswith(prefix) else ""
            if name in ("in_proj_weight", "in_proj_bias"):
                kind = name.rpartition("_")[2]
                parts = zip(_PROJECTIONS, value.chunk(3), strict=True)
                named.update((f"{prefix}{projection}.{kind}", part) for projection, part in parts)
            elif name.endswith("_proj_weight"):
                named[f"{prefix}{name.removesuffix('_weight')}.weight"] = value
            else:
                named[key] = value
        return named

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
        """The attended values, and the weights where they are wanted.

        Args:
            query: (L, N, embed_dim), with `batch_first` (N, L, embed_dim), or without a batch (L, embed_dim).
            key: alike, with S in place of L and `kdim` features.
            value: alike, with S in place of L and `vdim` features.
            key_padding_mask: (N, S) or (S): True where a key is not attended to, or numbers that are added.
            need_weights: whether the weights are returned too; default True.
            attn_mask: (L, S) or (N * heads, L, S): True where a query does not attend to a key, or numbers
                that are added to the scores.
            average_attn_weights: return the mean of the weights over the heads; default True.
            is_causal: says of `attn_mask` that it is causal, which makes no difference here.

        Returns:
            (output of the query's shape; weights (N, L, S), or (N, heads, L, S) without average, or None).

        Raises:
            UsageError: `is_causal` without `attn_mask`.
        """
        if is_causal and attn_mask is None:
            raise UsageError(
                "DecomposedAttention: is_causal says of attn_mask what it is like, got no attn_mask"
            )
        is_batched = query.dim() == 3
        heads = [
            self._heads(projection(_batch_first(x, is_batched, self.batch_first)))
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        ]
        mask = self._mask(attn_mask, key_padding_mask, query.dtype)
        weights = self.dropout(self.softmax(self.scores(heads[0], heads[1].transpose(1, 2)), mask=mask))
        context = self.context(weights, heads[2])  # (N * heads, L, head_dim)
        context = context.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2)
        output = self.out_proj(context)  # (N, L, embed_dim)
        if not is_batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        weights = weights.unflatten(0, (-1, self.num_heads))
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return output, weights if is_batched else weights.squeeze(0)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"num_heads={self.num_heads}, batch_first={self.batch_first}"

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, embed_dim) -> (N * heads, L, head_dim)."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2).flatten(0, 1)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """What is added to the scores, of a shape that broadcasts to (N * heads, L, S)."""
        mask = None if attn_mask is None else _added(attn_mask, dtype)
        if key_padding_mask is None:
            return mask
        padding = _added(key_padding_mask, dtype)
        padding = (padding if padding.dim() == 2 else padding.unsqueeze(0)).unsqueeze(1)  # (N, 1, S)
        padding = padding.repeat_interleave(self.num_heads, dim=0)
        return padding if mask is None else mask + padding

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        state_dict.update(self.from_attention(own, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


def why_not_decomposed(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention cannot be decomposed, in words that follow its name; None if it can."""
    if type(attention).forward is not nn.MultiheadAttention.forward or "forward" in vars(attention):
        return "has a forward of its own"
    if attention.bias_k is not None:
        return "attends to a learned key too (add_bias_kv)"
    if attention.add_zero_attn:
        return "attends to a key of zeros too (add_zero_attn)"
    if any(parametrize.is_parametrized(part) for part in attention.modules()):
        return "has parametrized weights"
    return None


def _linear(name: str, parameters: Mapping[str, Tensor]) -> nn.Linear:
    """A layer with its parameters: themselves, or copies of what was split off one."""
    weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _own(weight)
    layer.bias = None if bias is None else _own(bias)  # type: ignore[assignment]
    return layer


def _own(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)


def _batch_first(x: Tensor, is_batched: bool, is_batch_first: bool) -> Tensor:
    if not is_batched:
        return x.unsqueeze(0)
    return x if is_batch_first else x.transpose(0, 1)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, True where a position is masked, as numbers that are added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
