"""What a rewritten forward checks in each call: that it is run on inputs of the form it was made for.

Knows nothing about graphs.
"""

from __future__ import annotations

from typing import Any

from distiller.errors import UsageError


class OtherForm(UsageError):
    """A rewritten forward was called with inputs for which the one before would have taken another course.

    Attributes:
        module_name: canonical name of the module.
    """

    def __init__(self, module_name: str, expected: Any, got: Any) -> None:
        self.module_name = module_name
        super().__init__(
            f"{module_name or 'the model'}: its operations became modules for inputs of another form "
            f"({_described(expected)} then, {_described(got)} now); convert a model that is not converted "
            "yet, with such inputs"
        )


def as_traced(value: Any, expected: Any, module_name: str) -> None:
    """Raise if what decides the course of a forward is not what it was when the forward was rewritten.

    Args:
        value: a length, a size, the outcome of a comparison of sizes, an argument that is no tensor.
        expected: the same, then.
        module_name: canonical name of the module.

    Raises:
        OtherForm: they differ.
    """
    if not (value is expected or value == expected):
        raise OtherForm(module_name, expected, value)


def _described(value: Any) -> str:
    """A value of any type, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
