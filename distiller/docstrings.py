"""What the docstring of a class says, taken apart: a sentence, arguments, source.

Docstrings are Google's style, as in this project. Knows nothing about what classes there are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Docstring", "read_arguments", "read_docstring"]


@dataclass(frozen=True, slots=True)
class Docstring:
    """The parts of a docstring.

    Attributes:
        summary: its first paragraph, on one line.
        text: the paragraphs from there to the first section, as they are written.
        arguments: what `Args:` (of a dataclass `Attributes:`) says of each argument, on one line.
        source: what `Source:` says, on one line; empty when it has none.
    """

    summary: str
    text: str
    arguments: Mapping[str, str]
    source: str


def read_docstring(thing: Any) -> Docstring:
    """The docstring of a class or function itself, not of those that it inherits from."""
    docstring = inspect.cleandoc(vars(thing).get("__doc__") or "")
    head, *rest = _SECTION.split(docstring)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    summary, _, text = head.strip().partition("\n\n")
    arguments = sections.get("Args", sections.get("Attributes", ""))
    return Docstring(
        summary=_one_line(summary),
        text=text.strip("\n"),
        arguments={name: _one_line(meaning) for name, meaning in _ENTRY.findall(arguments)},
        source=_one_line(sections.get("Source", "").split("\n\n")[0]),
    )


def read_arguments(thing: Any, others: Mapping[str, Any]) -> Mapping[str, str]:
    """What the docstring of `thing` says of each argument.

    A docstring without arguments of its own may say whose they are, as "Arguments are those of `Name`".

    Args:
        thing: a class or function.
        others: what such names stand for.
    """
    found = read_docstring(thing)
    reference = _REFERENCE.search(found.text)
    if found.arguments or reference is None or reference[1] not in others:
        return found.arguments
    return read_arguments(others[reference[1]], others)


_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Source):", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n+ {5,}\S.*)*)", re.MULTILINE)
_REFERENCE = re.compile(r"\barguments\b[^.`]*`(\w+)`", re.IGNORECASE)


def _one_line(text: str) -> str:
    return " ".join(text.split())
