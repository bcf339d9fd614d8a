"""A quantized model beside the model it was made from: the same layers under the same names.

    twin = float_twin(model, dummy_input)               batch norms folded, as quantization does
    quantized = copy.deepcopy(twin)
    PostTrainLinearQuantizer(quantized, ...).prepare_model(dummy_input)

Knows nothing about how a quantized layer is made better.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distiller.errors import QuantizationError
from distiller.names import named_modules, unwrap
from distiller.quantization.ptq_layers import RangeLinearQuantParamLayerWrapper
from distiller.quantization.refinement.folded_norms import fold_keeping_norms
from distiller.quantization.refinement.layer_rows import LAYERS


@dataclass(frozen=True, slots=True)
class LayerPair:
    """A layer in full precision, and what took its place.

    Attributes:
        name: the name of both.
        float_layer: a convolution or linear layer.
        wrapper: holds the same layer with its weight rounded.
    """

    name: str
    float_layer: nn.Module
    wrapper: RangeLinearQuantParamLayerWrapper

    @property
    def layer(self) -> nn.Module:
        """The layer with the rounded weight."""
        return self.wrapper.wrapped_module

    @property
    def has_relu(self) -> bool:
        """Whether the quantizer of its output is a ReLU as well."""
        output = self.wrapper.output_quant
        return output is not None and output.settings.clip_half_range


def float_twin(model: nn.Module, dummy_input: Any) -> nn.Module:
    """A copy of a model in evaluation mode with its batch norms folded.

    Its layers compute what those of the quantized model approximate, under the same names. What the batch
    norms told of the layers' outputs is kept for `equalize`.

    Args:
        model: in floating point; not changed.
        dummy_input: an input, or a tuple of them, to trace the model with.

    Raises:
        GraphTraceError: the model cannot be traced.
        DistillerError: a batch norm cannot be folded.
    """
    twin = copy.deepcopy(unwrap(model)).eval()
    fold_keeping_norms(twin, dummy_input)
    return twin


def layer_pairs(float_model: nn.Module, quantized_model: nn.Module) -> dict[str, LayerPair]:
    """The quantized convolutions and linear layers with what they were, by name, in the model's order.

    Args:
        float_model: the twin, batch norms folded.
        quantized_model: prepared by `PostTrainLinearQuantizer`.

    Raises:
        QuantizationError: nothing is quantized, or the models are not twins.
    """
    floats = dict(named_modules(unwrap(float_model)))
    pairs: dict[str, LayerPair] = {}
    for name, module in named_modules(unwrap(quantized_model)):
        twin = floats.get(name)
        if isinstance(module, nn.Identity) and isinstance(twin, _BatchNorm):
            raise QuantizationError(
                f"float_model: '{name}' is a batch norm, which the quantized model has folded; "
                "make the model with float_twin(model, dummy_input)"
            )
        if not isinstance(module, RangeLinearQuantParamLayerWrapper):
            continue
        if not isinstance(module.wrapped_module, LAYERS):
            continue
        if twin is None or type(twin) is not type(module.wrapped_module):
            found = "no such layer" if twin is None else f"{type(twin).__name__} there"
            raise QuantizationError(
                f"float_model: '{name}' is {type(module.wrapped_module).__name__} in the quantized model, "
                f"{found}; make modules of functional operations first (to_modules), if any, then the "
                "twin, and quantize a copy of it"
            )
        if twin.weight.shape != module.wrapped_module.weight.shape:  # type: ignore[union-attr]
            raise QuantizationError(
                f"float_model: the weight of '{name}' is {tuple(twin.weight.shape)}, in the quantized model "  # type: ignore[arg-type]
                f"{tuple(module.wrapped_module.weight.shape)}; quantize a copy of the float model"  # type: ignore[arg-type]
            )
        pairs[name] = LayerPair(name, twin, module)
    if not pairs:
        raise QuantizationError(
            "quantized_model: has no layer with a quantized weight; "
            "prepare it with PostTrainLinearQuantizer(model, ...).prepare_model(dummy_input)"
        )
    return pairs
