"""What of a quantized model has a width of its own that may be chosen, and what the widths cost.

Knows nothing about sensitivities.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from distiller.macs import count_macs
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.ptq_layers import RangeLinearEmbeddingWrapper
from distiller.quantization.ptq_weights import QuantizedWeightWrapper
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper
from distiller.quantization.search.grids import Layers, own_quantizers
from distiller.quantization.search.width_choice import WidthCost, WidthProduct

Budget: TypeAlias = Literal["weight_bytes", "bit_operations"]
_FLOAT = 32


class LayerPart(NamedTuple):
    """The weight of a layer, or its activations: the output, and inputs that nobody quantized before."""

    layer: str
    what: Literal["weights", "activations"]

    def __str__(self) -> str:
        return f"the {self.what} of {self.layer}"

    @property
    def override(self) -> str:
        """The key of its width in overrides."""
        return f"bits_{self.what}"


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a model whose widths are to be chosen.

    Attributes:
        free: widths to choose from, by part.
        pinned: the width of quantized parts that have another.
    """

    free: Mapping[LayerPart, tuple[int, ...]]
    pinned: Mapping[LayerPart, int]

    def width_or_part(self, part: LayerPart | None) -> LayerPart | int:
        """The part where its width is to be chosen, or its width."""
        if part is None:
            return _FLOAT
        return part if part in self.free else self.pinned.get(part, _FLOAT)


def parts_of(
    quantizer: PostTrainLinearQuantizer,
    layers: Layers,
    weight_widths: Sequence[int],
    activation_widths: Sequence[int],
) -> Parts:
    """The parts of a prepared model: those to which the overrides give a width keep it.

    Args:
        quantizer: prepared.
        layers: its quantized layers.
        weight_widths: to choose from; empty: weights keep the widths of the quantizer.
        activation_widths: alike.
    """
    free: dict[LayerPart, tuple[int, ...]] = {}
    pinned: dict[LayerPart, int] = {}
    for name, layer in layers.items():
        given = quantizer.overrides.get(quantizer.override_keys.get(name, ""), {})
        own = own_quantizers(layer).values()
        widths: dict[LayerPart, tuple[int, Sequence[int]]] = {}
        if isinstance(layer, QuantizedWeightWrapper):
            widths[LayerPart(name, "weights")] = (layer.wts_quant_settings.num_bits, weight_widths)
        if own:
            widths[LayerPart(name, "activations")] = (
                max(q.settings.num_bits for q in own),
                activation_widths,
            )
        for part, (width, choice) in widths.items():
            if choice and part.override not in given:
                free[part] = tuple(choice)
            else:
                pinned[part] = width
    return Parts(free, pinned)


def cost_of(
    model: nn.Module, layers: Layers, parts: Parts, budget: Budget, dummy_input: Any
) -> WidthCost[LayerPart]:
    """What the parts' widths cost.

    `weight_bytes`: the weights, each rounded up to whole bytes; those that are not quantized as they are;
    without biases, scales and zero points. `bit_operations`: sum of MACs * width * width of what is
    multiplied, weights by activations or activations by activations; 32 for what is not quantized.

    Args:
        model: prepared.
        layers: its quantized layers.
        parts: its parts.
        budget: what is to be counted.
        dummy_input: its batch is what operations are counted for.
    """
    return (
        _bytes(model, layers, parts)
        if budget == "weight_bytes"
        else _operations(model, layers, parts, dummy_input)
    )


def _bytes(model: nn.Module, layers: Layers, parts: Parts) -> WidthCost[LayerPart]:
    sizes: dict[LayerPart, dict[int, int]] = {}
    fixed = _float_bytes(model, layers)
    for name, weight in quantized_weights(layers).items():
        part = LayerPart(name, "weights")
        if part in parts.free:
            sizes[part] = {width: _whole_bytes(weight, width) for width in parts.free[part]}
        else:
            fixed += _whole_bytes(weight, parts.pinned[part])
    return WidthCost(sizes, fixed=fixed)


def bytes_at(model: nn.Module, layers: Layers, average_bits: float) -> int:
    """The cost in bytes, as of `cost_of`, with all quantized weights at one width, which may be a fraction.

    Args:
        model: prepared.
        layers: its quantized layers.
        average_bits: the width.
    """
    weights = quantized_weights(layers).values()
    return _float_bytes(model, layers) + sum(_whole_bytes(weight, average_bits) for weight in weights)


def quantized_weights(layers: Layers) -> dict[str, Tensor]:
    """The weights that are quantized, by layer."""
    return {
        name: layer.wrapped_module.weight  # type: ignore[misc]
        for name, layer in layers.items()
        if isinstance(layer, QuantizedWeightWrapper)
    }


def _float_bytes(model: nn.Module, layers: Layers) -> int:
    """Of the weights that are not quantized."""
    counted = {id(weight) for weight in quantized_weights(layers).values()}
    others = {id(p): p for p in model.parameters() if p.dim() >= 2 and id(p) not in counted}
    return sum(p.numel() * p.element_size() for p in others.values())


def _operations(model: nn.Module, layers: Layers, parts: Parts, dummy_input: Any) -> WidthCost[LayerPart]:
    owners = _owners(layers)
    by_module = {id(layer.wrapped_module): (name, layer) for name, layer in layers.items()}
    products: list[WidthProduct[LayerPart]] = []
    for cost in count_macs(model, dummy_input):
        name, layer = by_module.get(id(cost.module), ("", None))
        first, second = (None, None) if layer is None else _operands(name, layer, owners)
        products.append(WidthProduct(cost.macs, parts.width_or_part(first), parts.width_or_part(second)))
    return WidthCost(products=products)


def _operands(
    name: str, layer: RangeLinearQuantWrapper, owners: Mapping[int, LayerPart]
) -> tuple[LayerPart | None, LayerPart | None]:
    """Whose widths the two factors of a layer's products have; None where they are in floating point."""
    inputs = {index: owners.get(id(grid)) for index, grid in layer.input_grids.items()}
    if isinstance(layer, QuantizedWeightWrapper):
        return LayerPart(name, "weights"), inputs.get(0)
    has_weight = any(p.dim() >= 2 for p in layer.wrapped_module.parameters())
    return (None if has_weight else inputs.get(1)), inputs.get(0)


def _owners(layers: Layers) -> dict[int, LayerPart]:
    """The part that each quantizer of activations belongs to, by the id of the quantizer."""
    owners: dict[int, LayerPart] = {}
    for name, layer in layers.items():
        if isinstance(layer, RangeLinearEmbeddingWrapper) and layer.output_quant is not None:
            owners[id(layer.output_quant)] = LayerPart(name, "weights")
        for quantizer in own_quantizers(layer).values():
            owners[id(quantizer)] = LayerPart(name, "activations")
    return owners


def _whole_bytes(weight: Tensor, width: float) -> int:
    return math.ceil(weight.numel() * width / 8)


def overrides_for(widths: Mapping[LayerPart, int]) -> dict[str, dict[str, int]]:
    """The overrides that give parts their widths, by layer."""
    found: dict[str, dict[str, int]] = {}
    for part, width in widths.items():
        found.setdefault(part.layer, {})[part.override] = width
    return found


def widths_by_layer(widths: Mapping[LayerPart, int], what: Collection[str]) -> dict[str, int]:
    """The widths of weights, or of activations, by layer."""
    return {part.layer: width for part, width in widths.items() if part.what in what}
