"""A quantized model for torch.onnx: marks where tensors and weights are on grids.

A mark is an operation that ONNX does not have, of the domain `DOMAIN`, with the index of what it
stands for; `qdq_rewrite.py` puts integers in its place. So the model computes in floating point
what the layers do between quantizers, and nothing of how quantization is simulated.
Knows nothing about ONNX files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distiller.errors import QuantizationError
from distiller.export.integer_view import (
    Grid,
    IntegerLayer,
    IntegerView,
    check_arithmetic,
    grid_of,
    is_tensor_quantizer,
)
from distiller.names import named_modules
from distiller.quantization.ptq_precision import computed_in
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper

DOMAIN = "distiller"
GRID, WEIGHT = "Grid", "Weight"
INDEX = "index"
_WITH_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


@dataclass(slots=True)
class Marks:
    """What the marks of a model stand for, by their indices.

    Attributes:
        grids: of the tensors.
        weights: of the layers.
    """

    grids: list[Grid] = field(default_factory=list)
    weights: list[IntegerLayer] = field(default_factory=list)


def with_marks(view: IntegerView) -> tuple[nn.Module, Marks]:
    """The view's model, to be exported only, and what its marks stand for.

    Args:
        view: of a quantized model; its copy is changed.

    Raises:
        QuantizationError: none of its weights is quantized, or not as integers of 8 bits can be.
    """
    marks = Marks([], list(view.layers.values()))
    names = {module: name for name, module in named_modules(view.model)}
    replaced: dict[nn.Module, nn.Module] = {}
    for module, name in names.items():
        if is_tensor_quantizer(module):
            replaced[module] = _Mark(GRID, len(marks.grids))
            marks.grids.append(grid_of(module, name or type(module).__name__))
        elif isinstance(module, RangeLinearQuantWrapper):
            check_arithmetic(module)
            replaced[module] = _Between(module)
    if not marks.grids and not marks.weights:
        raise QuantizationError(
            f"{type(view.model).__name__}: nothing in it is quantized, so there are no integers to export; "
            "quantize it first, or write it in floating point (export_onnx, --export-onnx)"
        )
    layers = [name for module, name in names.items() if isinstance(module, _WITH_WEIGHTS)]
    if layers and not marks.weights:
        raise QuantizationError(
            f"{type(view.model).__name__}: no weight in it is quantized, so runtimes would compute all of "
            f"its {len(layers)} layers in floating point; give weights 2 to 8 bits (bits_weights, "
            "--qe-bits-wts), or write it in floating point (export_onnx, --export-onnx)"
        )
    for index, layer in enumerate(view.layers):
        parametrize.register_parametrization(layer, "weight", _Mark(WEIGHT, index), unsafe=True)
    for module in (*names, *replaced.values()):
        for key, child in module._modules.items():
            if child in replaced:
                module._modules[key] = replaced[child]
    return replaced.get(view.model, view.model), marks


class _Mark(nn.Module):
    """The identity, to be found again in the exported graph."""

    def __init__(self, kind: str, index: int) -> None:
        super().__init__()
        self.kind = kind
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.kind}", (x,), {INDEX: self.index}, dtype=x.dtype, shape=x.shape, version=1
        )


class _Between(nn.Module):
    """A layer of post-training quantization: the float operation between the quantizers."""

    def __init__(self, wrapper: RangeLinearQuantWrapper) -> None:
        super().__init__()
        self.wrapped_module = wrapper.wrapped_module
        self.inputs_quant = wrapper.inputs_quant
        self.output_quant = wrapper.output_quant
        self.precision = wrapper.precision

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = list(args)
        for index, mark in self.inputs_quant.items():
            inputs[int(index)] = mark(inputs[int(index)])
        if self.precision is None:
            output = self.wrapped_module(*inputs, **kwargs)
        else:
            output = computed_in(self.precision, self.wrapped_module, tuple(inputs), kwargs, torch.float32)
        return output if self.output_quant is None else self.output_quant(output)

    @property
    def weight(self) -> Tensor:
        """The layer's, for models that look at it."""
        return self.wrapped_module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The layer's, as `weight`."""
        return self.wrapped_module.bias  # type: ignore[return-value]
