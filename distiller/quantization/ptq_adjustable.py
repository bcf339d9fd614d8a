"""A quantizer whose scales and clipping values can be read and set by name, as searches do.

Everything is in Distiller's convention, q = round(scale * x - zero_point), and takes effect at once:
weights are rounded again from their full-precision copies, biases to their accumulators' new scales.
Knows nothing about how a model is prepared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from torch import Tensor

from distiller.errors import UnknownNameError, did_you_mean
from distiller.names import strip_wrappers
from distiller.quantization.ptq_weights import QuantizedWeightWrapper
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper
from distiller.quantization.quantizer import Quantizer


class AdjustableQuantizer(Quantizer):
    """The names are `<layer>.<value>`.

    Values are `output_scale`, `output_zero_point`, `w_scale`, `w_zero_point`; or the ends of the ranges:
    `output_clipping` and `w_clipping` in symmetric modes, else `output_clip_min`, `output_clip_max`,
    `w_clip_min`, `w_clip_max`. Those of weights with a scale for each channel are of shape (channels,).

    Attributes:
        linear_quant_params: scales and zero points by name, as they are now; empty before `prepare_model`.
    """

    linear_quant_params: OrderedDict[str, Tensor]

    def named_linear_quant_params(
        self, yield_clipping_params: bool = False, filter: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the fixed scales and zero points.

        Args:
            yield_clipping_params: clipping values in their place, as `named_clipping`.
            filter: only what is free: no zero points, and no grid that is another layer's.
        """
        if yield_clipping_params:
            yield from self.named_clipping(filter)
            return
        for layer, wrapper in self._wrappers().items():
            for key, value in wrapper.named_linear_quant_params(filter):
                yield f"{layer}.{key}", value

    def named_clipping(self, filter: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the ends of the fixed ranges.

        Args:
            filter: only what is free: no lower end behind a ReLU, and no grid that is another layer's.
        """
        for layer, wrapper in self._wrappers().items():
            for key, value in wrapper.named_clipping(filter):
                yield f"{layer}.{key}", value

    def set_linear_quant_param(self, name: str, value: float | Tensor) -> None:
        """Set one value, by a name of `named_linear_quant_params` or `named_clipping`.

        Raises:
            UnknownNameError: no layer has such a value.
            QuantizationError: the value is impossible, or of a weight whose full-precision copy was not
                kept (`save_fp_weights`).
        """
        self.update_linear_quant_params({name: value})

    def set_clipping(self, name: str, value: float | Tensor) -> None:
        """`set_linear_quant_param` by the name of a clipping value."""
        self.set_linear_quant_param(name, value)

    def update_linear_quant_params(self, new_config: Mapping[str, float | Tensor]) -> None:
        """Set several values; what is given of one grid takes effect together.

        Args:
            new_config: numbers, or tensors in the value's shape, by name.

        Raises:
            UnknownNameError: no layer has such a value; nothing is changed.
            QuantizationError: as `set_linear_quant_param`; the layers before it are changed.
        """
        wrappers = self._wrappers()
        by_layer: dict[str, dict[str, float | Tensor]] = {}
        for name, value in new_config.items():
            layer, _, key = strip_wrappers(name).rpartition(".")
            wrapper = wrappers.get(layer)
            if wrapper is None or key not in _values_of(wrapper):
                known = [f"{layer}.{key}" for layer, each in wrappers.items() for key in _values_of(each)]
                hint = did_you_mean(strip_wrappers(name), known) or "; see named_linear_quant_params()"
                raise UnknownNameError(f"'{name}': no such value of a quantized layer{hint}", name)
            by_layer.setdefault(layer, {})[key] = value
        changed: set[int] = set()
        try:
            for layer, changes in by_layer.items():
                changed.update(id(grid) for grid in wrappers[layer].set_linear_quant_params(changes))
        finally:
            for layer, wrapper in wrappers.items():
                if any(id(grid) in changed for grid in wrapper.input_grids.values()):
                    wrapper.readjust()
                if layer in by_layer or id(wrapper.output_quant) in changed:
                    for key, value in wrapper.named_linear_quant_params():
                        self.linear_quant_params[f"{layer}.{key}"] = value

    def update_clipping_parameters(self, new_config: Mapping[str, float | Tensor]) -> None:
        """`update_linear_quant_params` by names of clipping values."""
        self.update_linear_quant_params(new_config)

    def force_readjust_wrappers(self) -> None:
        """Round all weights that have a full-precision copy, and all biases, to their present grids again."""
        for wrapper in self._wrappers().values():
            if isinstance(wrapper, QuantizedWeightWrapper) and wrapper.has_float_weight:
                wrapper.set_weight_grid(wrapper.weight_scale, wrapper.weight_zero_point)
            else:
                wrapper.readjust()

    def quantize_params(self) -> None:
        """Choose the weights' scales and round them again, from their full-precision copies where kept."""
        for wrapper in self._wrappers().values():
            if isinstance(wrapper, QuantizedWeightWrapper) and wrapper.has_float_weight:
                wrapper.quantize_weight()
        self.linear_quant_params = OrderedDict(self.named_linear_quant_params())

    def _wrappers(self) -> dict[str, RangeLinearQuantWrapper]:
        """The quantized layers by name; none before `prepare_model`."""
        return {
            name: wrapper
            for name, wrapper in self.modules_processed.values()
            if isinstance(wrapper, RangeLinearQuantWrapper)
        }


def _values_of(wrapper: RangeLinearQuantWrapper) -> list[str]:
    return [*dict(wrapper.named_linear_quant_params()), *dict(wrapper.named_clipping())]
