"""The grids of a quantized model's layers, read off and replaced in place: no layer is built anew for that.

    wide, narrow = grids_of(layers["conv1"]), grids_of(other_layers["conv1"])
    put_grids(layers, "conv1", narrow)             the model computes with the other's grids from here on

Knows nothing about how grids are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distiller.dummy_input import forward_arguments
from distiller.errors import QuantizationError
from distiller.names import named_modules, unwrap
from distiller.observation import watch_inputs
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.ptq_layers import RangeLinearEmbeddingWrapper
from distiller.quantization.ptq_weights import QuantizedWeightWrapper
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper

Layers = dict[str, RangeLinearQuantWrapper]


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """One grid.

    Attributes:
        settings: width, mode and clipping that it is of.
        scale: PyTorch's convention, scalar or one for each channel.
        zero_point: in its shape.
    """

    settings: QuantSettings
    scale: Tensor
    zero_point: Tensor

    def is_like(self, other: Grid) -> bool:
        """Whether both round every value alike."""
        return (
            self.settings.qrange == other.settings.qrange
            and self.settings.clip_half_range == other.settings.clip_half_range
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )


@dataclass(frozen=True, slots=True, eq=False)
class LayerGrids:
    """The fixed grids that a layer has for itself.

    Attributes:
        activations: by what they are of: `output`, or the index of an input.
        weight: of its weight; None where that is not quantized.
    """

    activations: Mapping[str, Grid]
    weight: Grid | None

    def is_like(self, other: LayerGrids) -> bool:
        """Whether both round every value alike."""
        if self.activations.keys() != other.activations.keys() or (self.weight is None) != (
            other.weight is None
        ):
            return False
        pairs = [(grid, other.activations[key]) for key, grid in self.activations.items()]
        if self.weight is not None and other.weight is not None:
            pairs.append((self.weight, other.weight))
        return all(grid.is_like(like) for grid, like in pairs)


def quantized_layers(model: nn.Module, dummy_input: Any) -> Layers:
    """The quantized layers of a prepared model by name, in the order of their first calls.

    Raises:
        QuantizationError: there are none.
    """
    found = {
        name: module
        for name, module in named_modules(unwrap(model))
        if isinstance(module, RangeLinearQuantWrapper)
    }
    order: dict[str, None] = {}
    handles = [
        watch_inputs(layer, lambda *_, name=name: order.setdefault(name)) for name, layer in found.items()
    ]
    try:
        with torch.no_grad():
            model(*forward_arguments(model, dummy_input))
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise QuantizationError("nothing of the model is quantized; there is nothing to search")
    return {name: found[name] for name in order}


def own_quantizers(layer: RangeLinearQuantWrapper) -> dict[str, ActivationQuantizer]:
    """The quantizers of activations that are the layer's own: of its output, and of inputs by index."""
    own = {
        key: quantizer
        for key, quantizer in layer.inputs_quant.items()
        if isinstance(quantizer, ActivationQuantizer) and quantizer.where.startswith(f"{layer.name} ")
    }
    follows = layer.keeps_grid or isinstance(layer, RangeLinearEmbeddingWrapper)
    if layer.output_quant is not None and not follows:
        own["output"] = layer.output_quant
    return own


def grids_of(layer: RangeLinearQuantWrapper) -> LayerGrids:
    """The layer's fixed grids as they are now."""
    activations = {
        key: Grid(quantizer.settings, quantizer.scale.clone(), quantizer.zero_point.clone())
        for key, quantizer in own_quantizers(layer).items()
        if not quantizer.is_dynamic
    }
    weight = None
    if isinstance(layer, QuantizedWeightWrapper):
        weight = Grid(layer.wts_quant_settings, layer.weight_scale.clone(), layer.weight_zero_point.clone())
    return LayerGrids(activations, weight)


def put_grids(layers: Layers, name: str, grids: LayerGrids) -> None:
    """Let a layer have other grids; what reads it is told.

    Args:
        layers: all quantized layers of the model.
        name: the layer.
        grids: of a layer of the same kind.

    Raises:
        QuantizationError: the weight's grid is another one and its full-precision weight was not kept.
    """
    layer, changed = layers[name], set[int]()
    for key, quantizer in own_quantizers(layer).items():
        if key in grids.activations:
            grid = grids.activations[key]
            quantizer.settings = grid.settings
            quantizer.set_grid(grid.scale, grid.zero_point)
            changed.add(id(quantizer))
    before = grids_of(layer).weight
    is_other = grids.weight is not None and before is not None and not grids.weight.is_like(before)
    if isinstance(layer, QuantizedWeightWrapper) and grids.weight is not None and is_other:
        layer.wts_quant_settings = grids.weight.settings
        layer.set_weight_grid(grids.weight.scale, grids.weight.zero_point)
        changed.add(id(layer.output_quant))  # an embedding's output is on its weight's grid
    for reader in layers.values():
        if any(id(grid) in changed for grid in reader.input_grids.values()):
            reader.readjust()
