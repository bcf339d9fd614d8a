"""The steps of preparing a model for post-training quantization that concern several layers at once.

Knows nothing about the quantizer's settings as a whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from distiller.errors import QuantizationError, StatsError
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.dataflow import LayerUse
from distiller.quantization.ptq_layers import RangeLinearQuantWrapper
from distiller.quantization.ptq_settings import LayerSettings
from distiller.quantization.stats_propagation import Reader


class LayerStats:
    """The statistics of a model's layers, or none, where ranges are dynamic.

    Args:
        stats: by layer, from `load_stats`; None for dynamic ranges.
        source: the file they are from, for messages.
    """

    def __init__(self, stats: Mapping[str, Any] | None, source: str) -> None:
        self._stats = stats
        self._source = source

    @property
    def is_dynamic(self) -> bool:
        """Whether there are none."""
        return self._stats is None

    def output(self, layer: str) -> Mapping[str, Any] | None:
        """Those of the layer's output; None where ranges are dynamic.

        Raises:
            StatsError: the layer is not among them.
        """
        return None if self._stats is None else self._layer(layer)["output"]

    def input(self, layer: str, index: int) -> Mapping[str, Any] | None:
        """Those of an input of the layer; None where ranges are dynamic.

        Raises:
            StatsError: the layer or the input is not among them.
        """
        if self._stats is None:
            return None
        inputs = self._layer(layer)["inputs"]
        if index not in inputs:
            raise StatsError(
                f"{self._source}: {layer}: has no statistics of input {index}, which has to be quantized; "
                "collect them from this model"
            )
        return inputs[index]

    def check(self, layers: list[str]) -> None:
        """See to it that all `layers` have statistics.

        Raises:
            StatsError: naming the first that have none.
        """
        missing = [name for name in layers if self._stats is not None and name not in self._stats]
        if missing:
            raise StatsError(self._missing(missing))

    def _layer(self, layer: str) -> Mapping[str, Any]:
        assert self._stats is not None
        if layer not in self._stats:
            raise StatsError(self._missing([layer]))
        return self._stats[layer]

    def _missing(self, layers: list[str]) -> str:
        names = ", ".join(f"'{name}'" for name in layers[:3]) + (", ..." if len(layers) > 3 else "")
        return (
            f"{self._source}: has no statistics of {len(layers)} of the layers to be quantized ({names}); "
            "collect them from this model"
        )


def relu_fusions(
    readers: Mapping[str, Reader], layers: Mapping[str, nn.Module], may_fuse: Callable[[str, str], bool]
) -> dict[str, str]:
    """Which layers can do the work of the ReLU module that alone reads them: layer -> ReLU.

    Args:
        readers: `sole_readers` of the layers.
        layers: the model's layers by name.
        may_fuse: (layer, ReLU) -> whether the settings allow it.
    """
    return {
        name: reader.module_name
        for name, reader in readers.items()
        if reader.module_name is not None
        and reader.is_dedicated
        and isinstance(layers.get(reader.module_name), nn.ReLU)
        and may_fuse(name, reader.module_name)
    }


def check_input_overrides(
    overrides: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str], uses: Mapping[str, LayerUse]
) -> None:
    """Refuse `input_overrides` for inputs that no layer has.

    Args:
        overrides: settings by name or pattern.
        keys: the name or pattern that holds for each layer.
        uses: how the model called its layers.

    Raises:
        QuantizationError: naming the inputs that there are.
    """
    for key, given in overrides.items():
        inputs = {name: sorted(use.sources) for name, use in uses.items() if keys.get(name) == key}
        for index in given.get("input_overrides", {}):
            if inputs and not any(index in indices for indices in inputs.values()):
                name, indices = next(iter(inputs.items()))
                raise QuantizationError(
                    f"overrides['{key}']: input_overrides[{index}]: no such input, '{name}' has "
                    f"{', '.join(map(str, indices)) or 'none'}"
                )


def connect_inputs(
    wrappers: Mapping[str, RangeLinearQuantWrapper],
    uses: Mapping[str, LayerUse],
    settings: Mapping[str, LayerSettings],
    stats: LayerStats,
) -> None:
    """Give every wrapper the quantizers of its inputs.

    An input that is the output of a quantized layer needs none of its own. Others are quantized by
    their statistics, or as `input_overrides` say.

    Raises:
        QuantizationError: an override for an input that is quantized already, or an input that
            is not while the fallback is off.
        StatsError: an input has no statistics.
    """
    for name, wrapper in wrappers.items():
        if wrapper.output_quant is None or not wrapper.quantizes_inputs:
            continue
        own: dict[int, ActivationQuantizer] = {}
        others: dict[int, ActivationQuantizer] = {}
        for index, source in uses[name].sources.items():
            producer = wrappers.get(source or "")
            grid = None if producer is None else producer.output_quant
            is_overridden = index in settings[name].input_overrides
            if grid is not None and is_overridden:
                raise QuantizationError(
                    f"{name}: input_overrides[{index}]: this input is the output of '{source}' and quantized "
                    "already; override that layer's output instead"
                )
            if grid is not None:
                others[index] = grid
            elif is_overridden or settings[name].inputs_quant_auto_fallback:
                own[index] = _input_quantizer(name, index, settings[name], stats)
            else:
                raise QuantizationError(
                    f"{name}: input {index} comes from no quantized layer; set inputs_quant_auto_fallback, "
                    "or input_overrides for it"
                )
        wrapper.connect(own, others)


def warn_of_narrow_accumulators(
    wrappers: Mapping[str, RangeLinearQuantWrapper], uses: Mapping[str, LayerUse], bits_accum: int
) -> None:
    """Warn of the layers whose accumulators can overflow, with the bits that each needs."""
    needed = {name: wrapper.accumulator_bits(uses[name].columns) or 0 for name, wrapper in wrappers.items()}
    narrow = {name: bits for name, bits in needed.items() if bits > bits_accum}
    if narrow:
        layers = ", ".join(f"'{name}' ({bits} bits)" for name, bits in narrow.items())
        warnings.warn(
            f"accumulators of {bits_accum} bits can overflow, and saturate then, in {layers}: "
            f"set bits_accum to {max(narrow.values())}, or quantize these layers to fewer bits",
            stacklevel=5,
        )


def _input_quantizer(
    name: str, index: int, settings: LayerSettings, stats: LayerStats
) -> ActivationQuantizer:
    where = f"{name} input {index}"
    given: QuantSettings | None = settings.input_overrides.get(index, settings.input())
    if given is not None:
        return ActivationQuantizer(given, stats.input(name, index), where)
    if stats.is_dynamic:
        raise QuantizationError(f"{where}: from_output needs statistics; ranges are dynamic here")
    return ActivationQuantizer(settings.output(), stats.output(name), where)
