"""Which tensor each layer reads, and whether it can be negative, found by running the model once.

Two layers that read the same tensor need quantize it once only; one that comes out of a ReLU needs no sign,
also behind operations that make nothing negative of what is not (pooling, sums, views).
Knows nothing about quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from distiller.dummy_input import forward_arguments
from distiller.evaluation_mode import evaluating
from distiller.names import unwrap

__all__ = ["TensorRead", "trace_reads"]

# By name: each is a function of torch, of torch.nn.functional or a method of Tensor.
_NEVER_NEGATIVE = frozenset(
    ("abs", "exp", "hardsigmoid", "hardsigmoid_", "relu", "relu_", "relu6", "sigmoid", "sigmoid_", "softmax",
     "softplus", "square")
)  # fmt: skip
_BOUNDED_BELOW = {  # function -> position and name of the bound, and its default
    "clamp": (1, "min", None),
    "clamp_": (1, "min", None),
    "clip": (1, "min", None),
    "clamp_min": (1, "min", None),
    "hardtanh": (1, "min_val", -1.0),
    "hardtanh_": (1, "min_val", -1.0),
}
_ARITHMETIC = frozenset(
    ("add", "add_", "__add__", "__radd__", "__iadd__", "maximum", "mul", "mul_", "multiply", "__mul__",
     "__rmul__", "__imul__")
)  # fmt: skip
_VALUES_KEPT = frozenset(
    ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
     "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "avg_pool1d", "avg_pool2d",
     "avg_pool3d", "cat", "channel_shuffle", "chunk", "clone", "concat", "concatenate", "contiguous",
     "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "expand", "flatten", "max_pool1d",
     "max_pool2d", "max_pool3d", "mean", "permute", "pixel_shuffle", "pixel_unshuffle", "ravel", "repeat",
     "reshape", "select", "split", "sqrt", "squeeze", "stack", "sum", "swapaxes", "to", "transpose", "unbind",
     "unflatten", "unsqueeze", "view", "__getitem__")
)  # fmt: skip


@dataclass(slots=True)
class TensorRead:
    """What the first arguments of a layer are.

    Attributes:
        tensors: a number for each tensor that it read; equal ones are the same tensor.
        is_nonnegative: whether none of them can be negative.
    """

    tensors: frozenset[int]
    is_nonnegative: bool


def trace_reads(model: nn.Module, layers: Mapping[str, nn.Module], dummy_input: Any) -> dict[str, TensorRead]:
    """Run the model once, in evaluation mode and without gradients, and see what the layers read.

    Args:
        model: its modes stay as they were.
        layers: the layers to watch, by name.
        dummy_input: an input, or a tuple of them.

    Returns:
        The layers that read a floating-point tensor, in the order of their first call.
    """
    tracker = _Tracker()
    reads: dict[str, TensorRead] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                read = TensorRead(frozenset({tracker.number(args[0])}), tracker.is_nonnegative(args[0]))
                before = reads.get(name, read)
                reads[name] = TensorRead(
                    before.tensors | read.tensors, before.is_nonnegative and read.is_nonnegative
                )

        return hook

    handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    inner = unwrap(model)
    try:
        with evaluating(inner), tracker:
            inner(*forward_arguments(inner, dummy_input))
    finally:
        for handle in handles:
            handle.remove()
    return reads


class _Tracker(TorchFunctionMode):
    """Remembers the tensors that cannot be negative, and numbers those that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Tensor] = []  # so that no id is used again
        self._nonnegative: set[tuple[int, int]] = set()
        self._numbers: dict[tuple[int, int], int] = {}

    def number(self, tensor: Tensor) -> int:
        """A number of its own for each tensor; another one after it was written to."""
        self._kept.append(tensor)
        return self._numbers.setdefault(_key(tensor), len(self._numbers))

    def is_nonnegative(self, tensor: Tensor) -> bool:
        """Whether it is known not to be negative."""
        return _key(tensor) in self._nonnegative

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_nonnegative = (
            name in _NEVER_NEGATIVE or _is_bounded(name, args, kwargs) or self._keeps(name, args, kwargs)
        )
        result = func(*args, **kwargs)
        if is_nonnegative:
            for tensor in _tensors(result):
                self._kept.append(tensor)
                self._nonnegative.add(_key(tensor))
        return result

    def _keeps(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether an operation makes nothing negative of operands that are not."""
        if name not in _VALUES_KEPT and name not in _ARITHMETIC:
            return False
        values = pytree.tree_leaves((args, kwargs))
        tensors = [value for value in values if isinstance(value, Tensor)]
        numbers = [value for value in values if isinstance(value, int | float)] if name in _ARITHMETIC else []
        return all(map(self.is_nonnegative, tensors)) and all(number >= 0 for number in numbers)


def _is_bounded(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation clamps its operand from below, at 0 or higher."""
    if name not in _BOUNDED_BELOW:
        return False
    position, keyword, default = _BOUNDED_BELOW[name]
    bound = args[position] if len(args) > position else kwargs.get(keyword, default)
    return isinstance(bound, int | float) and bound >= 0


def _key(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), tensor._version


def _tensors(value: Any) -> list[Tensor]:
    return [item for item in pytree.tree_leaves(value) if isinstance(item, Tensor)]
