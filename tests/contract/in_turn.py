"""One test of many inputs: what thousands of parameters would say, without the time that each of them takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch


def in_turn(argument: str, values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test with each value of one argument, each with torch's generator as a test begins with it.

    A failure says with which value.
    """
    each = tuple(values)

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def called(**others: Any) -> None:
            for value in each:
                torch.manual_seed(0)
                try:
                    test(**others, **{argument: value})
                except BaseException as error:
                    error.add_note(f"{argument}: {value!r}")
                    raise

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name != argument]
        called.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return called

    return decorated
