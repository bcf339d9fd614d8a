"""The quantizer of one tensor stream: a layer's output, or an input that nobody quantized before.

The range comes from calibration statistics (static: fixed once) or from each batch (dynamic).
The result is simulated: real values on the grid of the quantized ones, in floating point.
Knows nothing about layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.clipping import ClipMode, clipped_range, tensor_stats


@dataclass(frozen=True, slots=True)
class QuantSettings:
    """How a tensor is quantized.

    Attributes:
        num_bits: 2 to 16.
        quant_mode: how the range is laid onto integers.
        clip_mode: how the range is chosen.
        clip_n_stds: standard deviations, for N_STD.
        clip_half_range: the values pass a ReLU first.
        per_channel: a scale for each output channel; weights only.
    """

    num_bits: int
    quant_mode: LinearQuantMode
    clip_mode: ClipMode = ClipMode.NONE
    clip_n_stds: float | None = None
    clip_half_range: bool = False
    per_channel: bool = False

    @property
    def qrange(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return affine.quantized_range(self.num_bits, self.quant_mode)

    def ends(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """The real range that a grid of these settings was laid over, of which `scale` follows.

        Args:
            scale: scalar, or one for each channel.
            zero_point: in its shape.
        """
        if self.quant_mode.is_symmetric:
            hi = scale * affine.steps(self.num_bits, self.quant_mode)
            return (torch.zeros_like(hi) if self.clip_half_range else -hi), hi
        qmin, qmax = self.qrange
        lo = torch.zeros_like(scale) if self.clip_half_range else (qmin - zero_point) * scale
        return lo, (qmax - zero_point) * scale

    def checked_grid(self, scale: Tensor, zero_point: Tensor, where: str) -> tuple[Tensor, Tensor]:
        """Both, if they are a grid of these settings; the zero point as int32.

        Raises:
            QuantizationError: naming what is impossible.
        """
        if not bool(torch.all(torch.isfinite(scale) & (scale > 0))):
            raise QuantizationError(f"{where}: scale: must be a finite number > 0, got {scale.tolist()}")
        lowest, highest = (0, 0) if self.quant_mode.is_symmetric else self.qrange
        is_integral = torch.equal(zero_point, zero_point.round())
        if not is_integral or not lowest <= int(zero_point.min()) <= int(zero_point.max()) <= highest:
            raise QuantizationError(
                f"{where}: zero point: must be an integer from {lowest} to {highest} "
                f"({self.num_bits} bits, {self.quant_mode.name}), got {zero_point.tolist()}"
            )
        return scale, zero_point.to(torch.int32)


class ActivationQuantizer(nn.Module):
    """Rounds activations to a grid; `scale` and `zero_point` are in PyTorch's convention.

    With `clip_half_range` it is a ReLU as well: integers start at the zero point.

    Args:
        settings: width, mode, clipping.
        stats: one entry of calibration statistics; None for a range from each batch. The buffers
            `scale` and `zero_point` then hold those of the last batch and are not saved.
        where: whose values they are, for messages.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, settings: QuantSettings, stats: Mapping[str, Any] | None, where: str) -> None:
        super().__init__()
        self.settings = settings
        self.where = where
        self.is_dynamic = stats is None
        if stats is None:
            scale, zero_point = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
        else:
            lo, hi = self._range(stats)
            scale, zero_point = self._grid(lo.float(), hi.float())
        self.register_buffer("scale", scale, persistent=not self.is_dynamic)
        self.register_buffer("zero_point", zero_point, persistent=not self.is_dynamic)
        self._constants: tuple[float, float, float, float] | None = None
        self.register_load_state_dict_post_hook(_forget_constants)

    def forward(self, x: Tensor) -> Tensor:
        """The real values on the grid nearest to x, shape as x; a new tensor."""
        if self.is_dynamic:
            return self._forward_dynamic(x)
        if self._constants is None:
            self._constants = self._as_numbers()
        inverse_scale, lowest, highest, scale = self._constants
        return x.mul(inverse_scale).round_().clamp_(lowest, highest).mul_(scale)

    @property
    def largest_level(self) -> int:
        """The largest |q - zero_point| that can occur, whatever the zero point in a dynamic range."""
        qmin, qmax = self.settings.qrange
        if self.is_dynamic:
            return qmax - qmin
        zero_point = int(self.zero_point)
        return max(qmax - zero_point, 0 if self.settings.clip_half_range else zero_point - qmin)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The real range that the grid was laid over: what lies outside is clipped."""
        return self.settings.ends(self.scale, self.zero_point)

    def set_grid(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Put another fixed grid in the place of this one; it holds from the next batch on.

        Args:
            scale: scalar, > 0.
            zero_point: scalar, an integer of the grid; None keeps it.

        Raises:
            QuantizationError: ranges are dynamic here, or the values are impossible.
        """
        if self.is_dynamic:
            raise QuantizationError(f"{self.where}: its range is that of each batch, and cannot be set")
        scale, zero_point = self.settings.checked_grid(
            scale, self.zero_point if zero_point is None else zero_point, self.where
        )
        self.scale, self.zero_point = scale.to(self.scale), zero_point.to(self.zero_point)
        self._constants = None

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Lay the grid over [lo, hi] instead.

        Raises:
            QuantizationError: ranges are dynamic here, or this is no range.
        """
        self.set_grid(*self._grid(lo, hi))

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        settings = self.settings
        source = "dynamic" if self.is_dynamic else f"scale={self.scale.item():g}, zp={int(self.zero_point)}"
        return (
            f"{settings.num_bits} bits, {settings.quant_mode.name}, clip {settings.clip_mode.name}, {source}"
        )

    def _forward_dynamic(self, x: Tensor) -> Tensor:
        settings = self.settings
        lo, hi = self._range(tensor_stats(x.detach(), settings.clip_mode))
        scale, zero_point = self._grid(lo, hi)
        self.scale, self.zero_point = scale, zero_point
        qmin, qmax = settings.qrange
        x = torch.relu(x) if settings.clip_half_range else x
        return affine.fake_quantize(x, scale, zero_point, qmin, qmax)

    def _range(self, stats: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        settings = self.settings
        return clipped_range(
            stats,
            settings.clip_mode,
            settings.num_bits,
            settings.quant_mode.is_symmetric,
            settings.clip_n_stds,
            settings.clip_half_range,
            self.where,
        )

    def _grid(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return affine.scale_and_zero_point(lo, hi, self.settings.num_bits, self.settings.quant_mode)
        except QuantizationError as error:
            raise QuantizationError(f"{self.where}: {error}") from error

    def _as_numbers(self) -> tuple[float, float, float, float]:
        """1 / scale, the grid's ends over scale, and scale as Python numbers: no device sync per batch."""
        qmin, qmax = self.settings.qrange
        zero_point = int(self.zero_point)
        lowest = 0 if self.settings.clip_half_range else qmin - zero_point
        return float(1 / self.scale), lowest, qmax - zero_point, float(self.scale)


def _forget_constants(quantizer: ActivationQuantizer, _incompatible_keys: Any) -> None:
    quantizer._constants = None
