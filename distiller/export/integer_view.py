"""What an integer kernel needs to know of a quantized model: integers of the weights, grids of the tensors.

The model is one of post-training quantization or one that was trained with quantization; both come out as
a copy with its integers, and the modules in it that round tensors say by protocol to which grid.
Knows nothing about file formats and runtimes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.names import named_modules, unwrap
from distiller.quantization import affine
from distiller.quantization.activation_quant import ActivationQuantizer
from distiller.quantization.ptq_weights import QuantizedWeightWrapper
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper
from distiller.quantization.training.deploy import folded_copy

MAX_BITS = 8
_LEVELS = 2**MAX_BITS
_OFF_GRID = 1e-2  # of a step: far above what rounding in float32 makes, far below a change of a weight
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NEVER_SATURATED = 64  # 2 * 255 * 64 < 2**15
_ANY_TERMS = 2**15  # products in one sum of a matrix product, whose size is known at run time only


@runtime_checkable
class TensorQuantizer(Protocol):
    """A module that rounds a tensor of real numbers to one fixed grid: x -> (q - zero_point) * scale.

    Where it is a ReLU as well, qmin is the zero point.
    """

    scale: Tensor  # scalar
    zero_point: Tensor  # scalar, an integer
    qmin: int
    qmax: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers that a tensor of real numbers lies on: x = (q - zero_point) * scale.

    Attributes:
        scale: above 0.
        zero_point: the integer of the real number 0.
        qmin: smallest integer that occurs; the zero point, where a ReLU is part of the quantizer.
        qmax: largest one; at most 255 above `qmin`.
    """

    scale: float
    zero_point: int
    qmin: int
    qmax: int

    @property
    def unsigned(self) -> Grid:
        """The same real numbers by integers that begin at 0: they fit in 8 bits without a sign."""
        return Grid(self.scale, self.zero_point - self.qmin, 0, self.qmax - self.qmin)

    def __post_init__(self) -> None:
        assert self.qmin <= self.zero_point <= self.qmax < self.qmin + _LEVELS
        assert self.scale > 0


@dataclass(frozen=True, slots=True)
class IntegerLayer:
    """A layer's weight as integers: w = (q - zero_point) * scale.

    Attributes:
        name: of the layer, canonical.
        weight: q, int8, in the shape of the layer's weight.
        scale: float32, scalar or one for each index of `axis`.
        zero_point: int8, in the shape of `scale`; all 0 wherever that is possible.
        axis: dimension of the weight with a scale for each index; None for one scale in all.
        bias: real numbers, None if there is none.
    """

    name: str
    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class IntegerView:
    """A copy of a quantized model, and its integers.

    Attributes:
        model: the copy, in evaluation mode. Tensors are rounded in it by modules that `is_tensor_quantizer`
            knows; layers of post-training quantization are as `PostTrainLinearQuantizer` made them.
        layers: by the module of the copy that has the weight.
        is_trained: whether it was trained with quantization; batch norms are then folded in the copy.
    """

    model: nn.Module
    layers: dict[nn.Module, IntegerLayer]
    is_trained: bool


def integer_view(model: nn.Module, dummy_input: Any = None) -> IntegerView:
    """The integers of a model, which stays as it is.

    Args:
        model: prepared by `PostTrainLinearQuantizer`, or by a training quantizer and trained; batch norms
            behind the quantized layers of the latter become part of them.
        dummy_input: an input, or a tuple or list of them, to see which batch norms these are.

    Raises:
        QuantizationError: a weight has more than 8 bits, was changed since it was rounded, or has no
            integers.
        GraphTraceError: a trained model cannot be traced.
    """
    model = unwrap(model)
    if is_trained(model):
        arguments = tuple(dummy_input) if isinstance(dummy_input, list) else dummy_input
        folded = folded_copy(model, arguments)
        by_name = dict(named_modules(folded.model))
        layers = {
            by_name[name]: _finer(
                _layer(by_name[name], name, w.integers, w.scale, w.zero_point, w.qmin, w.qmax)
            )
            for name, w in folded.weights.items()
        }
        return IntegerView(folded.model, layers, is_trained=True)
    copied = copy.deepcopy(model).eval()
    layers = {
        module.wrapped_module: integer_layer(module, name or type(model).__name__)
        for name, module in named_modules(copied)
        if isinstance(module, QuantizedWeightWrapper)
    }
    return IntegerView(copied, layers, is_trained=False)


def is_trained(model: nn.Module) -> bool:
    """Whether a training quantizer has prepared the model."""
    return any(hasattr(module, "quantizes") for module in model.modules())


def is_tensor_quantizer(module: nn.Module) -> bool:
    """Whether the module rounds a tensor to a grid: `grid_of` tells which."""
    return isinstance(module, ActivationQuantizer | TensorQuantizer)


def grid_of(quantizer: nn.Module, where: str) -> Grid:
    """The grid of a tensor quantizer.

    Args:
        quantizer: an `ActivationQuantizer` or `TensorQuantizer`.
        where: whose values it rounds, for messages.

    Raises:
        QuantizationError: its range is that of each batch, or it has more than 8 bits.
    """
    if isinstance(quantizer, ActivationQuantizer):
        if quantizer.is_dynamic:
            raise QuantizationError(
                f"{where}: its range is dynamic, that of each batch; an integer model needs fixed scales; "
                "give activation statistics (model_activation_stats, --qe-stats-file or --qe-calibration)"
            )
        qmin, qmax = quantizer.settings.qrange
    else:
        assert isinstance(quantizer, TensorQuantizer)
        qmin, qmax = int(quantizer.qmin), int(quantizer.qmax)
    if qmax - qmin >= _LEVELS:
        raise QuantizationError(_too_wide(where, qmax - qmin, "bits_activations"))
    if isinstance(quantizer, ActivationQuantizer) and quantizer.settings.clip_half_range:
        qmin = int(quantizer.zero_point)
    return Grid(float(quantizer.scale), int(quantizer.zero_point), qmin, qmax)


def integer_layer(wrapper: QuantizedWeightWrapper, name: str) -> IntegerLayer:
    """The integers of the weight of a layer of post-training quantization.

    Args:
        wrapper: the layer.
        name: its canonical name.

    Raises:
        QuantizationError: the weight has more than 8 bits, is not of float32, or was changed since it was
            rounded.
    """
    where, layer = f"{name}: weight", wrapper.wrapped_module
    qmin, qmax = wrapper.wts_quant_settings.qrange
    assert isinstance(layer.weight, Tensor)
    if layer.weight.dtype != torch.float32:
        raise QuantizationError(
            f"{where}: integers are made of float32 numbers, got {layer.weight.dtype}; leave out fpq_module "
            "for it, or call model.float() before quantization"
        )
    weight, scale, zero_point = (
        tensor.detach().cpu() for tensor in (layer.weight, wrapper.weight_scale, wrapper.weight_zero_point)
    )
    axis = _axis(layer, scale, where)
    q = affine.quantize(weight, scale, zero_point, qmin, qmax, axis)
    off = (weight - affine.dequantize(q, scale, zero_point, axis)).abs()
    if bool((off > _OFF_GRID * _along(scale, axis, weight)).any()):
        raise QuantizationError(
            f"{where}: it is not on the grid that it was rounded to, something has changed it since; "
            "quantize the model again"
        )
    return _layer(layer, name, q, scale, zero_point, qmin, qmax)


def check_arithmetic(wrapper: RangeLinearQuantWrapper) -> None:
    """Refuse what a layer of post-training quantization simulates beyond 8-bit grids and 32-bit sums.

    Raises:
        QuantizationError: approximated changes of scale, or accumulators that saturate early.
    """
    if wrapper.scale_approx_mult_bits is not None:
        raise QuantizationError(
            f"{wrapper.name}: scale_approx_mult_bits: runtimes change the scale exactly, the approximation "
            "cannot be exported; leave it out (no --qe-scale-approx-bits)"
        )
    needed = wrapper.accumulator_bits(_ANY_TERMS) if wrapper.bits_accum < 32 else None
    if needed is not None and needed > wrapper.bits_accum:
        raise QuantizationError(
            f"{wrapper.name}: bits_accum: accumulators of {wrapper.bits_accum} bits can saturate here, those "
            "of runtimes have 32; set bits_accum to 32 (--qe-bits-accum)"
        )


def _layer(
    layer: nn.Module, name: str, q: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> IntegerLayer:
    """A weight's integers in int8: with zero point 0 if that holds them, which kernels are fastest with."""
    where = f"{name}: weight"
    if qmax - qmin >= _LEVELS:
        if qmin == -qmax == 1 - _LEVELS and bool((q.int() % 2 == 1).logical_or(q == 0).all()):
            raise QuantizationError(_no_zero(where, qmin, qmax))
        raise QuantizationError(_too_wide(where, qmax - qmin, "bits_weights"))
    q, zero_point, scale = (
        tensor.detach().cpu() for tensor in (q, zero_point.to(torch.int32), scale.float())
    )
    axis = _axis(layer, scale, where)
    centred = q - _along(zero_point, axis, q)
    has_room = int(centred.min()) >= -_LEVELS // 2 and int(centred.max()) < _LEVELS // 2
    shift = zero_point if has_room else torch.full_like(zero_point, qmin + _LEVELS // 2)
    integers = (q - _along(shift, axis, q)).to(torch.int8)
    bias = getattr(layer, "bias", None)
    bias = bias.detach().cpu() if isinstance(bias, Tensor) else None
    return IntegerLayer(name, integers, scale, (zero_point - shift).to(torch.int8), axis, bias)


def _finer(layer: IntegerLayer) -> IntegerLayer:
    """The same weight by integers times a power of two, so that biases, which are rounded to multiples of
    input scale times weight scale, are rounded less. At 4 bits rounding them coarsely changed 1 to 3 % of the
    decisions of trained models.

    Up to 64: processors without VNNI add two products of 8 bits in 16, and larger ones may not fit.
    """
    largest = int(layer.weight.int().abs().max()) if layer.weight.numel() else 0
    if layer.zero_point.any() or largest == 0:
        return layer
    factor = 2 ** max((_NEVER_SATURATED // largest).bit_length() - 1, 0)
    return replace(layer, weight=layer.weight * factor, scale=layer.scale / factor)


def _too_wide(where: str, largest: int, setting: str) -> str:
    return (
        f"{where}: its integers have {largest.bit_length()} bits, an integer model has at most {MAX_BITS}; "
        f"give it fewer ({setting})"
    )


def _no_zero(where: str, qmin: int, qmax: int) -> str:
    fitting = MAX_BITS - 1
    return (
        f"{where}: its levels are the odd numbers from {qmin} to {qmax} (so are DoReFa's); on integers "
        "without gaps their zero point would lie halfway between two, which ONNX has not, and with gaps they "
        f"have {(qmax - qmin).bit_length()} bits; train with at most {fitting} (bits_weights: {fitting})"
    )


def _axis(layer: nn.Module, scale: Tensor, where: str) -> int | None:
    """The dimension of a layer's weight that its scales belong to."""
    if scale.dim() == 0:
        return None
    if not isinstance(layer, _TRANSPOSED):
        return 0
    if layer.groups == 1:
        return 1
    if layer.groups == layer.out_channels == layer.in_channels:
        return 0
    raise QuantizationError(
        f"{where}: a transposed convolution in {layer.groups} groups has no dimension that its scales for "
        "each channel belong to; set per_channel_wts: false for it"
    )


def _along(values: Tensor, axis: int | None, x: Tensor) -> Tensor:
    if axis is None:
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)
