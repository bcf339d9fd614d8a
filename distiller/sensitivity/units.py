"""What one curve of a sweep is about: a parameter, its levels, and what each makes of the model.

Knows nothing about axes, data or how a compressed model is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from distiller.replay import Variant


def _no_note(level: float) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one curve is about.

    Attributes:
        axis: the name of the axis.
        parameter: the canonical name that the curve goes by.
        levels: how strongly it is compressed, in the order asked for; the dense level is not among them.
        make: level -> the variant. Pure: it keeps what it needs of the dense model.
        tensors: names that the variants replace.
        inputs: modules whose inputs the variants transform.
        note: level -> what is really taken away, in words; "" where the level says it all.
    """

    axis: str
    parameter: str
    levels: tuple[float, ...]
    make: Callable[[float], Variant]
    tensors: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    note: Callable[[float], str] = field(default=_no_note)
