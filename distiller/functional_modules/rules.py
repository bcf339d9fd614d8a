"""Which module stands for which function, and with which settings.

A rule takes the arguments of the function as it was called and returns the module and the tensors that
the module is to be called with. Functions that are methods, operators or written in place share a rule
with the plain one.
Knows nothing about graphs, but that what is computed is a node of one in the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from distiller.functional_modules.attention import ScaledDotProductAttention
from distiller.functional_modules.forward_trace import VALUE
from distiller.modules import (
    BatchMatmul,
    Concat,
    EltwiseAdd,
    EltwiseDiv,
    EltwiseMult,
    EltwiseSub,
    Matmul,
    Mean,
    Stack,
)


class NoModule(Exception):
    """Why no module stands for a function as it was called, in a few words."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A function that a module can stand for.

    Attributes:
        word: the operation's type in a graph, a word of ONNX.
        build: called with the function's arguments; returns the module and the tensors (or numbers) to
            call it with. Raises NoModule, or TypeError for arguments that no module takes.
        takes_numbers: numbers that are computed from sizes stay arguments of the call; else they become
            settings of the module, for inputs of this form only.
        is_exact: the module gives the same values bit for bit.
    """

    word: str
    build: Callable[..., tuple[nn.Module, Sequence[Any]]]
    takes_numbers: bool = False
    is_exact: bool = True


def is_tensor(value: Any) -> bool:
    """Whether an argument is a tensor, and not a number or a setting."""
    return isinstance(value, fx.Node) and isinstance(value.meta[VALUE], Tensor)


def rule_for(name: str) -> Rule | None:
    """The rule of a function by its plain name, None if no module stands for it."""
    return _RULES.get(name)


def _eltwise(cls: type[nn.Module], is_commutative: bool) -> Callable[..., Any]:
    def build(input: Any, other: Any, *, alpha: Any = 1) -> Any:
        if alpha != 1:
            raise NoModule("it has a factor (alpha)")
        # What is data comes first, a number second: `2 * x` as `x * 2`.
        is_swapped = is_commutative and not is_tensor(input)
        return cls(), (other, input) if is_swapped else (input, other)

    return build


def _activation(cls: type[nn.Module], *settings: str) -> Callable[..., Any]:
    """Functions of `input`, some settings, and perhaps `inplace`, as the module's constructor has them."""

    def build(input: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip((*settings, "inplace"), args, strict=False)) | kwargs
        return cls(**given), (input,)

    return build


def _clamp(input: Any, min: Any = None, max: Any = None) -> Any:
    if not (isinstance(min, (int, float)) and isinstance(max, (int, float)) and min < max):
        raise NoModule("its bounds are not two numbers")
    return nn.Hardtanh(min, max), (input,)


def _softmax(cls: type[nn.Module]) -> Callable[..., Any]:
    def build(input: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
        if dim is None or dtype is not None or not isinstance(_stacklevel, int):
            raise NoModule("it has no dimension, or a type")
        return cls(dim), (input,)  # type: ignore[call-arg]

    return build


def _mean(input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: Any = None) -> Any:
    if dtype is not None:
        raise NoModule("it has a type")
    dim = axis if dim is None else dim
    return Mean(tuple(dim) if isinstance(dim, (list, tuple)) else dim, keepdim), (input,)


def _joined(cls: type[nn.Module]) -> Callable[..., Any]:
    def build(tensors: Any, dim: int = 0, *, axis: int | None = None) -> Any:
        return cls(dim if axis is None else axis), tuple(tensors)  # type: ignore[call-arg]

    return build


def _product(cls: type[nn.Module]) -> Callable[..., Any]:
    return lambda input, other=None, *, mat2=None: (cls(), (input, mat2 if other is None else other))


def _average_pool(cls: type[nn.Module]) -> Callable[..., Any]:
    def build(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        divisor = {} if divisor_override is None else {"divisor_override": divisor_override}
        stride = stride or None  # an empty list is the kernel's size, as None
        return cls(kernel_size, stride, padding, ceil_mode, count_include_pad, **divisor), (input,)

    return build


def _max_pool(cls: type[nn.Module]) -> Callable[..., Any]:
    def build(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices:
            raise NoModule("it gives indices too")
        return cls(kernel_size, stride or None, padding, dilation, ceil_mode=ceil_mode), (input,)

    return build


def _adaptive_pool(cls: type[nn.Module]) -> Callable[..., Any]:
    def build(input: Any, output_size: Any, return_indices: bool = False) -> Any:
        if return_indices:
            raise NoModule("it gives indices too")
        size = tuple(output_size) if isinstance(output_size, (list, tuple)) else output_size
        return cls(size), (input,)  # type: ignore[call-arg]

    return build


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p != 0.0:
        raise NoModule("it drops out in every mode")
    if enable_gqa:
        raise NoModule("it has groups of queries (enable_gqa)")
    masks = () if attn_mask is None else (attn_mask,)
    factor = query.meta[VALUE].shape[-1] ** -0.5 if scale is None else scale
    return ScaledDotProductAttention(factor, is_causal), (query, key, value, *masks)


_RULES: dict[str, Rule] = {
    "add": Rule("Add", _eltwise(EltwiseAdd, is_commutative=True), takes_numbers=True),
    "sub": Rule("Sub", _eltwise(EltwiseSub, is_commutative=False), takes_numbers=True),
    "mul": Rule("Mul", _eltwise(EltwiseMult, is_commutative=True), takes_numbers=True),
    "div": Rule("Div", _eltwise(EltwiseDiv, is_commutative=False), takes_numbers=True),
    "cat": Rule("Concat", _joined(Concat)),
    "stack": Rule("Stack", _joined(Stack)),
    "matmul": Rule("MatMul", _product(Matmul)),
    "bmm": Rule("MatMul", _product(BatchMatmul)),
    "mean": Rule("ReduceMean", _mean),
    "relu": Rule("Relu", _activation(nn.ReLU)),
    "relu6": Rule("Clip", _activation(nn.ReLU6)),
    "hardtanh": Rule("Clip", _activation(nn.Hardtanh, "min_val", "max_val")),
    "clamp": Rule("Clip", _clamp),
    "hardswish": Rule("Hardswish", _activation(nn.Hardswish)),
    "hardsigmoid": Rule("Hardsigmoid", _activation(nn.Hardsigmoid)),
    "leaky_relu": Rule("LeakyRelu", _activation(nn.LeakyReLU, "negative_slope")),
    "elu": Rule("Elu", _activation(nn.ELU, "alpha")),
    "selu": Rule("Selu", _activation(nn.SELU)),
    "silu": Rule("Silu", _activation(nn.SiLU)),
    "mish": Rule("Mish", _activation(nn.Mish)),
    "gelu": Rule("Gelu", _activation(nn.GELU, "approximate")),
    "sigmoid": Rule("Sigmoid", _activation(nn.Sigmoid)),
    "tanh": Rule("Tanh", _activation(nn.Tanh)),
    "softplus": Rule("Softplus", _activation(nn.Softplus, "beta", "threshold")),
    "softmax": Rule("Softmax", _softmax(nn.Softmax)),
    "log_softmax": Rule("LogSoftmax", _softmax(nn.LogSoftmax)),
    "scaled_dot_product_attention": Rule("Attention", _attention, is_exact=False),
}
for _n, _kinds in enumerate(
    (
        (nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
        (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
        (nn.AvgPool3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
    ),
    start=1,
):
    _RULES[f"avg_pool{_n}d"] = Rule("AveragePool", _average_pool(_kinds[0]))
    _RULES[f"max_pool{_n}d"] = Rule("MaxPool", _max_pool(_kinds[1]))
    _RULES[f"adaptive_avg_pool{_n}d"] = Rule("AveragePool", _adaptive_pool(_kinds[2]))
    _RULES[f"adaptive_max_pool{_n}d"] = Rule("MaxPool", _adaptive_pool(_kinds[3]))

COMPUTING = frozenset((*_RULES, "einsum", "linear"))
"""Plain names of the functions that modules can stand for; their result is always a new tensor."""
