"""YAML text -> plain data in which every key and value knows its line.

Values are read as YAML's safe subset; `1e-4` is a number; a key given twice is a fault
that names both lines. Knows nothing about torch, classes or what a schedule means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distiller.errors import Fault, ScheduleError

Path_ = tuple[str | int, ...]
_DEEPEST = 30
_MERGE = "tag:yaml.org,2002:merge"
SECTIONS = ("pruners", "regularizers", "quantizers", "lr_schedulers", "extensions")


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML document as plain data, with the line of every key and list item.

    Attributes:
        file: the file's name, for messages.
        data: dicts, lists and scalars.
        lines: line (from 1) by path, a path being the keys and list indices down to a value.
    """

    file: str
    data: Any
    lines: dict[Path_, int] = field(repr=False)

    def line(self, path: Path_) -> int:
        """The line of a path, or of the nearest thing around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def fault(self, path: Path_, text: str) -> Fault:
        """A fault at `path`."""
        return Fault(self.line(path), dotted(path), text)

    def find(self, root: Path_, value: str) -> Path_:
        """The path below `root` of the key or list item that is `value`, or `root` itself."""
        for path, found in _walk(root, _at(self.data, root)):
            if found == value or (path != root and path[-1] == value):
                return path
        return root


def read_document(filename: str | Path) -> Document:
    """Read one YAML file.

    Raises:
        ScheduleError: the file is missing, empty, not text, not YAML, or has a duplicate key.
    """
    name = str(filename)
    try:
        raw = Path(filename).expanduser().read_bytes()
    except OSError as error:
        raise ScheduleError(name, [Fault(1, "", f"cannot be read: {error.strerror}")]) from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ScheduleError(
            name, [Fault(1, "", f"is not text (byte {error.start} is not UTF-8); a YAML file is wanted")]
        ) from error
    return parse_document(text, name)


def parse_document(text: str, file: str = "<string>") -> Document:
    """Parse YAML text.

    Raises:
        ScheduleError: it is empty, not YAML, or has a duplicate key.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise ScheduleError(file, [Fault(1, "", "is empty; a schedule has at least a 'policies' list")])
        lines: dict[Path_, int] = {}
        faults: list[Fault] = []
        _locate(node, (), lines, faults, loader)
        if faults:
            raise ScheduleError(file, faults)
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ScheduleError(file, [Fault(line, "", f"is not YAML: {error.problem}")]) from error
    except yaml.reader.ReaderError as error:
        raise ScheduleError(file, [Fault(1, "", f"is not YAML text: {error.reason}")]) from error
    finally:
        if loader is not None:
            loader.dispose()
    return Document(file, data, lines)


def dotted(path: Path_) -> str:
    """`('pruners', 'a', 'weights', 1)` -> `pruners.a.weights[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number, as every other language does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _locate(
    node: yaml.Node, path: Path_, lines: dict[Path_, int], faults: list[Fault], loader: _Loader
) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if len(path) > _DEEPEST:
        raise yaml.MarkedYAMLError(
            problem="nested too deeply, or within itself", problem_mark=node.start_mark
        )
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _locate(item, (*path, index), lines, faults, loader)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for key_node, value in node.value:
            if key_node.tag == _MERGE:
                _locate(value, path, lines, faults, loader)
                continue
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, (str, int, float, bool, type(None))):
                faults.append(Fault(line, dotted(path), f"a key must be a name or a number, got {key!r}"))
                continue
            if key in seen:
                faults.append(
                    Fault(
                        line,
                        dotted(path),
                        f"duplicate key '{key}', first given in line {seen[key]}; keep one",
                    )
                )
            seen[key] = line
            lines[(*path, key)] = line  # type: ignore[index]
            _locate(value, (*path, key), lines, faults, loader)  # type: ignore[arg-type]


def _walk(path: Path_, value: Any) -> Iterator[tuple[Path_, Any]]:
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk((*path, key), item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk((*path, index), item)


def _at(data: Any, path: Path_) -> Any:
    for part in path:
        data = data[part]
    return data
