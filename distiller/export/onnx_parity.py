"""Whether onnxruntime computes from a file what PyTorch computes from the model.

Knows nothing about how the file came to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.dummy_input import forward_arguments
from distiller.errors import DistillerError, first_line
from distiller.evaluation_mode import evaluating
from distiller.export.example_batches import batch_of
from distiller.names import unwrap

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

TOLERANCE = 1e-4
"""The largest difference between onnxruntime and PyTorch, as a share of the output's largest element."""


@dataclass(frozen=True, slots=True)
class OnnxParity:
    """How far onnxruntime's results are from PyTorch's.

    Attributes:
        batch_sizes: that were compared.
        max_difference: the largest of any element of any output.
        relative_difference: the same as a share of the largest element of its output.
        argmax_agreement: share of the first output's rows (of samples, for a classifier) with the same
            largest element, 0..1.
    """

    batch_sizes: tuple[int, ...]
    max_difference: float
    relative_difference: float
    argmax_agreement: float


def check_onnx(
    source: str | Path | bytes,
    model: nn.Module,
    inputs: Any,
    *,
    batch_sizes: Sequence[int] = (1, 3),
    batch_dim: int = 0,
    threads: int | None = None,
) -> OnnxParity:
    """Compare onnxruntime on the CPU with the model itself in evaluation mode.

    Args:
        source: the file that `export_onnx` wrote, or what `onnx_bytes` returned.
        model: what it was written from; afterwards as before.
        inputs: as the dummy input of `export_onnx`. Batches are made of its samples, in turn; those that
            are taken again have their elements shifted, so that no two samples are the same.
        batch_sizes: how many samples are in each batch; default one, and three.
        batch_dim: the dimension that counts samples.
        threads: that onnxruntime uses within an operation; default its own choice.

    Raises:
        DistillerError: they differ by more than `TOLERANCE`, or the file cannot be run.
    """
    model, where = unwrap(model), _name(source)
    session = open_session(source, threads)
    arguments = forward_arguments(model, inputs)
    absolute = relative = 0.0
    agreeing: list[Tensor] = []
    for size in batch_sizes:
        batch = batch_of(arguments, size, batch_dim)
        with evaluating(model, is_decomposed=True):
            expected = [x.cpu() for x in pytree.tree_leaves(model(*batch)) if isinstance(x, Tensor)]
        got = _run(session, batch, where)
        if [x.shape for x in got] != [x.shape for x in expected]:
            ours, theirs = ([tuple(x.shape) for x in found] for found in (expected, got))
            raise DistillerError(f"{where}: onnxruntime gives outputs of shapes {theirs}, the model {ours}")
        for a, b in zip(got, expected, strict=True):
            difference, scale = _difference(a, b)
            absolute = max(absolute, difference)
            relative = max(relative, _ratio(difference, scale))
        first, reference = (torch.atleast_1d(outputs[0]) for outputs in (got, expected))
        agreeing.append((first.argmax(-1) == reference.argmax(-1)).flatten())
    agreement = torch.cat(agreeing).float().mean().item()
    parity = OnnxParity(tuple(batch_sizes), absolute, relative, agreement)
    if relative > TOLERANCE:
        raise DistillerError(
            f"{where}: onnxruntime differs from the model by {absolute:.3g}, {relative:.3g} of the largest "
            f"output (allowed: {TOLERANCE:g}), on batches of {' and '.join(map(str, batch_sizes))}"
        )
    return parity


def open_session(source: str | Path | bytes, threads: int | None = None) -> InferenceSession:
    """A model opened by onnxruntime, for the CPU.

    Args:
        source: an ONNX file, or what is in one.
        threads: used within an operation; default onnxruntime's own choice.

    Raises:
        DistillerError: onnxruntime cannot read it.
    """
    import onnxruntime  # takes a third of a second, and training does not need it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are also raised
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise DistillerError(f"{_name(source)}: onnxruntime cannot read it: {first_line(error)}") from error


def _name(source: str | Path | bytes) -> str:
    return "ONNX model" if isinstance(source, bytes) else str(source)


def _run(session: InferenceSession, batch: tuple[Any, ...], where: str) -> list[Tensor]:
    tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
    inputs = session.get_inputs()
    if len(inputs) != len(tensors):
        raise DistillerError(f"{where}: takes {len(inputs)} inputs, got {len(tensors)}; is it of this model?")
    try:
        found = session.run(
            None, {x.name: tensor.cpu().numpy() for x, tensor in zip(inputs, tensors, strict=True)}
        )
    except Exception as error:
        raise DistillerError(f"{where}: onnxruntime cannot run it: {first_line(error)}") from error
    return [torch.as_tensor(output) for output in found]


def _ratio(difference: float, scale: float) -> float:
    return 0.0 if difference == 0 else difference / scale if scale else math.inf


def _difference(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference of an element (inf where one of both is no number), and the largest element."""
    if expected.numel() == 0:
        return 0.0, 0.0
    got, expected = got.double(), expected.double()
    difference = torch.where(got == expected, 0.0, (got - expected).abs())
    largest = torch.where(expected.isfinite(), expected, 0.0).abs().max().item()
    return difference.nan_to_num(math.inf, math.inf).max().item(), largest
