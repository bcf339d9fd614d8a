"""What reaches a layer, and what leaves it, when a model runs: no further than to that layer.

Knows nothing about quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from distiller.dummy_input import forward_arguments
from distiller.errors import UsageError
from distiller.observation import watch_inputs, watch_output

Batches: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]
"""Inputs of a model, the same in each pass: a list (or loader) of batches, or a function that gives one.

A batch is a tensor, or a tuple of the model's positional arguments; there are no labels."""


class _Reached(BaseException):
    """Ends a run of a model; no Exception, so that no model catches it."""


def each_batch(batches: Batches) -> Iterator[tuple[Any, ...]]:
    """The positional arguments of the model for each batch.

    Raises:
        UsageError: there is none, one holds no tensor, or `batches` can be gone through only once.
    """
    source = batches() if callable(batches) else batches
    if not isinstance(source, Iterable):
        raise UsageError(
            f"batches: must be a list of tensors or a function that returns one, got {_kind(source)}"
        )
    if not callable(batches) and iter(source) is source:
        raise UsageError(
            f"batches: are needed more than once, a {_kind(source)} gives them once; "
            "pass a list, or a function that returns one"
        )
    count = 0
    for count, batch in enumerate(source, start=1):
        arguments = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        if not arguments or not isinstance(arguments[0], Tensor):
            raise UsageError(
                f"batches[{count - 1}]: must be a tensor, or a tuple that begins with one, got {_kind(batch)}"
            )
        yield arguments
    if not count:
        raise UsageError("batches: there are none; give at least one batch of inputs")


def count_inputs(batches: Batches) -> int:
    """How many inputs (rows of the first argument) there are in all batches; raises as `each_batch`."""
    return sum(arguments[0].shape[0] for arguments in each_batch(batches))


def call_counts(
    model: nn.Module, layers: Mapping[str, nn.Module], arguments: tuple[Any, ...]
) -> dict[str, int]:
    """How often each layer is called in one run, by name, in the order of the first calls.

    Layers that are not called are left out.
    """
    counts: dict[str, int] = {}

    def counting(name: str) -> Callable[..., None]:
        def see(_module: nn.Module, _inputs: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return see

    handles = [watch_inputs(layer, counting(name)) for name, layer in layers.items()]
    try:
        run(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def inputs_of(model: nn.Module, layer: nn.Module, calls: int, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The first argument of each of the layer's calls in one run of the model, which ends with the last.

    Args:
        model: in evaluation mode.
        layer: one of its modules.
        calls: how often the model calls it.
        arguments: the model's.
    """
    return _captured(model, layer, calls, arguments, watch_inputs)


def outputs_of(model: nn.Module, layer: nn.Module, calls: int, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The output of each of the layer's calls; as `inputs_of`."""
    return _captured(model, layer, calls, arguments, watch_output)


def run(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """The model's output, on its own device."""
    return model(*forward_arguments(model, arguments))


def _captured(
    model: nn.Module,
    layer: nn.Module,
    calls: int,
    arguments: tuple[Any, ...],
    watch: Callable[..., Any],
) -> list[Tensor]:
    seen: list[Tensor] = []

    def see(_module: nn.Module, inputs: Any, *output: Any) -> None:
        # What is still to be run may write to it.
        seen.append((output[0] if output else inputs[0]).detach().clone())
        if len(seen) == calls:
            raise _Reached

    handle = watch(layer, see)
    try:
        run(model, arguments)
    except _Reached:
        return seen
    finally:
        handle.remove()
    return seen


def _kind(value: object) -> str:
    return type(value).__name__
