"""Rounding to a grid and going on as if nothing had been rounded: the operations of training with
quantization.

    forward   k = clamp(round(x / scale) + zero_point, qmin, qmax),   y = (k - zero_point) * scale
    backward  dL/dx = dL/dy where x is rounded to the grid without being clamped, 0 elsewhere

Forward is `affine.fake_quantize`, bit for bit. The gradient is one pass of a vectorized kernel, without masks
of booleans (some hundred times slower on CPUs), and nothing waits for the values of a tensor.
Knows nothing about layers or ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode

__all__ = ["Grid", "fake_quantize_ste", "linear_grid", "lsq_quantize", "round_ste"]


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers that a tensor is rounded to, and what they stand for: x = (k - zero_point) * scale.

    Attributes:
        scale: scalar, or (channels,) in the order of the output channels.
        zero_point: int32, in the shape of `scale`.
        qmin: smallest integer.
        qmax: largest integer.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int


def round_ste(x: Tensor) -> Tensor:
    """Nearest integers, halves to even; the gradient is handed on unchanged.

    Source: Bengio et al., arXiv 1308.3432 (the straight-through estimator).
    """
    return _Round.apply(x) if _differentiates(x) else torch.round(x)


def fake_quantize_ste(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    passes: tuple[float, float] | None = None,
) -> Tensor:
    """The real values on the grid that are nearest to x, with a straight-through gradient for x alone.

    Args:
        x: real values, any shape and floating type, which the result has too.
        scale: scalar, or of a shape that broadcasts with x; positive.
        zero_point: as `scale`; None for 0.
        qmin: smallest integer.
        qmax: largest integer.
        passes: the gradient passes where x / scale + zero_point lies strictly between the two; default
            (qmin - 1/2, qmax + 1/2), where x is rounded and not clamped. Of infinities it passes everywhere.
    """
    if not _differentiates(x):
        scale = scale.to(x.dtype)
        return _on_grid((x.detach() * (1 / scale)).round_(), scale, zero_point, qmin, qmax)
    return _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, passes or (qmin - 0.5, qmax + 0.5))


def lsq_quantize(x: Tensor, step: Tensor, qmin: int, qmax: int, gradient_scale: float) -> Tensor:
    """clamp(round(x / step), qmin, qmax) * step, with gradients for x and for the step size.

        dL/dx    = dL/dy between the ends of the grid, 0 beyond
        dL/dstep = gradient_scale * sum of dL/dy * (round(x / step) - x / step between the ends, qmin or qmax
        beyond)

    Args:
        x: real values, any shape.
        step: scalar, or of a shape that broadcasts with x. Its absolute value is the step size: an optimizer
            may carry it across zero.
        qmin: smallest integer.
        qmax: largest integer.
        gradient_scale: factor of the gradient of the step, > 0.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020 (arXiv 1902.08153), equations 1 to 5.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or step.requires_grad)):
        return fake_quantize_ste(x.detach(), step_size(step), None, qmin, qmax)
    return _LearnedStep.apply(x, step, qmin, qmax, gradient_scale)


def linear_grid(lo: Tensor, hi: Tensor, num_bits: int, mode: LinearQuantMode) -> tuple[Tensor, Tensor | None]:
    """`affine.scale_and_zero_point` for training: equal results, without looking at the values.

    On a GPU it waits for nothing; a range that is not finite gives a scale that is not.

    Args:
        lo: lower ends, any shape.
        hi: upper ends, not below `lo`.
        num_bits: 1 to 16.
        mode: the layout.

    Returns:
        Scale in the type of `lo`, zero point in the same type; None in the symmetric modes.
    """
    if mode.is_symmetric:
        return _scale(torch.maximum(lo.abs(), hi.abs()), num_bits, mode), None
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = _scale(hi - lo, num_bits, mode)
    qmin, qmax = affine.quantized_range(num_bits, mode)
    return scale, (qmin - torch.round(lo / scale)).clamp_(qmin, qmax)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        qmin: int,
        qmax: int,
        passes: tuple[float, float],
    ) -> Tensor:
        scale = scale.to(x.dtype)
        steps = x * (1 / scale)
        ctx.passes = passes
        if passes == _EVERYWHERE:
            return _on_grid(steps.round_(), scale, zero_point, qmin, qmax)
        ctx.save_for_backward(steps, zero_point)
        return _on_grid(torch.round(steps), scale, zero_point, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if ctx.passes == _EVERYWHERE:
            return grad, None, None, None, None, None
        steps, zero_point = ctx.saved_tensors
        position = steps if zero_point is None else steps + zero_point.to(steps.dtype)
        return torch.ops.aten.hardtanh_backward(grad, position, *ctx.passes), None, None, None, None, None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, qmin: int, qmax: int, gradient_scale: float) -> Tensor:
        size = step_size(step).to(x.dtype)
        steps = x * (1 / size)
        values = _on_grid(torch.round(steps), size, None, qmin, qmax)
        ctx.save_for_backward(steps, values, step)
        ctx.range, ctx.gradient_scale = (float(qmin), float(qmax)), gradient_scale
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        steps, values, step = ctx.saved_tensors
        grad = grads[0]
        grad_x = torch.ops.aten.hardtanh_backward(grad, steps, *ctx.range)
        # Between the ends of the grid k - x / step, beyond them k: the sum of dL/dy * k less that of dL/dx *
        # x / step.
        slope = _sum_of_products(grad, values, step) / step_size(step) - _sum_of_products(grad_x, steps, step)
        return grad_x, slope * torch.sign(step) * ctx.gradient_scale, None, None, None


_EVERYWHERE = (float("-inf"), float("inf"))


def step_size(step: Tensor) -> Tensor:
    """The positive step size that a learned step stands for."""
    return step.detach().abs().clamp_min(torch.finfo(step.dtype).tiny)


def _differentiates(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _on_grid(k: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """The values on the grid, in the place of k = round(x / scale)."""
    if zero_point is None:
        return k.clamp_(qmin, qmax).mul_(scale)
    zero_point = zero_point.to(k.dtype)
    return k.add_(zero_point).clamp_(qmin, qmax).sub_(zero_point).mul_(scale)


def _sum_of_products(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """The sum of a * b over the dimensions along which `like` does not vary, in its shape."""
    if like.dim() == 0 and a.is_contiguous() and b.is_contiguous() and a.dtype == torch.float32 == b.dtype:
        return torch.dot(a.flatten(), b.flatten())  # one pass, and nothing is written
    product = a.to(like.dtype) * b.to(like.dtype)
    return product.sum_to_size(like.shape)


def _scale(width: Tensor, num_bits: int, mode: LinearQuantMode) -> Tensor:
    scale = width / affine.steps(num_bits, mode)
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)
