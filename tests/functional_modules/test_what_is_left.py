import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.errors import UsageError
from distiller.functional_modules import (
    LeftOperations,
    ModulesReport,
    to_modules,
)
from tests.functional_modules.forwards import (
    Block,
    PoolsBySize,
    Residual,
    images,
)

Pair = namedtuple("Pair", ["first", "second"])


class DependsOnTheMode(Block):
    def forward(self, x):
        x = self.conv(x)
        if self.training:
            x = x * 2
        return F.relu(x)


class DependsOnValues(Block):
    def forward(self, x):
        return F.relu(x) if x.sum() > 0 else x


class DependsOnANumberOfValues(Block):
    def forward(self, x):
        return F.relu(x) if x.sum().item() > 0 else x


class WithoutGradients(Block):
    def forward(self, x):
        with torch.no_grad():
            y = self.conv(x)
        return y + x


class WithGradients(Block):
    def forward(self, x):
        with torch.enable_grad():
            return self.conv(x) + x


class AsksForGradients(Block):
    def forward(self, x):
        if torch.is_grad_enabled():
            x = x + 0
        return self.conv(x) + x


class ComputesInAutocast(Block):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x)
        return y + x


class SetsAnAttribute(Block):
    def forward(self, x):
        self.last = self.conv(x)
        return self.last + x


class Appends(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(self.conv(x))
        return self.seen[-1] + x


class Counts(Block):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x) + x


class LoopsOverASize(Block):
    def forward(self, x):
        total = self.conv(x)
        for channel in range(x.size(1)):
            total = total + x[:, channel : channel + 1]
        return total


class LoopsOverRows(Block):
    def forward(self, x):
        return torch.stack([row * 2 for row in self.conv(x)])


class LoopsOverSamples(Block):
    def forward(self, x):
        return torch.stack([sample * 2 for sample in self.conv(x).unbind()])


class HasAnOddDefault(Block):
    def forward(self, x, settings=()):
        return self.conv(x) + x


class CallsAStranger(Block):
    def __init__(self):
        super().__init__()
        self.strangers = [nn.Linear(6, 6)]

    def forward(self, x):
        return self.strangers[0](self.conv(x)) + x


class KeepsATensorAside(Block):
    def __init__(self):
        super().__init__()
        self.aside = [torch.ones(1)]

    def forward(self, x):
        return self.conv(x) + self.aside[0]


LEFT = {
    DependsOnTheMode: "its forward depends on the mode (self.training)",
    DependsOnValues: "its forward depends on the values of tensors",
    DependsOnANumberOfValues: "its forward depends on the values of tensors",
    WithoutGradients: "its forward computes under a gradient or autocast mode of its own",
    WithGradients: "its forward computes under a gradient or autocast mode of its own",
    ComputesInAutocast: "its forward computes under a gradient or autocast mode of its own",
    AsksForGradients: "its forward depends on whether gradients are wanted",
    SetsAnAttribute: "its forward changes the attribute 'last'",
    Appends: "its forward changes the attribute 'seen'",
    Counts: "its forward changes the attribute 'calls'",
    LoopsOverASize: "its forward needs a size or a tensor's value as a plain number",
    LoopsOverRows: "its forward loops over the rows of a tensor",
    LoopsOverSamples: "its forward depends on the number of samples (or of what is along dimension 0)",
    HasAnOddDefault: "its forward has a default for 'settings' that is not a plain value",
    CallsAStranger: "its forward calls a Linear that is not among its children",
    KeepsATensorAside: "its forward computes with a tensor that is made in it or is no attribute of a module",
}


@pytest.mark.parametrize("make", LEFT, ids=lambda make: make.__name__)
def test_a_forward_that_cannot_be_traced_is_left_and_reported(make):
    model = nn.Sequential(make(), Residual()).eval()
    before, names, x = copy.deepcopy(model), [name for name, _ in model[0].named_modules()], images()
    report = to_modules(model, images(2))
    (left,) = report.left
    assert (left.module_name, left.reason) == ("0", LEFT[make])
    assert type(model[0]) is make
    assert [name for name, _ in model[0].named_modules()] == names
    assert report.modules == {"1.Add": "1.add", "1.Relu": "1.relu"}
    assert torch.equal(before(x), model(x))


def test_the_report_names_what_is_left():
    report = to_modules(nn.Sequential(DependsOnTheMode()), images(1))
    assert report == ModulesReport(
        {}, (), (LeftOperations("0", ("relu",), "its forward depends on the mode (self.training)"),)
    )


def test_a_function_without_a_module_is_left_and_its_neighbours_are_not():
    class WithExponential(Block):
        def forward(self, x):
            return torch.add(self.conv(x).exp(), x, alpha=2) * x

    report = to_modules(nn.Sequential(WithExponential()), images(1))
    assert report.modules == {"0.Mul": "0.mul"}
    assert report.left == (
        LeftOperations("0", ("exp",), "no module stands for it"),
        LeftOperations("0", ("add",), "it has a factor (alpha)"),
    )


def test_a_module_that_is_run_in_two_ways_is_left():
    class Optional(Block):
        def forward(self, x, other=None):
            return self.conv(x) if other is None else self.conv(x) + other

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Optional()

        def forward(self, x):
            return self.a(self.a(x, x)) * 1

    model = Net()
    (left,) = to_modules(model, images(1)).left
    assert left == LeftOperations(
        "a",
        ("add",),
        "its forward is run in more than one way (a: its operations became modules for inputs of another form "
        "(False then, True now); convert a model that is not converted yet, with such inputs)",
    )
    assert type(model.a) is Optional


def test_another_outcome_of_a_question_about_sizes_is_refused():
    model = nn.Sequential(PoolsBySize()).eval()
    before = copy.deepcopy(model)
    to_modules(model, images(1, size=6))
    x = images(2, size=8)
    assert torch.equal(before(x), model(x))
    with pytest.raises(UsageError) as error:
        model(images(1, size=7))
    assert str(error.value) == (
        "0: its operations became modules for inputs of another form (False then, True now); convert a model "
        "that is not converted yet, with such inputs"
    )


def test_arguments_of_every_kind_go_through():
    class Every(Block):
        def forward(self, x, *more, scale=None, **free):
            return {"sum": self.conv(x) + more[0], "same": x}

    class Keyword(Block):
        def forward(self, pair, *, scale=1.0, name="a", others=None):
            if isinstance(pair, Tensor):
                raise TypeError("no pair")
            first, second = pair
            return torch.cat([self.conv(first), second["x"]], 1) * scale if name == "b" else first

    class Ordered(Block):
        def forward(self, given):
            return Pair(given["x"] * 2, second=self.conv(given["x"]))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.every, self.keyword, self.ordered = Every(), Keyword(), Ordered()

        def forward(self, x):
            result = self.every(x, x)
            y = self.keyword((result["sum"], {"x": result["same"]}), scale=3.0, name="b")
            return y, self.ordered(OrderedDict(x=x + 1)).first

    model = Net().eval()
    before, x = copy.deepcopy(model), images()
    report = to_modules(model, images(1))
    assert report.modules == {
        "Add": "add",
        "keyword.Concat": "keyword.cat",
        "keyword.Mul": "keyword.mul",
        "ordered.Mul": "ordered.mul",
    }
    assert report.left == (
        LeftOperations(
            "every", ("add",), "its forward takes any number of arguments, and others by keyword only"
        ),
    )
    for expected, got in zip(before(x), model(x), strict=True):
        assert torch.equal(expected, got)


def test_leaf_modules_are_left_alone():
    class Leaf(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    model = nn.Sequential(nn.Conv2d(4, 4, 1), Leaf())
    assert to_modules(model, images(1)) == ModulesReport()
    assert type(model[1]) is Leaf


def test_a_module_that_the_input_does_not_reach_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = Residual(), Residual()

        def forward(self, x):
            return self.used(x)

    model = Net()
    assert set(to_modules(model, images(1)).modules) == {"used.Add", "used.Relu"}
    assert type(model.unused) is Residual


def test_a_model_that_does_not_run_is_refused_and_not_changed():
    model = nn.Sequential(Residual(), nn.MultiheadAttention(4, 2))
    with pytest.raises(
        UsageError, match="to_modules: running Sequential on dummy_input: failed with RuntimeError"
    ):
        to_modules(model, torch.zeros(1, 3, 6, 6))
    assert type(model[0]) is Residual
    assert type(model[1]) is nn.MultiheadAttention
