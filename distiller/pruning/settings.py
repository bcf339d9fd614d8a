"""What a pruner's constructor arguments mean: names, patterns, defaults and ranges.

A setting by name is found in this order: exact name, then shell patterns in the order
of the file, then `*` as the default of every other parameter, biases included.
Knows nothing about tensors or masks.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from distiller.errors import DistillerError
from distiller.names import is_pattern, resolve_all, strip_wrappers

__all__ = ["ParameterError", "SettingsByName", "as_names", "check_fraction", "is_listed", "naming"]

_DEFAULT = "*"


class ParameterError(DistillerError):
    """A parameter that cannot be pruned so.

    Attributes:
        param_name: its canonical name; lets a schedule's reader find its line.
    """

    def __init__(self, message: str, param_name: str) -> None:
        super().__init__(message)
        self.param_name = param_name


class SettingsByName:
    """Numbers by parameter name, shell pattern or `*`.

    Args:
        argument: the constructor argument they were given as, for error messages.
        values: number by name; not empty.
        below: the numbers lie in [0, below).

    Raises:
        DistillerError: no values, or one outside of its range; names the key and the value.
    """

    def __init__(self, argument: str, values: Mapping[str, float], below: float = math.inf) -> None:
        if not values:
            raise DistillerError(
                f"{argument}: at least one parameter name, pattern or '*' is wanted, got {values!r}"
            )
        for key, value in values.items():
            if not 0 <= value < below:
                wanted = "must be 0 or more" if below == math.inf else f"must be in [0, {below:g})"
                raise DistillerError(f"{argument}['{key}'] {wanted}, got {value!r}")
        self.values = dict(values)
        # Names as written win over names without wrapper parts.
        self._exact = {strip_wrappers(key): value for key, value in values.items()} | self.values
        stripped = [(strip_wrappers(key), value) for key, value in values.items() if is_pattern(key)]
        self._patterns = [(key, value) for key, value in stripped if key != _DEFAULT]
        self._default = next((value for key, value in stripped if key == _DEFAULT), None)

    def get(self, param_name: str) -> float | None:
        """The number for a canonical parameter name, or None when there is none."""
        if param_name in self._exact:
            return self._exact[param_name]
        for pattern, value in self._patterns:
            if fnmatch.fnmatchcase(param_name, pattern):
                return value
        return self._default

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """Those of the names that have a number, in their order.

        Raises:
            UnknownNameError: a key matches nothing.
        """
        resolve_all(self.values, param_names)
        return tuple(name for name in param_names if self.get(name) is not None)


def as_names(weights: Iterable[str] | str) -> tuple[str, ...]:
    """The names and patterns in `weights`, which may be a single one.

    Distiller tested membership in a single string by substring: `weights: layer1.0.conv1.weight`
    pruned `conv1.weight` too. Here a string is one whole name.

    Raises:
        DistillerError: there are none.
    """
    names = (weights,) if isinstance(weights, str) else tuple(weights)
    if not names or "" in names:
        raise DistillerError(f"weights: at least one parameter name or pattern is wanted, got {weights!r}")
    return names


def is_listed(param_name: str, requested: Iterable[str]) -> bool:
    """Whether a canonical parameter name is one of the requested names or patterns."""
    return any(
        param_name in (name, stripped) or (is_pattern(name) and fnmatch.fnmatchcase(param_name, stripped))
        for name in requested
        for stripped in (strip_wrappers(name),)
    )


def check_fraction(argument: str, value: float, *, one_allowed: bool) -> float:
    """`value`, a fraction in [0, 1], or in [0, 1) unless `one_allowed`.

    Raises:
        DistillerError: it is not; names the argument, the value and the range.
    """
    if 0 <= value < 1 or (one_allowed and value == 1):
        return value
    raise DistillerError(f"{argument} must be in [0, 1{']' if one_allowed else ')'}, got {value!r}")


@contextmanager
def naming(pruner_name: str, param_name: str) -> Iterator[None]:
    """Make of a DistillerError a ParameterError that says which pruner failed on which parameter."""
    try:
        yield
    except DistillerError as error:
        raise ParameterError(f"pruner '{pruner_name}', '{param_name}': {error}", param_name) from error
