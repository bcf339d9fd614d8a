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
from distiller.quantization.ptq_settings import LayerSettings
from distiller.quantization.ptq_wrapper import RangeLinearFakeQuantWrapper, RangeLinearQuantWrapper
from distiller.quantization.stats_propagation import Reader

SELECTING = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Flatten,
    nn.Unflatten,
    nn.ChannelShuffle,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
)
"""Modules that return some of the values that they are given, unchanged, and zeros."""


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

    def is_within(self, layer: str, index: int, other: str) -> bool:
        """Whether an input of a layer never left the range of another layer's output; False if not known."""
        given = (self._stats or {}).get(layer, {}).get("inputs", {}).get(index)
        output = (self._stats or {}).get(other, {}).get("output")
        if given is None or output is None:
            return False
        return output["min"] <= given["min"] and given["max"] <= output["max"]

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

    A ReLU behind modules that only select values, as max pooling, is as good before them.

    Args:
        readers: `sole_readers` of all layers, in the order of the graph.
        layers: the model's layers by name.
        may_fuse: (layer, ReLU) -> whether the layer's output is quantized and the settings allow it.
    """
    found: dict[str, str] = {}
    for name in readers:
        relu = _relu_behind(name, readers, layers)
        if relu is not None and relu not in found.values() and may_fuse(name, relu):
            found[name] = relu
    return found


def _relu_behind(name: str, readers: Mapping[str, Reader], layers: Mapping[str, nn.Module]) -> str | None:
    """The dedicated ReLU module that a layer's output goes to, perhaps behind others that select values."""
    reader = readers.get(name)
    while reader is not None and reader.module_name is not None and reader.is_dedicated:
        module = layers.get(reader.module_name)
        if isinstance(module, nn.ReLU):
            return reader.module_name
        if not isinstance(module, SELECTING):
            return None
        reader = readers.get(reader.module_name)
    return None


def kept_grids(
    layers: Mapping[str, nn.Module],
    uses: Mapping[str, LayerUse],
    is_quantized: Callable[[str], bool],
    may_keep: Callable[[str, str], bool],
) -> dict[str, str]:
    """Modules whose output stays on the grid of the layer that they read: module -> that layer.

    Args:
        layers: the model's layers by name.
        uses: how the model called them, in the order of the calls.
        is_quantized: whether a layer's output is quantized.
        may_keep: (module, layer that it reads) -> whether the settings allow it.
    """
    found: dict[str, str] = {}
    for name, use in uses.items():
        source = use.sources.get(0)
        if not isinstance(layers[name], SELECTING) or not is_quantized(name) or source is None:
            continue
        if is_quantized(source) and may_keep(name, source):
            found[name] = source
    return found


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
    their statistics, or as `input_overrides` say. Modules made without an output quantizer are given that
    of the layer they read.

    Raises:
        QuantizationError: an override for an input that is quantized already, or an input that
            is not while the fallback is off.
        StatsError: an input has no statistics.
    """
    for name in uses:
        wrapper = wrappers.get(name)
        if isinstance(wrapper, RangeLinearFakeQuantWrapper) and wrapper.output_quant is None:
            grid = wrappers[uses[name].sources[0] or ""].output_quant
            assert grid is not None, "the caller has seen to it"
            wrapper.keep_grid(grid)
        if wrapper is not None and wrapper.output_quant is not None and wrapper.quantizes_inputs:
            own: dict[int, ActivationQuantizer] = {}
            others: dict[int, ActivationQuantizer] = {}
            for index in uses[name].origins:
                grid = _grid_of_source(name, index, wrappers, uses)
                if grid is None:
                    own[index] = _own_input(name, index, wrappers, uses[name], settings[name], stats)
                elif index in settings[name].input_overrides:
                    source = uses[name].sources[index]
                    raise QuantizationError(
                        f"{name}: input_overrides[{index}]: this input is the output of '{source}' and "
                        "quantized already; override that layer's output instead"
                    )
                else:
                    others[index] = grid
            wrapper.connect(own, others)


def warn_of_left_alone(
    reasons: Mapping[str, str], layers: Mapping[str, nn.Module], uses: Mapping[str, LayerUse]
) -> None:
    """Warn of the layers that cannot be quantized.

    Args:
        reasons: by layer.
        layers: the model's layers by name.
        uses: how the model called them; what it does not call and has no weight is no loss.
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if name in uses or any(parameter.dim() > 1 for parameter in layers[name].parameters()):
            by_reason.setdefault(reason, []).append(f"'{name}'")
    for reason, names in by_reason.items():
        warnings.warn(f"not quantized, since {reason}: {', '.join(names)}", stacklevel=5)


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
            stacklevel=4,
        )


def _grid_of_source(
    name: str, index: int, wrappers: Mapping[str, RangeLinearQuantWrapper], uses: Mapping[str, LayerUse]
) -> ActivationQuantizer | None:
    """The quantizer that an input has passed in every call, if there is one whose grid is known then."""
    source = uses[name].sources[index]
    producer = wrappers.get(source or "")
    if source is None or producer is None or producer.output_quant is None:
        return None
    # A dynamic grid is that of the producer's last call, which need not be the one whose result this is.
    return None if producer.output_quant.is_dynamic and uses[source].calls > 1 else producer.output_quant


def _own_input(
    name: str,
    index: int,
    wrappers: Mapping[str, RangeLinearQuantWrapper],
    use: LayerUse,
    settings: LayerSettings,
    stats: LayerStats,
) -> ActivationQuantizer:
    """The quantizer that is to be applied to an input.

    Of a loop's variable, which is given from outside at first and then some layer's output, it is that of
    the layer, if its range contains what is given: what has passed it already is not rounded a second time.
    """
    if index in settings.input_overrides:
        return _input_quantizer(name, index, settings, stats)
    source = use.partly_from(index) or ""
    grid = wrappers[source].output_quant if source in wrappers else None
    if grid is not None and not grid.is_dynamic and stats.is_within(name, index, source):
        return grid
    if settings.inputs_quant_auto_fallback:
        return _input_quantizer(name, index, settings, stats)
    raise QuantizationError(
        f"{name}: input {index} comes from no quantized layer; set inputs_quant_auto_fallback, "
        "or input_overrides for it"
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
