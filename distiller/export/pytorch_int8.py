"""A model after post-training quantization in PyTorch's own quantized form, as far as PyTorch still has it.

Convolutions and linear layers (with their ReLUs), additions, multiplications, concatenations and max
pooling run on quantized tensors; other layers get real numbers, and their outputs are quantized again.
PyTorch announces the end of its quantized tensors: `export_int8_onnx` writes integers that last.
Knows nothing about data.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.dummy_input import forward_arguments
from distiller.errors import QuantizationError, first_line
from distiller.evaluation_mode import evaluating
from distiller.export.cpu_facts import cpu_facts
from distiller.export.integer_view import IntegerLayer, check_arithmetic, grid_of, integer_layer
from distiller.export.pytorch_qparams import (
    distiller_qparams_to_pytorch,
    distiller_quantized_tensor_to_pytorch,
)
from distiller.modules import Concat, EltwiseAdd, EltwiseMult
from distiller.names import named_modules, unwrap
from distiller.quantization.activation_quant import ActivationQuantizer
from distiller.quantization.ptq_weights import QuantizedWeightWrapper
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper
from distiller.quantization.quantizer import leaf_modules

__all__ = [
    "PyTorchInt8Model",
    "check_backend",
    "convert_distiller_ptq_model_to_pytorch",
    "distiller_qparams_to_pytorch",
    "distiller_quantized_tensor_to_pytorch",
]

_PACKAGES = ("torch.ao.nn.intrinsic.quantized", "torch.ao.nn.quantized")  # imported where they are needed
_X86_BACKENDS = ("fbgemm", "x86", "onednn")
_ON_QUANTIZED = (nn.MaxPool2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)
_LAYER_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_INSTEAD = "or export integers that do not need it: --export-int8 (export_int8_onnx)"
_DEPRECATION = "torch.quantize_per_tensor, torch.quantize_per_channel and other"


class PyTorchInt8Model(nn.Module):
    """A model on quantized tensors inside, on real numbers outside.

    Args:
        model: takes real numbers, returns them or quantized tensors.

    Attributes:
        model: the same, with quantized modules in the places of the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, in real numbers."""
        return pytree.tree_map_only(Tensor, _in_reals, self.model(*args, **kwargs))


def convert_distiller_ptq_model_to_pytorch(
    model: nn.Module, dummy_input: Any, backend: str = "fbgemm"
) -> PyTorchInt8Model:
    """Convert a model that `PostTrainLinearQuantizer` has prepared to PyTorch's quantized modules.

    Weights become int8 by tensor or channel, activations uint8, biases stay real numbers. Where the backend
    needs it (x86 without VNNI) activations get one bit less, and results differ from the simulation.

    Args:
        model: with fixed ranges, 8 bits for activations and 2 to 8 for weights; stays as it is.
        dummy_input: an input, or a tuple or list of the model's positional arguments, to try the result on.
        backend: of `torch.backends.quantized.supported_engines`: fbgemm (default), x86, onednn, qnnpack.

    Returns:
        The converted model, in evaluation mode, on the CPU. A warning tells that PyTorch's quantized
        tensors will end.

    Raises:
        QuantizationError: this PyTorch has no such backend or no quantized modules any more, the model is
            quantized in another way, or it does something that PyTorch cannot do with quantized tensors.
    """
    model = unwrap(model)
    check_backend(backend)
    copied = copy.deepcopy(model).cpu()
    wrappers = {m: n for n, m in named_modules(copied) if isinstance(m, RangeLinearQuantWrapper)}
    if not wrappers:
        raise QuantizationError(
            f"{type(model).__name__}: PostTrainLinearQuantizer has quantized no layer of it; prepare it with "
            "that first (a trained model: --export-int8)"
        )
    warnings.warn(
        f"PyTorch {torch.__version__} announces that a future release has no quantized tensors any more; "
        "for a model that lasts, export it with --export-int8 (export_int8_onnx)",
        stacklevel=2,
    )
    inside = {part for wrapper in wrappers for part in wrapper.modules()}
    with _engine(backend):
        converted: dict[nn.Module, nn.Module] = {}
        for wrapper, name in wrappers.items():
            converted[wrapper] = _converted(wrapper, name or type(model).__name__, backend)
        for leaf in leaf_modules(copied).values():
            if leaf not in inside and not isinstance(leaf, _ON_QUANTIZED):
                converted[leaf] = _OnReals(leaf)
        for module in [m for m in copied.modules() if m not in inside]:
            for key, child in module._modules.items():
                if child in converted:
                    module._modules[key] = converted[child]
        result = PyTorchInt8Model(converted.get(copied, copied))
        try:
            with evaluating(result):
                result(*pytree.tree_map_only(Tensor, Tensor.cpu, forward_arguments(model, dummy_input)))
        except Exception as error:
            raise QuantizationError(
                f"{type(model).__name__}: PyTorch cannot run it on quantized tensors: "
                f"{type(error).__name__}: {first_line(error)}; make operations in its forward modules of "
                f"distiller.modules, {_INSTEAD}"
            ) from error
    return result


def check_backend(backend: str) -> None:
    """See to it that this PyTorch has quantized modules, and the backend.

    Args:
        backend: as in `convert_distiller_ptq_model_to_pytorch`.

    Raises:
        QuantizationError: it has not.
    """
    try:
        for package in _PACKAGES:
            import_module(package)
    except ImportError as error:
        raise QuantizationError(
            f"--qe-convert-pytorch: PyTorch {torch.__version__} has no quantized modules any more "
            f"({first_line(error)}); take one that has, {_INSTEAD}"
        ) from error
    known = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    if backend not in known:
        raise QuantizationError(
            f"--qe-convert-pytorch: PyTorch {torch.__version__} has no quantized backend '{backend}' here, "
            f"it has {', '.join(known) or 'none'}; give one of them, {_INSTEAD}"
        )


class _Grid(NamedTuple):
    """Scale and zero point of a uint8 tensor."""

    scale: float
    zero_point: int


class _Step(nn.Module):
    """An operation on quantized tensors, its inputs brought to their grids where they are not on them."""

    def __init__(self, inputs: dict[int, _Grid], operation: nn.Module) -> None:
        super().__init__()
        self.inputs = inputs
        self.operation = operation

    def forward(self, *args: Any) -> Any:
        on_grids = (_on(x, self.inputs[i]) if i in self.inputs else x for i, x in enumerate(args))
        return self.operation(*on_grids)


class _Arithmetic(nn.Module):
    """A function of `torch.ops.quantized` of two tensors, or of a list of them."""

    def __init__(self, function: str, output: _Grid, dim: int | None = None) -> None:
        super().__init__()
        self.function = function
        self.output = output
        self.dim = dim

    def forward(self, *inputs: Tensor) -> Tensor:
        function: Callable[..., Tensor] = getattr(torch.ops.quantized, self.function)
        operands = inputs if self.dim is None else (list(inputs), self.dim)
        return function(*operands, *self.output)


class _OnReals(nn.Module):
    """A module on real numbers; its output quantized where it has a grid."""

    def __init__(self, module: nn.Module, output: _Grid | None = None, has_relu: bool = False) -> None:
        super().__init__()
        self.module = module
        self.output = output
        self.has_relu = has_relu

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, _in_reals, (args, kwargs))
        result = self.module(*args, **kwargs)
        if self.output is None:
            return result
        return _on(torch.relu(result) if self.has_relu else result, self.output)


def _converted(wrapper: RangeLinearQuantWrapper, name: str, backend: str) -> nn.Module:
    """What takes the place of a layer of post-training quantization."""
    check_arithmetic(wrapper)
    output_quant = wrapper.output_quant
    if output_quant is None:
        raise QuantizationError(
            f"{name}: its activations are not quantized, and PyTorch's backends compute with 8 bits "
            f"throughout; set bits_activations to 8, {_INSTEAD}"
        )
    output = _grid(output_quant, name, backend)
    inputs = {
        i: _grid(quantizer, f"{name} input {i}", backend) for i, quantizer in wrapper.input_grids.items()
    }
    has_relu = output_quant.settings.clip_half_range
    suffix = "_relu" if has_relu else ""
    layer = wrapper.wrapped_module
    integers = None
    if isinstance(wrapper, QuantizedWeightWrapper) and not wrapper.is_fake:
        integers = integer_layer(wrapper, name)
    operation: nn.Module = _OnReals(layer, output, has_relu)
    if integers is not None and isinstance(layer, _LAYER_KINDS) and _has_kernel(layer):
        try:
            operation = _quantized_layer(layer, integers, output, has_relu)
        except RuntimeError as error:
            raise QuantizationError(
                f"{name}: the backend {backend} cannot hold this layer: {first_line(error).rstrip('.')}; "
                f"take another backend, {_INSTEAD}"
            ) from error
    elif isinstance(layer, EltwiseAdd | EltwiseMult) and len(inputs) == 2:
        operation = _Arithmetic(("add" if isinstance(layer, EltwiseAdd) else "mul") + suffix, output)
    elif isinstance(layer, Concat):
        operation = _Arithmetic("cat" + suffix, output, layer.dim)
    elif wrapper.keeps_grid and isinstance(layer, _ON_QUANTIZED):
        operation = layer
    return _Step(inputs, operation)


def _has_kernel(layer: nn.Module) -> bool:
    """Whether PyTorch's quantized layer takes the layer's settings."""
    if isinstance(layer, nn.Linear):
        return True
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _quantized_layer(layer: nn.Module, integers: IntegerLayer, output: _Grid, has_relu: bool) -> nn.Module:
    """A module of torch.ao.nn.quantized with the layer's integers and bias."""
    fused, plain = (import_module(package) for package in _PACKAGES)
    kind = next(kind.__name__ for kind in _LAYER_KINDS if isinstance(layer, kind))
    if has_relu:
        cls = getattr(fused, "LinearReLU" if kind == "Linear" else f"ConvReLU{kind[-2:]}")
    else:
        cls = getattr(plain, kind)
    if isinstance(layer, nn.Linear):
        quantized = cls(layer.in_features, layer.out_features)
    else:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        quantized = cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
        )
    scale, zero_point = integers.scale.double(), integers.zero_point.long()
    if integers.axis is None:
        weight = torch._make_per_tensor_quantized_tensor(integers.weight, float(scale), int(zero_point))
    else:
        weight = torch._make_per_channel_quantized_tensor(integers.weight, scale, zero_point, integers.axis)
    quantized.set_weight_bias(weight, integers.bias)
    quantized.scale, quantized.zero_point = output
    return quantized


def _grid(quantizer: ActivationQuantizer, where: str, backend: str) -> _Grid:
    """A grid in uint8: of the mode's whole range, whose ends are those of the type, also under a ReLU."""
    grid, settings = grid_of(quantizer, where), quantizer.settings
    if settings.num_bits != 8:
        raise QuantizationError(
            f"{where}: PyTorch's backends compute with 8 bits, got {settings.num_bits}; set bits_activations "
            f"to 8, {_INSTEAD}"
        )
    zero_point = grid.zero_point - settings.qrange[0]
    if not _needs_reduced_range(backend):
        return _Grid(grid.scale, zero_point)
    return _Grid(grid.scale * 255 / 127, round(zero_point * 127 / 255))


def _needs_reduced_range(backend: str) -> bool:
    """Whether sums of two products saturate at 16 bits: kernels for x86 where it has no VNNI."""
    return backend in _X86_BACKENDS and not cpu_facts().dot_products


def _on(x: Tensor, grid: _Grid) -> Tensor:
    if x.is_quantized:
        if x.q_scale() == grid.scale and x.q_zero_point() == grid.zero_point:
            return x
        x = x.dequantize()
    return torch.quantize_per_tensor(x, *grid, torch.quint8)


def _in_reals(x: Tensor) -> Tensor:
    return x.dequantize() if x.is_quantized else x


@contextmanager
def _engine(backend: str) -> Iterator[None]:
    """The backend is torch's own choice meanwhile: weights are laid out for it. Without torch's warning."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = backend
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_DEPRECATION)
            yield
    finally:
        torch.backends.quantized.engine = before
