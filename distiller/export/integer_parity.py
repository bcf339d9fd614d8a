"""Whether onnxruntime decides from an integer model's file as the simulation does in PyTorch.

The two compute the same integers but where a value lies halfway between two of them. Knows
nothing about how the file came to be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.dummy_input import forward_arguments
from distiller.errors import DistillerError, UsageError, first_line
from distiller.evaluation_mode import evaluating
from distiller.export.onnx_parity import open_session
from distiller.names import unwrap


@dataclass(frozen=True, slots=True)
class IntegerParity:
    """How an integer model in onnxruntime compares with its simulation.

    Attributes:
        samples: decisions compared: rows of the output.
        agreeing: of these, with the same largest element (the first, where several are).
        labelled: samples that had labels.
        simulation_correct: of these, those whose label the simulation chose.
        integer_correct: those whose label onnxruntime chose.
        max_difference: the largest of any element of the output.
        output_scale: width of a step of the output's grid; None if the output is not on a grid.
    """

    samples: int
    agreeing: int
    labelled: int
    simulation_correct: int
    integer_correct: int
    max_difference: float
    output_scale: float | None

    @property
    def agreement(self) -> float:
        """Share of the same decisions, 0..1."""
        return self.agreeing / self.samples

    @property
    def simulation_accuracy(self) -> float | None:
        """Top-1 of the simulation, 0..1; None without labels."""
        return self.simulation_correct / self.labelled if self.labelled else None

    @property
    def integer_accuracy(self) -> float | None:
        """Top-1 of onnxruntime, 0..1; None without labels."""
        return self.integer_correct / self.labelled if self.labelled else None

    @property
    def max_steps(self) -> float | None:
        """The largest difference in steps of the output's grid; None if it is not on one."""
        return None if self.output_scale is None else self.max_difference / self.output_scale


def compare_integer(
    model: nn.Module,
    source: str | Path | bytes,
    batches: Iterable[Any],
    *,
    threads: int | None = None,
) -> IntegerParity:
    """Run the model in evaluation mode and the file in onnxruntime on the same batches, one at a time.

    Args:
        model: with simulated quantization, that the file was written from; afterwards as before.
        source: the file that `export_int8_onnx` wrote, or what `int8_onnx_bytes` returned.
        batches: inputs, or pairs (inputs, labels); the inputs a tensor, or a tuple or list of the
            model's positional arguments, the labels integers, one for each row of the first output.
        threads: that onnxruntime uses within an operation; default its own choice.

    Raises:
        UsageError: there are no batches, or labels do not fit the output.
        DistillerError: onnxruntime cannot read or run the file.
    """
    model, where = unwrap(model), "ONNX model" if isinstance(source, bytes) else str(source)
    session = open_session(source, threads)
    names = [value.name for value in session.get_inputs()]
    samples = agreeing = labelled = simulation_correct = integer_correct = 0
    largest = 0.0
    for batch in batches:
        inputs, labels = batch if _is_pair(batch) else (batch, None)
        arguments = forward_arguments(model, inputs)
        with evaluating(model):
            outputs = pytree.tree_leaves(model(*arguments))
        simulated = next(x for x in outputs if isinstance(x, Tensor)).float().cpu().numpy()
        tensors = [x.cpu().numpy() for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
        if len(tensors) != len(names):
            raise DistillerError(
                f"{where}: takes {len(names)} inputs, got {len(tensors)}; is it of this model?"
            )
        try:
            integer = np.asarray(session.run(None, dict(zip(names, tensors, strict=True)))[0])
        except Exception as error:
            raise DistillerError(f"{where}: onnxruntime cannot run it: {first_line(error)}") from error
        if integer.shape != simulated.shape:
            raise DistillerError(
                f"{where}: onnxruntime gives an output of shape {integer.shape}, the model "
                f"{simulated.shape}; is it of this model?"
            )
        ours, theirs = (np.atleast_1d(output).argmax(-1).ravel() for output in (simulated, integer))
        samples += ours.size
        agreeing += int((ours == theirs).sum())
        largest = max(largest, _difference(simulated, integer))
        if labels is not None:
            expected = _labels(labels, ours.size)
            labelled += ours.size
            simulation_correct += int((ours == expected).sum())
            integer_correct += int((theirs == expected).sum())
    if not samples:
        raise UsageError("compare_integer: there are no samples to compare on; give at least one batch")
    return IntegerParity(
        samples, agreeing, labelled, simulation_correct, integer_correct, largest, output_scale(source)
    )


def output_scale(source: str | Path | bytes) -> float | None:
    """Width of a step of the grid that an ONNX model's first output is on; None if it is on none.

    Args:
        source: a file in QDQ form, or what is in one.
    """
    proto = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    output = proto.graph.output[0].name
    last = next((node for node in proto.graph.node if output in node.output), None)
    if last is None or last.op_type != "DequantizeLinear":
        return None
    scales = [tensor for tensor in proto.graph.initializer if tensor.name == last.input[1]]
    values = numpy_helper.to_array(scales[0]) if scales else np.zeros(0)
    return float(values) if values.ndim == 0 else None


def _is_pair(batch: Any) -> bool:
    """Whether a batch is inputs and labels: labels are integers, one for each row."""
    is_two = isinstance(batch, tuple | list) and len(batch) == 2
    return is_two and isinstance(batch[1], Tensor) and not batch[1].is_floating_point()


def _labels(labels: Tensor, count: int) -> NDArray[np.int64]:
    if labels.numel() != count:
        raise UsageError(
            f"compare_integer: there must be a label for each row of the output, got {labels.numel()} for "
            f"{count} rows"
        )
    return labels.cpu().to(torch.int64).numpy().ravel()


def _difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Of an element, the largest; infinite where one of both is no number."""
    difference = np.where(a == b, 0.0, np.abs(a.astype(np.float64) - b))
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
