"""Which layers a quantized model loses by: ranges, clipping, noise, error and accuracy of each layer, alone.

    report = quantization_report(float_twin(model, dummy_input), quantized_model, batches, eval_fn)
    report.worst(3)
    report.to_csv("quantization.csv"); report.to_png("quantization.png")

Each layer is quantized by itself, in the model in floating point: what reaches it is exact, and what it does
to the model's output is of no other layer. Knows nothing about how layers are quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.atomic_file import write_whole
from distiller.errors import QuantizationError, UsageError, require
from distiller.evaluation_mode import evaluating
from distiller.names import unwrap
from distiller.observation import watch_output
from distiller.quantization.refinement.capture import Batches, call_counts, each_batch, run
from distiller.quantization.report_host import FloatHost
from distiller.quantization.report_layers import (
    QuantizedLayer,
    bits_of,
    levels_of,
    read_layers,
    with_read_ranges,
)
from distiller.quantization.report_plot import encoded, report_figure
from distiller.quantization.report_rows import LayerRow, RunningFigures, TensorFigures

__all__ = ["LayerRow", "QuantizationReport", "Score", "ScoreFn", "TensorFigures", "quantization_report"]

_WHERE = "quantization_report"


class Score(NamedTuple):
    """What a model achieves."""

    top1: float  # percent
    loss: float


ScoreFn: TypeAlias = Callable[[nn.Module], tuple[float, float]]
"""Runs a model on the same data each time and returns (top-1 accuracy in percent, loss)."""


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """The quantized layers of a model.

    Attributes:
        rows: one for each layer, in the order in which the model calls them; those it does not call last.
        error: mean squared difference of the model's outputs with all layers quantized. The layers' errors
            add up to something else: they cancel or amplify each other.
        float_score: of the model in floating point; None where it was not measured.
        quantized_score: of the model with all layers quantized; None alike.
    """

    rows: tuple[LayerRow, ...]
    error: float
    float_score: Score | None = None
    quantized_score: Score | None = None

    def worst(self, n: int = 5) -> tuple[LayerRow, ...]:
        """The `n` layers with the largest errors at the model's output, the largest first.

        Raises:
            UsageError: `n` is no number from 1.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise UsageError(f"worst: n: must be a number of layers from 1, got {n!r}")
        return tuple(sorted(self.rows, key=lambda row: -row.error)[:n])

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer, what is not known is missing.

        Columns: `layer`, `kind`; the fields of `TensorFigures` behind `weight_`, `input_` and `output_`;
        `error`, `error_share`; with scores `top1`, `loss`, and against the model in floating point
        `top1_drop`, `loss_rise`.
        """
        frame = pd.DataFrame([self._as_columns(row) for row in self.rows])
        numbers = frame.columns.difference(["layer", "kind"])
        kinds = {column: "Int64" if column.endswith("_bits") else "float64" for column in numbers}
        return frame.astype(kinds)

    def to_csv(self, path: str | Path) -> Path:
        """Write `to_frame`, whole or not at all; infinite ratios are `inf`, what is not known is empty.

        Returns:
            The path.

        Raises:
            QuantizationError: the file cannot be written.
        """
        return _written(path, self.to_frame().to_csv(index=False).encode())

    def to_png(self, path: str | Path, title: str = "Each layer quantized by itself") -> Path:
        """Draw the layers with their errors, ratios, clipped shares and drops of accuracy.

        Args:
            path: `.png` or `.svg`; written whole or not at all.
            title: the title.

        Returns:
            The path.

        Raises:
            UsageError: another suffix.
            QuantizationError: the file cannot be written.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in (".png", ".svg"):
            raise UsageError(
                f"quantization report: the picture must end in .png or .svg, got '{Path(path).name}'"
            )
        return _written(path, encoded(report_figure(self.rows, self.float_score, title), suffix))

    def _as_columns(self, row: LayerRow) -> dict[str, Any]:
        columns: dict[str, Any] = {"layer": row.name, "kind": row.kind}
        for place in ("weight", "input", "output"):
            columns |= {f"{place}_{key}": value for key, value in asdict(getattr(row, place)).items()}
        columns |= {"error": row.error, "error_share": row.error_share}
        if self.float_score is None or row.top1 is None or row.loss is None:
            return columns
        drop, rise = self.float_score.top1 - row.top1, row.loss - self.float_score.loss
        return columns | {"top1": row.top1, "loss": row.loss, "top1_drop": drop, "loss_rise": rise}


def quantization_report(
    float_model: nn.Module,
    model: nn.Module,
    batches: Batches,
    eval_fn: ScoreFn | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> QuantizationReport:
    """Measure what each quantized layer costs, by quantizing it alone.

    A quantizer of activations counts for the layer whose output it rounds, one of an input for the layer that
    calls it. The share of the error is

        share_l = e_l / sum_k e_k,    e_l = mean (y_l - y)^2

    over all outputs: y of the model in floating point, y_l with only layer l quantized. It says by which
    layers the model loses most; it divides nothing up, for the errors of several layers do not add.

    With L layers, each batch is run L + 2 times (in floating point, all quantized, and for each layer), and
    `eval_fn` is called L + 2 times. In memory are a copy of the model and what it needs for one batch.

    Args:
        float_model: the model in floating point under the same names: `float_twin`, or
            `QuantizedWithData.float_model`. Of a model that was trained with quantization it is the
            architecture without it: its parameters do not matter, the trained ones are used, not rounded; nor
            are activations there, only clipped where the model was trained with ends that are set or learned
            (DoReFa-Net, WRPN, PACT). How good it is in that form, `float_score` tells.
        model: prepared by `PostTrainLinearQuantizer`, or by a training quantizer and trained. Both models
            stay as they are.
        batches: inputs, the same in each pass; some hundred images do.
        eval_fn: returns (top-1 accuracy in percent, loss) of a model, which is in evaluation mode; None:
            neither is measured.
        progress: is told of what was done, in a line of text.

    Returns:
        The report.

    Raises:
        QuantizationError: nothing is quantized, the models do not fit, outputs are not finite, or `eval_fn`
            returns something else.
        UsageError: a wrong kind of argument, or there are no batches.
        GraphTraceError: a model with fixed ranges of activations cannot be traced.
    """
    require(float_model, nn.Module, f"{_WHERE}: float_model", "a torch.nn.Module")
    require(model, nn.Module, f"{_WHERE}: model", "a torch.nn.Module")
    if eval_fn is not None and not callable(eval_fn):
        raise UsageError(
            f"{_WHERE}: eval_fn: must be a function of the model, or None, got {type(eval_fn).__name__}"
        )
    tell = progress or (lambda _text: None)
    model = unwrap(model)
    with evaluating(model):
        host = FloatHost(float_model, model)
        layers = read_layers(host.modules, model)
        with evaluating(host.model):
            layers = with_read_ranges(layers, host.model, next(each_batch(batches)))
            called, idle = _in_order_of_calls(host, layers, batches)
            measured = _Measured(host, model, called)
            for index, arguments in enumerate(each_batch(batches)):
                measured.add(arguments, index)
                tell(f"quantization report: batch {index + 1}, {len(called)} layers one by one")
            scores = _Scores(eval_fn, len(called) + 2, tell)
            in_float, together = scores.of(host.model, "floating point"), scores.of(model, "all quantized")
            alone: list[Score | None] = []
            for layer in called:
                with host.with_quantized(layer):
                    alone.append(scores.of(host.model, layer.name))
    rows = measured.rows(alone) + [_idle_row(layer, in_float) for layer in idle]
    return QuantizationReport(tuple(rows), measured.error, in_float, together)


class _Measured:
    """The errors and figures of layers, over batches."""

    def __init__(self, host: FloatHost, model: nn.Module, layers: Sequence[QuantizedLayer]) -> None:
        self._host = host
        self._model = model
        self._layers = layers
        self._inputs = [RunningFigures() for _ in layers]
        self._outputs = [RunningFigures() for _ in layers]
        self._errors = [0.0] * len(layers)
        self._error = 0.0
        self._values = 0

    @property
    def error(self) -> float:
        """Mean squared difference with all layers quantized."""
        return self._error / self._values

    def add(self, arguments: tuple[Any, ...], index: int) -> None:
        """Run the model on a batch in floating point, quantized, and with each layer quantized."""
        clean = _output_of(self._host.model, arguments).double()
        if not bool(clean.isfinite().all()):
            raise QuantizationError(
                f"batches[{index}]: the model in floating point returns values that are not finite; "
                "check the inputs"
            )
        self._values += clean.numel()
        self._error += self._squared(self._model, arguments, clean, "the quantized model")
        for number, layer in enumerate(self._layers):
            with (
                self._host.with_quantized(layer),
                _observed(self._host, layer, self._inputs[number], self._outputs[number]),
            ):
                what = f"the model with only '{layer.name}' quantized"
                self._errors[number] += self._squared(self._host.model, arguments, clean, what)

    def rows(self, scores: Sequence[Score | None]) -> list[LayerRow]:
        """One for each layer."""
        errors = [error / self._values for error in self._errors]
        whole = sum(errors)
        return [
            LayerRow(
                layer.name,
                layer.kind,
                layer.weight,
                self._inputs[number].result(bits_of(layer.input_quantizers)),
                self._outputs[number].result(bits_of([layer.output_quantizer])),
                errors[number],
                errors[number] / whole if whole else 0.0,
                *(score or (None, None)),
            )
            for number, (layer, score) in enumerate(zip(self._layers, scores, strict=True))
        ]

    def _squared(self, model: nn.Module, arguments: tuple[Any, ...], clean: Tensor, what: str) -> float:
        """The sum of the squared differences of the outputs."""
        output = _output_of(model, arguments)
        if output.shape != clean.shape:
            raise QuantizationError(
                f"{_WHERE}: {what} returns {tuple(output.shape)}, the one in floating point "
                f"{tuple(clean.shape)}; give the model in floating point that was quantized"
            )
        found = float((output - clean).square().sum())
        if not math.isfinite(found):
            raise QuantizationError(f"{_WHERE}: {what} returns values that are not finite")
        return found


class _Scores:
    """What `eval_fn` says of one model after the other."""

    def __init__(self, eval_fn: ScoreFn | None, count: int, tell: Callable[[str], None]) -> None:
        self._eval_fn = eval_fn
        self._count = count
        self._tell = tell
        self._done = 0

    def of(self, model: nn.Module, what: str) -> Score | None:
        """Its score; None without an `eval_fn`."""
        if self._eval_fn is None:
            return None
        value: Any = self._eval_fn(model)
        try:
            score = Score(*map(float, value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise QuantizationError(
                f"{_WHERE}: eval_fn: must return two numbers, (top-1 in percent, loss), got {value!r}"
            ) from error
        self._done += 1
        self._tell(
            f"quantization report [{self._done}/{self._count}] {what}: "
            f"top-1 {score.top1:.2f} %, loss {score.loss:.4g}"
        )
        return score


@contextmanager
def _observed(
    host: FloatHost, layer: QuantizedLayer, inputs: RunningFigures, outputs: RunningFigures
) -> Iterator[None]:
    """Within the block, take in what a quantized layer in the host makes, and what it would make in float."""
    floats = [host.modules[name] for name in layer.parts]
    in_float: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # What is run may write to its inputs.
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        values = floats[0](*args, **kwargs)
        for behind in floats[1:]:
            values = behind(values)
        values = _first_tensor(values)
        in_float.append(values.clamp(*layer.told_apart))

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        values = _first_tensor(output).clamp(*layer.told_apart)
        outputs.add(in_float.pop(), values, levels_of(layer.output_quantizer))

    def of_input(quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs.add(args[0], output, levels_of(quantizer))

    handles = [watch_output(quantizer, of_input) for quantizer in layer.input_quantizers]
    if layer.parts:
        first, *_, last = [*layer.parts.values()] * 2
        handles.append(first.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        handles.append(last.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_order_of_calls(
    host: FloatHost, layers: Sequence[QuantizedLayer], batches: Batches
) -> tuple[list[QuantizedLayer], list[QuantizedLayer]]:
    """The layers that the model calls, in that order, and the others."""
    by_name = {layer.name: layer for layer in layers}
    of_input = [layer for layer in layers if not layer.parts]
    modules = {name: host.residents[name] for name, layer in by_name.items() if layer.parts}
    calls = call_counts(host.model, modules, next(each_batch(batches)))
    called = of_input + [by_name[name] for name in calls]
    return called, [layer for layer in layers if layer.parts and layer.name not in calls]


def _idle_row(layer: QuantizedLayer, score: Score | None) -> LayerRow:
    """The row of a layer that the model does not call."""
    inputs = TensorFigures(bits_of(layer.input_quantizers))
    output = TensorFigures(bits_of([layer.output_quantizer]))
    return LayerRow(layer.name, layer.kind, layer.weight, inputs, output, 0.0, 0.0, *(score or (None, None)))


def _output_of(model: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    return _first_tensor(run(model, arguments))


def _first_tensor(output: Any) -> Tensor:
    """An output, or the first tensor of several."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise QuantizationError(f"{_WHERE}: the model returns no tensor, got {type(output).__name__}")


def _written(path: str | Path, data: bytes) -> Path:
    path = Path(path)
    try:
        write_whole(path, data)
    except OSError as error:
        raise QuantizationError(f"{path}: cannot be written, {error.strerror or error}") from error
    return path
