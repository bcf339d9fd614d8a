"""Sensitivity sweeps: how a model scores when one parameter at a time is compressed."""

from distiller.sensitivity.axes import AXES, sparsity_levels
from distiller.sensitivity.engine import perform_sensitivity_analysis
from distiller.sensitivity.plot import sensitivities_to_png
from distiller.sensitivity.report import sensitivities_from_csv, sensitivities_to_csv
from distiller.sensitivity.sweep import sensitivity_sweep

__all__ = [
    "AXES",
    "perform_sensitivity_analysis",
    "sensitivities_from_csv",
    "sensitivities_to_csv",
    "sensitivities_to_png",
    "sensitivity_sweep",
    "sparsity_levels",
]
