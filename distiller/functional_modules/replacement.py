"""Modules of one kind that others take the place of, at every name they have, with their hooks.

Knows nothing about what the modules compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from distiller.names import canonical

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def replace_modules(model: nn.Module, kind: type[nn.Module], make: Callable[[str, Any], Any]) -> list[str]:
    """Put others in the place of the modules of a kind.

    Args:
        model: changed in place; not a wrapper around one, and not itself of the kind.
        kind: the class; its subclasses count too.
        make: called once for each module with its canonical name and itself; returns what takes its place,
            or None to keep it. Handles of hooks stay good.

    Returns:
        The canonical names at which something was replaced, in the model's order.
    """
    made: dict[nn.Module, nn.Module | None] = {}
    names: list[str] = []
    for raw, module in list(model.named_modules(remove_duplicate=False)):
        if not raw or not isinstance(module, kind):
            continue
        name = canonical(raw, model)
        if module not in made:
            made[module] = make(name, module)
            _hand_over_hooks(module, made[module])
        if made[module] is not None:
            parent, _, child = raw.rpartition(".")
            setattr(model.get_submodule(parent), child, made[module])
            names.append(name)
    return names


def _hand_over_hooks(old: nn.Module, new: nn.Module | None) -> None:
    for hooks in _HOOKS if new is not None else ():
        setattr(new, hooks, getattr(old, hooks))
