"""Sensitivity sweeps: how a model scores when one part of it at a time is compressed."""

from distiller.sensitivity.axes import AXES, AxisContext, input_ranges, sparsity_levels
from distiller.sensitivity.curves import SensitivityPoint
from distiller.sensitivity.engine import perform_sensitivity_analysis
from distiller.sensitivity.plot import plot_points, sensitivities_to_png
from distiller.sensitivity.report import (
    points_from_csv,
    points_to_csv,
    sensitivities_from_csv,
    sensitivities_to_csv,
)
from distiller.sensitivity.sweep import AxisRequest, sensitivity_sweep
from distiller.sensitivity.sweep_data import TensorBlocks, random_order

__all__ = [
    "AXES",
    "AxisContext",
    "AxisRequest",
    "SensitivityPoint",
    "TensorBlocks",
    "input_ranges",
    "perform_sensitivity_analysis",
    "plot_points",
    "points_from_csv",
    "points_to_csv",
    "random_order",
    "sensitivities_from_csv",
    "sensitivities_to_csv",
    "sensitivities_to_png",
    "sensitivity_sweep",
    "sparsity_levels",
]
