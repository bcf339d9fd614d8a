import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.functional_modules import (
    ModulesReport,
    convert_model_to_distiller_lstm,
    to_modules,
)
from distiller.graph import SummaryGraph, leaf_modules
from distiller.models.word_language_model import RNNModel
from distiller.modules import EltwiseAdd, EltwiseMult
from distiller.observation import watch_output
from tests.functional_modules.forwards import (
    AddsToItsInput,
    AddsToWhatDropoutPassesOn,
    AsksForTheType,
    CallsItsBase,
    ChangesABuffer,
    Einsum,
    FunctionalDropout,
    InPlaceStatements,
    MakesTensors,
    Numbers,
    PoolsBySize,
    ReadsAView,
    ReadsTheModeOfAChild,
    ReadsTheOldName,
    Residual,
    TakenNames,
    Unpacks,
    UsesAChildsWeights,
    WithParameters,
    WritesSlices,
    images,
    residual_sequence,
)

# What becomes a module, by the operation's name in the graph.
CONVERTED = {
    Residual: {"Add": "add", "Relu": "relu"},
    AddsToItsInput: {"Add": "add"},
    ReadsTheOldName: {"Add": "add", "Mul": "mul"},
    ReadsAView: {"Add": "add", "Mul": "mul"},
    AddsToWhatDropoutPassesOn: {"Add": "add", "Mul": "mul"},
    InPlaceStatements: {"Add": "add", "Sigmoid": "sigmoid", "Relu": "relu", "Mul": "mul", "Sub": "sub", "Div": "div"},
    WritesSlices: {"Add": "add", "Add_1": "add_1"},
    Numbers: {
        "Rsub": "sub", "Mul": "mul", "Add": "add", "Div": "div", "Add_1": "add_1", "Mul_1": "mul_1",
        "Reciprocal": "div_1", "Add_2": "add_2",
    },
    WithParameters: {"Mul": "mul", "Add": "add"},
    FunctionalDropout: {"Relu": "relu", "Add": "add"},
    ReadsTheModeOfAChild: {"Add": "add"},
    PoolsBySize: {
        "Hardswish": "hardswish", "MaxPool": "max_pool2d", "AveragePool": "avg_pool2d", "ReduceMean": "mean",
    },
    MakesTensors: {"Add": "add", "Add_1": "add_1"},
    Unpacks: {"Stack": "stack", "MatMul": "matmul", "Concat": "cat"},
    CallsItsBase: {"Add": "add", "Relu": "relu", "Mul": "mul"},
    AsksForTheType: {"Add": "add"},
    TakenNames: {"Add": "add_1", "Relu": "relu_1", "Add_1": "add_2"},
    ChangesABuffer: {"Add": "add"},
    UsesAChildsWeights: {"Gemm": "fc"},
    Einsum: {"Einsum": "matmul"},
    residual_sequence: {"Add": "add"},
}  # fmt: skip


def evaluated(model, x):
    """The output, and what became of the input."""
    x = x.clone()
    with torch.no_grad():
        return model.eval()(x), x


def trained(model, x):
    """Output, gradients and buffers of a step in training mode."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    output = model.train()(x * 1)
    output.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output, "x": x.grad, **grads, **dict(model.named_buffers())}


def assert_equal(expected, got):
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert (value is None and got[key] is None) or torch.equal(value, got[key]), key


@pytest.mark.parametrize("make", CONVERTED, ids=lambda make: make.__name__)
def test_operations_become_modules_and_values_stay_equal_bit_for_bit(make):
    model = nn.Sequential(make()).eval()
    before, x = copy.deepcopy(model), images()
    report = to_modules(model, images(1))
    assert report.modules == {f"0.{site}": f"0.{name}" for site, name in CONVERTED[make].items()}
    assert {id(model.get_submodule(name)) for name in report.modules.values()} <= {
        id(module) for module in leaf_modules(model).values()
    }
    for expected, got in zip(evaluated(before, x), evaluated(model, x), strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize(
    "make",
    [make for make in CONVERTED if make not in (AddsToItsInput, InPlaceStatements, ChangesABuffer)],
    ids=lambda make: make.__name__,
)
def test_training_gives_equal_losses_gradients_and_buffers(make):
    model = nn.Sequential(make())
    before, x = copy.deepcopy(model), images()
    to_modules(model, images(1))
    assert_equal(trained(before, x), trained(model, x))


@pytest.mark.parametrize("make", CONVERTED, ids=lambda make: make.__name__)
def test_a_second_call_changes_nothing(make):
    model = nn.Sequential(make())
    first = to_modules(model, images(1))
    classes = {name: type(module) for name, module in model.named_modules()}
    second = to_modules(model, images(1))
    assert second.modules == {}
    assert second.left == first.left
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_two_copies_give_the_same_names():
    model = nn.Sequential(Numbers(), Residual(), TakenNames())
    other = copy.deepcopy(model)
    assert to_modules(model, images(1)) == to_modules(other, images(2))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in other.named_modules()]


@pytest.mark.parametrize(
    "make", [Residual, ReadsTheOldName, InPlaceStatements, CallsItsBase], ids=lambda make: make.__name__
)
def test_an_addition_in_place_gives_a_new_tensor_where_nobody_can_tell(make):
    model = nn.Sequential(make())
    to_modules(model, images(1))
    assert not [name for name, module in model.named_modules() if getattr(module, "inplace", False)]


@pytest.mark.parametrize(
    "make", [AddsToItsInput, ReadsAView, AddsToWhatDropoutPassesOn, WritesSlices], ids=lambda m: m.__name__
)
def test_an_addition_in_place_stays_one_where_the_overwritten_tensor_is_read(make):
    model = nn.Sequential(make())
    to_modules(model, images(1))
    assert model[0].add.inplace


def test_a_caller_sees_its_tensor_changed_as_before():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = AddsToItsInput()

        def forward(self, x):
            x = x * 1
            return self.block(x) - x + x

    model = Caller().eval()
    before, x = copy.deepcopy(model), images()
    to_modules(model, x)
    assert torch.equal(before(x), model(x))


def test_names_of_parameters_keys_and_values_of_the_state_stay():
    model = nn.Sequential(Residual(), WithParameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    to_modules(model, images(1))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_class_and_representation_stay():
    model = nn.Sequential(Residual())
    to_modules(model, images(1))
    assert isinstance(model[0], Residual)
    assert type(model[0]).__name__ == "Residual"
    assert type(model[0]).__module__ == Residual.__module__
    assert isinstance(model[0].add, EltwiseAdd)
    assert type(Residual()) is Residual


def test_hooks_stay_on_modules():
    model, seen = nn.Sequential(Residual()), []
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    to_modules(model, images(1))
    seen.clear()
    model(images())
    assert len(seen) == 1
    handle.remove()
    model(images())
    assert len(seen) == 1


def test_every_module_keeps_its_mode_and_new_ones_have_their_parents():
    model = nn.Sequential(Residual().train(), Residual().eval())
    model[0].bn.eval()
    to_modules(model, images(1))
    assert (model[0].training, model[0].add.training, model[0].bn.training) == (True, True, False)
    assert (model[1].training, model[1].add.training) == (False, False)


def test_random_numbers_and_buffers_are_those_of_before():
    model = nn.Sequential(FunctionalDropout(), ChangesABuffer())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    to_modules(model, torch.zeros(1, 4, 6, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(buffers, dict(model.named_buffers()))


def test_a_copy_runs_its_own_modules():
    model = nn.Sequential(Residual()).eval()
    to_modules(model, images(1))
    other = copy.deepcopy(model)
    other[0].add = EltwiseMult()
    other[0].conv.weight.data.zero_()
    assert isinstance(model[0].add, EltwiseAdd)
    x = images()
    assert not torch.equal(model(x), other(x))
    assert torch.equal(other(x), F.relu(other[0].bn(other[0].conv(x)) * x))


def test_what_takes_a_modules_place_later_is_run():
    model = nn.Sequential(Residual()).eval()
    to_modules(model, images(1))
    model[0].relu = nn.Identity()
    x = images()
    assert torch.equal(model(x), model[0].bn(model[0].conv(x)) + x)


@pytest.mark.slow
def test_a_converted_model_is_exported_with_a_dynamic_batch():
    model = nn.Sequential(PoolsBySize(), nn.Linear(4, 2)).eval()
    to_modules(model, images(1))
    x = images(3)
    program = torch.export.export(
        model, (images(2),), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False
    )
    assert torch.equal(program.module()(x), model(x))


def test_sites_are_called_as_in_the_graph_of_the_model_before():
    model = nn.Sequential(Numbers(), Residual(), Unpacks()).eval()
    before = SummaryGraph(copy.deepcopy(model), images(1))
    report = to_modules(model, images(1))
    functional = {op.name for op in before.ops.values() if op.is_functional}
    assert functional - set(report.modules) == {"0.Mul_2", "2.Split", "2.Split_1"}  # 3 / x is 1 / x * 3
    assert set(report.modules) <= functional
    after = SummaryGraph(model, images(1))
    types = {name: after.ops[module].type for name, module in report.modules.items()}
    assert types.pop("0.Reciprocal") == "EltwiseDiv"
    assert types == {name: before.ops[name].type for name in types}


def test_half_precision_and_channels_last_stay():
    model = nn.Sequential(Residual()).eval()
    to_modules(model, images(1))
    x = images().to(torch.bfloat16, memory_format=torch.channels_last)
    output = model.to(torch.bfloat16)(x)
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_a_wrapper_is_looked_through():
    model = nn.Sequential(Residual())
    assert to_modules(nn.DataParallel(model), images(1)).modules == {"0.Add": "0.add", "0.Relu": "0.relu"}


def test_the_models_own_forward_has_sites_without_a_prefix():
    model = Residual()
    assert to_modules(model, images(1)).modules == {"Add": "add", "Relu": "relu"}
    assert list(dict(model.named_children())) == ["conv", "bn", "drop", "add", "relu"]


def test_a_module_that_is_called_twice_gets_its_modules_once():
    block = Residual()
    model = nn.Sequential(block, block).eval()
    before, x = copy.deepcopy(model), images()
    assert to_modules(model, images(1)).modules == {"0.Add": "0.add", "0.Relu": "0.relu"}
    assert torch.equal(before(x), model(x))


def test_a_recurrent_layer_among_operations_stays_one_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x):
            output, (hidden, _) = self.rnn(x)
            return torch.sigmoid(output[:, -1] + hidden[-1])

    model, x = Net(), torch.randn(2, 5, 4)
    expected = model(x)
    assert to_modules(model, x[:1, :3]).modules == {"Add": "add", "Sigmoid": "sigmoid"}
    assert torch.equal(model(x), expected)


def test_those_who_watch_the_model_see_nothing_of_the_conversion():
    model, seen = nn.Sequential(Residual()), []
    watch_output(model[0].conv, lambda *args: seen.append(args))
    to_modules(model, images(1))
    assert seen == []
    model(images())
    assert len(seen) == 1


def test_a_word_model_has_nothing_left_with_this_projects_lstm():
    model = convert_model_to_distiller_lstm(RNNModel(20, 6, 6, 2))
    words = torch.randint(20, (5, 2))
    assert to_modules(model, (words, model.init_hidden(2))) == ModulesReport()


def test_a_converted_model_is_trained():
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    to_modules(model, images(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = images(8), torch.arange(8) % 2
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
