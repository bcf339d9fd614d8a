"""Ternary weights: a negative value, zero, and a positive one.

    TWN    s * sign(W) where |W| > D, else 0        D = 0.7 * mean |W|,  s = mean |W| of those above D
    TTQ    P where W > D, -N where W < -D, else 0   D = 0.05 * max |W|,  P and N are learned

Gradients of TWN pass unchanged; those of TTQ times P, 1 or N, whichever it is of.
Source: Li and Liu, Ternary Weight Networks (arXiv 1605.04711); Zhu et al., Trained Ternary Quantization, ICLR
2017 (arXiv 1612.01064).
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
from distiller.quantization.training.binary import check_flags, check_widths, mean_magnitude, sign_grid
from distiller.quantization.training.fake_quant import Grid
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.quantization.training.weight_quantizers import OutputChannels
from distiller.registry import QUANTIZERS

__all__ = [
    "LearnedTernaryWeights",
    "TernaryQuantizer",
    "TernaryWeightQuantizer",
    "initial_ternary_scales",
    "ttq_weight",
    "twn_weight",
]

TWN_THRESHOLD, TTQ_THRESHOLD = 0.7, 0.05
"""The papers' thresholds, in units of mean |W| and of max |W|."""


def twn_weight(
    weight: Tensor, threshold: float = TWN_THRESHOLD, channels: OutputChannels | None = None
) -> Tensor:
    """s * sign(w) where |w| > D, else 0; the gradient passes unchanged.

    D = threshold * mean |w| and s = mean |w| of those above D. Exactly 0 stays 0, and does not count in the
    means: what was pruned does not lower the threshold (a difference from the paper).

    Args:
        weight: any shape.
        threshold: in units of mean |w|, at least 0.
        channels: where the output channels are, for values of each; None for one in all, as in the paper.

    Source: Li and Liu, arXiv 1605.04711, section 2.
    """
    return _Ternary.apply(weight, threshold, channels)


def ttq_weight(
    weight: Tensor,
    positive_scale: Tensor,
    negative_scale: Tensor,
    threshold: float = TTQ_THRESHOLD,
    channels: OutputChannels | None = None,
) -> Tensor:
    """P where w > D, -N where w < -D, else 0, with D = threshold * max |w|; gradients for w, P and N.

        dL/dw = dL/dy * (P above D, N below -D, 1 between)
        dL/dP = sum of dL/dy above D,    dL/dN = -(sum of dL/dy below -D)

    The absolute values of P and N count: an optimizer may carry them across zero.

    Args:
        weight: any shape.
        positive_scale: P, scalar, or (output channels,) with `channels`.
        negative_scale: N, alike.
        threshold: in units of max |w|, at least 0 and below 1.
        channels: where the output channels are; None for one P and N in all, as in the paper.

    Source: Zhu et al., arXiv 1612.01064, section 4; the gradient of N has the other sign there.
    """
    return _TrainedTernary.apply(weight, positive_scale, negative_scale, threshold, channels)


def initial_ternary_scales(
    weight: Tensor, threshold: float = TTQ_THRESHOLD, channels: OutputChannels | None = None
) -> tuple[Tensor, Tensor]:
    """P and N of least squared error: mean |w| of the weights above D, and of those below -D; else 1.

    Arguments as of `ttq_weight`.
    """
    weight = weight.detach()
    pattern = _pattern(weight, _ttq_bound(weight, threshold, channels))
    above, below = pattern.clamp(min=0), pattern.clamp(max=0)
    scales = [mean_magnitude(weight * kept, channels) for kept in (above, below)]
    return scales[0] + _is_zero(scales[0]), scales[1] + _is_zero(scales[1])


class TernaryWeightQuantizer(nn.Module):
    """`twn_weight` as a parametrization.

    Args:
        threshold: in units of mean |w|.
        channels: where the output channels are, for values of each; None for one pair in all.
    """

    num_bits = 2

    def __init__(self, threshold: float = TWN_THRESHOLD, channels: OutputChannels | None = None) -> None:
        super().__init__()
        self.threshold = threshold
        self.channels = channels

    def forward(self, weight: Tensor) -> Tensor:
        """The ternary weight."""
        return twn_weight(weight, self.threshold, self.channels)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What a weight that is assigned to the layer becomes: the full-precision one."""
        return weight

    def weight_grid(self, weight: Tensor) -> Grid:
        """-1, 0 and 1 times the scale."""
        weight = weight.detach()
        return sign_grid(
            _twn_scale(weight, _twn_pattern(weight, self.threshold, self.channels), self.channels)
        )

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"threshold {self.threshold:g}{', per channel' if self.channels else ''}"


class LearnedTernaryWeights(nn.Module):
    """`ttq_weight` as a parametrization; its values are on no grid of integers unless P is N.

    Args:
        weight: the weight as it is, from which P and N begin.
        threshold: in units of max |w|.
        channels: where the output channels are, for P and N of each; None for one pair in all.

    Attributes:
        positive_scale: P, a parameter, scalar or (output channels,).
        negative_scale: N, alike.
    """

    num_bits = 2
    stored_state = ("positive_scale", "negative_scale")

    def __init__(
        self, weight: Tensor, threshold: float = TTQ_THRESHOLD, channels: OutputChannels | None = None
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.channels = channels
        positive, negative = initial_ternary_scales(weight, threshold, channels)
        self.positive_scale, self.negative_scale = nn.Parameter(positive), nn.Parameter(negative)

    def forward(self, weight: Tensor) -> Tensor:
        """The ternary weight."""
        return ttq_weight(weight, self.positive_scale, self.negative_scale, self.threshold, self.channels)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What a weight that is assigned to the layer becomes: the full-precision one."""
        return weight

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"threshold {self.threshold:g}, learned scales{', per channel' if self.channels else ''}"


@QUANTIZERS.register
class TernaryQuantizer(QatQuantizer):
    """Trains with ternary weights of convolutions, linear layers and embeddings, not activations.

    First and last layers are left in full precision by `overrides`: `fc: {bits_weights: null}`.
    Learned scales are in a group of their own in the optimizer, without weight decay. Their gradients are
    sums over half the weights of a layer, too large for the learning rate of weights; hence
    `scale_lr_factor`.
    Distiller had no such quantizer.

    Args:
        model: changed in place by `prepare_model`.
        optimizer: of the model; learned scales are added to it.
        bits_weights: 2, what three values need, the default; 0, None or 32: full precision.
        bits_bias: 2 to 23, symmetric over the range of the bias; 0, None, 24 and more: full precision.
        overrides: by layer name or pattern, the bits, `threshold` and `per_channel_wts`.
        learned_scales: the values are learned (TTQ) rather than computed (TWN).
        threshold: at least 0; in units of mean |W|, default 0.7; with learned scales of max |W|, below 1,
            default 0.05.
        per_channel_wts: values of each output channel, rather than of the layer as in the papers.
        scale_lr_factor: the learning rate of learned scales, as a multiple of the optimizer's first group's;
            from 0, default 0.01; 1 in the paper.

    Raises:
        QuantizationError: a setting is wrong.
        UnknownNameError: an override matches no layer.
    """

    override_names: ClassVar[frozenset[str]] = frozenset({"threshold", "per_channel_wts"})

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        bits_weights: int | None = 2,
        bits_bias: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        learned_scales: bool = False,
        threshold: float | None = None,
        per_channel_wts: bool = False,
        scale_lr_factor: float = 0.01,
    ) -> None:
        super().__init__(
            model, optimizer, bits_weights=bits_weights, bits_bias=bits_bias, overrides=overrides
        )
        check_flags({"learned_scales": learned_scales}, {}, "TernaryQuantizer")
        check_flags({"per_channel_wts": per_channel_wts}, self.overrides, "TernaryQuantizer")
        check_widths(self, QBits(wts=2))
        self.learned_scales = learned_scales
        self.per_channel_wts = per_channel_wts
        self.scale_lr_factor = _checked_number(scale_lr_factor, "scale_lr_factor", math.inf, "")
        self.threshold = self._checked_threshold(threshold, "threshold")
        for key, given in self.overrides.items():
            self._checked_threshold(given.get("threshold"), f"overrides['{key}'].threshold")

    def weight_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module:
        """Three values, computed or learned."""
        threshold = self._checked_threshold(overrides.get("threshold", self.threshold), "threshold")
        is_per_channel = overrides.get("per_channel_wts", self.per_channel_wts)
        channels = OutputChannels.of(layer) if is_per_channel else None
        if self.learned_scales:
            return LearnedTernaryWeights(layer.weight, threshold, channels)  # type: ignore[arg-type]
        return TernaryWeightQuantizer(threshold, channels)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """One group of all learned scales, without weight decay."""
        groups = super().optimizer_groups()
        for group in groups:
            if self.optimizer is not None:
                group["lr"] = self.optimizer.param_groups[0]["lr"] * self.scale_lr_factor
                if "weight_decay" in self.optimizer.defaults:
                    group["weight_decay"] = 0.0
        return groups

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except model and optimizer, as plain data."""
        inherited = {key: value for key, value in super().settings().items() if key != "bits_activations"}
        return {
            **inherited,
            "learned_scales": self.learned_scales,
            "threshold": self.threshold,
            "per_channel_wts": self.per_channel_wts,
            "scale_lr_factor": self.scale_lr_factor,
        }

    def _checked_threshold(self, threshold: Any, where: str) -> float:
        """`threshold`, or the paper's for None."""
        if threshold is None:
            return TTQ_THRESHOLD if self.learned_scales else TWN_THRESHOLD
        below, unit = (1.0, "max |W|, below 1") if self.learned_scales else (math.inf, "mean |W|")
        return _checked_number(threshold, where, below, f", in units of {unit}")


def _checked_number(value: Any, where: str, below: float, what: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < below:
        raise QuantizationError(f"{where}: must be a number from 0{what}, got {value!r}")
    return float(value)


def _twn_pattern(weight: Tensor, threshold: float, channels: OutputChannels | None) -> Tensor:
    return _pattern(weight, _spread(threshold * mean_magnitude(weight, channels), weight, channels))


def _twn_scale(weight: Tensor, pattern: Tensor, channels: OutputChannels | None) -> Tensor:
    """Mean |w| of what is not 0 in the pattern, scalar or (output channels,)."""
    return mean_magnitude(weight * pattern, channels)


def _ttq_bound(weight: Tensor, threshold: float, channels: OutputChannels | None) -> Tensor:
    if channels is None:
        return threshold * weight.abs().amax()
    return channels.spread(threshold * channels.rows(weight).abs().amax(1), weight)


def _pattern(weight: Tensor, bound: Tensor) -> Tensor:
    """sign(w) where |w| > bound, else 0, in the type of w: booleans are slow on CPUs."""
    return weight.abs().sub_(bound).clamp_(min=0).sign_().mul_(weight.sign())


def _spread(values: Tensor, weight: Tensor, channels: OutputChannels | None) -> Tensor:
    values = values if channels is None else channels.spread(values, weight)
    return values.to(weight.dtype)


def _is_zero(values: Tensor) -> Tensor:
    return (values == 0).to(values.dtype)


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: float, channels: OutputChannels | None) -> Tensor:
        pattern = _twn_pattern(weight, threshold, channels)
        return pattern.mul_(_spread(_twn_scale(weight, pattern, channels), weight, channels))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


class _TrainedTernary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        positive_scale: Tensor,
        negative_scale: Tensor,
        threshold: float,
        channels: OutputChannels | None,
    ) -> Tensor:
        pattern = _pattern(weight, _ttq_bound(weight, threshold, channels))
        ctx.save_for_backward(pattern, positive_scale, negative_scale)
        ctx.channels = channels
        above, below = pattern.clamp(min=0), pattern.clamp(max=0)
        above.mul_(_spread(positive_scale.abs(), weight, channels))
        return above.add_(below.mul_(_spread(negative_scale.abs(), weight, channels)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, channels = grads[0], ctx.channels
        pattern, positive_scale, negative_scale = ctx.saved_tensors
        above, below = pattern.clamp(min=0), pattern.clamp(max=0)
        # 1 + (P - 1) above - (N - 1) below: P, 1 or N
        factor = 1 + above * _spread(positive_scale.abs() - 1, grad, channels)
        factor -= below * _spread(negative_scale.abs() - 1, grad, channels)
        of_scales = [
            _sum(grad * part, channels).to(scale.dtype) * scale.sign()
            for part, scale in ((above, positive_scale), (below, negative_scale))
        ]
        return grad * factor, *of_scales, None, None


def _sum(values: Tensor, channels: OutputChannels | None) -> Tensor:
    kind = torch.promote_types(values.dtype, torch.float32)
    return values.sum(dtype=kind) if channels is None else channels.rows(values).sum(1, dtype=kind)
