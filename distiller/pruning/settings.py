"""What a pruner's constructor arguments mean: names, patterns, defaults and ranges.

A setting by name is found in this order: exact name, then shell patterns in the order
of the file, then `*` as the default of every other parameter, biases included.
The types that a constructor annotates its arguments with say their ranges to a schedule's reader and to
editors. Knows nothing about tensors or masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

from distiller.errors import DistillerError
from distiller.names import is_pattern, matches, resolve_all, strip_wrappers
from distiller.schedule_yaml import shown
from distiller.signatures import Checked

__all__ = [
    "LARGEST",
    "LONGEST",
    "Fraction",
    "FractionBelowOne",
    "LevelsByName",
    "Names",
    "NotNegative",
    "NumbersByName",
    "ParameterError",
    "SettingsByName",
    "as_names",
    "check_fraction",
    "check_number",
    "check_whole_number",
    "checked_number",
    "checked_whole_number",
    "is_listed",
    "naming",
    "some_by_name",
    "some_named",
]

LARGEST = 1e30
"""What a threshold, multiplier or strength may be at most: with a tensor it must not overflow."""
LONGEST = 10**9
"""What a number of epochs, or of structures, may be at most."""

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
        below_one: the numbers lie in [0, 1); else in [0, LARGEST].

    Raises:
        DistillerError: no values, or one outside of its range; names the key and the value.
    """

    def __init__(self, argument: str, values: Mapping[str, float], below_one: bool = False) -> None:
        if not values:
            raise DistillerError(
                f"{argument}: at least one parameter name, pattern or '*' is wanted, got {values!r}"
            )
        for key, value in values.items():
            if below_one:
                check_fraction(f"{argument}['{key}']", value, one_allowed=False)
            else:
                check_number(f"{argument}['{key}']", value)
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
            if matches(param_name, pattern):
                return value
        return self._default if matches(param_name, _DEFAULT) else None

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
        param_name in (name, stripped) or (is_pattern(name) and matches(param_name, stripped))
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
    raise DistillerError(_told(argument, f"must be in [0, 1{']' if one_allowed else ')'}", value))


def check_number(argument: str, value: float, *, above: float | None = None, most: float = LARGEST) -> float:
    """`value`, a finite number from 0, or more than `above`, to `most`.

    Raises:
        DistillerError: it is not; names the argument (if that is not empty), the value and the bound.
    """
    if not (value >= 0 if above is None else value > above):
        wanted = "must be 0 or more" if above is None else f"must be more than {above:g}"
        raise DistillerError(_told(argument, wanted, value))
    if not value <= most:
        raise DistillerError(_told(argument, f"must be at most {most:g}", value))
    return value


def check_whole_number(argument: str, value: int, *, least: int, most: int) -> int:
    """`value`, a whole number from `least` to `most`.

    Raises:
        DistillerError: it is not; names the argument (if that is not empty), the value and the bound.
    """
    if value < least:
        raise DistillerError(_told(argument, f"must be {least} or more", value))
    if value > most:
        raise DistillerError(_told(argument, f"must be at most {most}", value))
    return value


@contextmanager
def naming(pruner_name: str, param_name: str) -> Iterator[None]:
    """Make of a DistillerError a ParameterError that says which pruner failed on which parameter."""
    try:
        yield
    except DistillerError as error:
        raise ParameterError(f"pruner '{pruner_name}', '{param_name}': {error}", param_name) from error


def checked_number(above: float | None = None, most: float = LARGEST) -> Checked:
    """For an annotation: what `check_number` checks."""
    lower = {"minimum": 0} if above is None else {"exclusiveMinimum": above}
    return Checked(partial(check_number, "", above=above, most=most), {**lower, "maximum": most})


def checked_whole_number(least: int, most: int = LONGEST) -> Checked:
    """For an annotation: what `check_whole_number` checks."""
    refuse = partial(check_whole_number, "", least=least, most=most)
    return Checked(refuse, {"minimum": least, "maximum": most})


def _told(argument: str, wanted: str, value: object) -> str:
    return f"{argument} {wanted}, got {shown(value)}".lstrip()


def _not_empty(wanted: str) -> Callable[[Any], None]:
    def refuse(values: Any) -> None:
        if not values or "" in ([values] if isinstance(values, str) else values):
            raise DistillerError(f"at least one {wanted} is wanted, got {shown(values)}")

    return refuse


def some_named(wanted: str) -> Checked:
    """For the annotation of a dict by name: that there is an entry, and none by an empty name.

    Args:
        wanted: what the names are of, for the message.
    """
    return Checked(_not_empty(wanted), {"minProperties": 1, "propertyNames": {"minLength": 1}})


some_by_name = some_named("parameter name, pattern or '*'")
"""For the annotation of a dict by parameter name."""
_SOME_NAMES = Checked(
    _not_empty("parameter name or pattern"),
    {"minLength": 1, "minItems": 1, "items": {"type": "string", "minLength": 1}},
)

Fraction = Annotated[
    float, Checked(partial(check_fraction, "", one_allowed=True), {"minimum": 0, "maximum": 1})
]
"""A fraction in [0, 1]."""
FractionBelowOne = Annotated[
    float, Checked(partial(check_fraction, "", one_allowed=False), {"minimum": 0, "exclusiveMaximum": 1})
]
"""A fraction in [0, 1)."""
NotNegative = Annotated[float, checked_number()]
"""A number of 0 or more."""
Names = Annotated[list[str] | str, _SOME_NAMES]
"""Parameter names and patterns, or a single one."""
NumbersByName = Annotated[dict[str, NotNegative], some_by_name]
"""Numbers of 0 or more by parameter name, pattern or `*`."""
LevelsByName = Annotated[dict[str, FractionBelowOne], some_by_name]
"""Fractions in [0, 1) by parameter name, pattern or `*`."""
