"""The outputs of a model's layers themselves, kept and written, one file for each layer.

Knows nothing about what they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distiller.data_loggers.collector import ActivationCollector, collector_context, measurable
from distiller.data_loggers.layer_files import layer_file_name, reporting_failed_writes, write_tensors
from distiller.errors import StatsError, UsageError

__all__ = ["RAW_OUTPUTS_FOLDER", "RawActivationsCollector", "collect_raw_outputs"]

RAW_OUTPUTS_FOLDER = "raw_outputs"


def collect_raw_outputs(
    model: nn.Module,
    test_fn: Callable[..., Any],
    save_dir: str | Path | None = None,
    classes: Sequence[type[nn.Module]] | None = None,
    max_samples: int | None = None,
) -> dict[str, Any]:
    """The outputs of the leaf modules over the data that `test_fn` feeds.

    Args:
        model: the model.
        test_fn: called as `test_fn(model=model)`; runs the model on the data in evaluation mode.
        save_dir: existing folder to make the folder `raw_outputs` in, with one file for each layer; None
            writes nothing.
        classes: types of module to look at; None for all.
        max_samples: keep only so many samples of each layer, the first; None: all. See
            `RawActivationsCollector` for the memory that it takes.

    Returns:
        As `RawActivationsCollector.value`.

    Raises:
        StatsError: nothing was run, or the folder cannot be written.
        UsageError: `max_samples` is no number of samples.
    """
    if save_dir is not None and not Path(save_dir).is_dir():
        raise StatsError(f"{save_dir}: no such folder to make {RAW_OUTPUTS_FOLDER} in; make it first")
    collector = RawActivationsCollector(model, classes, max_samples)
    with collector_context(collector):
        test_fn(model=model)
    collector.require_data()
    if save_dir is not None:
        collector.save(Path(save_dir) / RAW_OUTPUTS_FOLDER)
    return collector.value()


class RawActivationsCollector(ActivationCollector):
    """The outputs of modules, batch after batch, on the host.

    Memory: all of them are kept, at their own precision, which is the sum over the layers of the bytes of
    one sample's output times the samples; half as much again while the value is put together. ResNet-18 at
    224 takes 33 MB for each image, ResNet-50 130 MB: bound the samples with `max_samples`, or the layers with
    `classes` or `start`.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[type[nn.Module]] | None = None,
        max_samples: int | None = None,
    ) -> None:
        """Choose the modules.

        Args:
            model: the model.
            classes: types of module to look at; None for all.
            max_samples: keep only so many samples of each layer, the first; None: all.

        Raises:
            UsageError: `max_samples` is no number of samples, or the model runs as several copies at once
                (DataParallel).
        """
        super().__init__(model, classes)
        is_number = isinstance(max_samples, int) and not isinstance(max_samples, bool)
        if max_samples is not None and not (is_number and max_samples > 0):
            raise UsageError(
                f"max_samples: a number of samples from 1, or None for all, wanted, got {max_samples!r}"
            )
        self._max_samples = max_samples
        self.reset()

    def reset(self) -> None:
        """Forget everything collected."""
        self._parts: dict[str, dict[str, list[Tensor]]] = {}

    def on_inputs(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Inputs are not kept."""

    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Keep a copy of the output, as far as it is within the bound."""
        for x in measurable(output):
            samples = x.detach() if x.dim() else x.detach()[None]
            kinds = self._parts.setdefault(name, {})
            room = len(samples)
            if self._max_samples is not None:
                room = min(
                    room, self._max_samples - sum(len(part) for parts in kinds.values() for part in parts)
                )
            if room > 0:
                part = samples[:room].to("cpu", copy=True).contiguous()
                kinds.setdefault(_kind(samples), []).append(part)

    def require_data(self) -> None:
        """See to it that something was collected.

        Raises:
            StatsError: no module was run.
        """
        if not self._parts:
            raise StatsError(
                f"{type(self).__name__}: no module of the model was run; "
                "the model must be called while the collector is attached"
            )

    def value(self) -> dict[str, Any]:
        """The outputs by canonical module name, in the order of the forward pass.

        Returns:
            A tensor (samples, ...) for each layer, samples in the order in which they ran; where the calls of
            a module gave samples of several shapes, a dict of tensors by these: `4x8x8`.
        """
        return {name: self._joined(name) for name in self._parts}

    def save(self, fname: str | Path) -> Path:
        """Write a file for each layer into the folder `fname`, which is made where it is missing.

        `007-layer1.0.conv1.pt`, with the number of the layer in the order of the forward pass, is what
        `value()` has of it, and `torch.load(path, weights_only=True)` reads it. Each file is written whole or
        not at all; other files in the folder stay.

        Raises:
            StatsError: nothing was collected, or a file cannot be written.
        """
        folder = Path(fname)
        self.require_data()
        with reporting_failed_writes(folder):
            folder.mkdir(exist_ok=True)
        for index, name in enumerate(self._parts):
            write_tensors(folder / f"{layer_file_name(index, name)}.pt", self._joined(name))
        return folder

    def _joined(self, name: str) -> Tensor | dict[str, Tensor]:
        kinds = self._parts[name]
        for parts in kinds.values():
            if len(parts) > 1:
                parts[:] = [torch.cat(parts)]
        joined = {kind: parts[0] for kind, parts in kinds.items()}
        return joined if len(joined) > 1 else next(iter(joined.values()))


def _kind(samples: Tensor) -> str:
    """`4x8x8`: the shape of one sample."""
    return "x".join(map(str, samples.shape[1:])) or "single"
