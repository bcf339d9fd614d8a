"""YAML text -> plain data in which every key and value knows its line.

Values are read as YAML's safe subset; `1e-4` is a number; a key given twice is a fault
that names both lines. Knows nothing about torch, classes or what a schedule means.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distiller.errors import Fault, ScheduleError

Path_ = tuple[str | int, ...]
_DEEPEST = 30
_MOST_NODES = 100_000
_MOST_DIGITS = 18
_TOO_DEEP = "nested too deeply, or within itself"
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

    def texts(self, root: Path_) -> Iterator[tuple[Path_, str]]:
        """Every key and every value below `root` that is text, with its path."""
        for path, value in _walk(root, _at(self.data, root)):
            if path != root and isinstance(path[-1], str):
                yield path, path[-1]
            if isinstance(value, str):
                yield path, value

    def find(self, root: Path_, value: str) -> Path_:
        """The path below `root` of the key or list item that is `value`, or `root` itself."""
        return next((path for path, text in self.texts(root) if text == value), root)

    def find_mentioned(self, root: Path_, message: str) -> Path_:
        """The path below `root` that an error message is about, or `root` itself.

        It is the one of which the message names the most keys (and the quoted text at its end): from
        "levels['fc'] must be ..." that is `levels.fc`. Of several, the one that it names first.
        """
        best, most, first = root, 0, 0
        message = re.sub(r"got [\[{].*", "", message)  # of what was got as a whole, no part is meant
        for path, text in self.texts(root):
            keys = [part for part in path[len(root) :] if isinstance(part, str)]
            last = _mention(text, message) if path[-1] == text else message.find(f"'{text}'")
            if last < 0:
                continue
            count = sum(_mention(key, message) >= 0 for key in keys) + (path[-1] != text)
            if count > most or (count == most and last < first):
                best, most, first = path, count, last
        return best


def read_document(filename: str | Path) -> Document:
    """Read one YAML file.

    Raises:
        ScheduleError: the file is missing, empty, not text, not YAML, or has a duplicate key.
    """
    name = str(filename)
    try:
        raw = Path(filename).expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: the home of a user that does not exist; ValueError: a NUL in the name.
        reason = error.strerror if isinstance(error, OSError) else error
        raise ScheduleError(name, [Fault(1, "", f"cannot be read: {reason}")]) from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ScheduleError(
            name, [Fault(1, "", f"is not text (byte {error.start} is not UTF-8); a YAML file is wanted")]
        ) from error
    return parse_document(text, name)


def parse_document(
    text: str, file: str = "<string>", wanted: str = "a schedule has at least a 'policies' list"
) -> Document:
    """Parse YAML text of any kind.

    Neither the depth nor, with every alias written out, the values of a document are without bounds.

    Args:
        wanted: what an empty text should have been.

    Raises:
        ScheduleError: it is empty, not YAML, or has a duplicate key.
    """
    loader, node, data = None, None, None
    try:
        loader = _Loader(text)
        locator = _Locator(loader)
        node = loader.get_single_node()
        if node is not None:
            locator.locate(node, ())
            data = None if locator.faults else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ScheduleError(file, [Fault(line, "", f"is not YAML: {error.problem}")]) from error
    except yaml.reader.ReaderError as error:
        raise ScheduleError(file, [Fault(1, "", f"is not YAML text: {error.reason}")]) from error
    except RecursionError as error:
        raise ScheduleError(file, [Fault(1, "", f"is not YAML: {_TOO_DEEP}")]) from error
    except (ValueError, OverflowError) as error:  # of PyYAML's scanner, for characters as "\UFFFFFFFF"
        line = loader.line + 1 if loader else 1
        raise ScheduleError(file, [Fault(line, "", f"is not YAML: {error}")]) from error
    finally:
        if loader is not None:
            loader.dispose()
    if node is None:
        raise ScheduleError(file, [Fault(1, "", f"is empty; {wanted}")])
    if locator.faults:
        raise ScheduleError(file, locator.faults)
    return Document(file, data, locator.lines)


def dotted(path: Path_) -> str:
    """`('pruners', 'a', 'weights', 1)` -> `pruners.a.weights[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if type(part) is int else f".{part}" if text else str(part)
    return text


def shown(value: Any) -> str:
    """`repr(value)`, cut short where it is long."""
    return _REPR.repr(value)


def plain(value: Any) -> Any:
    """A value as a YAML file could have it: numbers, text, lists and dicts of them.

    All else is written as text, without addresses in memory: the same in every process.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 4, 10, 10
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 100


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number, as every other language does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _Locator:
    """Notes the line of every key and item of a node, and what is wrong with them."""

    def __init__(self, loader: _Loader) -> None:
        self.lines: dict[Path_, int] = {}
        self.faults: list[Fault] = []
        self._loader = loader
        self._nodes = 0

    def locate(self, node: yaml.Node, path: Path_) -> None:
        """Note the lines of `node`, which stands at `path`, and of all that is in it."""
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            if self._nodes == _MOST_NODES + 1:
                where = path[:1]  # an alias's own line is not kept, the node has that of its anchor
                text = f"more than {_MOST_NODES:,} values up to here, with every alias (*name) written out"
                self.faults.append(Fault(self.lines.get(where, 1), dotted(where), text))
            return
        if len(path) > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=node.start_mark)
        self.lines.setdefault(path, _line(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.locate(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            self._locate_keys(node, path)
        else:
            self._read(node, path)

    def _locate_keys(self, node: yaml.MappingNode, path: Path_) -> None:
        """A mapping's own keys first, which win over those of a merge (`<<`)."""
        seen: dict[Any, int] = {}
        for key_node, value in node.value:
            if key_node.tag == _MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(key_node, path, f"a key must be a name or a number, got a {key_node.id}")
                continue
            key = self._read(key_node, path)
            if not isinstance(key, (str, int, float, bool, type(None))):
                self._fault(key_node, path, f"a key must be a name or a number, got {shown(key)}")
                continue
            line = _line(key_node)
            if key in seen:
                text = f"duplicate key '{key}', first given in line {seen[key]}; keep one"
                self._fault(key_node, path, text)
            seen[key] = line
            self.lines.setdefault((*path, key), line)  # type: ignore[arg-type]
            self.locate(value, (*path, key))  # type: ignore[arg-type]
        for key_node, value in node.value:
            if key_node.tag == _MERGE:
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for item in merged:
                    self.locate(item, path)

    def _read(self, node: yaml.Node, path: Path_) -> Any:
        """The value of a scalar; None, and a fault, where it is not what its tag says."""
        try:
            value = self._loader.construct_object(node)
        except (ValueError, LookupError, AttributeError, OverflowError):
            # PyYAML's constructors do not guard what their regular expressions let pass, as 2024-13-45.
            self._loader.recursive_objects.pop(node, None)
            kind = node.tag.rpartition(":")[2]
            self._fault(node, path, f"{shown(node.value)} is no {kind}; put it in quotes if it is text")
            return None
        if isinstance(value, int) and abs(value) >= 10**_MOST_DIGITS:
            self._fault(node, path, f"must be a whole number of at most {_MOST_DIGITS} digits")
        return value

    def _fault(self, node: yaml.Node, path: Path_, text: str) -> None:
        self.faults.append(Fault(_line(node), dotted(path), text))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _mention(name: str, message: str) -> int:
    """Where a message names a key, as a whole word; -1 if it does not."""
    found = re.search(rf"(?<![\w.]){re.escape(name)}(?![\w])", message, re.IGNORECASE) if name else None
    return found.start() if found else -1


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
