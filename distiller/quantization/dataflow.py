"""Which layer's output reaches which layer's input unchanged, found by running the model once.

A layer's output that is quantized need not be quantized again where it is used, also not after
operations that only move values, take some of them or add zeros (views, permutations, ReLU, max
pooling, padding).
Knows nothing about quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# By name: each is a function of torch, of torch.nn.functional or a method of Tensor.
_VALUES_UNCHANGED = frozenset(
    [
        "chunk",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "expand_as",
        "flatten",
        "flip",
        "index_select",
        "movedim",
        "narrow",
        "permute",
        "ravel",
        "repeat",
        "reshape",
        "reshape_as",
        "roll",
        "select",
        "split",
        "squeeze",
        "swapaxes",
        "swapdims",
        "tile",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
        "__getitem__",
        "channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "relu",
        "relu_",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
    ]
)
_JOINED = frozenset(["cat", "concat", "concatenate", "stack", "hstack", "vstack"])


@dataclass(slots=True)
class LayerUse:
    """How one layer was called.

    Attributes:
        origins: for each positional argument that is a floating-point tensor, by its index, the layers
            whose output it was, each once; None among them: from elsewhere, or changed on the way.
        returns_tensor: whether every call returned one floating-point tensor.
        columns: the largest size of the first argument's last dimension.
        calls: how many calls there were.
    """

    origins: dict[int, dict[str | None, None]] = field(default_factory=dict)
    returns_tensor: bool = True
    columns: int = 1
    calls: int = 0

    @property
    def sources(self) -> dict[int, str | None]:
        """By index of the argument, the layer whose output it always is, or None."""
        return {i: next(iter(found)) if len(found) == 1 else None for i, found in self.origins.items()}

    def partly_from(self, index: int) -> str | None:
        """The one layer whose output an argument is in some calls, being from elsewhere in the others."""
        layers = [name for name in self.origins[index] if name is not None]
        return layers[0] if len(layers) == 1 and None in self.origins[index] else None


def trace_dataflow(
    model: nn.Module, layers: Mapping[str, nn.Module], dummy_input: Any
) -> dict[str, LayerUse]:
    """Run the model once, without gradients, and see where the layers' inputs come from.

    Args:
        model: in evaluation mode.
        layers: the layers to watch, by name; none inside of another.
        dummy_input: an input, or a tuple of them.

    Returns:
        The layers that ran, in the order of their first call.
    """
    uses: dict[str, LayerUse] = {}
    tracker = _Tracker()

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            tracker.pause()
            use = uses.setdefault(name, LayerUse())
            use.calls += 1
            for index, arg in enumerate(args):
                if _is_real(arg):
                    use.origins.setdefault(index, {})[tracker.source(arg)] = None
            if args and _is_real(args[0]) and args[0].dim():
                use.columns = max(use.columns, args[0].shape[-1])

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tracker.resume()
            uses[name].returns_tensor &= _is_real(output)
            for tensor in _tensors(output):
                tracker.mark(tensor, name)

        return hook

    handles = []
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_pre_hook(before(name)))
            handles.append(module.register_forward_hook(after(name)))
        with torch.inference_mode(False), torch.no_grad(), tracker:
            model(*dummy_input) if isinstance(dummy_input, tuple | list) else model(dummy_input)
    finally:
        for handle in handles:
            handle.remove()
    return uses


class _Tracker(TorchFunctionMode):
    """Remembers which layer's values a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[int, tuple[Tensor, int, str]] = {}  # the tensor itself keeps its id from reuse
        self._depth = 0

    def pause(self) -> None:
        """Entering a layer: what happens inside is its own affair."""
        self._depth += 1

    def resume(self) -> None:
        """Leaving it."""
        self._depth -= 1

    def mark(self, tensor: Tensor, name: str) -> None:
        """`tensor` holds values of the layer `name`."""
        self._marks[id(tensor)] = (tensor, tensor._version, name)

    def source(self, tensor: Any) -> str | None:
        """The layer whose values `tensor` holds, if it was not written to since."""
        _, version, name = self._marks.get(id(tensor), (None, 0, None))
        return name if name is not None and tensor._version == version else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        source, name, kwargs = None, getattr(func, "__name__", ""), kwargs or {}
        if not self._depth and args:
            if name in _VALUES_UNCHANGED or (name == "pad" and _pads_with_zeros(*args, **kwargs)):
                source = self.source(args[0])
            elif name in _JOINED:
                sources = {self.source(item) for item in args[0]}
                source = sources.pop() if len(sources) == 1 else None
        result = func(*args, **kwargs)
        if source is not None:
            for tensor in _tensors(result):
                self.mark(tensor, source)
        return result


def _pads_with_zeros(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> bool:
    """Or with values of the input; arguments as of `torch.nn.functional.pad`. Zero is on every grid."""
    return mode != "constant" or not value


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
