"""The ranges of what the layers of a model read, measured in one pass over images.

Knows nothing about bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from distiller.data_loggers.observers import RangeObserver
from distiller.dummy_input import forward_arguments
from distiller.errors import StatsError
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.names import named_modules, unwrap
from distiller.observation import watch_inputs
from distiller.quantization.ptq_build import kind_of

__all__ = ["input_ranges"]


def input_ranges(model: nn.Module, batches: Iterable[Any]) -> dict[str, tuple[float, float]]:
    """The least and the largest value that each convolution and linear layer reads.

    The model runs in evaluation mode, without gradients, and stays as it is.

    Args:
        model: the model, or a wrapper around it.
        batches: images without labels: tensors, or tuples of the model's positional arguments.

    Returns:
        By canonical name; a layer that is called several times has the range of all its calls, one that is
        not called (or with no positional tensor) is left out.

    Raises:
        StatsError: there are no batches, or a layer reads NaN or infinity.
    """
    bare = unwrap(model)
    observers: dict[str, RangeObserver] = {}
    runs = 0
    with ExitStack() as stack:
        for name, module in named_modules(bare):
            if kind_of(module) == "param":
                stack.callback(watch_inputs(module, _updating(observers, name)).remove)
        stack.enter_context(evaluating(bare))
        stack.enter_context(buffers_kept(bare))
        for batch in batches:
            bare(*forward_arguments(bare, batch))
            runs += 1
    if not runs:
        raise StatsError("ranges of the layers' inputs: there is nothing to measure on, got no batches")
    for name, observer in observers.items():
        if not observer.is_finite:
            raise StatsError(
                f"ranges of the layers' inputs: '{name}' reads NaN or infinite values; is the model trained?"
            )
    return {name: (observer.minimum, observer.maximum) for name, observer in observers.items()}


def _updating(observers: dict[str, RangeObserver], name: str) -> Callable[..., None]:
    """What adds a call's first input to the range of the layer of that name."""

    def see(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            observers.setdefault(name, RangeObserver()).update(inputs[0])

    return see
