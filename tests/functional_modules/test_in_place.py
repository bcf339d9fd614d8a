import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from distiller.functional_modules import to_modules
from distiller.functional_modules.forward_trace import RecordedCall, trace_forward
from distiller.functional_modules.in_place import SharedMemory
from distiller.functional_modules.rules import COMPUTING

VARIABLES = 3
OPERATIONS = {
    "conv": lambda module, a, b: module.conv(a),
    "pass": lambda module, a, b: module.drop(a),
    "maybe": lambda module, a, b: module.maybe(a),
    "sequence": lambda module, a, b: module.sequence(a),
    "name": lambda module, a, b: a,
    "view": lambda module, a, b: a.view(-1).view(a.shape),
    "add": lambda module, a, b: a + b,
    "flatten": lambda module, a, b: a.contiguous().flatten(1).unflatten(1, (2, 3, 3)),
    "dropout": lambda module, a, b: F.dropout(a, 0.5, module.training),
    "relu": lambda module, a, b: F.relu(a),
}


def add_to(a, b):
    a += b


def add_to_a_slice(a, b):
    a[:, :1] += b[:, 1:]


def halve(a, b):
    a /= 2


WRITES = {
    "+=": add_to,
    "slice +=": add_to_a_slice,
    "/=": halve,
    "relu_": lambda a, b: a.relu_(),
    "add_": lambda a, b: a.add_(b),
    "inplace": lambda a, b: F.relu(a, inplace=True),
}


class Maybe(nn.Module):
    """Gives what it is given, or something new."""

    def forward(self, x):
        return x


class Program(nn.Module):
    """A forward that is drawn at random: steps (operation, from, with, to), and what is returned."""

    def __init__(self, steps, returned):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.maybe = Maybe()
        self.sequence = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.steps, self.returned = steps, returned

    def forward(self, x, y):
        values = [x, y, x * 1.5]
        for operation, a, b, to in self.steps:
            if operation in WRITES:
                WRITES[operation](values[a], values[b])
            else:
                values[to] = OPERATIONS[operation](self, values[a], values[b])
        return [values[i] for i in self.returned]


numbers = st.integers(0, VARIABLES - 1)
steps = st.tuples(st.sampled_from([*OPERATIONS, *WRITES, *WRITES]), numbers, numbers, numbers)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, min_size=2, max_size=7), st.lists(numbers, min_size=1, max_size=3))
def test_whatever_is_written_in_place_results_and_inputs_stay_equal(program, returned):
    torch.manual_seed(0)
    model = nn.Sequential(Program(program, returned)).eval()
    before = copy.deepcopy(model)[0]
    x, y = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)
    report = to_modules(model[0], (x, y))
    assert report.left == ()
    given_before, given_after = (x.clone(), y.clone()), (x.clone(), y.clone())
    with torch.no_grad():
        expected, got = before(*given_before), model[0](*given_after)
    for one, other in zip([*given_before, *expected], [*given_after, *got], strict=True):
        assert torch.equal(one, other)


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.drop = nn.Dropout()
        self.register_buffer("state", torch.ones(2, 2, 1, 1))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def may_be_new(forward):
    """What is found out about the one addition in place."""
    module = Net(forward).eval()
    with torch.no_grad():
        graph = trace_forward(module, RecordedCall((torch.randn(2, 2, 1, 1),), {}), "net")
    memory = SharedMemory(graph, module, COMPUTING)
    for node in graph.nodes:
        if getattr(node.target, "__name__", "") == "iadd":
            assert isinstance(node.args[0], fx.Node)
            return memory.may_be_new(node, node.args[0])
        memory.pass_by(node)
    raise AssertionError("no addition in place")


def test_a_layers_result_may_be_replaced():
    def forward(self, x):
        y = self.conv(x)
        y += x
        return y

    assert may_be_new(forward)


def test_what_dropout_passes_on_may_not():
    def forward(self, x):
        y = self.drop(x)
        y += 1
        return y

    assert not may_be_new(forward)


def test_a_view_that_is_read_afterwards_forbids_it():
    def forward(self, x):
        y = self.conv(x)
        view = y.flatten(1)
        y += x
        return y, view

    assert not may_be_new(forward)


def test_a_view_that_is_read_before_does_not_forbid_it():
    def forward(self, x):
        y = self.conv(x)
        view = y.flatten(1) * 2
        y += x
        return y, view

    assert may_be_new(forward)


def test_a_buffer_may_not_be_replaced():
    def forward(self, x):
        state = self.state
        state += x
        return self.conv(state)

    assert not may_be_new(forward)
