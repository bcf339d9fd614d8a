"""One registry per kind of component: what a schedule's `class:` may name.

A name is a registered name, or a dotted path into a package that the user named
with `--plugin`: a schedule from elsewhere cannot run code.
Knows nothing about schedules or models.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from distiller.errors import UnknownNameError, did_you_mean, users_code

T = TypeVar("T", bound=Callable[..., Any])


DISTILLERS_ALONE = frozenset(("LambdaLR",))
"""Classes that schedules of the archived Distiller may name, and that are not in this version."""


class Registry(Mapping[str, Callable[..., Any]]):
    """Names to classes (or factory functions) of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Callable[..., Any]] = {}

    def register(self, entry: T, name: str | None = None) -> T:
        """Add a class under its own name (or `name`); usable as a decorator.

        Raises:
            ValueError: the name is taken.
        """
        key = name or entry.__name__
        if key in self._entries:
            raise ValueError(f"{self.kind} '{key}' is registered already, by {self._entries[key]!r}")
        self._entries[key] = entry
        return entry

    def look_up(self, name: str, plugins: Collection[str] = ()) -> Callable[..., Any]:
        """The entry called `name`, or the object at a dotted path into one of `plugins`.

        Raises:
            UnknownNameError: no such entry; names the one most like it.
        """
        if name in self._entries:
            return self._entries[name]
        if "." in name:
            with users_code(f"{self.kind} class '{name}'", "; its module is imported", UnknownNameError):
                return load_dotted(name, plugins, f"{self.kind} class")
        if name in DISTILLERS_ALONE:
            raise UnknownNameError(
                f"class '{name}' of Distiller is not in this version; see docs/migrating.md"
            )
        raise UnknownNameError(f"unknown class '{name}'{did_you_mean(name, self._entries)}")

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load_dotted(path: str, plugins: Collection[str], what: str) -> Callable[..., Any]:
    """The object at `package.module.Object`, where `package` is one of `plugins`.

    Raises:
        UnknownNameError: the package is not a plugin, or there is no such class or function.
    """
    package = path.partition(".")[0]
    if not all(path.split(".")):
        raise UnknownNameError(f"{what} '{path}' is no dotted path; it is written package.module.Name")
    if package not in plugins:
        raise UnknownNameError(
            f"{what} '{path}' lies in package '{package}', which may not run; "
            f"allow it with --plugin {package}"
        )
    module_name, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UnknownNameError(f"{what} '{path}' cannot be imported: {error}") from error
    if not callable(found):
        raise UnknownNameError(
            f"{what} '{path}' is of type {type(found).__name__}; a class or function is wanted"
        )
    return found


PRUNERS = Registry("pruner")
REGULARIZERS = Registry("regularizer")
QUANTIZERS = Registry("quantizer")
EXTENSIONS = Registry("extension")
LR_SCHEDULERS = Registry("lr_scheduler")
MODELS = Registry("model")
DATASETS = Registry("dataset")
