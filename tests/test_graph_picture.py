"""Pictures: what they are told to show, against the graph; and the files, as a reader of pictures sees them."""

from __future__ import annotations

import io
import re
import shutil
from xml.etree import ElementTree

import graphviz
import pytest
import torch
from PIL import Image
from torch import nn

from distiller import graph_picture
from distiller.errors import DistillerError, UnknownNameError, UsageError
from distiller.graph import SummaryGraph
from distiller.graph_picture import (
    create_dot_graph,
    create_png,
    draw_img_classifier_to_file,
    draw_model_to_file,
)
from tests.test_graph import IMAGE, Net, graph_of

needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None,
    reason="Graphviz's program 'dot' is not installed (Debian's package graphviz)",
)


@pytest.fixture(scope="module")
def residual() -> SummaryGraph:
    return SummaryGraph(Net(), IMAGE)


def nodes_of(dot: graphviz.Digraph) -> dict[str, str]:
    """The attributes of each node, by its id."""
    return dict(re.findall(r"^\t(\w+) \[(label=.*)\]$", dot.source, re.MULTILINE))


def edges_of(dot: graphviz.Digraph) -> set[tuple[str, str]]:
    return set(re.findall(r"^\t(\w+) -> (\w+)", dot.source, re.MULTILINE))


def title(attributes: str) -> str:
    return re.findall(r"<b>(.*?)</b>", attributes)[0]


def test_every_operation_and_input_is_a_node_and_every_reading_an_edge(residual):
    dot = create_dot_graph(residual)
    names = {node: title(attributes) for node, attributes in nodes_of(dot).items()}
    assert sorted(names.values()) == sorted(["x", *residual.ops])
    assert {(names[source], names[reader]) for source, reader in edges_of(dot)} == {
        ("x", "stem"),
        *((read, name) for name in residual.ops for read in residual.predecessors(name)),
    }


def test_a_node_says_name_kind_shape_and_macs(residual):
    nodes = nodes_of(create_dot_graph(residual)).values()
    labels = [re.findall(r"label=(<.*>) ", attributes)[0] for attributes in nodes]
    assert labels[:3] == [
        "<<b>x</b><br/>input<br/>1 x 3 x 8 x 8>",
        "<<b>stem</b><br/>Conv   1 x 3 x 8 x 8<br/>576 MACs>",
        "<<b>layer.0.conv1</b><br/>Conv   1 x 3 x 8 x 8<br/>5.18 k MACs>",
    ]
    assert "<<b>layer.0.Add</b><br/>Add   1 x 3 x 8 x 8>" in labels


@pytest.mark.parametrize(
    "macs, text", [(999, "999"), (1_000, "1 k"), (118_013_952, "118 M"), (4_089_184_256, "4.09 G")]
)
def test_macs_have_three_digits_and_a_unit(macs, text):
    assert graph_picture._short(macs) == text


def test_kinds_differ_in_colour(residual):
    colours = {
        title(attributes): re.findall(r'fillcolor="?([#\w]+)', attributes)[0]
        for attributes in nodes_of(create_dot_graph(residual)).values()
    }
    assert colours["stem"] == colours["layer.0.conv1"]
    assert len({colours[n] for n in ("x", "stem", "layer.0.bn1", "layer.0.relu", "layer.0.Add", "AveragePool",
                                     "Flatten", "fc")}) == 8  # fmt: skip


def test_parameters_are_drawn_where_they_are_read_only_when_asked_for(residual):
    dot = create_dot_graph(residual, display_param_nodes=True)
    nodes = nodes_of(dot)
    names = {node: title(attributes) for node, attributes in nodes.items()}
    drawn = {(names[source], names[reader]) for source, reader in edges_of(dot)}
    assert {edge for edge in drawn if edge[0] in residual.params} == {
        (name, reader) for name, param in residual.params.items() for reader in param.readers
    }
    assert any("<<b>fc.weight</b><br/>5 x 3>" in attributes for attributes in nodes.values())
    assert not {*nodes_of(create_dot_graph(residual))} & {node for node in nodes if node.startswith("param")}


def test_the_arrows_that_reach_too_far_are_named_in_a_note(residual, monkeypatch):
    monkeypatch.setattr(graph_picture, "_MOST_PASSED", 12)
    monkeypatch.setattr(graph_picture, "_FAR", 2)
    dot = create_dot_graph(residual)
    names = {node: title(attributes) for node, attributes in nodes_of(dot).items()}
    assert ("stem", "layer.0.Add") not in {(names[source], names[reader]) for source, reader in edges_of(dot)}
    (note,) = [attributes for attributes in nodes_of(dot).values() if title(attributes) == "from far"]
    assert "<b>from far</b><br/>stem>" in note
    assert ("from far", "layer.0.Add") in {(names[source], names[reader]) for source, reader in edges_of(dot)}


def test_names_are_shown_as_they_are_whatever_is_in_them():
    graph = graph_of(lambda m, x: m.get_submodule("a<b>:c")(x), **{"a<b>:c": nn.ReLU()})
    assert "<b>a&lt;b&gt;:c</b>" in create_dot_graph(graph).source


def test_direction_and_styles_are_the_callers(residual):
    source = create_dot_graph(residual, rankdir="LR", styles={"module.fc": {"fillcolor": "red"}}).source
    assert "rankdir=LR" in source
    assert re.search(r"<b>fc</b>.*fillcolor=red", source)
    with pytest.raises(UsageError) as caught:
        create_dot_graph(residual, rankdir="UP")
    assert str(caught.value) == "graph picture: rankdir must be one of TB, BT, LR, RL, got 'UP'"
    with pytest.raises(UnknownNameError, match=r"^no operation 'steem' in the graph; did you mean 'stem'\?$"):
        create_dot_graph(residual, styles={"steem": {}})


@needs_dot
def test_a_png_shows_the_nodes_in_their_colours(residual):
    image = Image.open(io.BytesIO(create_png(residual)))
    assert image.format == "PNG"
    assert image.height > image.width
    pixels = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=image.width * image.height)}
    for kind in ("Conv", "Gemm", "BatchNormalization", "Relu", "AveragePool", "Add", "Flatten"):
        red, green, blue = bytes.fromhex(graph_picture._COLOURS[kind][1:])
        assert (red, green, blue) in pixels


@needs_dot
def test_the_kind_of_picture_goes_by_the_suffix(residual, tmp_path):
    png = draw_model_to_file(residual, tmp_path / "made" / "a.PNG")
    svg = draw_model_to_file(residual, str(tmp_path / "a.svg"), display_param_nodes=True, rankdir="LR")
    with Image.open(png) as image:
        image.load()
        assert image.format == "PNG"
    texts = {
        "".join(element.itertext())
        for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    }
    assert {"layer.0.conv1", "fc.weight", "5 x 3"} <= texts
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.PNG", "a.svg"]


@pytest.mark.parametrize("name", ["a.jpeg", "a"])
def test_another_suffix_is_refused(residual, tmp_path, name):
    for draw, what in ((draw_model_to_file, residual), (draw_img_classifier_to_file, Net())):
        with pytest.raises(UsageError) as caught:
            draw(what, tmp_path / name)
        assert str(caught.value) == f"graph picture: the file must end in .png or .svg, got '{name}'"


@needs_dot
def test_a_classifier_is_drawn_with_the_images_it_takes_and_stays_as_it_is(tiny_cnn, tmp_path):
    before = {name: value.clone() for name, value in tiny_cnn.state_dict().items()}
    first = draw_img_classifier_to_file(nn.DataParallel(tiny_cnn), tmp_path / "a.svg")
    other = draw_img_classifier_to_file(tiny_cnn, tmp_path / "b.svg", input_shape=(2, 1, 4, 4))
    third = draw_img_classifier_to_file(tiny_cnn, tmp_path / "c.svg", "mnist", display_param_nodes=True)
    for path, shape in ((first, "1 x 6 x 8 x 8"), (other, "2 x 6 x 4 x 4"), (third, "1 x 6 x 28 x 28")):
        assert f"Conv   {shape}" in path.read_text().replace("\xa0", " ").replace("&#160;", " ")
    assert "conv2.weight" in third.read_text()
    assert tiny_cnn.training
    assert all(torch.equal(value, before[name]) for name, value in tiny_cnn.state_dict().items())


def test_without_the_shape_of_the_images_nothing_is_drawn(tmp_path):
    with pytest.raises(UsageError, match="neither data set nor input_shape given"):
        draw_img_classifier_to_file(Net(), tmp_path / "a.png")


def test_without_graphviz_the_package_is_named_and_nothing_is_written(residual, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DistillerError) as caught:
        draw_model_to_file(residual, tmp_path / "made" / "a.png")
    assert str(caught.value) == (
        "graph picture: the program 'dot' of Graphviz is not on the PATH; install the package 'graphviz' "
        "(apt-get install graphviz, or conda install graphviz)"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_graphviz_says_when_it_fails_is_told_and_the_file_stays(residual, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'no fonts here' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    picture = tmp_path / "a.png"
    picture.write_text("the one before")
    with pytest.raises(DistillerError) as caught:
        draw_model_to_file(residual, picture)
    assert str(caught.value) == "graph picture: Graphviz's 'dot' failed: no fonts here"
    assert picture.read_text() == "the one before"


@needs_dot
def test_a_file_that_cannot_be_written_is_told(residual, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/a\.svg: cannot be written, "):
        draw_model_to_file(residual, tmp_path / "file" / "a.svg")
