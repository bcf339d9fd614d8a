"""Random inputs of the shape that a data set or a model has.

Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.dataset_facts import DATASET_FACTS
from distiller.errors import UnknownNameError, UsageError, did_you_mean


def get_dummy_input(
    dataset: str | None = None, device: str | torch.device | None = None, input_shape: Any = None
) -> Any:
    """Standard normal tensors to run a model on.

    Args:
        dataset: a name in `DATASET_FACTS`: one image, shape (1, channels, height, width).
        device: where to make them; default the CPU.
        input_shape: the shape, batch included, e.g. a model's `input_shape`; or shapes in
            tuples, lists and dicts, nested as wanted. Not looked at when `dataset` is given.

    Returns:
        A tensor, or tensors nested as the shapes are.

    Raises:
        UnknownNameError: no such data set.
        UsageError: neither is given, or the shape is malformed.
    """
    return shaped(resolve_input_shape(dataset, input_shape), partial(torch.randn, device=device))


def resolve_input_shape(dataset: str | None, input_shape: Any) -> Any:
    """The shape that `get_dummy_input` makes for these arguments; takes and raises what it does."""
    if dataset is not None:
        if dataset not in DATASET_FACTS:
            hint = did_you_mean(dataset, DATASET_FACTS) or "; give input_shape"
            raise UnknownNameError(f"dummy input: unknown data set '{dataset}'{hint}")
        return (1, *DATASET_FACTS[dataset].input_shape)
    if input_shape is None:
        raise UsageError("dummy input: neither data set nor input_shape given; give one")
    _check(input_shape)
    return input_shape


def shaped(shape: Any, make: Callable[[tuple[int, ...]], Tensor]) -> Any:
    """What `make` makes of a shape, or of shapes nested in tuples, lists and dicts, nested alike."""
    if isinstance(shape, dict):
        return {key: shaped(nested, make) for key, nested in shape.items()}
    if _is_shape(shape):
        return make(tuple(shape))
    return type(shape)(shaped(nested, make) for nested in shape)


def _check(shape: Any) -> None:
    if isinstance(shape, dict) and shape:
        for nested in shape.values():
            _check(nested)
    elif _is_shape(shape):
        if min(shape) < 0:
            raise UsageError(f"dummy input: a shape has no negative sizes, got {shape}")
    elif isinstance(shape, (tuple, list)) and shape:
        for nested in shape:
            _check(nested)
    else:
        raise UsageError(
            "dummy input: a shape is a sequence of integers, or shapes in tuples, lists and dicts, "
            f"got {shape!r}"
        )


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, Sequence)
        and not isinstance(shape, str)
        and len(shape) > 0
        and all(isinstance(size, int) and not isinstance(size, bool) for size in shape)
    )


def forward_arguments(model: nn.Module, dummy_input: Any) -> tuple[Any, ...]:
    """The model's positional arguments, where its weights are."""
    arguments = tuple(dummy_input) if isinstance(dummy_input, (tuple, list)) else (dummy_input,)
    state = next(model.parameters(), None)
    if state is None:
        return arguments
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(state.device), arguments)
