"""Weight and bias of a layer with the batch norm behind it folded in, as a parametrization of the weight.

Knows nothing about how weights are quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from distiller.quantization.training.weight_quantizers import OutputChannels

__all__ = ["FoldedParameters", "affine_of", "parameter_quantizer", "sigma_of"]


class FoldedParameters(nn.Module):
    """The parametrization of a layer that a batch norm is folded into: Q(W * gamma / sigma), and the bias.

    Args:
        bn: the batch norm; stays where it is in the model.
        channels: where the output channels are in W.
        quantizer: Q; None for none.
        bias_quantizer: the same for the bias.
    """

    bn: _BatchNorm

    def __init__(
        self,
        bn: _BatchNorm,
        channels: OutputChannels,
        quantizer: Callable[[Tensor], Tensor] | None,
        bias_quantizer: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "bn", bn)  # not registered
        self.channels = channels
        self.quantizer = quantizer
        self.bias_quantizer = bias_quantizer

    def forward(self, weight: Tensor) -> Tensor:
        """The folded weight, quantized."""
        folded = self.folded_weight(weight)
        return folded if self.quantizer is None else self.quantizer(folded)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What a weight that is assigned to the layer becomes: the full-precision one, not folded."""
        return weight

    def folded_weight(self, weight: Tensor) -> Tensor:
        """W * gamma / sigma."""
        gamma, _ = affine_of(self.bn)
        factor = (gamma / sigma_of(self.bn)).to(weight.dtype)
        return weight * self.channels.spread(factor, weight)

    def folded_bias(self, bias: Tensor | None) -> Tensor:
        """beta - gamma * (mu - b) / sigma, quantized."""
        return self.quantized_bias(self.full_bias(bias))

    def full_bias(self, bias: Tensor | None) -> Tensor:
        """The same in full precision."""
        gamma, beta = affine_of(self.bn)
        mean = cast(Tensor, self.bn.running_mean)
        distance = mean if bias is None else mean - bias
        return beta - gamma * distance / sigma_of(self.bn)

    def quantized_bias(self, bias: Tensor) -> Tensor:
        """A folded bias, quantized."""
        return bias if self.bias_quantizer is None else self.bias_quantizer(bias)


def parameter_quantizer(layer: nn.Module, tensor_name: str) -> nn.Module | None:
    """The module that quantizes a parameter of a layer in training, None if none does."""
    if not parametrize.is_parametrized(layer, tensor_name):
        return None
    last = list(getattr(layer.parametrizations, tensor_name))[-1]
    if isinstance(last, FoldedParameters):
        return last.quantizer  # type: ignore[return-value]
    return last if getattr(last, "quantizes", None) == tensor_name else None


def affine_of(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """gamma and beta, (channels,); 1 and 0 where it has none."""
    mean = cast(Tensor, bn.running_mean)
    return (
        torch.ones_like(mean) if bn.weight is None else bn.weight,
        torch.zeros_like(mean) if bn.bias is None else bn.bias,
    )


def sigma_of(bn: _BatchNorm) -> Tensor:
    """sqrt(running variance + eps), (channels,)."""
    return torch.sqrt(cast(Tensor, bn.running_var) + bn.eps)
