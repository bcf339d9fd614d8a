"""Layer-wise compression after training: each layer by itself, and what is really stored of it."""

from distiller.layerwise.compressed_layer import TECHNIQUES, CompressedWeight, WeightToCompress, read_pipeline
from distiller.layerwise.log import LayerwiseLog, LayerwiseSettings, read_points
from distiller.layerwise.plot import draw_layerwise, layerwise_curves, layerwise_figures
from distiller.layerwise.points import LayerwisePoint
from distiller.layerwise.source_files import read_source_files, write_source_files
from distiller.layerwise.sweep import SweepPlan, fraction_range, layers_to_compress, layerwise_points
from distiller.layerwise.techniques import kmeans_by_fraction, prune_by_fraction, svd_by_kept_rank

__all__ = [
    "TECHNIQUES",
    "CompressedWeight",
    "LayerwiseLog",
    "LayerwisePoint",
    "LayerwiseSettings",
    "SweepPlan",
    "WeightToCompress",
    "draw_layerwise",
    "fraction_range",
    "kmeans_by_fraction",
    "layers_to_compress",
    "layerwise_curves",
    "layerwise_figures",
    "layerwise_points",
    "prune_by_fraction",
    "read_pipeline",
    "read_points",
    "read_source_files",
    "svd_by_kept_rank",
    "write_source_files",
]
