"""Activations of one bit: their signs, and layers that multiply what they make of them by the magnitude lost.

Knows nothing about weights, or about which layers of a model have binary inputs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller.quantization.training.attachments import INPUT_QUANTIZER

__all__ = [
    "BinaryActivations",
    "HandedOn",
    "binary_sign",
    "gradient_within_one",
    "has_scaled_form",
    "make_scaled",
    "xnor_activation_scale",
]


def binary_sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1; the gradient of hard tanh: it passes where |x| <= 1.

    Source: Courbariaux et al., BinaryNet (arXiv 1602.02830), section 1.
    """
    return _BinarySign.apply(x)


def xnor_activation_scale(x: Tensor, layer: nn.Module) -> Tensor:
    """K: the mean of |x| over what each output of a layer sees; no gradient passes.

    A convolution in groups has it for each group, of the channels in it. Padding counts as it is padded.

    Args:
        x: the layer's input before it is binary.
        layer: `Conv1d` to `Conv3d`, or `Linear`.

    Returns:
        Of a shape that broadcasts with the layer's output.

    Source: Rastegari et al., XNOR-Net (arXiv 1603.05279), section 3.2.
    """
    magnitude = x.detach().abs()
    if isinstance(layer, nn.Linear):
        return magnitude.mean(-1, keepdim=True)
    conv = cast(Any, layer)
    channel_dim = x.dim() - len(conv.kernel_size) - 1  # the batch may be left out
    magnitude = magnitude.unflatten(channel_dim, (conv.groups, -1)).mean(channel_dim + 1)
    kernel = x.new_ones(conv.groups, 1, *conv.kernel_size)
    scale = conv._conv_forward(magnitude, kernel / kernel[0].numel(), None)
    if conv.groups == 1:
        return scale
    return scale.repeat_interleave(conv.out_channels // conv.groups, channel_dim)


class BinaryActivations(nn.Module):
    """`binary_sign` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """+1 and -1, in the shape of x."""
        return binary_sign(x)


class HandedOn(nn.Module):
    """Hands on its input, in the place of a ReLU: after that all signs would be +1."""

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


def has_scaled_form(layer: nn.Module) -> bool:
    """Whether `make_scaled` takes it: a plain convolution (1d to 3d) or linear layer."""
    return type(layer) in _SCALED


def make_scaled(layer: nn.Module) -> None:
    """Make a layer compute K * layer(signs of its input) + bias.

    It keeps its parameters and their names. The signs are its child `input_quantizer`'s, to be added.
    """
    layer.__class__ = _SCALED[type(layer)]


def gradient_within_one(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient where -1 <= x <= 1, 0 elsewhere."""
    beyond = 1 + torch.finfo(x.dtype).eps  # the kernel leaves the ends out
    return torch.ops.aten.hardtanh_backward(grad, x, -beyond, beyond)


class _Scaled(nn.Module):
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = self._run(getattr(self, INPUT_QUANTIZER)(x)) * xnor_activation_scale(x, self)
        if self.bias is None:
            return y
        spatial = len(getattr(self, "kernel_size", ()))
        return y + self.bias.reshape(-1, *[1] * spatial)

    def _run(self, x: Tensor) -> Tensor:
        """The layer's operation without its bias."""
        raise NotImplementedError


class _ScaledConv(_Scaled):
    def _run(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, None)  # type: ignore[operator]


class _ScaledConv1d(_ScaledConv, nn.Conv1d): ...


class _ScaledConv2d(_ScaledConv, nn.Conv2d): ...


class _ScaledConv3d(_ScaledConv, nn.Conv3d): ...


class _ScaledLinear(_Scaled, nn.Linear):
    def _run(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


_SCALED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: _ScaledConv1d,
    nn.Conv2d: _ScaledConv2d,
    nn.Conv3d: _ScaledConv3d,
    nn.Linear: _ScaledLinear,
}


class _BinarySign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign().add_(0.5).sign_()  # comparisons and `where` take many times as long on CPUs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return gradient_within_one(grads[0], *ctx.saved_tensors)
