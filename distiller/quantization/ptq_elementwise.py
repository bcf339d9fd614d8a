"""Additions, multiplications, concatenations and matrix products after post-training quantization.

Addition, subtraction, concatenation and stacking bring their inputs to the output's scale; the rounding
is done once, on the result. A product's accumulator has the product of the inputs' scales.
Knows nothing about models or statistics files.
"""

from __future__ import annotations

import math

from torch import Tensor

from distiller.quantization.ptq_layers import bits_to_hold
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper


class _SameScaleWrapper(RangeLinearQuantWrapper):
    """An operation on inputs that were brought to the output's scale."""

    def compute(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        """The operation's real result."""
        grids = self.input_grids
        return self.wrapped_module(
            *(self.rescaled(x, grids[i].scale) if i in grids else x for i, x in enumerate(inputs))
        )


class RangeLinearQuantConcatWrapper(_SameScaleWrapper):
    """`distiller.modules.Concat`: inputs at the output's scale, joined."""


class RangeLinearQuantStackWrapper(_SameScaleWrapper):
    """`distiller.modules.Stack`: inputs at the output's scale, stacked."""


class RangeLinearQuantEltwiseAddWrapper(_SameScaleWrapper):
    """`distiller.modules.EltwiseAdd`: inputs at the output's scale, added."""


class RangeLinearQuantEltwiseSubWrapper(_SameScaleWrapper):
    """`distiller.modules.EltwiseSub`: inputs at the output's scale, subtracted."""


class _ProductWrapper(RangeLinearQuantWrapper):
    """An operation whose accumulator sums products of the inputs."""

    def compute(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        """The accumulator's real values."""
        largest = self._largest_sum(self._products_summed(inputs[0].shape[-1]))
        accumulator = self.saturated(self.wrapped_module(*inputs), largest)
        return self.rescaled(accumulator)

    def accumulator_bits(self, terms: int = 1) -> int | None:
        """As in the base class."""
        return None if self.is_fake else bits_to_hold(self._largest_sum(self._products_summed(terms)))

    def _largest_sum(self, products: int) -> float:
        return float(products * math.prod(grid.largest_level for grid in self.input_grids.values()))

    def _products_summed(self, columns: int) -> int:
        return 1


class RangeLinearQuantEltwiseMultWrapper(_ProductWrapper):
    """`distiller.modules.EltwiseMult`."""


class RangeLinearQuantMatmulWrapper(_ProductWrapper):
    """`distiller.modules.Matmul` and `BatchMatmul`."""

    def _products_summed(self, columns: int) -> int:
        return columns


__all__ = [
    "RangeLinearQuantConcatWrapper",
    "RangeLinearQuantEltwiseAddWrapper",
    "RangeLinearQuantEltwiseMultWrapper",
    "RangeLinearQuantEltwiseSubWrapper",
    "RangeLinearQuantMatmulWrapper",
    "RangeLinearQuantStackWrapper",
]
