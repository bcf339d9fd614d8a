"""The axes of a sensitivity sweep: what one level of compression does to one part of a model.

    axis            | one curve for each                        | level
    element         | weight of two or more dimensions          | floor(s n) of n elements are zero
    filter          | convolution weight, (out, in/groups, ...) | floor(s n) of n filters are, dimension 0
    channel         | the same                                  | floor(s n) of n channels are, dimension 1
    group           | group of coupled channels                 | floor(s n) of n are, in all its layers
    n:m             | weight of two or more dimensions          | k/M: of M neighbouring inputs k are zero
    weight-bits     | convolution or linear layer               | width of its weight
    activation-bits | convolution or linear layer               | width of its input
    rank            | linear layer, convolution without groups  | floor(s r) of the full rank r is gone

What is least in magnitude goes first; s is a fraction 0..1. Everything is named by a weight.
"""

from distiller.sensitivity.axes.axis import Axis, AxisContext, WeightAxis, weight_owners
from distiller.sensitivity.axes.input_ranges import input_ranges
from distiller.sensitivity.axes.levels import bit_levels, sparsity_levels
from distiller.sensitivity.axes.registry import AXES, find_axis

__all__ = [
    "AXES",
    "Axis",
    "AxisContext",
    "WeightAxis",
    "bit_levels",
    "find_axis",
    "input_ranges",
    "sparsity_levels",
    "weight_owners",
]
