"""Evaluating a model with early exits: every output of it, of every image.

Knows nothing about thresholds: nobody leaves here.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distiller.apputils import training_loop
from distiller.apputils.meters import ClassificationMeter, EvalResult
from distiller.branch_points import every_exit, exit_names, exits_of
from distiller.names import unwrap
from distiller.quantization import PostTrainLinearQuantizer

_LOG = logging.getLogger(__name__)


def evaluate(model: nn.Module, loader: training_loop.Batches, **options: Any) -> EvalResult:
    """`training_loop.evaluate`, and the accuracy of every early exit in the log."""
    *exits, final = evaluate_exits(model, loader, **options)
    for index, (name, result) in enumerate(zip(exit_names(unwrap(model)), exits, strict=False), start=1):
        _LOG.info("exit %d (%s) %s", index, name, result.line())
    return final


def evaluate_exits(model: nn.Module, loader: training_loop.Batches, **options: Any) -> tuple[EvalResult, ...]:
    """What each exit scored on all images, the final output last.

    Of a model that was quantized after training only the final output: its exits were not calibrated.

    Args:
        model: with exits, or without.
        loader: of what `training_loop.evaluate` takes.
        **options: of `training_loop.evaluate`, without `criterion`.
    """
    if not exits_of(model) or is_quantized_after_training(model):
        return (training_loop.evaluate(model, loader, **options),)
    scores = _ExitScores(len(exits_of(model)))
    with every_exit(model):
        final = training_loop.evaluate(model, loader, criterion=scores, **options)
    return (*scores.results(), final)


def is_quantized_after_training(model: nn.Module) -> bool:
    """Whether its layers compute with ranges that were collected when it had been trained."""
    metadata = getattr(unwrap(model), "quantizer_metadata", None)
    return metadata is not None and metadata["class"] == PostTrainLinearQuantizer.__name__


class _ExitScores:
    """The criterion of the final output, which keeps the scores of the others."""

    def __init__(self, exits: int) -> None:
        self._meters = [ClassificationMeter() for _ in range(exits)]

    def __call__(self, outputs: list[Tensor], labels: Tensor) -> Tensor:
        for meter, logits in zip(self._meters, outputs[:-1], strict=True):
            meter.update(logits, labels, cross_entropy(logits, labels))
        return cross_entropy(outputs[-1], labels)

    def results(self) -> list[EvalResult]:
        return [meter.result() for meter in self._meters]
