"""Graphs of small models, worked out by hand from their forward functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from distiller.errors import DistillerError, GraphTraceError, UnknownNameError
from distiller.graph import OpSimpleMetadata, SummaryGraph, is_leaf, leaf_modules, model_graph

IMAGE = torch.zeros(1, 3, 8, 8)


class Add(nn.Module):
    def forward(self, *terms):
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


class Residual(nn.Module):
    """conv1 - bn1 - relu - conv2 - bn2 - add(the input of conv1) - relu (the same relu)."""

    def __init__(self, add: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.add = add

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.add is None:
            out += x
        else:
            out = self.add(out, x)
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, add: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.layer = nn.Sequential(Residual(add))
        self.drop = nn.Dropout()
        self.same = nn.Identity()
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        x = F.dropout(self.drop(self.layer(self.stem(x))), training=self.training)
        return self.fc(self.same(F.adaptive_avg_pool2d(x, 1)).flatten(1))


class Calls(nn.Module):
    """A model whose forward is a function of (model, *inputs); submodules by keyword."""

    def __init__(self, call, **submodules: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, module in submodules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self.call(self, *inputs)


def graph_of(call, *inputs, **submodules) -> SummaryGraph:
    return SummaryGraph(Calls(call, **submodules), inputs or (torch.ones(2, 4),))


def names(neighbours) -> list[str]:
    return [neighbour.name for neighbour in neighbours]


def test_every_leaf_module_and_functional_operation_is_one_operation_with_an_onnx_type():
    graph = SummaryGraph(Net(), IMAGE)
    assert [(op.name, op.type) for op in graph.ops.values()] == [
        ("stem", "Conv"),
        ("layer.0.conv1", "Conv"),
        ("layer.0.bn1", "BatchNormalization"),
        ("layer.0.relu", "Relu"),
        ("layer.0.conv2", "Conv"),
        ("layer.0.bn2", "BatchNormalization"),
        ("layer.0.Add", "Add"),
        ("layer.0.relu_Relu_1", "Relu"),
        ("AveragePool", "AveragePool"),
        ("Flatten", "Flatten"),
        ("fc", "Gemm"),
    ]


@pytest.mark.parametrize("add, name", [(None, "layer.0.Add"), (Add(), "layer.0.add")])
def test_a_residual_add_reads_both_branches(add, name):
    graph = SummaryGraph(Net(add), IMAGE)
    assert graph.ops[name].type == "Add"
    assert graph.predecessors(name) == ("layer.0.bn2", "stem")
    assert graph.successors("stem") == ("layer.0.conv1", name)
    assert graph.successors(name) == ("layer.0.relu_Relu_1",)


def test_dropout_and_identity_are_looked_through():
    graph = SummaryGraph(Net(), IMAGE)
    assert graph.predecessors("AveragePool") == ("layer.0.relu_Relu_1",)
    assert graph.successors("AveragePool") == ("Flatten",)


def test_layers_are_in_the_order_of_execution_and_not_of_registration():
    order = graph_of(
        lambda m, x: m.first(m.second(m.first(x))), second=nn.Linear(4, 4), first=nn.Tanh()
    ).layers_topological_order()
    assert order == ["first", "second"]


def test_adjacency_map_holds_name_type_module_and_shape():
    adjacency = SummaryGraph(Net(), IMAGE).adjacency_map()
    entry = adjacency["layer.0.relu_Relu_1"]
    assert entry.op_meta == OpSimpleMetadata("layer.0.relu_Relu_1", "Relu")
    assert entry.predecessors == [OpSimpleMetadata("layer.0.Add", "Add")]
    assert entry.successors == [OpSimpleMetadata("AveragePool", "AveragePool")]
    assert entry.module_name == "layer.0.relu"
    assert adjacency["layer.0.Add"].module_name is None
    assert entry.output_shape == (1, 3, 8, 8)
    assert adjacency["fc"].output_shape == (1, 5)


def test_adjacency_of_dedicated_modules_leaves_out_functional_operations_and_shared_modules():
    adjacency = SummaryGraph(Net(), IMAGE).adjacency_map(dedicated_modules_only=True)
    assert list(adjacency) == [
        "stem",
        "layer.0.conv1",
        "layer.0.bn1",
        "layer.0.conv2",
        "layer.0.bn2",
        "fc",
    ]
    assert names(adjacency["layer.0.bn1"].predecessors) == ["layer.0.conv1"]
    assert adjacency["layer.0.bn1"].successors == []


def test_a_value_that_the_model_returns_is_marked_as_output():
    adjacency = graph_of(
        lambda m, x: (h := m.a(x), m.b(h)), a=nn.Linear(4, 4), b=nn.Linear(4, 4)
    ).adjacency_map()
    assert [(name, entry.is_output) for name, entry in adjacency.items()] == [("a", True), ("b", True)]
    assert not SummaryGraph(Net(), IMAGE).ops["stem"].is_output


@pytest.mark.parametrize(
    "module, input_shape, expected",
    [
        (nn.Conv1d(4, 2, 3), (1, 4, 8), "Conv"),
        (nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), (1, 4, 8, 8), "Conv"),
        (nn.ConvTranspose2d(4, 2, 3), (1, 4, 8, 8), "ConvTranspose"),
        (nn.ReLU6(), (1, 4), "Clip"),
        (nn.Sigmoid(), (1, 4), "Sigmoid"),
        (nn.Tanh(), (1, 4), "Tanh"),
        (nn.MaxPool2d(2), (1, 4, 8, 8), "MaxPool"),
        (nn.AvgPool2d(2), (1, 4, 8, 8), "AveragePool"),
        (nn.AdaptiveAvgPool2d(1), (1, 4, 8, 8), "AveragePool"),
        (nn.LayerNorm(4), (1, 4), "LayerNormalization"),
        (nn.LSTM(4, 3), (5, 4), "LSTM"),
        (nn.Softmax(1), (1, 4), "Softmax"),
        (nn.SiLU(), (1, 4), "Silu"),
        (nn.Flatten(), (1, 4, 2), "Flatten"),
        (nn.LocalResponseNorm(3), (1, 4, 8, 8), "LocalResponseNorm"),
    ],
)
def test_a_leaf_module_is_one_operation_of_its_kind(module, input_shape, expected):
    # Some of them torch.export takes apart: circular padding, LRN, an unbatched LSTM
    graph = graph_of(lambda m, x: m.it(x), torch.ones(input_shape), it=module)
    assert [(op.name, op.type) for op in graph.ops.values()] == [("it", expected)]


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda m, x: x * x, "Mul"),
        (lambda m, x: torch.cat([x, x]), "Concat"),
        (lambda m, x: x.chunk(2, 1), "Split"),
        (lambda m, x: x @ torch.ones(4, 4), "MatMul"),
        (lambda m, x: F.relu6(x), "Clip"),
        (lambda m, x: x.clamp(0, 1), "Clip"),
        (lambda m, x: torch.sigmoid_(x + 0)[None], "Sigmoid"),
    ],
)
def test_functional_operations_have_onnx_types(function, expected):
    assert expected in [op.type for op in graph_of(function).ops.values()]


def test_the_shape_of_an_lstm_is_that_of_its_first_result():
    graph = graph_of(lambda m, x: m.lstm(x)[0] * 2, torch.ones(5, 4), lstm=nn.LSTM(4, 3))
    assert graph.ops["lstm"].output_shape == (5, 3)


def test_consumers_of_a_split_read_the_split():
    def call(m, x):
        left, right = x.chunk(2, dim=1)
        return m.a(left) + m.b(right)

    graph = graph_of(call, a=nn.ReLU(), b=nn.Tanh())
    assert graph.successors("Split") == ("a", "b")
    assert graph.predecessors("Add") == ("a", "b")


def test_a_module_used_under_two_names_goes_by_its_first():
    relu = nn.ReLU()
    graph = graph_of(lambda m, x: m.b(m.fc(m.a(x))), a=relu, fc=nn.Linear(4, 4), b=relu)
    assert list(graph.ops) == ["a", "fc", "a_Relu_1"]
    assert graph.layers_topological_order() == ["a", "fc"]


def test_a_block_called_twice_has_two_operations_for_each_of_its_layers():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    graph = graph_of(lambda m, x: m.block(m.block(x)), block=block)
    assert list(graph.ops) == ["block.0", "block.1", "block.0_Gemm_1", "block.1_Relu_1"]


def test_names_of_functional_operations_avoid_names_of_modules():
    graph = graph_of(lambda m, x: m.Relu(x.relu()).relu(), Relu=nn.Tanh())
    assert [(op.name, op.type) for op in graph.ops.values()] == [
        ("Relu_1", "Relu"),
        ("Relu", "Tanh"),
        ("Relu_2", "Relu"),
    ]


def test_a_value_changed_in_place_is_read_from_the_operation_that_changed_it():
    def call(m, x):
        hidden = m.fc(x)
        m.relu(hidden)  # the result is ignored, the value is not
        return m.tanh(hidden)

    graph = graph_of(call, fc=nn.Linear(4, 4), relu=nn.ReLU(inplace=True), tanh=nn.Tanh())
    assert graph.predecessors("tanh") == ("relu",)


@pytest.mark.parametrize(
    "change", [lambda h: h.view(-1).add_(1), lambda h: h[:, :2].add_(1), lambda h: h[:, :2].add_(1).add_(1)]
)
def test_a_value_changed_through_a_view_is_read_from_the_operation_that_changed_it(change):
    def call(m, x):
        hidden = m.fc(x)
        change(hidden)
        return m.tanh(hidden)

    graph = graph_of(call, fc=nn.Linear(4, 4), tanh=nn.Tanh())
    assert graph.ops[graph.predecessors("tanh")[0]].type == "Add"


def test_a_view_is_read_from_the_operation_that_changed_what_it_views():
    def call(m, x):
        hidden = m.fc(x)
        view = hidden[:, :2]
        other = hidden[:, 2:]
        hidden.mul_(2)
        other.add_(1)
        return m.tanh(view)

    graph = graph_of(call, fc=nn.Linear(4, 4), tanh=nn.Tanh())
    assert graph.predecessors("tanh") == ("Mul",)


def test_regions_without_gradients_or_with_autocast_are_opened():
    def call(m, x):
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            x = m.relu(m.fc(x))
        return m.tanh(x)

    graph = graph_of(call, fc=nn.Linear(4, 4), relu=nn.ReLU(), tanh=nn.Tanh())
    assert [op for op in graph.ops if "." not in op and op != "Cast"] == ["fc", "relu", "tanh"]
    assert graph.predecessors("relu") == ("fc",)
    assert graph.predecessors("tanh") == ("relu",)


def test_what_is_computed_from_parameters_alone_is_no_operation():
    fc = parametrizations.weight_norm(nn.Linear(4, 4))
    graph = graph_of(lambda m, x: m.fc(x) + torch.exp(m.fc.bias) + torch.ones_like(x) * 2, fc=fc)
    assert [(op.name, op.type) for op in graph.ops.values()] == [
        ("fc", "Gemm"),
        ("Add", "Add"),
        ("Add_1", "Add"),
    ]
    assert is_leaf(fc)


def test_a_leaf_module_that_reads_no_input_is_an_operation():
    graph = graph_of(lambda m, x: x + m.positions(torch.arange(2)).neg(), positions=nn.Embedding(2, 4))
    assert graph.ops["positions"].type == "Gather"
    assert graph.predecessors("Add") == ("positions",)


def test_leaf_modules_are_neither_containers_nor_the_inside_of_parametrizations():
    shortcut = nn.Sequential()
    fc = parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict({"shortcut": shortcut, "fc": fc, "block": nn.Sequential(nn.ReLU())})
    assert list(leaf_modules(model)) == ["fc", "block.0"]


def test_modes_state_and_outputs_of_the_model_stay_as_they_were():
    model = Net().train()
    model.stem.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    SummaryGraph(model, IMAGE)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_wrappers_are_looked_through():
    graph = SummaryGraph(nn.DataParallel(Net()), IMAGE)
    assert graph.predecessors("module.layer.0.bn1") == ("layer.0.conv1",)


def test_a_model_of_several_inputs_takes_them_as_a_tuple():
    graph = SummaryGraph(Calls(lambda m, x, y: x + y), (torch.ones(2), torch.ones(2)))
    assert list(graph.ops) == ["Add"]


def test_a_model_that_cannot_be_traced_is_named_with_purpose_and_remedy(capfd, caplog):
    model = Calls(lambda m, x: x if x.sum() > 0 else -x).train()
    with pytest.raises(GraphTraceError) as caught:
        SummaryGraph(model, torch.ones(2), purpose="folding", remedy="leave it out")
    assert str(caught.value).startswith(
        "Calls: torch.export cannot trace it for folding: Could not guard on "
    )
    assert str(caught.value).endswith("; leave it out")
    assert model.training
    assert capfd.readouterr() == ("", "")
    assert [record.name for record in caplog.records if record.levelname == "WARNING"] == []


def test_an_input_the_model_refuses_is_reported_with_the_reason():
    with pytest.raises(
        GraphTraceError, match=r"^Net: torch\.export cannot trace it for the model's graph: .*8"
    ):
        SummaryGraph(Net(), torch.zeros(1, 7, 8, 8))


def test_an_unknown_operation_suggests_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        SummaryGraph(Net(), IMAGE).successors("steem")
    assert str(caught.value) == "no operation 'steem' in the graph; did you mean 'stem'?"


def test_the_graph_of_a_model_is_kept_until_its_modules_or_shapes_change(tiny_cnn):
    graph = model_graph(tiny_cnn, "a test")
    assert model_graph(nn.DataParallel(tiny_cnn), "a test") is graph
    tiny_cnn.conv2 = nn.Conv2d(4, 5, 3, padding=1)
    tiny_cnn.fc = nn.Linear(5, 4)
    narrower = model_graph(tiny_cnn, "a test")
    assert narrower.ops["conv2"].output_shape == (1, 5, 8, 8)
    tiny_cnn.relu2 = nn.Sigmoid()
    assert model_graph(tiny_cnn, "a test").ops["relu2"].type == "Sigmoid"
    tiny_cnn.input_shape = (2, 1, 4, 4)
    assert model_graph(tiny_cnn, "a test").ops["conv2"].output_shape == (2, 5, 4, 4)


def test_the_graph_of_a_model_leaves_random_numbers_statistics_and_modes_alone(tiny_cnn):
    tiny_cnn.bn1.eval()
    before = torch.get_rng_state(), {name: value.clone() for name, value in tiny_cnn.state_dict().items()}
    model_graph(tiny_cnn, "a test")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in tiny_cnn.state_dict().items())
    assert tiny_cnn.training
    assert not tiny_cnn.bn1.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_graph_of_a_model_of_another_precision(tiny_cnn, dtype):
    assert "conv2" in model_graph(tiny_cnn.to(dtype), "a test").ops


def test_the_graph_of_a_model_needs_the_shape_of_its_input():
    with pytest.raises(DistillerError) as error:
        model_graph(nn.Linear(1, 1), "the purpose")
    assert str(error.value) == (
        "'the purpose' needs the shape of the model's input: set model.input_shape, as (1, 3, 32, 32)"
    )


def test_an_input_shape_that_is_none_is_told_before_anything_is_traced():
    model = nn.Linear(1, 1)
    model.input_shape = "x"  # type: ignore[assignment]
    with pytest.raises(DistillerError) as error:
        model_graph(model, "the purpose")
    assert str(error.value) == (
        "'the purpose': model.input_shape: dummy input: a shape is a sequence of integers, or shapes in "
        "tuples, lists and dicts, got 'x'; set model.input_shape, as (1, 3, 32, 32)"
    )


def test_an_input_shape_may_be_of_several_inputs():
    class Sum(nn.Module):
        input_shape = ((1, 2), (1, 2))

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, a, b):
            return self.layer(a) + b

    graph = model_graph(Sum(), "the purpose")
    assert [op.type for op in graph.ops.values()] == ["Gemm", "Add"]


@pytest.mark.parametrize("kind", ["Softmax", "BatchNormalization", "LSTM", "GroupNormalization"])
def test_types_that_a_model_does_not_have_are_nowhere_in_it(kind):
    graph = SummaryGraph(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.zeros(1, 1, 2, 2))
    assert graph.predecessors_f("1", kind) == ()


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("Convv", "; did you mean 'Conv'?"),
        ("conv", "; did you mean 'Conv'?"),
        ("", "; the graph has Conv, Relu"),
    ],
)
def test_misspelt_types_are_refused(kind, hint):
    graph = SummaryGraph(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.zeros(1, 1, 2, 2))
    with pytest.raises(UnknownNameError) as caught:
        graph.successors_f("0", ("Relu", kind))
    assert str(caught.value) == f"no such type of operation: '{kind}'{hint}"


def test_misspelt_figures_are_refused():
    graph = SummaryGraph(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.zeros(1, 1, 2, 2))
    assert graph.get_attr("group") == [1]
    with pytest.raises(UnknownNameError, match="^no figure 'macs' of operations; there are MACs, footprint,"):
        graph.get_attr("macs")
