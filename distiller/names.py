"""Canonical names of parameters and modules, and how names in files find them.

A canonical name is the fully qualified name without the parts that wrappers add:
`module.` (DataParallel, DistributedDataParallel), `_orig_mod.` (torch.compile) and
`parametrizations.<p>.original` (torch.nn.utils.parametrize). Only this file knows them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, nn

from distiller.errors import UnknownNameError, did_you_mean

_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$")
_WILDCARDS = frozenset("*?[")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile wrappers."""
    while (attribute := _WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, attribute)
    return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(canonical name, module) of every module once, the model itself ("") first."""
    wrapper_prefixes: list[str] = []
    for raw, module in model.named_modules():
        name = _without(raw, wrapper_prefixes)
        attribute = _WRAPPERS.get(type(module).__name__)
        if attribute is not None:
            wrapper_prefixes.append(f"{raw}.{attribute}" if raw else attribute)
            continue
        if any(part == "parametrizations" for part in raw.split(".")):
            continue
        yield name, module


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(canonical name, parameter) of every parameter once, in the model's order."""
    prefixes = _wrapper_prefixes(model)
    for raw, parameter in model.named_parameters():
        yield _canonical(raw, prefixes), parameter


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, buffer) of every buffer once, in the model's order."""
    prefixes = _wrapper_prefixes(model)
    for raw, buffer in model.named_buffers():
        yield _canonical(raw, prefixes), buffer


def canonical_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's `state_dict` under canonical names (tensors are not copied)."""
    prefixes = _wrapper_prefixes(model)
    return {_canonical(raw, prefixes): value for raw, value in model.state_dict().items()}


def canonical(raw: str, model: nn.Module) -> str:
    """The canonical form of a raw name of `model` (as in `model.named_parameters()`)."""
    return _canonical(raw, _wrapper_prefixes(model))


def strip_wrappers(name: str) -> str:
    """A name from a file without any `module` or `_orig_mod` component."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def is_pattern(name: str) -> bool:
    """Whether a requested name is a shell-style pattern (`*`, `?`, `[...]`)."""
    return not _WILDCARDS.isdisjoint(name)


def matches(name: str, pattern: str) -> bool:
    """Whether a canonical name is one that a shell-style pattern, without wrapper parts, stands for.

    It stands for no parameters of a parametrization, such as the step size that a quantizer learns: these
    have to be named.
    """
    return fnmatch.fnmatchcase(name, pattern) and "parametrizations" not in name.split(".")


def hidden_prefix(name: str) -> str:
    """What the names of all tensors begin with that the parametrizations of a parameter have of their own.

    Args:
        name: of the parameter, canonical.
    """
    owner_name, dot, key = name.rpartition(".")
    return f"{owner_name}{dot}parametrizations.{key}."


def resolve(requested: str, available: Collection[str], what: str = "parameter") -> tuple[str, ...]:
    """The available names that a name or shell-style pattern stands for, in their order.

    Names are accepted with and without wrapper parts (`module.conv1.weight`).

    Raises:
        UnknownNameError: it matches nothing; names the available name most like it.
    """
    for name in (requested, strip_wrappers(requested)):
        if name in available:
            return (name,)
    if is_pattern(requested):
        pattern = strip_wrappers(requested)
        found = tuple(name for name in available if matches(name, pattern))
        if found:
            return found
        raise UnknownNameError(f"pattern '{requested}' matches no {what} of the model", requested)
    wanted = strip_wrappers(requested)
    hint = did_you_mean(wanted, _deeper(wanted, available) or available)
    raise UnknownNameError(f"no {what} '{requested}' in the model{hint}", requested)


def resolve_all(
    requested: Iterable[str], available: Collection[str], what: str = "parameter"
) -> tuple[str, ...]:
    """`resolve` of several names: each match once, in the order asked for.

    Raises:
        UnknownNameError: naming every request that matches nothing, one a line.
    """
    found: dict[str, None] = {}
    faults: dict[str, str] = {}
    for name in requested:
        try:
            found.update(dict.fromkeys(resolve(name, available, what)))
        except UnknownNameError as error:
            faults[name] = str(error)
    if faults:
        raise UnknownNameError("\n".join(faults.values()), faults=faults)
    return tuple(found)


def find_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter called `name`.

    Raises:
        UnknownNameError: there is none.
    """
    parameters = dict(named_parameters(model))
    return parameters[_one(name, parameters, "parameter")]


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`.

    Raises:
        UnknownNameError: there is none.
    """
    modules = dict(named_modules(model))
    return modules[_one(name, modules, "module")]


def owner(param_name: str) -> str:
    """The name of the module that a parameter belongs to: `layer1.conv.weight` -> `layer1.conv`."""
    return param_name.rpartition(".")[0]


def _canonical(raw: str, wrapper_prefixes: list[str]) -> str:
    return _PARAMETRIZED.sub(r"\1\2", _without(raw, wrapper_prefixes))


def _deeper(name: str, available: Collection[str]) -> tuple[str, ...]:
    """The first name of the same owner and key with parts between: `fc1.weight` -> `fc1.first.weight`."""
    begin, dot, key = name.rpartition(".")
    return tuple(own for own in available if dot and own.startswith(begin + dot) and own.endswith(dot + key))[
        :1
    ]


def _one(name: str, available: Collection[str], what: str) -> str:
    found = resolve(name, available, what)
    if len(found) != 1:
        raise UnknownNameError(f"pattern '{name}' matches {len(found)} {what}s where one is wanted")
    return found[0]


def _wrapper_prefixes(model: nn.Module) -> list[str]:
    prefixes: list[str] = []
    for raw, module in model.named_modules():
        attribute = _WRAPPERS.get(type(module).__name__)
        if attribute is not None:
            prefixes.append(f"{raw}.{attribute}" if raw else attribute)
    return prefixes


def _without(raw: str, wrapper_prefixes: list[str]) -> str:
    """`raw` with the last component of each wrapper prefix dropped, the innermost first."""
    parts = raw.split(".")
    for prefix in sorted(wrapper_prefixes, key=len, reverse=True):
        prefix_parts = prefix.split(".")
        if parts[: len(prefix_parts)] == prefix_parts:
            index = len(prefix_parts) - 1
            parts = parts[:index] + parts[index + 1 :]
    return ".".join(parts)
