"""A quantized model as an ONNX file that runs in integers: standard QDQ form, from our own grids.

    quantizer = PostTrainLinearQuantizer(model, model_activation_stats=stats)
    quantizer.prepare_model(dummy_input)
    export_int8_onnx(model, "model.int8.onnx", dummy_input)

Weights are int8, biases int32, tensors uint8; between a
DequantizeLinear and a QuantizeLinear there are ordinary operators, which a runtime computes in integers.
Widths below 8 bits lie in the same containers. `integer_parity.py` compares the file with the model.
Knows nothing about data sets.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from distiller.atomic_file import replacing
from distiller.errors import UsageError
from distiller.export.added_grids import add_missing_grids
from distiller.export.integer_view import integer_view, is_trained
from distiller.export.onnx_export import OPSET, onnx_bytes, reporting_failed_writes
from distiller.export.qdq_marks import with_marks
from distiller.export.qdq_rewrite import with_integers
from distiller.functional_modules import to_modules
from distiller.names import unwrap
from distiller.quantization.refinement.capture import Batches


@dataclass(frozen=True, slots=True)
class Int8Onnx:
    """An integer model.

    Attributes:
        content: of the file.
        simulation: a model that computes in floating point what the file does in integers. After
            post-training quantization the model itself; of a trained model a copy with the batch norms
            folded, the biases rounded as int32 have to be, to multiples of input scale times weight scale,
            and the added grids.
        added_grids: names of the tensors that batches gave a grid: of the modules that make them, or
            `<module>.input`.
    """

    content: bytes
    simulation: nn.Module
    added_grids: tuple[str, ...] = ()


def export_int8_onnx(
    model: nn.Module,
    path: str | Path,
    dummy_input: Any,
    *,
    batch_dim: int = 0,
    opset_version: int = OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    batches: Batches | None = None,
    quantize_activations: bool = False,
) -> Path:
    """Write a quantized model to an ONNX file of integers that takes any batch size.

    The file is written whole or not at all; the model stays as it was.

    Args:
        model: quantized by `PostTrainLinearQuantizer` with fixed ranges, weights and activations to 2 to
            8 bits or only weights; or trained with linear quantization to such widths.
        path: the file, in an existing folder; one that is there is replaced.
        dummy_input: as in `export_onnx`, and so are the arguments below.
        batch_dim: the dimension of every tensor in `dummy_input` that counts samples; default the first.
        opset_version: the operator set, 18 or above; default 18.
        input_names: of the file's inputs; default `input` if there is one, else the forward's own.
        output_names: of its outputs; default `output` if there is one, else torch's.
        batches: inputs of a trained model, some hundred samples. Tensors that its training left without a
            grid, as those between convolutions and sums, get one of 8 bits over the range that they have on
            these; without, runtimes compute in floating point what is next to them, and that is slow.
            After post-training quantization there are none, and the batches are not looked at.
        quantize_activations: with `batches`, also where only the weights were quantized in training.

    Returns:
        `path`.

    Raises:
        QuantizationError: no weight of the model is quantized, or it is in a way that runtimes do not
            compute: more than 8 bits, dynamic ranges, approximated scales, accumulators that saturate early.
        GraphTraceError: `torch.export` cannot trace the model, or not for any batch size.
        UsageError: the file cannot be written, the names do not fit, or there are no batches in `batches`.
        DistillerError: an operation has no counterpart in ONNX, or the weights are above 2 GB.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give the name of a file")
    with reporting_failed_writes(path), replacing(path) as file:
        found = int8_onnx(
            model,
            dummy_input,
            batch_dim=batch_dim,
            opset_version=opset_version,
            input_names=input_names,
            output_names=output_names,
            batches=batches,
            quantize_activations=quantize_activations,
        )
        file.write(found.content)
    return path


def int8_onnx_bytes(model: nn.Module, dummy_input: Any, **settings: Any) -> bytes:
    """What `export_int8_onnx` writes; takes and raises what it does."""
    return int8_onnx(model, dummy_input, **settings).content


def int8_onnx(
    model: nn.Module,
    dummy_input: Any,
    *,
    batch_dim: int = 0,
    opset_version: int = OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    batches: Batches | None = None,
    quantize_activations: bool = False,
) -> Int8Onnx:
    """What `export_int8_onnx` writes, and the simulation of it; takes and raises what it does."""
    added: tuple[str, ...] = ()
    model = unwrap(model)
    if batches is None or not is_trained(model):
        view = integer_view(model, dummy_input)
    else:
        with_modules = copy.deepcopy(model)
        to_modules(with_modules, dummy_input)  # only modules can have grids
        view = integer_view(with_modules, dummy_input)
        added = add_missing_grids(view, batches, dummy_input, quantize_activations)
    simulation = copy.deepcopy(view.model) if view.is_trained else None
    marked, marks = with_marks(view)
    content = onnx_bytes(
        marked,
        dummy_input,
        batch_dim=batch_dim,
        opset_version=opset_version,
        input_names=input_names,
        output_names=output_names,
    )
    proto, biases = with_integers(onnx.load_from_string(content), marks)
    if simulation is not None:
        for name, bias in biases.items():
            parameter: nn.Parameter = simulation.get_submodule(name).bias  # type: ignore[assignment]
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(bias))
    return Int8Onnx(proto.SerializeToString(), model if simulation is None else simulation, added)


def check_integers(model: nn.Module, dummy_input: Any) -> None:
    """See to it that a quantized model has integers, which `int8_onnx` can write; the model stays as it was.

    Args:
        model: as in `export_int8_onnx`, and so is `dummy_input`.

    Raises:
        QuantizationError: it has none, as `export_int8_onnx` tells.
        GraphTraceError: it cannot be traced.
    """
    with_marks(integer_view(unwrap(model), dummy_input))
