"""Bias correction: the mean of each output channel of a quantized model made what it is in full precision.

Rounding weights and activations shifts the mean of what a layer puts out; with few weights for each channel,
as in depthwise convolutions, by much. The difference goes into the bias:

    b' = b + E[W x + b] - E[W' x' + b]

over calibration inputs and positions, before the ReLU; x' comes from layers that are corrected already.
Knows nothing about how weights are rounded.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv 1906.04721, section 4.2, and its appendix on the empirical way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.evaluation_mode import evaluating
from distiller.names import unwrap
from distiller.observation import watch_output
from distiller.quantization.refinement.capture import Batches, call_counts, each_batch, outputs_of, run
from distiller.quantization.refinement.float_twin import layer_pairs
from distiller.quantization.refinement.layer_rows import channel_dim
from distiller.quantization.refinement.quantized_layer import add_to_bias


@dataclass(frozen=True, slots=True)
class CorrectedBias:
    """What became of one layer.

    Attributes:
        name: the layer.
        correction: what was added to its bias, before it was rounded to its grid; (output channels,).
        is_new: whether the layer had no bias before.
    """

    name: str
    correction: Tensor
    is_new: bool


@dataclass(frozen=True, slots=True)
class BiasCorrectionReport:
    """What became of all layers.

    Attributes:
        layers: in the order of execution.
        skipped: why others were left as they are, by name.
    """

    layers: tuple[CorrectedBias, ...]
    skipped: Mapping[str, str]

    @property
    def new_biases(self) -> tuple[str, ...]:
        """The layers that had no bias before."""
        return tuple(layer.name for layer in self.layers if layer.is_new)


def correct_biases(
    float_model: nn.Module, quantized_model: nn.Module, batches: Batches
) -> BiasCorrectionReport:
    """Correct the biases of all quantized convolutions and linear layers, in the order of execution.

    Costs one run of the float model over all batches, and for each layer a run of the quantized one that ends
    with it: for L layers (L + 1) / 2 whole runs on average. Nothing but sums is kept in memory.

    Args:
        float_model: in full precision, batch norms folded: `float_twin`.
        quantized_model: the same, prepared by `PostTrainLinearQuantizer`; changed in place. A bias is
            rounded to the accumulator's grid where that is known; a layer without one gets one.
        batches: inputs, the same in each pass; some hundred images do.

    Returns:
        The report.

    Raises:
        QuantizationError: the models are not twins, or a layer's output is not finite.
        UsageError: there are no batches.
    """
    pairs = layer_pairs(float_model, quantized_model)
    floats = {name: pair.float_layer for name, pair in pairs.items()}
    with evaluating(float_model), evaluating(quantized_model):
        calls = call_counts(float_model, floats, next(each_batch(batches)))
        wanted = _means_of_all(unwrap(float_model), {name: floats[name] for name in calls}, batches)
        layers: list[CorrectedBias] = []
        for name, count in calls.items():
            pair, mean = pairs[name], _Mean(channel_dim(floats[name]))
            for arguments in each_batch(batches):
                for output in outputs_of(unwrap(quantized_model), pair.layer, count, arguments):
                    mean.add(output)
            correction = wanted[name].value() - mean.value()
            if not bool(correction.isfinite().all()):
                raise QuantizationError(
                    f"{name}: its outputs for the batches are not finite; check the inputs"
                )
            layers.append(CorrectedBias(name, correction, pair.layer.bias is None))
            add_to_bias(pair.wrapper, correction)
    return BiasCorrectionReport(
        tuple(layers), {name: "the model does not call it" for name in pairs if name not in calls}
    )


class _Mean:
    """The mean of a stream of outputs over everything but the channels, in float64."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, output: Tensor) -> None:
        rows = (
            output.detach().double().movedim(self._dim, 0).flatten(1)
            if output.dim() > 1
            else output.unsqueeze(1)
        )
        self._sum = self._sum + rows.sum(1)
        self._count += rows.shape[1]

    def value(self) -> Tensor:
        assert isinstance(self._sum, Tensor)
        return self._sum / self._count


def _means_of_all(model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches) -> dict[str, _Mean]:
    means = {name: _Mean(channel_dim(layer)) for name, layer in layers.items()}
    handles = [
        watch_output(layer, lambda _layer, _inputs, output, mean=means[name]: mean.add(output))
        for name, layer in layers.items()
    ]
    try:
        for arguments in each_batch(batches):
            run(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return means
