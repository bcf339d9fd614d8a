"""How far a quantized model is from the model in floating point: by its loss, or by its outputs.

Knows nothing about what is quantized.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.evaluation_mode import evaluating
from distiller.observation import watch_output
from distiller.quantization.search.copies import EvalFn, loss_of
from distiller.quantization.search.search_log import SearchLog

Metric: TypeAlias = Literal["loss", "kl"]


def mean_divergence(reference: Tensor, outputs: Tensor) -> float:
    """Mean over the samples of KL(softmax(reference) || softmax(outputs)), in nats.

    Args:
        reference: logits, (samples, classes) or (samples, classes, places).
        outputs: alike.
    """
    p, q = reference.double().log_softmax(1), outputs.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


class Distance:
    """Measures models against one in floating point, which is run once, when it is first needed.

    Args:
        float_model: what they are compared with.
        eval_fn: runs a model on the same data each time and returns its loss.
        metric: "loss": loss - loss of `float_model`; "kl": `mean_divergence` of the outputs, over all runs.
        log: of the search: the loss of `float_model` is a point there.
        where: the search, for messages.
    """

    def __init__(
        self, float_model: nn.Module, eval_fn: EvalFn, metric: Metric, log: SearchLog, where: str
    ) -> None:
        self._float_model = float_model
        self._eval_fn = eval_fn
        self._metric = metric
        self._log = log
        self._where = where
        self._reference: list[Tensor] | None = None

    @property
    def float_loss(self) -> float:
        """The loss of the model in floating point."""
        return self._log.evaluated({"model": "in floating point"}, self._loss_in_float)

    def of(self, model: nn.Module) -> float:
        """The distance of a model; NaN where its loss or its outputs are."""
        if self._metric == "loss":
            before = self.float_loss
            return loss_of(model, self._eval_fn, self._where) - before
        if self._reference is None:
            with evaluating(self._float_model):
                self._reference = self._outputs(self._float_model)
        outputs = self._outputs(model)
        if [x.shape for x in outputs] != [x.shape for x in self._reference]:
            raise QuantizationError(
                f"{self._where}: eval_fn: must feed the same data each time, its outputs were of shapes "
                f"{_shapes(self._reference)} and then {_shapes(outputs)}"
            )
        samples = sum(len(x) for x in outputs)
        pairs = zip(self._reference, outputs, strict=True)
        return sum(mean_divergence(clean, noisy) * len(noisy) for clean, noisy in pairs) / samples

    def _loss_in_float(self) -> float:
        with evaluating(self._float_model):
            return loss_of(self._float_model, self._eval_fn, self._where)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []

        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() < 2:
                raise QuantizationError(
                    f"{self._where}: metric 'kl' needs a model that returns logits, (samples, classes), "
                    f"got {_kind(output)}; choose metric 'loss'"
                )
            found.append(output.detach().clone())

        handle = watch_output(model, see)
        try:
            with torch.no_grad():
                self._eval_fn(model)
        finally:
            handle.remove()
        if not found:
            raise QuantizationError(f"{self._where}: eval_fn: does not run the model that it is given")
        return found


def _kind(output: Any) -> str:
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def _shapes(tensors: list[Tensor]) -> str:
    shapes = [str(tuple(x.shape)) for x in tensors]
    return ", ".join(shapes[:3]) + (", ..." if len(shapes) > 3 else "")
