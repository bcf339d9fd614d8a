"""Statistics of a classifier's activations over the phases of a run: collected, logged, and saved as tables.

What is collected is in `data_loggers/activation_stats.py`. Knows nothing about what a phase does.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from distiller.apputils.image_classifier import Run
from distiller.data_loggers.activation_stats import (
    SummaryActivationStatsCollector,
    activation_stats_collectors,
    columns,
)
from distiller.errors import UsageError

_LOG = logging.getLogger(__name__)


class ActivationPhases:
    """The phases of `--activation-stats`.

    Args:
        model: whose activations they are.
        phases: of train, valid and test, those to look at.

    Raises:
        UsageError: there are such phases, and the model is spread over several devices.
    """

    def __init__(self, model: nn.Module, phases: Collection[str]) -> None:
        if phases and isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise UsageError(
                f"--activation-stats: the model is spread over {len(model.device_ids)} GPUs, and can only be "
                "looked into on one; give --load-serialized, or one GPU with --gpus"
            )
        self._model = model
        self._phases = frozenset(phases)
        self._has_warned = False

    @contextmanager
    def collected(self, phase: str, epoch: int, run: Run) -> Iterator[None]:
        """Collect within the block, and log and save at its end, if the phase is one of those asked for.

        The model computes what it would compute without; after the block, and after an error in it, nothing
        is left on it.

        Args:
            phase: train, valid or test.
            epoch: from 0; of a test, the last one trained.
            run: takes the figures; files go to `activation_stats/<phase>/` in its folder, in the place of
                those of the epoch before.
        """
        if phase not in self._phases:
            yield
            return
        collectors = activation_stats_collectors(self._model)
        with ExitStack() as attached:
            for collector in collectors.values():
                attached.enter_context(collector)
            yield
        seen = {name: collector for name, collector in collectors.items() if not collector.is_empty}
        self._warn_of([name for name in collectors if name not in seen])
        by_statistic = {
            name: columns(collector.value())
            for name, collector in seen.items()
            if isinstance(collector, SummaryActivationStatsCollector)
        }
        for logger in run.loggers if by_statistic else ():
            logger.log_activation_statistics(epoch, phase, by_statistic)
        if seen and run.folder is not None:
            folder = run.folder.path / "activation_stats" / phase
            folder.mkdir(parents=True, exist_ok=True)
            for name, collector in seen.items():
                collector.save(folder / name)
            _LOG.info("Saved activation statistics to: %s", folder)

    def _warn_of(self, statistics: list[str]) -> None:
        """Tell, once, which statistics cannot be had of this model."""
        if statistics and not self._has_warned:
            _LOG.warning(
                "--activation-stats: no %s: the model has run no module that they are taken from "
                "(ReLU, ReLU6, LeakyReLU; for records Conv2d)",
                ", ".join(statistics),
            )
        self._has_warned = self._has_warned or bool(statistics)
