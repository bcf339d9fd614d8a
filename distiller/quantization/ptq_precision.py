"""Layers computed in another floating-point type than the model around them.

Knows nothing about quantization.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

PRECISIONS: dict[int | str, torch.dtype] = {
    16: torch.float16,
    "bf16": torch.bfloat16,
    32: torch.float32,
    64: torch.float64,
}
"""The types by the names that `fpq_module` gives them."""


class FPWrapper(nn.Module):
    """A module that is computed in a floating-point type of its own, and returns the type it was given.

    Args:
        wrapped_module: the module; it gets new parameters and buffers.
        fpq_module: 16, 32, 64 or "bf16".

    Attributes:
        dtype: the type it is computed in.
        dtype_outside: the type of its result where no input is of floating point: its own before.
    """

    def __init__(self, wrapped_module: nn.Module, fpq_module: int | str) -> None:
        super().__init__()
        self.dtype = PRECISIONS[fpq_module]
        self.dtype_outside = dtype_of(wrapped_module)
        self.wrapped_module = converted(wrapped_module, self.dtype)
        self.train(wrapped_module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result in the type of the first input of floating point."""
        return computed_in(self.dtype, self.wrapped_module, args, kwargs, self.dtype_outside)

    @property
    def weight(self) -> Tensor:
        """The module's, for models that look at it; AttributeError where it has none."""
        return self.wrapped_module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The module's, as `weight`."""
        return self.wrapped_module.bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """The type, for `repr`."""
        return str(self.dtype).removeprefix("torch.")


def computed_in(
    dtype: torch.dtype,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype_outside: torch.dtype,
) -> Any:
    """`module(*args, **kwargs)` with all tensors of floating point in `dtype` on the way in, and back.

    Args:
        dtype: the type of the module's parameters.
        module: the module.
        args: its positional arguments; tensors may be nested in tuples, lists and dicts.
        kwargs: its others.
        dtype_outside: the type of the result where no argument is of floating point.

    Returns:
        The result in the type of the first argument of floating point.
    """
    given = (leaf.dtype for leaf in pytree.tree_leaves((args, kwargs)) if _is_real(leaf))
    back = next(given, dtype_outside)
    args, kwargs = pytree.tree_map(lambda leaf: leaf.to(dtype) if _is_real(leaf) else leaf, (args, kwargs))
    result = module(*args, **kwargs)
    return pytree.tree_map(lambda leaf: leaf.to(back) if _is_real(leaf) else leaf, result)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type of a module's first parameter of floating point; the default where it has none."""
    own = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return next(own, torch.get_default_dtype())


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` with its parameters and buffers of floating point in `dtype`.

    They are new ones: other modules that share them keep theirs, which `module.to` would convert too.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_floating_point():
                new = nn.Parameter(parameter.detach().to(dtype, copy=True), parameter.requires_grad)
                setattr(part, name, new)
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(part, name, buffer.to(dtype))
    return module


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
