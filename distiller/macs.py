"""Multiply-accumulate operations (MACs) of a model, counted in one forward pass.

Counted are convolutions of every kind and matrix products, wherever they happen: in a
`Conv2d` or `Linear`, in attention, or as a plain function in somebody's `forward`. Each is
booked on the innermost module that was running. Additions of biases, normalization,
activations and pooling count nothing.
Knows nothing about tables.

    convolution            volume(output) * channels_in / groups * volume(kernel)
    transposed convolution volume(input) * channels_out / groups * volume(kernel)
    matrix product         (m, k) @ (k, n): m * k * n
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.names import named_modules, named_parameters, owner, unwrap
from distiller.observation import unobserved


@dataclass(slots=True)
class LayerCost:
    """What one module does in a forward pass of the whole batch.

    Attributes:
        name: canonical.
        module: the module.
        macs: of all its calls, those of its submodules left out.
        weights: elements of its parameters of two and more dimensions, and of those of submodules
            that it uses without calling them; each parameter once.
        input_shape: of the first tensor of its first call; None when it takes none.
        output_shape: of the first tensor it returned first; None when it returns none.
    """

    name: str
    module: nn.Module
    macs: int = 0
    weights: int = 0
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None


def count_macs(model: nn.Module, dummy_input: Any) -> list[LayerCost]:
    """The cost of every module that has one, in the order in which they ran.

    Runs the model once, in evaluation mode, without gradients; its mode and buffers are as
    before afterwards.

    Args:
        model: any model; DataParallel and the like are looked into.
        dummy_input: a tensor, or a tuple or list of the model's arguments, on its device.
    """
    model = unwrap(model)
    arguments = dummy_input if isinstance(dummy_input, (tuple, list)) else (dummy_input,)
    ledger = _Ledger(model)
    with (
        unobserved(model),
        evaluating(model),
        buffers_kept(model),
        _without_fused_operations(),
        ledger.watching(),
    ):
        model(*arguments)
    ledger.book_weights(model)
    return [cost for cost in ledger.in_order_of_running if cost.macs]


def macs_of_call(call: Callable[[], Any]) -> int:
    """The MACs of whatever tensor operations `call` does; it may do them on stand-ins without values."""
    counted: list[int] = []
    with torch.no_grad(), _without_fused_operations(), _CountingMode(counted.append):
        call()
    return sum(counted)


def is_counted(operation: Any) -> bool:
    """Whether an aten operation (an overload packet) counts by itself, not by what it is made of."""
    return operation in _COUNTS


class _Ledger:
    """Hooks know which module is running, the dispatch mode sees its operations."""

    def __init__(self, model: nn.Module) -> None:
        self._costs = {module: LayerCost(name, module) for name, module in named_modules(model)}
        self._running: list[LayerCost] = []
        self.in_order_of_running: list[LayerCost] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self._costs:
                for handle in (
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(self._leave),
                ):
                    stack.callback(handle.remove)
            stack.enter_context(_CountingMode(self._book))
            yield

    def book_weights(self, model: nn.Module) -> None:
        """Book each parameter on the innermost module around it that ran."""
        ran = {cost.name: cost for cost in self.in_order_of_running}
        for param_name, parameter in named_parameters(model):
            if parameter.dim() >= 2:
                name = owner(param_name)
                while name not in ran:
                    name = owner(name)
                ran[name].weights += parameter.numel()

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        cost = self._costs[module]
        if cost.input_shape is None:
            cost.input_shape = _first_shape(inputs)
            self.in_order_of_running.append(cost)
        self._running.append(cost)

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        cost = self._running.pop()
        if cost.output_shape is None:
            cost.output_shape = _first_shape(output)

    def _book(self, macs: int) -> None:
        self._running[-1].macs += macs


class _CountingMode(TorchDispatchMode):
    def __init__(self, book: Callable[[int], None]) -> None:
        super().__init__()
        self._book = book

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func.overloadpacket)
        if count is not None:
            self._book(count(result, *args))
        return result


def _convolution_macs(result: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> int:
    transposed = settings[4]  # after bias, stride, padding, dilation
    return (x if transposed else result).numel() * weight[0].numel()


def _product_macs(result: Tensor, a: Tensor, b: Tensor) -> int:
    return a.numel() * b.shape[-1]


def _product_and_sum_macs(result: Tensor, summand: Tensor, a: Tensor, b: Tensor, *scales: Any) -> int:
    return _product_macs(result, a, b)


_COUNTS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.convolution: _convolution_macs,
    torch.ops.aten.mm: _product_macs,
    torch.ops.aten.bmm: _product_macs,
    torch.ops.aten.addmm: _product_and_sum_macs,
    torch.ops.aten.baddbmm: _product_and_sum_macs,
}


@contextmanager
def _without_fused_operations() -> Iterator[None]:
    """Attention and LSTMs as the matrix products they stand for, not as one opaque operation."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [library.enabled for library in libraries]
    torch.backends.mha.set_fastpath_enabled(False)
    for library in libraries:
        library.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for library, before in zip(libraries, enabled, strict=True):
            library.enabled = before


def _first_shape(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((shape for item in value if (shape := _first_shape(item)) is not None), None)
    return None
