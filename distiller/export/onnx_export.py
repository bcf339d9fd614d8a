"""A model as an ONNX file that takes any batch size; `onnx_parity.py` compares it with the model.

Knows nothing about data, and nothing about integer arithmetic: quantized models are refused.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from distiller.atomic_file import replacing
from distiller.dummy_input import forward_arguments, get_dummy_input
from distiller.errors import DistillerError, GraphTraceError, QuantizationError, UsageError, first_line
from distiller.evaluation_mode import evaluating
from distiller.export.example_batches import batch_of
from distiller.names import unwrap
from distiller.quantization.stored import stored_params

if TYPE_CHECKING:
    import onnx

OPSET = 18
"""The operator set that PyTorch's exporter is written in: any other is a conversion after the export."""
_MAX_BYTES = 2**31 - 1
_TRACED_BATCH = 2  # torch.export takes a size of 1 for a constant
_MODULES_NOTE = "pkg.torch.onnx.name_scopes"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    dummy_input: Any,
    *,
    batch_dim: int = 0,
    opset_version: int = OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Path:
    """Write a model in evaluation mode, weights included, to an ONNX file that takes any batch size.

    The file is written whole or not at all. Modes and state of the model stay as they were.

    Args:
        model: any model; unwrapped first.
        path: the file, in an existing folder; one that is there is replaced.
        dummy_input: a tensor, or a tuple or list of the model's positional arguments (nested as they
            are), on any device; of any batch size, which is not the file's.
        batch_dim: the dimension of every tensor in `dummy_input` that counts samples; default the first.
        opset_version: the operator set, 18 or above; default 18.
        input_names: of the file's inputs; default `input` if there is one, else the forward's own.
        output_names: of its outputs; default `output` if there is one, else torch's.

    Returns:
        `path`.

    Raises:
        GraphTraceError: `torch.export` cannot trace the model, or not for any batch size.
        QuantizationError: the model's quantization is simulated.
        UsageError: the file cannot be written, or the names do not fit.
        DistillerError: an operation has no counterpart in ONNX, or the weights are above 2 GB.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give the name of a file")
    with reporting_failed_writes(path), replacing(path) as file:
        file.write(
            onnx_bytes(
                model,
                dummy_input,
                batch_dim=batch_dim,
                opset_version=opset_version,
                input_names=input_names,
                output_names=output_names,
            )
        )
    return path


def onnx_bytes(
    model: nn.Module,
    dummy_input: Any,
    *,
    batch_dim: int = 0,
    opset_version: int = OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> bytes:
    """What `export_onnx` writes; takes and raises what it does."""
    model = unwrap(model)
    _refuse_quantized(model)
    _refuse_large(model)
    if opset_version < OPSET:
        raise UsageError(f"export_onnx: opset_version must be at least {OPSET}, got {opset_version}")
    arguments = batch_of(forward_arguments(model, dummy_input), _TRACED_BATCH, batch_dim)
    with evaluating(model, is_decomposed=True), _silence():
        program = _traced(model, arguments, batch_dim)
        proto = _translated(model, program, opset_version, input_names, output_names)
        written = next(opset.version for opset in proto.opset_import if not opset.domain)
        if written != opset_version:
            raise UsageError(
                f"export_onnx: this PyTorch cannot write opset_version {opset_version}, only {written}"
            )
        _name_batch(proto, batch_dim)
        _drop_notes(proto)
        try:
            return proto.SerializeToString()
        except Exception as error:
            raise DistillerError(_cannot(model, f"{type(error).__name__}: {first_line(error)}")) from error


def export_img_classifier_to_onnx(
    model: nn.Module, onnx_fname: str | Path, dataset: str | None, add_softmax: bool = True, **kwargs: Any
) -> Path:
    """Write an image classifier to an ONNX file, as `export_onnx` does.

    Args:
        model: answers images with logits, (batch, classes).
        onnx_fname: the file.
        dataset: the data set whose image shape it takes; None: the model's `input_shape`.
        add_softmax: whether the file's output are probabilities in place of logits.
        **kwargs: keywords of `export_onnx`, named as those of `torch.onnx.export`.

    Raises:
        UsageError: the input shape is not known.
        UnknownNameError: no such data set.
        DistillerError: as `export_onnx`.
    """
    shape = None if dataset is not None else getattr(unwrap(model), "input_shape", None)
    dummy_input = get_dummy_input(dataset, input_shape=shape)
    with with_softmax(model) if add_softmax else contextlib.nullcontext():
        return export_onnx(model, onnx_fname, dummy_input, **kwargs)


@contextmanager
def with_softmax(model: nn.Module) -> Iterator[None]:
    """Within the block the model's output are probabilities: the softmax over its last dimension.

    Of a list of outputs, as of early exits, the softmax of each.
    """

    def softmax(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return [x.softmax(-1) for x in output] if isinstance(output, list) else output.softmax(-1)

    handle = unwrap(model).register_forward_hook(softmax)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def reporting_failed_writes(path: Path) -> Iterator[None]:
    """An OSError within becomes a UsageError that names `path`; but a full disk stays one."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:  # the program tells of these itself
            raise
        folder = path.parent
        reason = error.strerror or error
        remedy = "give another folder" if folder.is_dir() else f"make the folder {folder} first"
        raise UsageError(f"{path}: cannot be written, {reason}; {remedy}") from error


def _traced(model: nn.Module, arguments: tuple[Any, ...], batch_dim: int) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    shapes = pytree.tree_map(
        lambda x: {batch_dim: batch} if isinstance(x, Tensor) and x.dim() > batch_dim else None, arguments
    )
    try:
        return torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        where = f"{type(model).__name__}: torch.export cannot trace it for ONNX: "
        if isinstance(error, GuardOnDataDependentSymNode):
            what, remedy = "what it does depends on the values of a tensor", "use torch.where or torch.cond"
        elif "onstraints violated" in str(error):
            what = f"its forward does not take every batch size, it was traced with {_TRACED_BATCH}"
            remedy = "take the size from the input's shape, or write -1 for it"
        else:
            what, remedy = f"{type(error).__name__}: {first_line(error)}", "change that in its forward"
        raise GraphTraceError(f"{where}{what}{_place(error)}; {remedy}") from error


def _translated(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    opset: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> onnx.ModelProto:
    signature = program.graph_signature
    names = {
        kind: _names(kind, given, len(values))
        for kind, given, values in (
            ("input", input_names, signature.user_inputs),
            ("output", output_names, signature.user_outputs),
        )
    }
    try:
        translated = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=names["input"],
            output_names=names["output"],
        )
        assert translated is not None
        return translated.model_proto
    except ImportError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(cause))
        what = (
            f"ONNX has no operation for {missing[1]}; replace it in the model's forward"
            if missing
            else f"{type(cause).__name__}: {first_line(cause)}"
        )
        raise DistillerError(_cannot(model, what)) from error


def _names(kind: str, given: Sequence[str] | None, count: int) -> list[str] | None:
    if given is None:
        return [kind] if count == 1 else None
    if len(given) != count or len(set(given)) != count:
        raise UsageError(
            f"export_onnx: {kind}_names must be {count} different names, one for each {kind}, "
            f"got {', '.join(given) or 'none'}"
        )
    return list(given)


def _name_batch(proto: onnx.ModelProto, batch_dim: int) -> None:
    """Call the dynamic dimension `batch` throughout, in place of torch's own symbol."""
    graph = proto.graph
    inputs = [value.type.tensor_type.shape.dim for value in graph.input]
    symbols = {dims[batch_dim].dim_param for dims in inputs if len(dims) > batch_dim} - {""}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            for symbol in symbols if dim.dim_param else ():
                dim.dim_param = re.sub(rf"\b{symbol}\b", "batch", dim.dim_param)


def _drop_notes(proto: onnx.ModelProto) -> None:
    """Leave out the exporter's notes, among them paths and lines of source code; not each node's module."""
    graph = proto.graph
    for owner in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        kept = [(note.key, note.value) for note in owner.metadata_props if note.key == _MODULES_NOTE]
        del owner.metadata_props[:]
        for key, value in kept:
            owner.metadata_props.add(key=key, value=value)


def _refuse_quantized(model: nn.Module) -> None:
    if stored_params(model).bits:
        raise QuantizationError(
            f"{type(model).__name__}: cannot be exported to ONNX in floating point, where its quantization "
            "is only simulated; write its integers (export_int8_onnx, --export-int8), or export the model "
            "from before quantization"
        )


def _refuse_large(model: nn.Module) -> None:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > _MAX_BYTES:
        raise DistillerError(
            _cannot(model, f"one ONNX file holds at most {_MAX_BYTES:,} bytes, its weights are {size:,}")
        )


def _cannot(model: nn.Module, reason: str) -> str:
    return f"{type(model).__name__}: cannot be exported to ONNX: {reason}"


def _place(error: BaseException) -> str:
    """Where in the code of a model an error came up; nothing when no forward was running."""
    library = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.name == "forward" and not frame.filename.startswith(library)
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


@contextmanager
def _silence() -> Iterator[None]:
    """What torch prints, warns and logs of an export does not help the model's user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
