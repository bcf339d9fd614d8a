"""WRPN: weights clipped to [-1, 1], activations to [0, 1], both on evenly spaced values.

    weight        round(n * clamp(W, -1, 1)) / n,    n = (2^b - 1) / 2
    activation    round(m * clamp(x, 0, 1)) / m,     m = 2^b - 1

Gradients pass straight through the rounding, and not where a value was clipped. Networks are made wider by
whoever makes them, not here.
Source: Mishra et al., WRPN: Wide Reduced-Precision Networks, ICLR 2018 (arXiv 1709.01134); as Distiller
computed it.
Knows nothing about data or training loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.quantizer import QBits
from distiller.quantization.training.dorefa import ClippedLinearQuantization
from distiller.quantization.training.fake_quant import Grid, fake_quantize_ste
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.registry import QUANTIZERS

__all__ = ["WRPNQuantizer", "WrpnWeightQuantizer", "wrpn_quantize_weight"]

_MODE = LinearQuantMode.SYMMETRIC


def wrpn_quantize_weight(weight: Tensor, num_bits: int) -> Tensor:
    """round(n * clamp(w, -1, 1)) / n with n = (2^b - 1) / 2, the integers from -2^(b-1) to 2^(b-1) - 1.

    The gradient passes where -1 < w < 1. The paper has n = 2^(b-1) - 1; this is what Distiller computed, but
    for weights of 1 and more: they became 2^(b-1) / n, an integer beyond b bits; here they are one step less.

    Args:
        weight: any shape.
        num_bits: b, from 2: with 1 bit all weights would be 0.

    Source: Mishra et al., arXiv 1709.01134.
    """
    steps = affine.steps(num_bits, _MODE)
    scale = weight.new_full((), 1 / steps)
    qmin, qmax = affine.quantized_range(num_bits, _MODE)
    return fake_quantize_ste(weight, scale, None, qmin, qmax, passes=(-steps, steps))


class WrpnWeightQuantizer(nn.Module):
    """`wrpn_quantize_weight` as a parametrization.

    Args:
        num_bits: 2 to 16.
    """

    def __init__(self, num_bits: int) -> None:
        super().__init__()
        self.num_bits = num_bits

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight."""
        return wrpn_quantize_weight(weight, self.num_bits)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What a weight that is assigned to the layer becomes: the full-precision one."""
        return weight

    def weight_grid(self, weight: Tensor) -> Grid:
        """The grid that a full-precision weight is rounded to."""
        scale = weight.new_tensor(1 / affine.steps(self.num_bits, _MODE))
        zero_point = weight.new_tensor(0, dtype=torch.int32)
        return Grid(scale, zero_point, *affine.quantized_range(self.num_bits, _MODE))

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{self.num_bits} bits"


@QUANTIZERS.register
class WRPNQuantizer(QatQuantizer):
    """Trains with WRPN's weights of convolutions, linear layers and embeddings, and outputs of ReLUs.

    Weights below 1 / (2^b - 1) in size become 0: all of a layer's, if they are small and the bits few, and
    such a layer learns nothing. Begin with a trained model, and leave a layer more bits where that happens.
    Distiller differs: its default width, 32, quantized to 32 bits (here it is full precision); it left ReLU6
    as it was (here it is a ReLU like others); weights of 1 and more became an integer beyond b bits; its
    bias was clipped to [-1, 1] (here it is linear over its own range); 1 bit made all weights 0 (it is
    refused).

    Args:
        model: changed in place by `prepare_model`.
        optimizer: of the model; nothing is added to it.
        bits_activations: 1 to 16; 0, None or 32: full precision, the default.
        bits_weights: 2 to 16; alike.
        bits_bias: 2 to 23, symmetric over the range of the bias; 0, None, 24 and more: full precision.
        overrides: by layer name or pattern, the bits.

    Raises:
        QuantizationError: a setting is wrong.
        UnknownNameError: an override matches no layer.
    """

    smallest_bits: ClassVar[QBits] = QBits(1, 2, 2)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        bits_activations: int | None = None,
        bits_weights: int | None = None,
        bits_bias: int | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            bits_activations=bits_activations,
            bits_weights=bits_weights,
            bits_bias=bits_bias,
            overrides=overrides,
        )

    def weight_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module:
        """WRPN's formula."""
        return WrpnWeightQuantizer(bits)

    def activation_replacement(
        self, module: nn.Module, name: str, bits: int, **overrides: Any
    ) -> nn.Module | None:
        """A ReLU clipped to [0, 1]."""
        return ClippedLinearQuantization(bits) if isinstance(module, nn.ReLU | nn.ReLU6) else None
