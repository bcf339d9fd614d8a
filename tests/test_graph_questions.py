"""What can be asked of a graph, on networks whose answers are worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from distiller.errors import UnknownNameError
from distiller.graph import SourceTensor, SummaryGraph
from distiller.graph_ops import Operand
from distiller.macs import count_macs
from distiller.models import RNNModel, create_model
from tests.test_graph import IMAGE, Net, graph_of

STEPS, BATCH, WORDS, EMBEDDED, HIDDEN = 5, 3, 50, 6, 8


@pytest.fixture(scope="module")
def residual() -> SummaryGraph:
    """stem - conv1 - bn1 - relu - conv2 - bn2 - Add(stem) - relu again - AveragePool - Flatten - fc."""
    return SummaryGraph(Net(), IMAGE)


@pytest.fixture(scope="module")
def words() -> SummaryGraph:
    """encoder - rnn - decoder, given tokens and (hidden, cell)."""
    model = RNNModel(WORDS, EMBEDDED, HIDDEN, nlayers=2)
    tokens = torch.zeros(STEPS, BATCH, dtype=torch.long)
    return SummaryGraph(model, (tokens, model.init_hidden(BATCH)))


def test_the_nearest_operations_of_a_kind_are_found_through_others(residual):
    assert residual.predecessors_f("fc", "Add") == ("layer.0.Add",)
    assert residual.predecessors_f("layer.0.Add", "Conv") == ("stem", "layer.0.conv2")
    assert residual.successors_f("stem", ["BatchNormalization", "Add"]) == ("layer.0.Add", "layer.0.bn1")
    assert residual.successors_f("layer.0.conv1", ("Gemm",)) == ("fc",)


def test_what_lies_behind_the_nearest_operation_of_a_kind_is_not_looked_at(residual):
    assert residual.predecessors_f("layer.0.bn2", "Conv") == ("layer.0.conv2",)


def test_where_there_is_no_operation_of_a_kind_none_is_found(residual):
    assert residual.predecessors_f("stem", "Conv") == ()
    assert residual.successors_f("stem", "LSTM") == ()


def test_an_operation_is_found_by_its_name_and_by_a_wrappers(residual):
    assert residual.find_op("module.layer.0.conv1") is residual.ops["layer.0.conv1"]
    with pytest.raises(UnknownNameError) as caught:
        residual.find_op("layer.0.con1")
    assert str(caught.value) == "no operation 'layer.0.con1' in the graph; did you mean 'layer.0.conv1'?"


def test_a_parameter_is_found_with_its_shape_and_who_reads_it(residual):
    assert residual.find_param("module.stem.weight") == SourceTensor(
        "stem.weight", shape=(3, 3, 1, 1), readers=("stem",)
    )
    assert residual.param_shape("fc.weight") == (5, 3)
    assert residual.param_volume("fc.weight") == 15
    with pytest.raises(UnknownNameError) as caught:
        residual.param_shape("fc.wieght")
    assert str(caught.value) == "no parameter 'fc.wieght' in the graph; did you mean 'fc.weight'?"


def test_parameters_come_with_the_layer_they_belong_to():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    found = list(SummaryGraph(nn.DataParallel(model), torch.zeros(1, 4)).named_params_layers())
    assert [(layer, name) for layer, name, _ in found] == [
        ("0", "0.weight"),
        ("0", "0.bias"),
        ("1", "1.weight"),
    ]
    assert found[2][2] is model[1].weight


def test_a_parameter_of_a_functional_operation_is_one_of_its(residual):
    head = nn.Linear(4, 2)
    graph = graph_of(
        lambda m, x: F.linear(x, m.head.weight) + torch.sigmoid(m.head.bias * 2) + m.head.bias, head=head
    )
    assert graph.ops["Gemm"].params == ("head.weight",)
    assert graph.ops["Add"].params == ("head.bias",)
    assert graph.params["head.bias"].readers == ("Add", "Add_1")
    assert graph.missing_modules() == ["head"]


def test_a_parametrized_parameter_goes_by_its_canonical_name():
    fc = parametrizations.orthogonal(nn.Linear(4, 4))
    assert graph_of(lambda m, x: m.fc(x), fc=fc).ops["fc"].params == ("fc.weight", "fc.bias")


def test_a_parameter_under_two_names_goes_by_its_first():
    model = RNNModel(WORDS, HIDDEN, HIDDEN, nlayers=1, tied=True)
    graph = SummaryGraph(model, (torch.zeros(1, 1, dtype=torch.long), model.init_hidden(1)))
    assert graph.params["encoder.weight"].readers == ("encoder", "decoder")
    assert graph.ops["decoder"].params == ("encoder.weight", "decoder.bias")


def test_functional_operations_of_the_models_own_forward_are_at_the_top_level(residual):
    assert residual.top_level_ops() == ["AveragePool", "Flatten"]


def test_modules_that_are_passed_through_or_never_called_are_missing(residual):
    assert residual.missing_modules() == ["drop", "same"]


def test_operations_are_chosen_by_a_figure_they_have_and_a_condition(residual):
    assert [op.name for op in residual.get_ops("kernel_shape")] == ["stem", "layer.0.conv1", "layer.0.conv2"]
    assert residual.get_attr("kernel_shape") == [(1, 1), (3, 3), (3, 3)]
    assert residual.get_attr("MACs", lambda op: op.macs > 0) == [9 * 64, 81 * 64, 81 * 64, 15]


def test_the_figures_of_a_convolution_are_distillers(residual):
    """3 channels of 8x8 in and out, 3x3 kernels: footprint = both volumes and the weights, ai = MACs / footprint."""
    figures = residual.ops["layer.0.conv1"].attrs
    assert figures == {
        "MACs": 192 * 3 * 9,
        "footprint": 192 + 192 + 81,
        "fm_vol": 192 + 192,
        "weights_vol": 81,
        "ai": 5184 / 465,
        "n_ifm": 3,
        "n_ofm": 3,
        "kernel_shape": (3, 3),
        "group": 1,
    }


def test_the_figures_of_a_functional_operation(residual):
    add = residual.ops["layer.0.Add"]
    assert add.input_shapes == ((1, 3, 8, 8), (1, 3, 8, 8))
    assert (add.input_volume, add.output_volume) == (384, 192)
    assert add.attrs == {"MACs": 0, "footprint": 576, "fm_vol": 576, "weights_vol": 0, "ai": 0.0}


def test_channels_of_linear_layers_are_features_whatever_stands_before_them():
    (op,) = graph_of(lambda m, x: m.it(x), torch.ones(2, 7, 4), it=nn.Linear(4, 3)).ops.values()
    assert (op.attrs["n_ifm"], op.attrs["n_ofm"]) == (4, 3)
    (op,) = graph_of(lambda m, x: m.it(x), torch.ones(2, 4, 9), it=nn.Conv1d(4, 6, 3, groups=2)).ops.values()
    assert [op.attrs[name] for name in ("n_ifm", "n_ofm", "group", "kernel_shape")] == [4, 6, 2, (3,)]


@pytest.mark.parametrize(
    "module, kernel",
    [(nn.MaxPool2d(3, 2), (3, 3)), (nn.AvgPool2d((2, 1)), (2, 1)), (nn.ChannelShuffle(2), ())],
    ids=str,
)
def test_the_kernel_of_a_pooling(module, kernel):
    graph = graph_of(lambda m, x: m.it(x), torch.ones(1, 4, 8, 8), it=module)
    assert [op.kernel_shape for op in graph.ops.values()] == [kernel]


def test_each_part_of_a_split_is_an_operand_of_its_own():
    def call(m, x):
        left, right = x.split([3, 1], dim=1)
        return torch.cat([right, left], 1)

    graph = graph_of(call)
    assert graph.ops["Split"].output_shapes == ((2, 1), (2, 3))
    assert graph.ops["Concat"].operands == (Operand("Split", (2, 1)), Operand("Split", (2, 3)))
    assert graph.ops["Concat"].predecessors == ("Split",)


def test_a_tensor_that_is_read_twice_or_through_dropout_is_one_operand():
    graph = graph_of(lambda m, x: m.fc(x) * F.dropout(m.fc(x), training=False), fc=nn.Linear(4, 4))
    assert graph.ops["Mul"].operands == (Operand("fc", (2, 4)), Operand("fc_Gemm_1", (2, 4)))
    assert graph_of(lambda m, x: x * F.dropout(x, training=False)).ops["Mul"].input_volume == 8


def test_inputs_have_the_names_of_the_forward_and_their_readers(words):
    assert list(words.inputs.values()) == [
        SourceTensor("input", (STEPS, BATCH), ("encoder",)),
        SourceTensor("hidden_0", (2, BATCH, HIDDEN), ("rnn",)),
        SourceTensor("hidden_1", (2, BATCH, HIDDEN), ("rnn",)),
    ]


def test_the_language_model_is_embedding_lstm_and_decoder(words):
    assert [(op.name, op.type) for op in words.ops.values()] == [
        ("encoder", "Gather"),
        ("rnn", "LSTM"),
        ("decoder", "Gemm"),
    ]
    assert words.ops["rnn"].output_shapes == (
        (STEPS, BATCH, HIDDEN),
        (2, BATCH, HIDDEN),
        (2, BATCH, HIDDEN),
    )
    assert words.layers_topological_order() == ["encoder", "rnn", "decoder"]


def test_the_macs_of_the_language_model_agree_with_their_closed_form(words):
    """An LSTM has four gates, each from input and hidden state; an embedding multiplies nothing."""
    gates = 4 * HIDDEN * (EMBEDDED + HIDDEN) + 4 * HIDDEN * (HIDDEN + HIDDEN)
    assert words.get_attr("MACs") == [0, STEPS * BATCH * gates, STEPS * BATCH * HIDDEN * WORDS]


@pytest.mark.parametrize(
    "product, macs",
    [
        (lambda a, b: a @ b, 2 * 3 * 4 * 5),
        (lambda a, b: torch.einsum("bik,bkj->bij", a, b), 2 * 3 * 4 * 5),
        (lambda a, b: torch.baddbmm(torch.ones(2, 3, 5), a, b), 2 * 3 * 4 * 5),
        (lambda a, b: a[0].addmm(a[0], torch.eye(4)), 3 * 4 * 4),
        (lambda a, b: F.scaled_dot_product_attention(a, a, a), 2 * 2 * 3 * 3 * 4),
        (lambda a, b: F.conv1d(a, torch.ones(6, 3, 2)), 2 * 6 * 3 * 3 * 2),
        (lambda a, b: a + a, 0),
        (lambda a, b: a.relu().mean(), 0),
    ],
    ids=["matmul", "einsum", "baddbmm", "addmm", "attention", "conv1d", "add", "relu"],
)
def test_the_macs_of_functional_operations_agree_with_their_closed_forms(product, macs):
    """a is (2, 3, 4), b is (2, 4, 5)."""
    graph = graph_of(lambda m, a, b: product(a, b), torch.ones(2, 3, 4), torch.ones(2, 4, 5))
    assert sum(graph.get_attr("MACs")) == macs


def test_products_within_autocast_are_counted():
    def call(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.b(m.a(x))

    graph = graph_of(call, a=nn.Linear(4, 3), b=nn.Linear(3, 5))
    assert {op.name: op.macs for op in graph.ops.values() if op.macs} == {"a": 2 * 12, "b": 2 * 15}


def test_products_of_parameters_alone_are_booked_once_on_their_first_reader():
    fc = nn.Linear(4, 4)
    graph = graph_of(lambda m, x: x * (weight := m.fc.weight @ m.fc.weight).sum() + weight.mean(), fc=fc)
    assert [(op.name, op.macs) for op in graph.ops.values()] == [("Mul", 64), ("Add", 0)]


def transformer_macs(image: int, patch: int, layers: int, width: int, mlp: int, classes: int) -> int:
    """Of a vision transformer: patches are embedded; a class token goes along; only it is classified."""
    patches = (image // patch) ** 2
    tokens = patches + 1
    attention = tokens * 3 * width * width + 2 * tokens * tokens * width + tokens * width * width
    return patches * 3 * patch**2 * width + layers * (attention + 2 * tokens * width * mlp) + width * classes


def test_the_macs_of_a_vision_transformer_agree_with_their_closed_form():
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "hidden_dim": 8, "mlp_dim": 12}
    model = VisionTransformer(num_heads=2, num_classes=5, **sizes)
    images = torch.zeros(1, 3, 16, 16)
    graph = SummaryGraph(model, images)
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert graph.ops[f"{attention}.Attention"].macs == 2 * 5 * 5 * 8
    assert graph.ops[f"{attention}.Gemm"].params == (
        f"{attention}.in_proj_weight",
        f"{attention}.in_proj_bias",
    )
    assert graph.ops["Concat"].params == ("class_token",)
    expected = transformer_macs(16, 8, 2, 8, 12, 5)
    assert sum(graph.get_attr("MACs")) == sum(cost.macs for cost in count_macs(model, images)) == expected


@pytest.mark.parametrize("arch, macs", [("resnet20_cifar", 40_813_184), ("simplenet_cifar", 651_720)])
def test_the_macs_of_the_graph_are_distillers(arch, macs):
    model = create_model(False, None, arch)
    assert sum(SummaryGraph(model, torch.zeros(model.input_shape)).get_attr("MACs")) == macs


def test_figures_are_those_of_the_whole_batch(tiny_cnn):
    one, four = (SummaryGraph(tiny_cnn, torch.zeros(n, 1, 8, 8)) for n in (1, 4))
    for attr in ("MACs", "fm_vol"):
        assert four.get_attr(attr) == [4 * value for value in one.get_attr(attr)]
    assert four.get_attr("weights_vol") == one.get_attr("weights_vol")
