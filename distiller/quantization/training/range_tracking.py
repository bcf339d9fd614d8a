"""The range of a stream of tensors, tracked while a model trains, and rounding to a grid over it.

    biased <- d * biased + (1 - d) * batch,     tracked = biased / (1 - d^batches)

for the smallest and the largest value alike: the first batch counts fully, later ones fade as d^age.
In evaluation the tracked range stays as it is. Knows nothing about layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.training.fake_quant import Grid, fake_quantize_ste, linear_grid

__all__ = ["FakeLinearQuantization", "RangeTracker", "check_decay"]


class RangeTracker(nn.Module):
    """A moving average of the smallest and the largest value of each batch, with bias correction.

    All state is in buffers, of float32 whatever the model's type: `biased_range` and `tracked_range` hold
    (smallest, largest), `batches_tracked` their number.

    Args:
        decay: d, in [0, 1); default 0.999.
        where: whose values they are, for messages.

    Raises:
        QuantizationError: the decay is out of range.
    """

    biased_range: Tensor
    tracked_range: Tensor
    batches_tracked: Tensor

    def __init__(self, decay: float = 0.999, where: str = "") -> None:
        super().__init__()
        self.decay = check_decay(decay)
        self.where = where
        self.register_buffer("biased_range", torch.zeros(2))
        self.register_buffer("tracked_range", torch.zeros(2))
        self.register_buffer("batches_tracked", torch.tensor(0))
        self._is_tracked = False
        self.register_load_state_dict_post_hook(_look_again)

    def track(self, lo: Tensor, hi: Tensor) -> None:
        """Take in the smallest and the largest value of a batch, scalars."""
        with torch.no_grad():
            batch = torch.stack([lo.detach(), hi.detach()]).float()
            self.biased_range.mul_(self.decay).add_(batch, alpha=1 - self.decay)
            self.batches_tracked.add_(1)
            self.tracked_range.copy_(self.biased_range / self._weight_so_far())
        self._is_tracked = True

    def check_tracked(self) -> None:
        """Raise a QuantizationError if no batch was tracked yet."""
        if self._is_tracked or torch.compiler.is_compiling():  # a program has no values yet
            return
        self._is_tracked = bool(self.batches_tracked > 0)
        if not self._is_tracked:
            raise QuantizationError(
                f"{self.where or type(self).__name__}: has seen no training batch, the range of its values "
                "is not known; train first, or load a trained checkpoint"
            )

    def _weight_so_far(self) -> Tensor:
        """1 - d^batches, in double precision."""
        if self.decay == 0:
            return torch.ones_like(self.batches_tracked, dtype=torch.float64)
        return -torch.expm1(self.batches_tracked.double() * math.log(self.decay))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in ("biased_range", "tracked_range")}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)  # half precision would lose the small steps
        return self


class FakeLinearQuantization(RangeTracker):
    """Rounds activations to a grid over their tracked range; in training it tracks the range of each batch
    first.

    Args:
        num_bits: 2 to 16.
        mode: how the range is laid onto integers.
        ema_decay: of the moving average, in [0, 1).
        is_relu: negative values become 0 first, as by the ReLU that it takes the place of.
        ceiling: with `is_relu`, larger values become this first: 6 in the place of a ReLU6.
        where: whose values they are, for messages.
    """

    def __init__(
        self,
        num_bits: int,
        mode: LinearQuantMode,
        ema_decay: float = 0.999,
        is_relu: bool = False,
        ceiling: float | None = None,
        where: str = "",
    ) -> None:
        super().__init__(ema_decay, where)
        self.num_bits = num_bits
        self.mode = mode
        self.is_relu = is_relu
        self.ceiling = ceiling

    def forward(self, x: Tensor) -> Tensor:
        """The values on the grid nearest to x, in its shape; a new tensor."""
        if self.training:
            self._track(x.detach())
        else:
            self.check_tracked()
        lo, hi = self.tracked_range.unbind()
        scale, zero_point = linear_grid(lo, hi, self.num_bits, self.mode)
        qmin, qmax = self._integers()
        if not self.is_relu:
            return fake_quantize_ste(x, scale, zero_point, qmin, qmax)
        # The range begins at 0, and so do the integers counted from the zero point.
        top = qmax - qmin
        return fake_quantize_ste(x, scale, None, 0, top, passes=(0.0, top + 0.5))

    @property
    def grid(self) -> Grid:
        """The integers over the tracked range.

        Raises:
            QuantizationError: no batch was tracked yet.
        """
        self.check_tracked()
        lo, hi = self.tracked_range.unbind()
        scale, zero_point = affine.scale_and_zero_point(lo, hi, self.num_bits, self.mode)
        return Grid(scale, zero_point, *self._integers())

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        relu = f", of ReLU{'' if self.ceiling is None else f' to {self.ceiling:g}'}" if self.is_relu else ""
        return f"{self.num_bits} bits, {self.mode.name}, decay {self.decay:g}{relu}"

    def _track(self, x: Tensor) -> None:
        if self.is_relu:
            hi = x.amax().clamp_(min=0, max=self.ceiling)
            self.track(torch.zeros_like(hi), hi)
        else:
            self.track(*torch.aminmax(x))

    def _integers(self) -> tuple[int, int]:
        qmin, qmax = affine.quantized_range(self.num_bits, self.mode)
        return (0 if self.is_relu and self.mode.is_symmetric else qmin), qmax


def check_decay(decay: float, where: str = "ema_decay") -> float:
    """`decay` if it is in [0, 1), else a QuantizationError."""
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise QuantizationError(f"{where}: must be at least 0 and less than 1, got {decay!r}")
    return float(decay)


def _look_again(tracker: RangeTracker, _incompatible_keys: Any) -> None:
    """After a load: whether something was tracked; known from here on without waiting for a value."""
    tracker._is_tracked = bool(tracker.batches_tracked > 0)
