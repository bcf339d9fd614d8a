"""Axes that put elements of one weight at zero: elements, filters, input channels, N:M.

Elements are ranked by |w|, filters and channels by their mean |w|. A convolution with a single filter (or
channel) is left out: there is nothing to choose from, and its flat curve would look like insensitivity.

Knows nothing about models or how a compressed model is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from distiller.errors import UsageError
from distiller.pruning.criteria import create_mask_level_criterion
from distiller.pruning.n_to_m import n_to_m_mask, n_to_m_sparsity
from distiller.pruning.ranking import ranked_structure_mask
from distiller.sensitivity.axes.axis import AxisContext, ParameterAxis, WeightAxis, no_note
from distiller.sensitivity.curves import clean_level
from distiller.sensitivity.units import Unit

__all__ = ["ChannelAxis", "ElementAxis", "FilterAxis", "NMAxis"]

_CONVOLUTION_DIMS = range(3, 6)  # Conv1d, Conv2d, Conv3d
_LARGEST_BLOCK = 2**16


class ElementAxis(WeightAxis):
    """Level s puts the floor(s n) of n elements at zero that are least in magnitude."""

    name = "element"
    takes = "weights of two or more dimensions"
    label = "Share of the elements pruned"

    def applies_to(self, name: str, weight: Tensor) -> bool:
        """Whether it is a weight of two or more dimensions."""
        return _is_weight(name, weight)

    def compress(self, weight: Tensor, level: float) -> Tensor:
        """The weight without its least elements."""
        return _masked(weight, create_mask_level_criterion(weight, level))


class FilterAxis(WeightAxis):
    """Level s puts the floor(s n) of n filters (dimension 0) at zero whose mean |w| is least."""

    name = "filter"
    takes = "convolution weights of several filters"
    label = "Share of the filters pruned"

    def applies_to(self, name: str, weight: Tensor) -> bool:
        """Whether it is a convolution's weight of several filters."""
        return _is_kernel(name, weight) and weight.shape[0] > 1

    def compress(self, weight: Tensor, level: float) -> Tensor:
        """The weight without its least filters."""
        return _masked(weight, ranked_structure_mask(weight, "Filters", level))


class ChannelAxis(WeightAxis):
    """Level s puts the floor(s n) of n input channels (dimension 1) at zero whose mean |w| is least."""

    name = "channel"
    takes = "convolution weights of several channels"
    label = "Share of the input channels pruned"

    def applies_to(self, name: str, weight: Tensor) -> bool:
        """Whether it is a convolution's weight of several channels."""
        return _is_kernel(name, weight) and weight.shape[1] > 1

    def compress(self, weight: Tensor, level: float) -> Tensor:
        """The weight without its least channels."""
        return _masked(weight, ranked_structure_mask(weight, "Channels", level))


class NMAxis(WeightAxis):
    """Level k/M leaves at most M - k of each M neighbouring input channels (dimension 1), as `NMPruner`.

    Args:
        block: M; of units it is that of their context.
    """

    name = "n:m"
    takes = "weights of two or more dimensions with several input channels"
    label = "Share of each M neighbouring inputs pruned"
    default_range = (0.0, 0.75, 0.25)

    def __init__(self, block: int = 4) -> None:
        self.block = block

    def units(
        self, model: nn.Module, names: Iterable[str], levels: Iterable[float], context: AxisContext
    ) -> list[Unit]:
        """One for each weight that the axis is meant for."""
        return ParameterAxis.units(_of_block(context), model, names, levels, context)

    def default_levels(self, context: AxisContext) -> tuple[float, ...]:
        """0, 1/M, ..., (M - 1)/M."""
        block = _of_block(context).block
        return tuple(clean_level(zeros / block) for zeros in range(block))

    def check_level(self, level: float) -> None:
        """Refuse what is no k/M for any M."""
        if not 0 <= level < 1:
            raise UsageError(f"sensitivity: a level of n:m must be at least 0 and less than 1, got {level:g}")

    def applies_to(self, name: str, weight: Tensor) -> bool:
        """Whether it is a weight of several input channels."""
        return _is_weight(name, weight) and weight.shape[1] > 1

    def compress(self, weight: Tensor, level: float) -> Tensor:
        """The weight with `level` of each `block` neighbours at zero."""
        return _masked(weight, n_to_m_mask(weight, self.block - _zeros_of(level, self.block), self.block))

    def _checked_levels(self, levels: Iterable[float]) -> tuple[float, ...]:
        found = super()._checked_levels(levels)
        for level in found:
            _zeros_of(level, self.block)
        return found

    def _note(self, weight: Tensor) -> Callable[[float], str]:
        channels = weight.shape[1]
        return no_note if channels % self.block == 0 else _ShortBlockNote(channels, self.block)


@dataclass(frozen=True, slots=True)
class _ShortBlockNote:
    """Level -> what N:M comes to where M does not divide the input channels."""

    channels: int
    block: int

    def __call__(self, level: float) -> str:
        """The ratio, and the sparsity that it really gives."""
        kept = self.block - _zeros_of(level, self.block)
        sparsity = n_to_m_sparsity(self.channels, kept, self.block)
        return f"{kept}:{self.block} of {self.channels} inputs: {100 * sparsity:.1f} % of the elements"


def _of_block(context: AxisContext) -> NMAxis:
    if not 2 <= context.block <= _LARGEST_BLOCK:
        raise UsageError(
            f"sensitivity: n:m takes blocks of 2 to {_LARGEST_BLOCK} neighbouring inputs, got {context.block}"
        )
    return NMAxis(context.block)


def _zeros_of(level: float, block: int) -> int:
    """How many of a block are zero."""
    zeros = round(level * block)
    if abs(level * block - zeros) > 1e-4:
        below, above = (f"{clean_level(k / block):g}" for k in (int(level * block), int(level * block) + 1))
        raise UsageError(
            f"sensitivity: a level of n:m with blocks of {block} must be k/{block} with a whole k, "
            f"got {level:g}; next to it are {below} and {above}"
        )
    return zeros


def _is_weight(name: str, weight: Tensor) -> bool:
    return weight.dim() >= 2 and "weight" in name.rpartition(".")[2]


def _is_kernel(name: str, weight: Tensor) -> bool:
    return _is_weight(name, weight) and weight.dim() in _CONVOLUTION_DIMS


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    # Not weight * mask: that leaves -0.0, and NaN where a weight is infinite.
    return weight.masked_fill(mask == 0, 0.0)
