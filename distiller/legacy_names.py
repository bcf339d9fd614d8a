"""Distiller's look-up functions, for scripts that call them; each is one line over `names.py`.

New code calls `names.py` itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from distiller.names import named_modules, named_parameters, owner, strip_wrappers

__all__ = [
    "denormalize_module_name",
    "has_children",
    "mask_tensor",
    "model_device",
    "model_find_module",
    "model_find_module_name",
    "model_find_param",
    "model_find_param_name",
    "normalize_module_name",
    "param_name_2_module_name",
]


def normalize_module_name(layer_name: str) -> str:
    """A name without the parts that DataParallel and torch.compile add."""
    return strip_wrappers(layer_name)


def denormalize_module_name(parallel_model: nn.Module, normalized_name: str) -> str:
    """The name that `parallel_model.named_modules()` has for a canonical name (itself if it has none)."""
    modules = {id(module): raw for raw, module in parallel_model.named_modules()}
    return modules.get(id(dict(named_modules(parallel_model)).get(normalized_name)), normalized_name)


def model_find_param(model: nn.Module, param_to_find_name: str) -> nn.Parameter | None:
    """The parameter of that name, or None."""
    return dict(named_parameters(model)).get(strip_wrappers(param_to_find_name))


def model_find_param_name(model: nn.Module, param_to_find: Tensor) -> str | None:
    """The canonical name of a parameter, or None."""
    return next((name for name, param in named_parameters(model) if param is param_to_find), None)


def model_find_module(model: nn.Module, module_to_find: str) -> nn.Module | None:
    """The module of that name, or None."""
    return dict(named_modules(model)).get(strip_wrappers(module_to_find))


def model_find_module_name(model: nn.Module, module_to_find: nn.Module) -> str | None:
    """The canonical name of a module, or None."""
    return next((name for name, module in named_modules(model) if module is module_to_find), None)


def param_name_2_module_name(param_name: str) -> str:
    """The name of the module that a parameter belongs to."""
    return owner(param_name)


def has_children(module: nn.Module) -> bool:
    """Whether a module has modules inside."""
    return next(module.children(), None) is not None


def model_device(model: nn.Module) -> str:
    """The device of the model's first parameter, as text: `cpu`, `cuda:0`."""
    return str(next(model.parameters()).device)


def mask_tensor(tensor: Tensor, mask: Tensor, inplace: bool = True) -> Tensor:
    """`tensor` times `mask`, in place or not."""
    return tensor.data.mul_(mask) if inplace else tensor.data.mul(mask)
