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
from distiller.data_loggers.loggers import (
    CsvLogger,
    EpochRecord,
    Logger,
    NullLogger,
    PythonLogger,
    TensorBoardLogger,
)
from distiller.data_loggers.quant_stats import QuantCalibrationStatsCollector, collect_quant_stats
from distiller.data_loggers.stats_file import check_stats, load_stats

__all__ = [
    "ActivationCollector",
    "CollectorDirection",
    "CsvLogger",
    "EpochRecord",
    "Logger",
    "NullLogger",
    "PythonLogger",
    "QuantCalibrationStatsCollector",
    "RecordsActivationStatsCollector",
    "SummaryActivationStatsCollector",
    "TensorBoardLogger",
    "activation_channels_apoz",
    "activation_channels_l1",
    "activation_channels_means",
    "activation_stats_collectors",
    "check_stats",
    "collect_quant_stats",
    "collector_context",
    "load_stats",
]
