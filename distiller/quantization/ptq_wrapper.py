"""A layer after post-training quantization: the layer itself between quantizers, simulated.

Scales and zero points are in PyTorch's convention; only `output_scale`, `output_zero_point` and the
values with names that are read and set from outside are Distiller's.
Knows nothing about models or statistics files, nor what kinds of layers compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError, UnknownNameError, did_you_mean
from distiller.quantization import affine
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.ptq_parameters import AdjustableGrid, clipping_params, scale_params, set_params
from distiller.quantization.ptq_precision import computed_in, converted, dtype_of


class RangeLinearQuantWrapper(nn.Module, ABC):
    """A module whose inputs and output are quantized. Works in evaluation mode only.

    Args:
        wrapped_module: the module.
        name: its name in the model, for messages.
        output_quant: quantizer of its output; None leaves the output as it is.
        bits_accum: width of the accumulator, which saturates; 2 to 64.
        scale_approx_mult_bits: width of the integer multiplier by which hardware rescales the
            accumulator; None for exact factors.
        is_fake: compute the module in floating point between its quantizers, not as integer hardware:
            nothing saturates, no change of scale is approximated.
        precision: with `is_fake`, the type that the module is converted to and computed in; None for its own.

    Attributes:
        input_grids: the quantizer of each input, its own or that of the layer it comes from.
        keeps_grid: whether the output is on its input's grid, and `output_quant` is that of another layer.
    """

    quantizes_inputs = True

    def __init__(
        self,
        wrapped_module: nn.Module,
        name: str,
        output_quant: ActivationQuantizer | None,
        bits_accum: int = 32,
        scale_approx_mult_bits: int | None = None,
        *,
        is_fake: bool = False,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._dtype_outside = dtype_of(wrapped_module)
        self.wrapped_module = wrapped_module if precision is None else converted(wrapped_module, precision)
        self.name = name
        self.output_quant = output_quant
        self.bits_accum = bits_accum
        self.scale_approx_mult_bits = scale_approx_mult_bits
        self.is_fake = is_fake
        self.precision = precision
        self.keeps_grid = False
        self.inputs_quant = nn.ModuleDict()
        self.input_grids: dict[int, ActivationQuantizer] = {}  # not registered: most belong to other layers
        self.train(wrapped_module.training)

    def connect(
        self, own: Mapping[int, ActivationQuantizer], others: Mapping[int, ActivationQuantizer]
    ) -> None:
        """Tell the wrapper where its inputs come from, once.

        Args:
            own: by index of the argument, quantizers that are to be applied here.
            others: quantizers, of other layers, that were applied already.
        """
        self.inputs_quant.update({str(index): quantizer for index, quantizer in own.items()})
        self.inputs_quant.train(self.training)
        self.input_grids = {**others, **own}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The quantized module's output for its inputs, quantized or not."""
        if self.training:
            raise QuantizationError(
                f"{self.name}: a quantized model works in evaluation mode only; call model.eval()"
            )
        if self.inputs_quant:
            inputs = list(args)
            for key, quantizer in self.inputs_quant.items():
                inputs[int(key)] = quantizer(inputs[int(key)])
            args = tuple(inputs)
        output = self._in_float(*args, **kwargs) if self.is_fake else self.compute(*args, **kwargs)
        if self.output_quant is None or (self.keeps_grid and self.output_quant.is_dynamic):
            return output
        return self.output_quant(output)

    @abstractmethod
    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output before it is quantized, from quantized inputs."""

    def readjust(self) -> None:
        """Make anew what follows from the inputs' grids, of which one was replaced."""

    def accum_scale(self) -> Tensor:
        """The real value of one unit of the accumulator: the product of the inputs' scales."""
        scale = torch.ones(())
        for grid in self.input_grids.values():
            scale = grid.scale * scale
        return scale

    def accumulator_bits(self, terms: int = 1) -> int | None:
        """How wide an accumulator has to be that never saturates; None where nothing is accumulated.

        Args:
            terms: products in one sum of a matrix product; other layers know theirs.
        """
        return None

    def saturated(self, accumulator: Tensor, largest: float) -> Tensor:
        """The accumulator's values as far as `bits_accum` bits can hold them.

        Args:
            accumulator: real values.
            largest: the largest absolute value that can occur, in units of `accum_scale`.
        """
        limit = 2 ** (self.bits_accum - 1)
        if largest < limit:
            return accumulator
        scale = self.accum_scale().double()  # float32 knows neither limit - 1 nor its product with the scale
        lowest, highest = (-limit * scale).to(accumulator.dtype), ((limit - 1) * scale).to(accumulator.dtype)
        return torch.clamp(accumulator, lowest, highest)

    def rescaled(self, values: Tensor, scale: Tensor | None = None) -> Tensor:
        """Values as the approximated change of scale to the output's makes them.

        Args:
            values: real values.
            scale: the scale they are at; None for `accum_scale`.
        """
        if self.scale_approx_mult_bits is None or self.output_quant is None:
            return values
        factor = (self.accum_scale() if scale is None else scale) / self.output_quant.scale
        return values * (affine.approximate_scale(factor, self.scale_approx_mult_bits) / factor)

    @property
    def weight(self) -> Tensor:
        """The wrapped module's, for models that look at it; AttributeError where it has none."""
        return self.wrapped_module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The wrapped module's, as `weight`."""
        return self.wrapped_module.bias  # type: ignore[return-value]

    @property
    def output_quant_settings(self) -> QuantSettings | None:
        """How the output is quantized; None when it is not."""
        return None if self.output_quant is None else self.output_quant.settings

    @property
    def output_scale(self) -> Tensor | None:
        """Distiller's convention; of the last batch where scales are dynamic; None when not quantized."""
        return None if self.output_quant is None else self._output_params()[0]

    @property
    def output_zero_point(self) -> Tensor | None:
        """Distiller's convention, as `output_scale`."""
        return None if self.output_quant is None else self._output_params()[1]

    def adjustable_grids(self) -> dict[str, AdjustableGrid]:
        """The fixed grids of the layer by what the names of their values begin with: `output`, `w`."""
        if self.output_quant is None or self.output_quant.is_dynamic:
            return {}
        return {"output": self.output_quant}

    def named_linear_quant_params(self, filter: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the fixed scales and zero points, in Distiller's convention.

        Args:
            filter: only what is free: no zero points, no grids of other layers.
        """
        for prefix, grid in self.adjustable_grids().items():
            if not (filter and self.keeps_grid):
                for key, value in scale_params(grid, filter).items():
                    yield f"{prefix}_{key}", value

    def named_clipping(self, filter: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the ends of fixed ranges: `output_clipping`, or `output_clip_min` and `_max`.

        Args:
            filter: only what is free: no end that is always 0, no grids of other layers.
        """
        for prefix, grid in self.adjustable_grids().items():
            if not (filter and self.keeps_grid):
                for key, value in clipping_params(grid, filter).items():
                    yield f"{prefix}_{key}", value

    def set_linear_quant_params(self, changes: Mapping[str, float | Tensor]) -> list[AdjustableGrid]:
        """Replace values by the names of `named_linear_quant_params` or `named_clipping`.

        The layers that read this one are not told: see the quantizer's `set_linear_quant_param`.

        Returns:
            The grids that were replaced.

        Raises:
            UnknownNameError: no such value here.
            QuantizationError: an impossible value.
        """
        grids = self.adjustable_grids()
        by_grid: dict[str, dict[str, float | Tensor]] = {}
        for name, value in changes.items():
            prefix, _, key = name.partition("_")
            if prefix not in grids:
                known = [*dict(self.named_linear_quant_params()), *dict(self.named_clipping())]
                hint = did_you_mean(name, known) or f"; there are {', '.join(known) or 'none'}"
                raise UnknownNameError(f"{self.name}: no value '{name}' that could be set{hint}", name)
            by_grid.setdefault(prefix, {})[key] = value
        for prefix, values in by_grid.items():
            set_params(grids[prefix], values)
        return [grids[prefix] for prefix in by_grid]

    def _in_float(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module in floating point, in `precision` where there is one."""
        if self.precision is None:
            return self.wrapped_module(*args, **kwargs)
        return computed_in(self.precision, self.wrapped_module, args, kwargs, self._dtype_outside)

    def _output_params(self) -> tuple[Tensor, Tensor]:
        assert self.output_quant is not None
        return affine.to_distiller(self.output_quant.scale, self.output_quant.zero_point)


class RangeLinearFakeQuantWrapper(RangeLinearQuantWrapper):
    """Any module, computed in floating point, with its output quantized.

    Args:
        wrapped_module: the module.
        name: its name in the model, for messages.
        output_quant: quantizer of its output; None where it is to be that of its input (`keep_grid`).
        quantize_inputs: quantize its inputs too.
        precision: the type that the module is converted to and computed in; None for its own.
    """

    def __init__(
        self,
        wrapped_module: nn.Module,
        name: str,
        output_quant: ActivationQuantizer | None,
        quantize_inputs: bool = False,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__(wrapped_module, name, output_quant, is_fake=True, precision=precision)
        self.quantizes_inputs = quantize_inputs

    def keep_grid(self, grid: ActivationQuantizer) -> None:
        """The output is on the input's grid, as the module only selects or moves values."""
        self.output_quant, self.keeps_grid = grid, True

    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output in floating point."""
        return self._in_float(*args, **kwargs)
