"""What a class accepts from a schedule, read off its constructor and checked by pydantic.

The class never sees the schedule. What of a type is refused, a `Checked` in an annotation says, to the
schedule's reader and to editors. Parameters that the reader supplies itself (`model`, `optimizer`, ...) are
left out, and functions are not offered: a file cannot hold one.
Knows nothing about registries.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import core_schema

from distiller.errors import did_you_mean
from distiller.schedule_yaml import shown

INJECTED = ("model", "optimizer", "name", "last_epoch")


@dataclass(frozen=True, eq=False)
class Checked:
    """A mark in an annotation: `Annotated[float, Checked(refuse, {"minimum": 0})]`.

    Attributes:
        refuse: raises a DistillerError, as "must be 0 or more, got -1", unless a value of the type is taken.
        schema: keywords of JSON Schema that refuse the same values.
    """

    refuse: Callable[[Any], object]
    schema: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        def checked(value: Any) -> Any:
            self.refuse(value)
            return value

        return core_schema.no_info_after_validator_function(checked, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core), **self.schema}


@cache
def settings_model(factory: Callable[..., Any]) -> type[BaseModel]:
    """A pydantic model with a field for each keyword that `factory` takes from a schedule."""
    hints = _hints(factory.__init__ if inspect.isclass(factory) else factory)
    fields: dict[str, Any] = {}
    extra = "forbid"
    for index, parameter in enumerate(_parameters(factory)):
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL and parameter.name not in INJECTED:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            annotation = _as_yaml(hints.get(parameter.name, Any), default)
            fields[f"f{index}"] = (annotation, Field(default, alias=parameter.name))
    config = ConfigDict(extra=extra, strict=True, arbitrary_types_allowed=True)  # type: ignore[typeddict-item]
    return create_model(getattr(factory, "__name__", "settings"), __config__=config, **fields)


def takes(factory: Callable[..., Any]) -> frozenset[str]:
    """The keywords that `factory` takes from a schedule."""
    return frozenset(str(field.alias) for field in settings_model(factory).model_fields.values())


def injected(factory: Callable[..., Any]) -> frozenset[str]:
    """Which of `INJECTED` the factory takes."""
    return frozenset(parameter.name for parameter in _parameters(factory)).intersection(INJECTED)


def check_settings(
    factory: Callable[..., Any], settings: Mapping[str, Any]
) -> list[tuple[tuple[str | int, ...], str]]:
    """What is wrong with `settings` as keywords of `factory`: (path within them, text) for each fault."""
    model = settings_model(factory)
    accepted = [
        str(field.alias) for field in model.model_fields.values() if not _is_function(field.annotation)
    ]
    try:
        model.model_validate(dict(settings))
    except ValidationError as error:
        faults: dict[tuple[str | int, ...], str] = {}
        for detail in error.errors(include_url=False, include_context=False):
            path = _path(detail["loc"], settings)
            faults[path] = _either(faults.get(path), _text(detail, factory, accepted))
        # Of a union, the kind that fits on the outside says what is wrong on the inside.
        return [
            (path, text)
            for path, text in faults.items()
            if not any(other[: len(path)] == path != other for other in faults if path)
        ]
    return []


def _parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(factory).parameters.values())


def _is_function(annotation: Any) -> bool:
    """Whether a parameter takes a function (or nothing)."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return any((typing.get_origin(option) or option) is collections.abc.Callable for option in options)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Type hints by parameter; {} where one names a type that cannot be seen from here."""
    names = {
        name: getattr(collections.abc, name) for name in collections.abc.__all__
    }  # torch hides its imports
    try:
        return typing.get_type_hints(function, localns=names, include_extras=True)
    except NameError:
        return {}


def _as_yaml(annotation: Any, default: Any) -> Any:
    """An annotation in the types that YAML gives: sequences are lists, mappings dicts."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return Annotated[_as_yaml(args[0], default), *args[1:]]  # type: ignore[valid-type]
    if origin in (collections.abc.Iterable, collections.abc.Sequence, tuple, list):
        items = [arg for arg in args if arg is not Ellipsis]
        return list[_as_yaml(items[0], ...)] if items else list  # type: ignore[misc]
    if origin in (collections.abc.Mapping, collections.abc.MutableMapping, dict):
        return dict[args[0], _as_yaml(args[1], ...)] if args else dict  # type: ignore[misc]
    if _is_union(annotation):
        return typing.Union[tuple(_as_yaml(arg, ...) for arg in args)]  # noqa: UP007 - built at run time
    if annotation is float and default is None:
        return float | None
    return annotation


def _path(location: tuple[str | int, ...], settings: Mapping[str, Any]) -> tuple[str | int, ...]:
    """The part of pydantic's location that leads into the data; the rest names types of a union."""
    found: list[str | int] = []
    value: Any = settings
    for part in location:
        if isinstance(value, Mapping) and (part in value or not found):
            part = next((key for key in value if str(key) == part), part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        found.append(part)
    return tuple(found)


_WANTED = {
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be a mapping (name: value)",
    "none_required": "must be null",
    "callable_type": "takes a function, which a file cannot hold; leave it out",
    "invalid_key": "a setting's name must be text",
}


def _text(detail: Any, factory: Callable[..., Any], accepted: list[str]) -> str:
    kind, value = detail["type"], detail["input"]
    name = getattr(factory, "__name__", str(factory))
    if kind == "value_error":  # of a `Checked`
        return detail["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return f"missing; {name} needs it"
    if kind == "extra_forbidden":
        key = str(detail["loc"][-1])
        hint = did_you_mean(key, accepted) or f"; it takes {', '.join(accepted) or 'nothing'}"
        return f"unknown to {name}{hint}"
    if detail["loc"][-1] == "[key]":
        return f"a name here {_WANTED.get(kind, detail['msg'])}, got {shown(value)}"
    return f"{_WANTED.get(kind, detail['msg'].replace('Input should be', 'must be'))}, got {shown(value)}"


def _either(first: str | None, second: str) -> str:
    """What is wrong when neither of two kinds of a union fits."""
    wanted, comma, got = second.rpartition(", got ")
    if first is None or not first.endswith(comma + got):
        return second
    return (
        first
        if wanted in first
        else f"{first.removesuffix(comma + got)} or {wanted.removeprefix('must be ')}{comma}{got}"
    )
