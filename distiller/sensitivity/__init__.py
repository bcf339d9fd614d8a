"""Sensitivity sweeps: how a model scores when one parameter at a time is compressed."""

from distiller.sensitivity.axes import AXES as AXES
from distiller.sensitivity.axes import sparsity_levels as sparsity_levels
from distiller.sensitivity.engine import perform_sensitivity_analysis as perform_sensitivity_analysis
from distiller.sensitivity.plot import sensitivities_to_png as sensitivities_to_png
from distiller.sensitivity.report import sensitivities_from_csv as sensitivities_from_csv
from distiller.sensitivity.report import sensitivities_to_csv as sensitivities_to_csv
from distiller.sensitivity.sweep import sensitivity_sweep as sensitivity_sweep
