"""What `reg_regims` means: strengths and groups by parameter name, and the groups of a tensor.

A name is found in this order: exact name, then shell patterns in the order of the file,
then `*`. A kind of groups is one or two families of groups:

    group           | one group of each family            | tensors
    2D              | w[i, j]                             | 4-D (kernels)
    Rows            | w[i]                                | 2-D
    Cols            | w[:, j]                             | 2-D
    Rows+Cols       | w[i]; w[:, j]                       | 2-D
    Channels        | w[:, j]                             | 2-D and more (dim 1: input channels)
    Filters, 3D     | w[i]                                | 2-D and more (dim 0: output channels)
    4D              | w                                   | 4-D (the whole layer)
    Channels+4D     | w[:, j]; w                          | 4-D

Knows nothing about penalties, masks or training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from distiller.errors import DistillerError, UnknownNameError, did_you_mean
from distiller.names import is_pattern, named_parameters, resolve, resolve_all, strip_wrappers
from distiller.pruning.criteria import group_count
from distiller.pruning.settings import LARGEST, check_number
from distiller.schedule_yaml import shown
from distiller.signatures import Checked

__all__ = ["ELEMENTS", "FAMILIES", "Regime", "Regimes", "checked_entry", "family_dims"]

FAMILIES: dict[str, tuple[str, ...]] = {
    "2D": ("2D",),
    "Rows": ("Rows",),
    "Cols": ("Cols",),
    "Rows+Cols": ("Rows", "Cols"),
    "Channels": ("Channels",),
    "Filters": ("Filters",),
    "3D": ("3D",),
    "4D": ("4D",),
    "Channels+4D": ("Channels", "4D"),
}
"""The families of groups that each kind stands for."""

ELEMENTS = "Elements"
"""The group of those methods that also treat every element by itself."""

_DIMS_OF_FAMILY = {
    "2D": (0, 1), "Rows": (0,), "Cols": (1,), "Channels": (1,), "Filters": (0,), "3D": (0,), "4D": ()
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Regime:
    """How one parameter is regularized.

    Attributes:
        strength: lambda, 0 or more.
        group: a key of `FAMILIES`; ELEMENTS or None for single elements.
    """

    strength: float
    group: str | None = None

    @property
    def families(self) -> tuple[str, ...]:
        """The families of groups; none for single elements."""
        return () if self.group in (None, ELEMENTS) else FAMILIES[self.group]


class Regimes:
    """The regimes of a model's parameters.

    Args:
        model: the model; every name and shape is checked against it.
        reg_regims: lambda, or [lambda, group], by parameter name, pattern or `*`; not empty.
        groups: the groups allowed; none where values are lambda alone.

    Raises:
        UnknownNameError: a key matches no parameter of the model, or a group is none of `groups`.
        DistillerError: a value of the wrong form, a lambda that is no number from 0 to
            `settings.LARGEST`, or a parameter that does not have such groups.
    """

    def __init__(self, model: nn.Module, reg_regims: Mapping[str, Any], groups: Sequence[str] = ()) -> None:
        if not reg_regims:
            raise DistillerError(
                f"reg_regims: at least one parameter name, pattern or '*' is wanted, got {reg_regims!r}"
            )
        read = _read_grouped(reg_regims, groups) if groups else _read_plain(reg_regims)
        # Names as written win over names without wrapper parts; then patterns, then the default.
        self._by_key = dict(sorted(read.items(), key=lambda item: _rank(item[0])))
        params = dict(named_parameters(model))
        self._names = tuple(params)
        self.by_name = self._resolve(self._names)
        """The regime of each regularized parameter of the model, by canonical name, in the model's order."""
        for name, regime in self.by_name.items():
            _check_shape(name, params[name], regime)

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """Those of the names that have a regime, in their order.

        Raises:
            UnknownNameError: a key of `reg_regims` matches none of them.
        """
        return tuple(self.by_name if tuple(param_names) == self._names else self._resolve(param_names))

    def of(self, params: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Regime]]:
        """(name, parameter, regime) of those in `params` that have a regime."""
        return [(name, param, self.by_name[name]) for name, param in params.items() if name in self.by_name]

    def _resolve(self, param_names: Sequence[str]) -> dict[str, Regime]:
        resolve_all(self._by_key, param_names)
        found: dict[str, Regime] = {}
        for key, regime in self._by_key.items():
            for name in resolve(key, param_names):
                found.setdefault(name, regime)
        return {name: found[name] for name in param_names if name in found}


def checked_entry(groups: Sequence[str]) -> Checked:
    """For the annotation of [lambda, group]: that it is one, of these groups."""
    pair = [{"type": "number", "minimum": 0, "maximum": LARGEST}, {"enum": list(groups)}]
    return Checked(partial(_read_entry, groups), {"prefixItems": pair, "minItems": 2, "maxItems": 2})


def family_dims(family: str) -> tuple[int, ...]:
    """The dimensions of a tensor that tell the groups of a family apart; none for '4D'."""
    return _DIMS_OF_FAMILY[family]


def _rank(key: str) -> int:
    if key == "*":
        return 3
    if is_pattern(key):
        return 2
    return int(strip_wrappers(key) != key)


def _read_plain(reg_regims: Mapping[str, Any]) -> dict[str, Regime]:
    return {key: Regime(_strength(value, f"reg_regims['{key}']: ")) for key, value in reg_regims.items()}


def _read_grouped(reg_regims: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Regime]:
    regimes: dict[str, Regime] = {}
    unknown: dict[str, str] = {}
    for key, value in reg_regims.items():
        try:
            regimes[key] = _read_entry(groups, value, f"reg_regims['{key}']")
        except UnknownNameError as error:
            unknown[key] = str(error)
    if unknown:
        raise UnknownNameError("\n".join(unknown.values()), faults=unknown)
    return regimes


def _read_entry(groups: Sequence[str], value: Any, where: str = "") -> Regime:
    """The regime that [lambda, group] is; `where` begins the text of a refusal."""
    colon = f"{where}: " if where else ""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        wanted = f"{where} must be [lambda, group], as [0.001, {groups[0]}]"
        raise DistillerError(f"{wanted}, got {shown(value)}".lstrip())
    strength, group = value
    if group not in groups:
        text = f"{colon}group must be one of {', '.join(groups)}, got {shown(group)}"
        raise UnknownNameError(text + did_you_mean(str(group), groups))
    return Regime(_strength(strength, colon), group)


def _strength(value: Any, colon: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise DistillerError(f"{colon}lambda must be a number, got {shown(value)}")
    return float(check_number(f"{colon}lambda", value))


def _check_shape(name: str, param: Tensor, regime: Regime) -> None:
    for family in regime.families:
        try:
            group_count(param, family)
        except DistillerError as error:
            raise DistillerError(f"reg_regims, '{name}': {error}") from error
