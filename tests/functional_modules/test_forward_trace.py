import pytest
import torch
from torch import nn

from distiller.functional_modules.forward_trace import (
    FROM_INPUT,
    VALUE,
    RecordedCall,
    Untraceable,
    trace_forward,
)


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.ones(2))
        self.plain = torch.ones(2)
        self.seen = [1]
        self.function = function

    def forward(self, x, *more, **free):
        return self.function(self, x)


def traced(function, *args, **kwargs):
    net = Net(function).eval()
    with torch.no_grad():
        return trace_forward(net, RecordedCall((torch.randn(3, 2), *args), kwargs), "net")


def node_of(graph, name):
    (found,) = [node for node in graph.nodes if getattr(node.target, "__name__", node.target) == name]
    return found


def test_children_are_calls_and_every_operation_has_its_value():
    graph = traced(lambda self, x: self.layer(x).exp() + self.gain)
    kinds = [(node.op, str(node.target)) for node in graph.nodes if node.op in ("call_module", "call_method")]
    assert kinds == [("call_module", "layer"), ("call_method", "exp")]
    assert node_of(graph, "add").meta[VALUE].shape == (3, 2)


def test_what_parameters_and_sizes_alone_decide_does_not_depend_on_the_input():
    graph = traced(
        lambda self, x: x * self.gain.exp() + x.shape[0] * 2 + x.new_zeros(1) + self.plain.to(x.dtype)
    )
    depends = {name: node_of(graph, name).meta[FROM_INPUT] for name in ("exp", "new_zeros", "to")}
    assert depends == {"exp": False, "new_zeros": False, "to": False}
    assert [node.meta[FROM_INPUT] for node in graph.nodes if "mul" in node.name] == [True, False]
    assert {node.meta[FROM_INPUT] for node in graph.nodes if "add" in node.name} == {True}


def test_sizes_stay_open_and_questions_about_them_are_checked():
    def forward(self, x):
        return x.reshape(x.size(0) * 2, -1) if x.size(1) == 2 else x

    code = traced(forward).python_code("self").src
    assert ".size(0)" in code
    assert "as_traced(eq, True, 'net')" in code


def test_additions_in_place_are_told_from_others():
    def forward(self, x):
        y, n = self.layer(x), x.size(0)
        y += 1
        n += 1
        y @= y.mT
        return y * n

    graph = traced(forward)
    assert node_of(graph, "iadd").meta[VALUE].shape == (3, 2)
    assert node_of(graph, "add").meta[VALUE] == 4
    assert node_of(graph, "matmul").meta[VALUE].shape == (3, 3)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda self, x: x if x.any() else -x, "depends on the values of tensors"),
        (
            lambda self, x: x if float(x.sum().tolist()) else -x,
            "needs a size or a tensor's value as a plain number",
        ),
        (lambda self, x: x if torch.equal(x, x) else -x, "depends on the values of tensors"),
        (lambda self, x: x if self.training else -x, "depends on the mode (self.training)"),
        (lambda self, x: x if 0.1 * self.training > 0 else -x, "depends on the mode (self.training)"),
        (lambda self, x: x if self.layer.training else -x, "depends on the mode (self.training)"),
        (lambda self, x: sum(row for row in x), "loops over the rows of a tensor"),
        (lambda self, x: self.seen.append(x) or x, "changes the attribute 'seen'"),
        (lambda self, x: setattr(self, "other", x) or x, "changes the attribute 'other'"),
        (lambda self, x: undefined, "cannot be traced (NameError: name 'undefined' is not defined)"),  # noqa: F821
    ],
)
def test_what_a_graph_cannot_hold_is_refused(function, reason):
    with pytest.raises(Untraceable) as error:
        traced(function)
    assert str(error.value) == reason
    assert isinstance(nn.Linear(2, 2).training, bool)


def test_an_attribute_that_was_changed_is_put_back():
    net = Net(lambda self, x: (self.seen.append(x), setattr(self, "plain", x))[0] or x)
    plain = net.plain
    with pytest.raises(Untraceable):
        trace_forward(net, RecordedCall((torch.randn(3, 2),), {}), "net")
    assert net.seen == [1]
    assert net.plain is plain


def test_a_forward_of_the_instance_is_refused():
    net = Net(lambda self, x: x)
    net.forward = lambda x: x
    with pytest.raises(Untraceable, match="^is not that of its class, written in Python$"):
        trace_forward(net, RecordedCall((torch.randn(3, 2),), {}), "net")


def test_free_arguments_go_through():
    graph = traced(lambda self, x: x, torch.ones(1), flag=True, other=torch.ones(1))
    assert [str(node.target) for node in graph.nodes if node.op == "placeholder"] == ["x", "*more", "**free"]


def test_parameters_are_read_each_time_and_plain_tensors_of_the_module_too():
    graph = traced(lambda self, x: x * self.gain + self.plain + self.layer.weight[0])
    reads = [node.target for node in graph.nodes if node.op == "get_attr"]
    assert sorted(reads) == ["gain", "layer.weight", "plain"]
