"""Pictures of a model's graph, drawn by Graphviz: its operations, coloured by kind, and what flows between.

A node says the operation's name, its kind, the shape of its result, and its MACs where it has some.
Pictures are made by the program `dot`; the text that describes one to it needs no program. A PNG higher than
32,767 pixels, of about 450 operations, is made smaller by it; an SVG is not.
Knows nothing about how a graph is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import graphviz
from torch import nn

from distiller.atomic_file import write_whole
from distiller.dummy_input import get_dummy_input
from distiller.errors import DistillerError, UsageError
from distiller.graph import Op, SummaryGraph
from distiller.names import unwrap

Styles = Mapping[str, Mapping[str, str]]

_MOST_PASSED = 10_000
"""How many operations all arrows together may pass by; dot takes minutes for more."""
_FAR = 30
"""Where they would be more: how many operations a single arrow may pass by."""
_RANKDIRS = ("TB", "BT", "LR", "RL")
_FORMATS = {".png": "png", ".svg": "svg"}
_KINDS = {
    "#aec7e8": "Conv ConvTranspose",
    "#ffbb78": "Gemm MatMul Einsum Bilinear Attention LSTM GRU RnnTanh RnnRelu",
    "#c5e0b4": "BatchNormalization LayerNormalization GroupNormalization InstanceNormalization "
    "LocalResponseNorm",
    "#f4b6b6": "Relu Clip Sigmoid Tanh Softmax LogSoftmax Silu Gelu LeakyRelu Elu PRelu Hardswish "
    "Hardsigmoid",
    "#d9c8ec": "MaxPool AveragePool ReduceMean ReduceSum",
    "#fff2a8": "Add Sub Mul Div Concat Stack",
    "#e3e3e3": "Flatten Reshape Transpose Slice Split Gather Squeeze Unsqueeze Expand Pad Cast Roll",
}
_COLOURS = {kind: colour for colour, kinds in _KINDS.items() for kind in kinds.split()}


def create_dot_graph(
    graph: SummaryGraph,
    display_param_nodes: bool = False,
    rankdir: str = "TB",
    styles: Styles | None = None,
) -> graphviz.Digraph:
    """The description of a picture in Graphviz's language; `.source` is its text.

    Where the arrows together would pass by more than ten thousand operations, as the concatenations of a
    DenseNet do, those from far are not drawn: a note beside the reader names the operations it reads.

    (Distiller's `create_pydot_graph`, for the package `graphviz`.)

    Args:
        graph: what is drawn.
        display_param_nodes: whether the parameters are drawn too, each with its shape, where they are read.
        rankdir: the way the graph runs: TB (downwards), BT, LR (to the right) or RL.
        styles: Graphviz's attributes of single nodes by the operation's name, as
            {"conv1": {"fillcolor": "red"}}; default none.

    Raises:
        UsageError: there is no such `rankdir`.
        UnknownNameError: `styles` names an operation that is not in the graph.
    """
    if rankdir not in _RANKDIRS:
        raise UsageError(f"graph picture: rankdir must be one of {', '.join(_RANKDIRS)}, got '{rankdir}'")
    styled = {graph.find_op(name).name: dict(style) for name, style in (styles or {}).items()}
    dot = graphviz.Digraph(
        graph_attr={"rankdir": rankdir, "nodesep": "0.25", "ranksep": "0.25"},
        node_attr={"fontname": "Helvetica", "fontsize": "11", "margin": "0.12,0.05", "shape": "box"},
        edge_attr={"arrowsize": "0.6", "color": "#555555"},
    )
    nodes = {
        name: f"op{number}" for number, name in enumerate(graph.ops)
    }  # names may hold what dot takes apart
    far = _far_predecessors(graph)
    for number, given in enumerate(graph.inputs.values()):
        label = _label(given.name, "input", _by(given.shape))
        dot.node(f"in{number}", label, shape="ellipse", style="filled", fillcolor="white", tooltip=given.name)
        dot.edges((f"in{number}", nodes[reader]) for reader in given.readers)
    for op in graph.ops.values():
        style = {"style": "filled,rounded", "fillcolor": _COLOURS.get(op.type, "white"), "tooltip": op.name}
        if op.is_output:
            style["penwidth"] = "2"
        dot.node(nodes[op.name], _label(op.name, *_lines(op)), **style | styled.get(op.name, {}))
        dot.edges((nodes[source], nodes[op.name]) for source in op.predecessors if source not in far[op.name])
        if far[op.name]:
            _add_note(dot, f"far{nodes[op.name]}", _label("from far", *far[op.name]), nodes[op.name])
    if display_param_nodes:
        for number, param in enumerate(graph.params.values()):
            readers = [nodes[reader] for reader in param.readers]
            _add_note(dot, f"param{number}", _label(param.name, _by(param.shape)), *readers)
    return dot


def create_png(
    graph: SummaryGraph,
    display_param_nodes: bool = False,
    rankdir: str = "TB",
    styles: Styles | None = None,
) -> bytes:
    """The picture as the bytes of a PNG; takes and raises as `create_dot_graph`.

    Raises:
        DistillerError: Graphviz's program `dot` is not there, or fails.
    """
    return _render(create_dot_graph(graph, display_param_nodes, rankdir, styles), "png")


def draw_model_to_file(
    graph: SummaryGraph,
    png_fname: str | Path,
    display_param_nodes: bool = False,
    rankdir: str = "TB",
    styles: Styles | None = None,
) -> Path:
    """Draw a graph into a file; takes and raises as `create_png`, and more.

    Args:
        graph: what is drawn.
        png_fname: the picture, `.png` or `.svg`; written whole or not at all. Its folder is made when
            missing.
        display_param_nodes: as in `create_dot_graph`.
        rankdir: as in `create_dot_graph`.
        styles: as in `create_dot_graph`.

    Returns:
        The path of the picture.

    Raises:
        UsageError: the file is no picture by its suffix, or cannot be written.
    """
    path = Path(png_fname)
    picture_format = _format(path)
    picture = _render(create_dot_graph(graph, display_param_nodes, rankdir, styles), picture_format)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, picture)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written, {error.strerror or error}") from error
    return path


def draw_img_classifier_to_file(
    model: nn.Module,
    png_fname: str | Path,
    dataset: str | None = None,
    display_param_nodes: bool = False,
    rankdir: str = "TB",
    styles: Styles | None = None,
    input_shape: Any = None,
) -> Path:
    """Draw the graph of an image classifier into a file; raises as `draw_model_to_file`, and more.

    Args:
        model: the classifier, or a wrapper around it; it stays as it is.
        png_fname: the picture, `.png` or `.svg`; written whole or not at all. Its folder is made when
            missing.
        dataset: the data set whose image shape is drawn; default: see `input_shape`.
        display_param_nodes: as in `create_dot_graph`.
        rankdir: as in `create_dot_graph`.
        styles: as in `create_dot_graph`.
        input_shape: shape of the input, batch included; default the model's `input_shape`. Not looked
            at when `dataset` is given.

    Returns:
        The path of the picture.

    Raises:
        UsageError: the shape of the input is not known.
        GraphTraceError: `torch.export` cannot trace the model.
    """
    _format(Path(png_fname))
    shape = input_shape or getattr(unwrap(model), "input_shape", None)
    graph = SummaryGraph(model, get_dummy_input(dataset, input_shape=shape), purpose="a picture of its graph")
    return draw_model_to_file(graph, png_fname, display_param_nodes, rankdir, styles)


def _far_predecessors(graph: SummaryGraph) -> dict[str, list[str]]:
    """By operation, the predecessors from which no arrow is drawn."""
    at = {name: number for number, name in enumerate(graph.ops)}
    passed = {
        (read, op.name): at[op.name] - at[read] for op in graph.ops.values() for read in op.predecessors
    }
    most = _FAR if sum(passed.values()) > _MOST_PASSED else len(at)
    return {
        op.name: [read for read in op.predecessors if passed[read, op.name] > most]
        for op in graph.ops.values()
    }


def _add_note(dot: graphviz.Digraph, node: str, label: str, *readers: str) -> None:
    dot.node(node, label, shape="note", fontsize="9", color="#888888")
    for reader in readers:
        dot.edge(node, reader, style="dashed", color="#888888")


def _format(path: Path) -> str:
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"graph picture: the file must end in .png or .svg, got '{path.name}'")
    return _FORMATS[path.suffix.lower()]


def _render(dot: graphviz.Digraph, picture_format: str) -> bytes:
    try:
        return dot.pipe(format=picture_format, quiet=True)
    except graphviz.ExecutableNotFound as error:
        raise DistillerError(
            "graph picture: the program 'dot' of Graphviz is not on the PATH; install the package 'graphviz' "
            "(apt-get install graphviz, or conda install graphviz)"
        ) from error
    except graphviz.CalledProcessError as error:
        told = (error.stderr or b"").decode(errors="replace").strip()
        raise DistillerError(f"graph picture: Graphviz's 'dot' failed: {told or error}") from error


def _lines(op: Op) -> Iterable[str]:
    """What a node says below the operation's name."""
    yield f"{op.type}   {_by(op.output_shape)}"
    if op.macs:
        yield f"{_short(op.macs)} MACs"


def _label(title: str, *lines: str) -> str:
    """A label of which the first line is bold, in Graphviz's HTML."""
    return f"<{'<br/>'.join([f'<b>{escape(title)}</b>', *map(escape, lines)])}>"


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _short(number: int) -> str:
    """Three digits and a unit: 118 M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
