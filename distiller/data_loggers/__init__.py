"""What a run measures and where the numbers go: activation statistics, loggers."""

from distiller.data_loggers.activation_channels import (
    activation_channels_apoz,
    activation_channels_l1,
    activation_channels_means,
)
from distiller.data_loggers.activation_stats import (
    CollectorDirection,
    RecordsActivationStatsCollector,
    SummaryActivationStatsCollector,
    activation_stats_collectors,
)
from distiller.data_loggers.collector import ActivationCollector, collector_context
from distiller.data_loggers.histograms import (
    ActivationHistogramsCollector,
    Histogram,
    collect_histograms,
    histogram_of,
)
from distiller.data_loggers.loggers import (
    CsvLogger,
    EpochRecord,
    Logger,
    NullLogger,
    PythonLogger,
    TensorBoardLogger,
)
from distiller.data_loggers.one_pass import OnePassQuantStatsCollector
from distiller.data_loggers.quant_stats import QuantCalibrationStatsCollector, collect_quant_stats
from distiller.data_loggers.raw_outputs import RawActivationsCollector, collect_raw_outputs
from distiller.data_loggers.stats_file import check_stats, load_stats

__all__ = [
    "ActivationCollector",
    "ActivationHistogramsCollector",
    "CollectorDirection",
    "CsvLogger",
    "EpochRecord",
    "Histogram",
    "Logger",
    "NullLogger",
    "OnePassQuantStatsCollector",
    "PythonLogger",
    "QuantCalibrationStatsCollector",
    "RawActivationsCollector",
    "RecordsActivationStatsCollector",
    "SummaryActivationStatsCollector",
    "TensorBoardLogger",
    "activation_channels_apoz",
    "activation_channels_l1",
    "activation_channels_means",
    "activation_stats_collectors",
    "check_stats",
    "collect_histograms",
    "collect_quant_stats",
    "collect_raw_outputs",
    "collector_context",
    "histogram_of",
    "load_stats",
]
