"""What the values of flags must be. Each raises `argparse.ArgumentTypeError`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def not_empty(text: str) -> str:
    """Text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def path(text: str) -> str:
    """A path, `~` at its beginning followed."""
    return str(Path(not_empty(text)).expanduser())


def arch(text: str) -> str:
    """The name of an architecture, whose case counts only in a dotted path."""
    return text if ":" in text else text.lower()


def precision(text: str) -> int | str:
    """A floating-point format: the bits of an IEEE type, or bf16."""
    if text.lower() not in ("16", "32", "64", "bf16"):
        raise argparse.ArgumentTypeError(f"must be 16, bf16, 32 or 64, got '{text}'")
    return "bf16" if text.lower() == "bf16" else int(text)


def at_least(low: int, up_to: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of a flag that takes a whole number from `low` to `up_to`."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low}, got '{text}'")
        if value > up_to:
            limit = "below 2**63" if up_to == 2**63 - 1 else f"at most {up_to:,}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got '{text}'")
        return value

    return whole_number


def fraction(
    low: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    up_to: float = 1.0,
) -> Callable[[str], float]:
    """The type of a flag that takes a number from `low` or above `above`, below `below` or up to `up_to`."""
    bounds = [f"from {low:g}" if low is not None else f"above {above:g}"]
    bounds.append(f"below {below:g}" if below is not None else f"up to {up_to:g}")

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        inside = value >= low if low is not None else value > (above or 0.0)
        inside = inside and (value < below if below is not None else value <= up_to)
        if not inside:
            raise argparse.ArgumentTypeError(f"must be a number {' and '.join(bounds)}, got '{text}'")
        return value

    return number
