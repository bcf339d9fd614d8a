"""Factored layers: two or three ordinary layers in the place of one, and the one again.

    svd, channel, spatial    `first`, `second`
    tucker2                  `first`, `core`, `last`
    plus sparse              `first`, `second`, `sparse`: second(first(x)) + sparse(x)

The last of a chain has the bias, which stays the same parameter. Padding, stride and dilation go to the layer
that has the kernel (of a `spatial` form, each direction to its own).
Knows nothing about models, or how ranks are chosen.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from distiller.factorization.decompositions import (
    channel_svd,
    low_rank_plus_sparse,
    spatial_svd,
    truncated_svd,
    tucker2,
    whitened_svd,
)
from distiller.factorization.forms import Form, Rank

__all__ = ["LowRankPlusSparse", "children_of", "composed", "factored", "set_weights"]

_CHILDREN: dict[str, tuple[str, ...]] = {"tucker2": ("first", "core", "last")}


class LowRankPlusSparse(nn.Module):
    """A product of two layers plus a third whose weight is mostly zeros.

    Args:
        first: n channels to r.
        second: r channels to m, with the bias.
        sparse: n channels to m, without bias. Its zeros stay as long as a mask keeps them.
    """

    def __init__(self, first: nn.Module, second: nn.Module, sparse: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.sparse = sparse
        self.second = second  # last: where the one layer had its bias behind its weight, so has this

    def forward(self, x: Tensor) -> Tensor:
        """second(first(x)) + sparse(x)."""
        return self.second(self.first(x)) + self.sparse(x)


def children_of(form: Form, is_sparse: bool = False) -> tuple[str, ...]:
    """The names of a factored layer's children, in the order in which they run."""
    return _CHILDREN.get(form, ("first", "second")) + (("sparse",) if is_sparse else ())


def factored(layer: nn.Module, form: Form, rank: Rank, is_sparse: bool = False) -> nn.Module:
    """The layers that take the place of one: weights are zero, the bias is the layer's own.

    Args:
        layer: one that `forms.refusal` has nothing against.
        form: the form.
        rank: within the layer's.
        is_sparse: whether a sparse layer of the whole shape is added.
    """
    if isinstance(layer, nn.Linear):
        parts: list[nn.Module] = [
            _linear(layer, layer.in_features, rank[0]),
            _linear(layer, rank[0], layer.out_features),
        ]
        extra = _linear(layer, layer.in_features, layer.out_features) if is_sparse else None
    else:
        assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
        parts = _convolutions(layer, form, rank)
        extra = _convolution(layer, layer.in_channels, layer.out_channels) if is_sparse else None
    last: Any = parts[-1]
    last.bias = layer.bias
    if extra is not None:
        result: nn.Module = LowRankPlusSparse(parts[0], parts[1], extra)
    else:
        result = nn.Sequential(OrderedDict(zip(children_of(form), parts, strict=True)))
    for name, param in result.named_parameters():
        if not name.endswith("bias"):
            param.requires_grad_(layer.weight.requires_grad)
    return result.train(layer.training)


def set_weights(
    module: nn.Module,
    weight: Tensor,
    form: Form,
    moments: Tensor | None = None,
    nonzeros: int | None = None,
) -> None:
    """Give a factored layer the weights that are nearest to the whole one's.

    Args:
        module: as `factored` made it.
        weight: of the layer that it takes the place of.
        form: its form.
        moments: of the layer's inputs, for `svd` and `channel`; the error is then least on these.
        nonzeros: of the sparse layer; None: there is none.
    """
    parts: Any = module
    ranks = [parts.first.weight.shape[0]]
    if form == "tucker2":
        weights: tuple[Tensor, ...] = tucker2(weight, ranks[0], parts.core.weight.shape[0])
    elif nonzeros is not None:
        left, right, sparse = low_rank_plus_sparse(weight.flatten(1), ranks[0], nonzeros)
        weights = (right, left, sparse)
    elif form == "spatial":
        weights = spatial_svd(weight, ranks[0])
    elif form == "channel":
        weights = channel_svd(weight, ranks[0], moments)
    else:
        pair = truncated_svd(weight, ranks[0]) if moments is None else whitened_svd(weight, ranks[0], moments)
        weights = pair[::-1]
    with torch.no_grad():
        for name, value in zip(children_of(form, nonzeros is not None), weights, strict=True):
            param = getattr(parts, name).weight
            param.copy_(value.reshape(param.shape))


def composed(module: nn.Module, form: Form) -> nn.Module:
    """The one layer that computes what a factored one does; its bias is the factored one's own."""
    parts: Any = module
    first, last = parts.first, getattr(parts, children_of(form)[-1])
    left, right = last.weight.detach(), first.weight.detach()
    if isinstance(first, nn.Linear):
        layer: nn.Linear | nn.Conv1d | nn.Conv2d = _linear(first, first.in_features, last.out_features)
        weight = left @ right
    elif form == "spatial":
        kernel = (first.kernel_size[0], last.kernel_size[1])
        layer = _convolution(
            first,
            first.in_channels,
            last.out_channels,
            kernel_size=kernel,
            stride=(first.stride[0], last.stride[1]),
            padding=_either_padding(first.padding, last.padding),
            dilation=(first.dilation[0], last.dilation[1]),
        )
        weight = torch.einsum("rni,mrj->mnij", right[..., 0], left[:, :, 0])
    else:
        kernel_layer = parts.core if form == "tucker2" else first
        layer = _convolution(kernel_layer, first.in_channels, last.out_channels)
        core = kernel_layer.weight.detach()
        weight = torch.einsum("mr,rn...->mn...", left.flatten(1), core)
        if form == "tucker2":
            weight = torch.einsum("ma...,an->mn...", weight, right.flatten(1))
    if isinstance(module, LowRankPlusSparse):
        weight = weight + parts.sparse.weight.detach()
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.weight.requires_grad_(first.weight.requires_grad)
    layer.bias = last.bias
    return layer.train(module.training)


def _linear(like: nn.Linear, n: int, m: int) -> nn.Linear:
    layer = nn.Linear(n, m, bias=False, device="meta", dtype=like.weight.dtype)
    return _zeroed(layer, like.weight)


def _convolution(like: nn.Conv1d | nn.Conv2d, n: int, m: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        name: getattr(like, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    layer = type(like)(n, m, bias=False, device="meta", dtype=like.weight.dtype, **{**settings, **changes})
    return _zeroed(layer, like.weight)


def _zeroed(layer: Any, like: Tensor) -> Any:
    """The layer with a weight of zeros where, and laid out as, another is; no random number is drawn."""
    layer = layer.to_empty(device=like.device)
    if like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        layer = layer.to(memory_format=torch.channels_last)
    with torch.no_grad():
        layer.weight.zero_()
    return layer


def _convolutions(layer: nn.Conv1d | nn.Conv2d, form: Form, rank: Rank) -> list[nn.Module]:
    n, m, dims = layer.in_channels, layer.out_channels, layer.weight.dim() - 2
    plain: dict[str, Any] = {
        "kernel_size": (1,) * dims,
        "stride": (1,) * dims,
        "padding": (0,) * dims,
        "dilation": (1,) * dims,
        "padding_mode": "zeros",
    }
    if form == "tucker2":
        into, out = rank
        return [
            _convolution(layer, n, into, **plain),
            _convolution(layer, into, out),
            _convolution(layer, out, m, **plain),
        ]
    if form == "channel":
        return [_convolution(layer, n, rank[0]), _convolution(layer, rank[0], m, **plain)]
    return [
        _convolution(layer, n, rank[0], **_one_direction(layer, 0)),
        _convolution(layer, rank[0], m, **_one_direction(layer, 1)),
    ]


def _one_direction(layer: Any, axis: int) -> dict[str, Any]:
    """The settings of a convolution along one axis of two alone."""

    def along(values: Any, other: int) -> Any:
        return (
            values
            if isinstance(values, str)
            else tuple(value if index == axis else other for index, value in enumerate(values))
        )

    return {
        "kernel_size": along(layer.kernel_size, 1),
        "stride": along(layer.stride, 1),
        "padding": along(layer.padding, 0),
        "dilation": along(layer.dilation, 1),
    }


def _either_padding(first: Any, last: Any) -> Any:
    return first if isinstance(first, str) else (first[0], last[1])
