"""What a model is made of, as tables: sparsity, compute, modules, the operations of its graph.

Everything is returned as a DataFrame or a text; nothing is printed.
Knows nothing about training or data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tabulate import tabulate
from torch import Tensor, nn

from distiller.dummy_input import get_dummy_input
from distiller.errors import UsageError
from distiller.factorization.summary import low_rank_summary
from distiller.graph import Op, SummaryGraph
from distiller.graph_picture import draw_img_classifier_to_file
from distiller.macs import count_macs
from distiller.names import named_modules, named_parameters, unwrap
from distiller.scheduler import CompressionScheduler
from distiller.tensor_stats import (
    count_nonzeros,
    sparsity_2D,
    sparsity_3D,
    sparsity_ch,
    sparsity_cols,
    sparsity_rows,
)

PICTURES = {"png": "", "png_w_params": "_w_params"}
"""The summaries that are pictures of the graph, and what their files' names have behind the model's."""
SUMMARIES = ("sparsity", "compute", "model", "modules", "low-rank", *PICTURES)


def model_summary(
    model: nn.Module, what: str, dataset: str | None = None, logdir: str | Path | None = None
) -> str:
    """One of the summaries of `--summary`, as a text; of a picture, where it was written.

    Args:
        model: any model.
        what: sparsity, compute, model, modules, low-rank, png or png_w_params.
        dataset: the data set whose image shape `compute`, `low-rank` and pictures take; default the model's
            `input_shape`.
        logdir: an existing folder for `weights_sparsity.csv`, written by `sparsity`; default none. The
            folder, made when missing, for pictures, `<arch>.png` and `<arch>_w_params.png`; default the
            current one.

    Raises:
        UsageError: no such summary, or the input shape is not known.
        DistillerError: a picture cannot be made, see `draw_img_classifier_to_file`.
    """
    if what == "sparsity":
        if logdir is not None:
            weights_sparsity_levels(model).to_csv(Path(logdir) / "weights_sparsity.csv", index=False)
        return weights_sparsity_tbl_summary(model)
    if what in ("compute", "low-rank"):
        shape = getattr(unwrap(model), "input_shape", None)
        dummy_input = get_dummy_input(dataset, device=_device(model), input_shape=shape)
        if what == "low-rank":
            return _table(low_rank_summary(model, dummy_input), ("", "", "", "", ".1f"))
        return model_performance_tbl_summary(model, dummy_input)
    if what == "model":
        return str(model)
    if what == "modules":
        return _table(modules_summary(model))
    if what in PICTURES:
        arch = str(getattr(unwrap(model), "arch", type(unwrap(model)).__name__))
        file_name = re.sub(r"[^\w.-]+", "_", arch) + PICTURES[what]  # of package.module:function too
        path = Path(logdir or "") / f"{file_name}.png"
        draw_img_classifier_to_file(model, path, dataset, display_param_nodes=what == "png_w_params")
        return f"Saved the picture of the graph to: {path}"
    raise UsageError(f"model_summary: unknown summary '{what}'; there are {', '.join(SUMMARIES)}")


def weights_sparsity_summary(model: nn.Module) -> pd.DataFrame:
    """The sparsity of each weight tensor, and of all together in the last row.

    Columns: Name, Shape, NNZ (dense) and NNZ (sparse) (elements, and those that are not zero);
    in percent Cols, Rows (of linear weights), Ch, 2D, 3D (channels, kernels, filters of
    convolutions) and Fine (elements); Std, Mean, Abs-Mean of the elements.

    Args:
        model: its parameters of two and more dimensions with `weight` or `bias` in their names.
    """
    weights = _weights(model)
    nonzeros = count_nonzeros(weights.values())
    rows = [
        (
            *_structure_cells(name, weight, nonzero),
            weight.std().item() if weight.numel() > 1 else 0.0,
            weight.mean().item(),
            weight.abs().mean().item(),
        )
        for (name, weight), nonzero in zip(weights.items(), nonzeros, strict=True)
    ]
    count = sum(weight.numel() for weight in weights.values())
    rows.append((*_total_cells(count, sum(nonzeros)), 0.0, 0.0, 0.0))
    return pd.DataFrame(rows, columns=pd.Index(_SPARSITY_COLUMNS))


def weights_sparsity_tbl_summary(model: nn.Module) -> str:
    """`weights_sparsity_summary` as a text."""
    return _table(weights_sparsity_summary(model), ("", "", "", "", *[".2f"] * 6, *[".5f"] * 3))


def masks_sparsity_summary(model: nn.Module, scheduler: CompressionScheduler) -> pd.DataFrame:
    """How much the masks in force prune of each weight tensor, and of all of them together.

    Columns: Name, Shape, NNZ (dense), NNZ (sparse), the number of elements and of those that the mask keeps;
    Cols (%), Rows (%), Ch (%), 2D (%), 3D (%), Fine (%), as in `weights_sparsity_summary`. Listed are the
    parameters of two or more dimensions, of which those without a mask are kept whole, and others that
    have a mask. The last row, "Total sparsity:", is of them all.

    Args:
        model: any model.
        scheduler: whose masks they are; of this model.
    """
    masks, weights = scheduler.masks.masked(), _weights(model)
    listed = {
        name: masks[name] if name in masks else torch.ones_like(param)
        for name, param in named_parameters(model)
        if name in masks or name in weights
    }
    kept = count_nonzeros(listed.values())
    rows = [
        _structure_cells(name, mask, count) for (name, mask), count in zip(listed.items(), kept, strict=True)
    ]
    rows.append(_total_cells(sum(mask.numel() for mask in listed.values()), sum(kept)))
    return pd.DataFrame(rows, columns=pd.Index(_SPARSITY_COLUMNS[:-3]))


def masks_sparsity_tbl_summary(model: nn.Module, scheduler: CompressionScheduler) -> str:
    """`masks_sparsity_summary` as a text."""
    return _table(masks_sparsity_summary(model, scheduler), ("", "", "", "", *[".2f"] * 6))


def weights_sparsity_levels(model: nn.Module) -> pd.DataFrame:
    """What Distiller writes to `weights_sparsity.csv`, a row for each weight tensor.

    Columns: parameter, shape, volume, sparse volume (elements that are not zero), sparsity level
    (percent of elements that are zero).
    """
    weights = _weights(model)
    rows = [
        [name, str(tuple(weight.shape)), weight.numel(), nonzero, _percent(1 - nonzero / weight.numel())]
        for (name, weight), nonzero in zip(weights.items(), count_nonzeros(weights.values()), strict=True)
    ]
    return pd.DataFrame(
        rows, columns=pd.Index(["parameter", "shape", "volume", "sparse volume", "sparsity level"])
    )


def model_params_stats(model: nn.Module) -> tuple[float, int, int]:
    """(sparsity 0..1, elements, non-zero elements) of the weights that `weights_sparsity_summary` lists."""
    weights = _weights(model).values()
    count = sum(weight.numel() for weight in weights)
    nonzero = sum(count_nonzeros(weights))
    return _total_sparsity(count, nonzero), count, nonzero


def model_sparsity(model: nn.Module) -> float:
    """The fraction, 0..1, of zeros in the weights that `weights_sparsity_summary` lists."""
    return model_params_stats(model)[0]


def model_performance_summary(model: nn.Module, dummy_input: Any, batch_size: int = 1) -> pd.DataFrame:
    """The multiply-accumulate operations (MACs) of each layer for one sample.

    Columns: Name, Type, Attrs (kernel, stride, groups), IFM and OFM (shapes of the first input and
    output, batch included) and their volumes for one sample, Weights volume, MACs. One row for each
    module that has MACs, in the order in which they run; a module called several times has the
    MACs of all its calls, and its weights once. What is counted: see `distiller.macs`.

    Args:
        model: run once in evaluation mode; its mode and buffers are as before afterwards.
        dummy_input: a tensor, or a tuple or list of the model's arguments, on its device.
        batch_size: how many samples `dummy_input` holds; default 1.
    """
    rows = [
        (
            cost.name,
            type(cost.module).__name__,
            _attributes(cost.module),
            _shape(cost.input_shape),
            _volume(cost.input_shape) // batch_size,
            _shape(cost.output_shape),
            _volume(cost.output_shape) // batch_size,
            cost.weights,
            cost.macs // batch_size,
        )
        for cost in count_macs(model, dummy_input)
    ]
    return pd.DataFrame(rows, columns=pd.Index(_COMPUTE_COLUMNS))


def model_performance_tbl_summary(model: nn.Module, dummy_input: Any, batch_size: int = 1) -> str:
    """`model_performance_summary` as a text, with the total in the last line."""
    table = model_performance_summary(model, dummy_input, batch_size)
    return f"{_table(table)}\nTotal MACs: {table['MACs'].sum():,}"


def total_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """The multiply-accumulate operations (MACs) of a model for one sample.

    Args:
        model: run once in evaluation mode; its mode and buffers are as before afterwards.
        input_shape: batch included, e.g. its `input_shape`, (1, channels, height, width).
    """
    # Zeros, not random numbers: a count in the middle of a run must not move its random state.
    dummy_input = torch.zeros(tuple(input_shape), device=_device(model))
    return sum(cost.macs for cost in count_macs(model, dummy_input)) // input_shape[0]


def modules_summary(model: nn.Module) -> pd.DataFrame:
    """Columns Name and Type of the modules without children, in the model's order."""
    rows = [
        [name, type(module).__name__]
        for name, module in named_modules(model)
        if next(module.children(), None) is None
    ]
    return pd.DataFrame(rows, columns=pd.Index(["Name", "Type"]))


def connectivity_summary(graph: SummaryGraph) -> pd.DataFrame:
    """Columns Name, Type, Predecessors, Successors (lists of names) of each operation, as executed."""
    rows = [[op.name, op.type, list(op.predecessors), list(op.successors)] for op in graph.ops.values()]
    return pd.DataFrame(rows, columns=pd.Index(["Name", "Type", "Predecessors", "Successors"]))


def connectivity_summary_verbose(graph: SummaryGraph) -> pd.DataFrame:
    """What each operation reads and gives, tensor by tensor, in order of execution.

    Columns: Name, Type; Inputs, a list of `name (shape)` of the operations, model inputs and parameters whose
    tensors it reads; Outputs, a list of the shapes of its results.
    """
    rows = [
        [op.name, op.type, _inputs(op, graph), [str(shape) for shape in op.output_shapes]]
        for op in graph.ops.values()
    ]
    return pd.DataFrame(rows, columns=pd.Index(["Name", "Type", "Inputs", "Outputs"]))


def connectivity_tbl_summary(graph: SummaryGraph, verbose: bool = False) -> str:
    """`connectivity_summary`, or `connectivity_summary_verbose`, as a text with a line for each neighbour."""
    table = connectivity_summary_verbose(graph) if verbose else connectivity_summary(graph)
    return _table(table.map(lambda cell: "\n".join(cell) if isinstance(cell, list) else cell))


def attributes_summary(graph: SummaryGraph, ignore_attrs: Collection[str] = ()) -> pd.DataFrame:
    """Columns Name, Type, Attributes of each operation; the last a text with a line for each of `Op.attrs`.

    Args:
        graph: of any model.
        ignore_attrs: those that are left out.
    """
    rows = []
    for op in graph.ops.values():
        lines = [f"{key}: {_pretty(value)}" for key, value in op.attrs.items() if key not in ignore_attrs]
        rows.append([op.name, op.type, "\n".join(lines)])
    return pd.DataFrame(rows, columns=pd.Index(["Name", "Type", "Attributes"]))


def attributes_summary_tbl(graph: SummaryGraph, ignore_attrs: Collection[str] = ()) -> str:
    """`attributes_summary` as a text."""
    return _table(attributes_summary(graph, ignore_attrs))


_STRUCTURES = {
    "Cols (%)": sparsity_cols,
    "Rows (%)": sparsity_rows,
    "Ch (%)": sparsity_ch,
    "2D (%)": sparsity_2D,
    "3D (%)": sparsity_3D,
}
_SPARSITY_COLUMNS = [
    *("Name", "Shape", "NNZ (dense)", "NNZ (sparse)"),
    *_STRUCTURES,
    *("Fine (%)", "Std", "Mean", "Abs-Mean"),
]
_COMPUTE_COLUMNS = [
    *("Name", "Type", "Attrs", "IFM", "IFM volume", "OFM", "OFM volume"),
    *("Weights volume", "MACs"),
]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach()
        for name, parameter in named_parameters(model)
        if parameter.dim() >= 2 and parameter.numel() and ("weight" in name or "bias" in name)
    }


def _structure_cells(name: str, tensor: Tensor, nonzero: int) -> tuple[Any, ...]:
    """The first ten columns of a sparsity table: of a weight or a mask, not zero in `nonzero` places."""
    structures = (_percent(sparsity_of(tensor)) for sparsity_of in _STRUCTURES.values())
    fine = _percent(1 - nonzero / tensor.numel())
    return (name, str(tuple(tensor.shape)), tensor.numel(), nonzero, *structures, fine)


def _total_cells(count: int, nonzero: int) -> tuple[Any, ...]:
    """The same columns of the last row."""
    return ("Total sparsity:", "-", count, nonzero, *[0.0] * 5, _percent(_total_sparsity(count, nonzero)))


def _total_sparsity(count: int, nonzero: int) -> float:
    return 1 - nonzero / count if count else 0.0


def _percent(fraction: float) -> float:
    return 100 * fraction


def _attributes(module: nn.Module) -> str:
    """`k=(3, 3), s=(1, 1), g=1` of a convolution, else nothing."""
    if not hasattr(module, "kernel_size"):
        return ""
    return f"k={module.kernel_size}, s={module.stride}, g={module.groups}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else str(shape)


def _volume(shape: tuple[int, ...] | None) -> int:
    return 0 if shape is None else torch.Size(shape).numel()


def _inputs(op: Op, graph: SummaryGraph) -> list[str]:
    tensors = [f"{operand.source} {operand.shape}" for operand in op.operands]
    return tensors + [f"{name} {graph.param_shape(name)}" for name in op.params]


def _pretty(value: Any) -> str:
    """1,234 of an integer, 12.3 of a float."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(rows: pd.DataFrame, formats: tuple[str, ...] = ("",)) -> str:
    return tabulate(
        rows.to_numpy(dtype=object).tolist(),
        headers=list(rows.columns),
        tablefmt="psql",
        floatfmt=formats,
        disable_numparse=[0] if len(rows) else False,
    )


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
