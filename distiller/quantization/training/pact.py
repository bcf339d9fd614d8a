"""PACT: activations clipped at a value that is learned, on evenly spaced values; weights as DoReFa-Net's.

    y           (|x| - |x - alpha| + alpha) / 2, which is clamp(x, 0, alpha)
    y_q         round(y * n / alpha) * alpha / n, where n = 2^b - 1
    gradient    of x: 1 where 0 < x < alpha, else 0;  of alpha: 1 where x >= alpha, else 0

Source: Choi et al., PACT: Parameterized Clipping Activation for Quantized Neural Networks (arXiv 1805.06085),
equations 1 to 3; as in Distiller.
Knows nothing about data or training loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.errors import QuantizationError
from distiller.quantization.quantizer import QBits
from distiller.quantization.training.dorefa import DorefaWeightQuantizer
from distiller.quantization.training.fake_quant import Grid
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.registry import QUANTIZERS

__all__ = ["LearnedClippedLinearQuantization", "PACTQuantizer", "pact_quantize"]


def pact_quantize(x: Tensor, clip_val: Tensor, num_bits: int) -> Tensor:
    """round(n * clamp(x, 0, alpha) / alpha) * alpha / n with n = 2^b - 1, with gradients for x and for alpha.

    Args:
        x: any shape.
        clip_val: alpha, scalar. If it is not above 0, the smallest positive number is in its place, and its
            gradient goes on.
        num_bits: b, from 1.

    Source: Choi et al., arXiv 1805.06085, equations 1 to 3.
    """
    return _Clipped.apply(x, clip_val, 2**num_bits - 1)


class LearnedClippedLinearQuantization(nn.Module):
    """`pact_quantize` as a module, in the place of a ReLU.

    Args:
        num_bits: 1 to 16.
        init_act_clip_val: alpha in the beginning, above 0.

    Attributes:
        clip_val: alpha, a scalar parameter.
    """

    def __init__(self, num_bits: int, init_act_clip_val: float = 8.0) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.clip_val = nn.Parameter(torch.tensor(float(init_act_clip_val)))

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, a new tensor in the shape of x."""
        return pact_quantize(x, self.clip_val, self.num_bits)

    @property
    def grid(self) -> Grid:
        """The integers from 0 to 2^b - 1."""
        top = 2**self.num_bits - 1
        scale = _positive(self.clip_val, torch.float32) / top
        return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), 0, top)

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{self.num_bits} bit{'s' if self.num_bits > 1 else ''}"


@QUANTIZERS.register
class PACTQuantizer(QatQuantizer):
    """Trains with outputs of ReLUs and ReLU6s clipped at learned values, and DoReFa-Net's weights.

    The clipping values are in a group of their own in the optimizer, with the learning rate of its first
    group. Distiller differs: its default width, 32, quantized to 32 bits (here it is full precision); it left
    ReLU6 as it was (here it begins with 6 where `act_clip_init_val` is more); its checkpoints did not load;
    on weights and biases see `DorefaQuantizer`.

    Args:
        model: changed in place by `prepare_model`.
        optimizer: of the model; the clipping values are added to it.
        bits_activations: 1 to 16; 0, None or 32: full precision, the default.
        bits_weights: alike.
        bits_bias: 2 to 23, symmetric over the range of the bias; 0, None, 24 and more: full precision.
        overrides: by layer name or pattern, the bits. The paper leaves the first and the last layer alone.
        act_clip_init_val: the clipping values in the beginning, above 0.
        act_clip_decay: their weight decay, from 0; None: that of the optimizer, as in the paper.

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
        act_clip_init_val: float = 8.0,
        act_clip_decay: float | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            bits_activations=bits_activations,
            bits_weights=bits_weights,
            bits_bias=bits_bias,
            overrides=overrides,
        )
        if not _is_number(act_clip_init_val) or not 0 < act_clip_init_val < math.inf:
            raise QuantizationError(f"act_clip_init_val: must be a number above 0, got {act_clip_init_val!r}")
        if act_clip_decay is not None and (
            not _is_number(act_clip_decay) or not 0 <= act_clip_decay < math.inf
        ):
            raise QuantizationError(
                "act_clip_decay: must be a number from 0, or null for that of the optimizer, "
                f"got {act_clip_decay!r}"
            )
        if act_clip_decay is not None and optimizer is not None and "weight_decay" not in optimizer.defaults:
            raise QuantizationError(
                f"act_clip_decay: {type(optimizer).__name__} has no weight decay; leave it out"
            )
        self.act_clip_init_val = float(act_clip_init_val)
        self.act_clip_decay = None if act_clip_decay is None else float(act_clip_decay)

    def weight_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module:
        """DoReFa-Net's formula."""
        return DorefaWeightQuantizer(bits)

    def activation_replacement(
        self, module: nn.Module, name: str, bits: int, **overrides: Any
    ) -> nn.Module | None:
        """A ReLU with a learned clipping value."""
        if isinstance(module, nn.ReLU6):
            return LearnedClippedLinearQuantization(bits, min(self.act_clip_init_val, module.max_val))
        if isinstance(module, nn.ReLU):
            return LearnedClippedLinearQuantization(bits, self.act_clip_init_val)
        return None

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """One group of all clipping values."""
        groups = super().optimizer_groups()
        for group in groups:
            if self.optimizer is not None:
                group["lr"] = self.optimizer.param_groups[0]["lr"]
            if self.act_clip_decay is not None:
                group["weight_decay"] = self.act_clip_decay
        return groups

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except model and optimizer, as plain data."""
        return {
            **super().settings(),
            "act_clip_init_val": self.act_clip_init_val,
            "act_clip_decay": self.act_clip_decay,
        }


def _positive(clip_val: Tensor, dtype: torch.dtype) -> Tensor:
    return clip_val.detach().to(dtype).clamp_min(torch.finfo(dtype).tiny)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_val: Tensor, top: int) -> Tensor:
        clip = _positive(clip_val, x.dtype)
        share = x / clip  # at least 1 exactly where x >= alpha, whatever the rounding
        ctx.save_for_backward(share)
        ctx.clip_dtype = clip_val.dtype
        return share.clamp(0, 1).mul_(top).round_().mul_(clip / top)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (share,) = grads[0], ctx.saved_tensors
        below_one = 1 - torch.finfo(share.dtype).eps / 2  # the kernel wants more than it
        clipped = torch.ops.aten.threshold_backward(grad, share, below_one)
        grad_clip = clipped.sum(dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.clip_dtype)
        return torch.ops.aten.hardtanh_backward(grad, share, 0.0, 1.0), grad_clip, None
