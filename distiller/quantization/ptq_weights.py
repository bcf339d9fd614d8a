"""Layers with a weight that is rounded to a grid after training, once.

Knows nothing about models or statistics files.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.clipping import clipped_range, tensor_stats
from distiller.quantization.ptq_parameters import AdjustableGrid
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class QuantizedWeightWrapper(RangeLinearQuantWrapper):
    """A layer whose `weight` is quantized.

    Args:
        wrapped_module: the layer; it gets new parameters.
        name: its name in the model, for messages.
        weight: how its weight is quantized.
        output_quant: as in the base class.
        save_fp_weights: keep the full-precision weight, and bias, as buffers `float_weight` and `float_bias`
            of the layer.
        others: further arguments of the base class.

    Attributes:
        weight_scale: scalar, or (output channels,).
        weight_zero_point: the same shape, int32.

    Raises:
        QuantizationError: the weight is parametrized or not finite.
    """

    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(
        self,
        wrapped_module: nn.Module,
        name: str,
        weight: QuantSettings,
        output_quant: ActivationQuantizer | None,
        save_fp_weights: bool,
        **others: Any,
    ) -> None:
        if parametrize.is_parametrized(wrapped_module):
            raise QuantizationError(
                f"{name}: its parameters are parametrized and cannot be replaced; "
                "call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        full = {key: value.detach().clone() for key, value in wrapped_module.named_parameters(recurse=False)}
        super().__init__(wrapped_module, name, output_quant, **others)
        self.wts_quant_settings = weight
        scale, zero_point = self._grid_of(full["weight"])
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", zero_point)
        self._round_weight(full["weight"])
        if save_fp_weights:
            for key, value in full.items():
                wrapped_module.register_buffer(f"float_{key}", value)

    def quantize_weight(self) -> None:
        """Choose the weight's scale and round the weight, from `float_weight` where there is one."""
        source = getattr(self.wrapped_module, "float_weight", self.weight).detach()
        self.weight_scale, self.weight_zero_point = self._grid_of(source)
        self._round_weight(source)
        self.readjust()

    def set_weight_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Round the weight to another grid, from `float_weight`.

        Args:
            scale: PyTorch's convention, in the shape of `weight_scale`.
            zero_point: integers, in the same shape.

        Raises:
            QuantizationError: there is no `float_weight`, or the values are impossible.
        """
        source: Tensor | None = getattr(self.wrapped_module, "float_weight", None)
        if source is None:
            raise QuantizationError(
                f"{self.name}: its weight cannot be rounded to another grid, the full-precision one was "
                "not kept; set save_fp_weights"
            )
        scale, zero_point = self.wts_quant_settings.checked_grid(scale, zero_point, f"{self.name} weight")
        self.weight_scale, self.weight_zero_point = scale, zero_point
        self._round_weight(source)
        self.readjust()

    def adjustable_grids(self) -> dict[str, AdjustableGrid]:
        """Also that of the weight."""
        return {**super().adjustable_grids(), "w": _WeightGrid(self)}

    @property
    def has_float_weight(self) -> bool:
        """Whether the full-precision weight was kept."""
        return hasattr(self.wrapped_module, "float_weight")

    @property
    def w_scale(self) -> Tensor:
        """Scale of the weight in Distiller's convention, scalar or (output channels,)."""
        return affine.to_distiller(self.weight_scale, self.weight_zero_point)[0]

    @property
    def w_zero_point(self) -> Tensor:
        """Zero point of the weight in Distiller's convention."""
        return affine.to_distiller(self.weight_scale, self.weight_zero_point)[1]

    def _grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for a weight."""
        settings, where = self.wts_quant_settings, f"{self.name} weight"
        lo, hi = clipped_range(
            tensor_stats(
                filters_first(weight, self.wrapped_module), settings.clip_mode, settings.per_channel
            ),
            settings.clip_mode,
            settings.num_bits,
            settings.quant_mode.is_symmetric,
            settings.clip_n_stds,
            where=where,
        )
        try:
            return affine.scale_and_zero_point(lo, hi, settings.num_bits, settings.quant_mode)
        except QuantizationError as error:
            raise QuantizationError(f"{where}: {error}") from error

    def _round_weight(self, source: Tensor) -> None:
        """Give the layer `source` rounded to the weight's grid."""
        settings, layer = self.wts_quant_settings, self.wrapped_module
        rounded = affine.fake_quantize(
            filters_first(source, layer),
            self.weight_scale,
            self.weight_zero_point,
            *settings.qrange,
            axis=0 if settings.per_channel else None,
        )
        new = filters_back(rounded, layer).to(self.weight.dtype)
        layer.weight = nn.Parameter(new, self.weight.requires_grad)


class _WeightGrid:
    """The grid of a layer's weight, as `AdjustableGrid`."""

    def __init__(self, wrapper: QuantizedWeightWrapper) -> None:
        self._wrapper = wrapper
        self.where = f"{wrapper.name} weight"

    @property
    def settings(self) -> QuantSettings:
        return self._wrapper.wts_quant_settings

    @property
    def scale(self) -> Tensor:
        return self._wrapper.weight_scale

    @property
    def zero_point(self) -> Tensor:
        return self._wrapper.weight_zero_point

    def set_grid(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        self._wrapper.set_weight_grid(scale, self.zero_point if zero_point is None else zero_point)

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        self.set_grid(*affine.scale_and_zero_point(lo, hi, self.settings.num_bits, self.settings.quant_mode))


def filters_first(weight: Tensor, layer: nn.Module) -> Tensor:
    """A layer's weight as (output channels, ...): transposed convolutions hold them in dimension 1."""
    if not isinstance(layer, _TRANSPOSED):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def filters_back(rows: Tensor, layer: nn.Module) -> Tensor:
    """The inverse of `filters_first`."""
    if not isinstance(layer, _TRANSPOSED):
        return rows
    return rows.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()
