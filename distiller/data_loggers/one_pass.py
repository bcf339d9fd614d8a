"""Activation statistics for quantization from a single pass over the data, for large models.

Knows nothing about how a tensor is reduced.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from distiller.data_loggers.observers import OnePassObserver
from distiller.data_loggers.stats_collector import QuantStatsCollector, Taken, shape_text, version_of
from distiller.data_loggers.tensor_summary import TensorSummary, new_scratch, summary_of, sums_agree
from distiller.errors import StatsError

__all__ = ["OnePassQuantStatsCollector"]


class _Stream(OnePassObserver):
    """One input, or the output, of a module."""

    def result(self) -> dict[str, Any]:
        return {**super().result(), "shape": shape_text(self.ranges.shape), "total_numel": self.numel}


class OnePassQuantStatsCollector(QuantStatsCollector[_Stream]):
    """Everything in one pass: all values exact but b, which is within 1 % (`OnePassObserver`).

    A tensor that is one module's output and, itself or as a view, the next one's input is reduced once.
    Under torch.inference_mode nothing tells whether it was changed in place in between: there the sums of its
    samples are computed again, and all else where one of them is another.
    A tensor whose memory something else changes (through numpy or `.data`) is not noticed to have changed.
    A value that is not finite is a StatsError at once, naming the first module that met it.
    """

    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Reduce the output and add up both; a ReLU's extremes follow from those of its input."""
        pending = self._pending[name]
        is_watched_only = len(module._forward_hooks) == len(module._forward_pre_hooks) == 1
        is_plain_relu = type(module) is nn.ReLU and is_watched_only
        self._rectified = pending[0].reduction if is_plain_relu and len(pending) == 1 else None
        self._is_output = True
        super().on_output(name, module, output)
        self._rectified, self._is_output = None, False

    def _lack(self) -> str | None:
        if self._records:
            return None
        return "nothing was collected; run the model while the collector is attached"

    def _new_stream(self) -> _Stream:
        return _Stream()

    def _reduced(self, stream: _Stream, x: Tensor) -> TensorSummary:
        seen = self._seen.setdefault(x if x._base is None else x._base, {})
        version, place = version_of(x), _place(x)
        version_seen, summary = seen.get(place, (None, None))
        if summary is None or not self._is_unchanged(x, version, version_seen, summary):
            summary = summary_of(x, stream.so_far, self._rectified, self._scratch(x.device))
            seen[place] = version, summary
        return summary

    def _is_unchanged(
        self, x: Tensor, version: int | None, version_seen: int | None, summary: TensorSummary
    ) -> bool:
        if version is not None:
            return version == version_seen
        return not self._is_output and sums_agree(x, summary)

    def _add_up(self, taken: Sequence[Taken[_Stream]]) -> None:
        for item in taken:
            if item.reduction.spread is None:
                raise StatsError(f"{item.where}: NaN or infinite values; is the model trained?")
            item.stream.add(item.reduction, item.shape)

    def _forget_tensors(self) -> None:
        super()._forget_tensors()
        self._seen: MutableMapping[Tensor, dict[Any, tuple[int | None, TensorSummary]]]
        self._seen = WeakTensorKeyDictionary()
        self._rectified: TensorSummary | None = None
        self._is_output = False
        self._memory: dict[torch.device, Tensor] = {}

    def _scratch(self, device: torch.device) -> Tensor:
        if device not in self._memory:
            self._memory[device] = new_scratch(device)
        return self._memory[device]


def _place(x: Tensor) -> tuple[Any, ...]:
    """What of the memory that it may share a tensor is: the same for tensors of the same samples."""
    if x.is_contiguous():
        return x.dtype, x.storage_offset(), x.shape[0] if x.dim() else 1, x.numel()
    return x.dtype, x.storage_offset(), *x.shape, *x.stride()
