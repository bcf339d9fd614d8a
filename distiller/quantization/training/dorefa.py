"""DoReFa-Net: weights through tanh onto [-1, 1], activations clipped to [0, 1], both on evenly spaced values.

    Q_b(x)            round((2^b - 1) * x) / (2^b - 1)
    weight, b bits    2 * Q_b(tanh(W) / (2 * max |tanh W|) + 1/2) - 1
    weight, 1 bit     sign(W) * mean |W|
    activation        Q_b(clamp(x, 0, 1))

Gradients pass straight through the rounding and the sign, and not where activations were clamped.
Gradients are not quantized.
Source: Zhou et al., DoReFa-Net (arXiv 1606.06160), sections 2.2 to 2.4; as in Distiller.
Knows nothing about data or training loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.quantization.quantizer import QBits
from distiller.quantization.training.binary import mean_magnitude, sign_grid, xnor_weight
from distiller.quantization.training.fake_quant import Grid, fake_quantize_ste
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.registry import QUANTIZERS

__all__ = [
    "ClippedLinearQuantization",
    "DorefaQuantizer",
    "DorefaWeightQuantizer",
    "clipped_linear_quantize",
    "dorefa_quantize_weight",
]


def dorefa_quantize_weight(weight: Tensor, num_bits: int) -> Tensor:
    """2 * Q_b(tanh(w) / (2 * max |tanh w|) + 1/2) - 1; with 1 bit sign(w) * mean |w|.

    The values are the odd numbers from -(2^b - 1) to 2^b - 1, divided by 2^b - 1: none is 0. Here a weight
    that is exactly 0 stays 0 nevertheless, so that what was pruned stays pruned, and does not count in the
    mean of 1 bit; with Distiller it became 1 / (2^b - 1), or mean |w|.
    The gradient is that of the formula without the rounding, the maximum included; with 1 bit it passes.

    Args:
        weight: any shape.
        num_bits: b, from 1.

    Source: Zhou et al., arXiv 1606.06160, section 2.3.
    """
    return xnor_weight(weight) if num_bits == 1 else _DorefaWeight.apply(weight, num_bits)


def clipped_linear_quantize(x: Tensor, num_bits: int, clip_val: float = 1.0) -> Tensor:
    """round(n * clamp(x, 0, c) / c) * c / n with n = 2^b - 1; the gradient passes where 0 < x < c.

    Args:
        x: any shape.
        num_bits: b, from 1.
        clip_val: c, above 0.

    Source: Zhou et al., arXiv 1606.06160, equation 5 and section 2.4.
    """
    top = 2**num_bits - 1
    return fake_quantize_ste(x, x.new_full((), clip_val / top), None, 0, top, passes=(0.0, float(top)))


class DorefaWeightQuantizer(nn.Module):
    """`dorefa_quantize_weight` as a parametrization.

    Args:
        num_bits: 1 to 16.
    """

    def __init__(self, num_bits: int) -> None:
        super().__init__()
        self.num_bits = num_bits

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight."""
        return dorefa_quantize_weight(weight, self.num_bits)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What a weight that is assigned to the layer becomes: the full-precision one."""
        return weight

    def weight_grid(self, weight: Tensor) -> Grid:
        """Integers of b + 1 bits, for there are 2^b odd ones and 0; with 1 bit -1, 0 and 1."""
        if self.num_bits == 1:
            return sign_grid(mean_magnitude(weight))
        top = 2**self.num_bits - 1
        return Grid(weight.new_tensor(1 / top), weight.new_tensor(0, dtype=torch.int32), -top, top)

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{self.num_bits} bit{'s' if self.num_bits > 1 else ''}"


class ClippedLinearQuantization(nn.Module):
    """`clipped_linear_quantize` as a module, in the place of a ReLU.

    Args:
        num_bits: 1 to 16.
        clip_val: the largest value, above 0.
    """

    def __init__(self, num_bits: int, clip_val: float = 1.0) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.clip_val = clip_val

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, a new tensor in the shape of x."""
        return clipped_linear_quantize(x, self.num_bits, self.clip_val)

    @property
    def grid(self) -> Grid:
        """The integers from 0 to 2^b - 1."""
        top = 2**self.num_bits - 1
        return Grid(torch.tensor(self.clip_val / top), torch.tensor(0, dtype=torch.int32), 0, top)

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{self.num_bits} bit{'s' if self.num_bits > 1 else ''}, clip {self.clip_val:g}"


@QUANTIZERS.register
class DorefaQuantizer(QatQuantizer):
    """Trains with DoReFa-Net's weights of convolutions, linear layers and embeddings, and outputs of ReLUs.

    Distiller differs: its default width, 32, quantized to 32 bits (here it is full precision); it left ReLU6
    as it was (here it is a ReLU like others); its bias went through the formula of the weights, up to +-1
    (here it is linear over its own range); weights that were exactly 0 became something else.

    Args:
        model: changed in place by `prepare_model`.
        optimizer: of the model; nothing is added to it.
        bits_activations: 1 to 16; 0, None or 32: full precision, the default.
        bits_weights: alike.
        bits_bias: 2 to 23, symmetric over the range of the bias; 0, None, 24 and more: full precision.
        overrides: by layer name or pattern, the bits. The paper leaves the first and the last layer alone.

    Raises:
        QuantizationError: a setting is wrong.
        UnknownNameError: an override matches no layer.
    """

    smallest_bits: ClassVar[QBits] = QBits(1, 1, 2)

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
        """DoReFa-Net's formula."""
        return DorefaWeightQuantizer(bits)

    def activation_replacement(
        self, module: nn.Module, name: str, bits: int, **overrides: Any
    ) -> nn.Module | None:
        """A ReLU clipped to [0, 1]."""
        return ClippedLinearQuantization(bits) if isinstance(module, nn.ReLU | nn.ReLU6) else None


class _DorefaWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, num_bits: int) -> Tensor:
        top = 2**num_bits - 1
        squashed = torch.tanh(weight)
        largest = squashed.abs().amax()
        largest = largest + (largest == 0).to(largest.dtype)
        ctx.save_for_backward(squashed, largest)
        odd = squashed.div(2 * largest).add_(0.5).mul_(top).round_().mul_(2).sub_(top)
        is_nonzero = weight.sign().abs_()  # in the weight's own type, booleans are slow on CPUs
        return odd.div_(top).mul_(is_nonzero)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        squashed, largest = ctx.saved_tensors
        unit = squashed / largest  # y = t / max |t|, of which the largest t have two derivatives
        ends = torch.trunc(unit)  # +-1 there, 0 elsewhere
        share = (grads[0] * unit).sum() / ends.abs().sum().clamp_min(1)
        grad = torch.ops.aten.tanh_backward(grads[0] - ends * share, squashed)
        return grad.div_(largest), None
