"""Plain data as JSON and back without a loss: what JSON has not is an object with one key that begins with $.

    {"$tuple": [...]}                a tuple
    {"$dict": [[key, value], ...]}   a dict with a key that is no text, or that begins with $
    {"$float": "nan" | "inf" | "-inf"}
    {"$tensor": index}               a tensor, kept elsewhere

Knows nothing about what the data mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from distiller.errors import CheckpointError

__all__ = ["from_json", "to_json"]

_DEEPEST = 200


def to_json(value: Any, place: str, tensors: list[tuple[str, Tensor]], depth: int = 0) -> Any:
    """`value` in the types of JSON.

    Args:
        value: numbers, text, True, False, None, tensors, and lists, tuples and dicts of them.
        place: what it is, for the message.
        tensors: those in it are appended, each with its place.
        depth: of the lists, tuples and dicts around it.

    Raises:
        CheckpointError: it is something else, or too deep; names the place.
    """
    if depth > _DEEPEST:
        raise CheckpointError(f"pack: '{place}' is nested more than {_DEEPEST} deep")
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Tensor):
        tensors.append((place, value))
        return {"$tensor": len(tensors) - 1}
    if isinstance(value, list | tuple):
        items = [to_json(item, f"{place}[{i}]", tensors, depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        pairs = [
            [
                to_json(key, f"a key of {place}", [], depth + 1),
                to_json(item, f"{place}.{key}", tensors, depth + 1),
            ]
            for key, item in value.items()
        ]
        is_text = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(pairs) if is_text else {"$dict": pairs}
    raise CheckpointError(f"pack: '{place}' is a {type(value).__name__}, which is not plain data")


def from_json(value: Any, tensor: Callable[[int], Tensor]) -> Any:
    """What `to_json` made `value` of.

    Args:
        value: of JSON.
        tensor: gives the tensor of an index.

    Raises:
        ValueError: `to_json` makes no such thing.
    """
    if isinstance(value, list):
        return [from_json(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    marked = [key for key in value if key.startswith("$")]
    if not marked:
        return {key: from_json(item, tensor) for key, item in value.items()}
    if len(value) != 1:
        raise ValueError(f"'{marked[0]}' is not alone")
    [(mark, content)] = value.items()
    if mark == "$float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if mark == "$tensor" and type(content) is int:
        return tensor(content)
    if mark == "$tuple" and isinstance(content, list):
        return tuple(from_json(item, tensor) for item in content)
    if mark == "$dict" and isinstance(content, list) and all(_is_pair(pair) for pair in content):
        return {from_json(key, tensor): from_json(item, tensor) for key, item in content}
    raise ValueError(f"'{mark}' is unknown, or holds something else")


def _is_pair(value: Any) -> bool:
    """A key, which is no list, tuple or dict, and its value."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    key = value[0]
    return not isinstance(key, list | dict) or (isinstance(key, dict) and list(key) == ["$float"])
