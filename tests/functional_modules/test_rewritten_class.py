import inspect
import traceback

import torch
from torch import nn

from distiller.functional_modules.forward_trace import RecordedCall, trace_forward
from distiller.functional_modules.rewritten_class import is_rewritten, rewritten_class


class Net(nn.Module):
    """A net."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x, scale=2.0):
        batch, _ = x.shape
        return self.layers[0](x).reshape(batch, -1) * scale


def rewritten(net):
    with torch.no_grad():
        graph = trace_forward(net, RecordedCall((torch.randn(3, 2),), {}), "net")
    return rewritten_class(Net, graph, "net", output_is_new=True)


def test_the_subclass_computes_the_same_and_is_called_the_same():
    net, x = Net(), torch.randn(5, 2)
    expected = net(x)
    net.__class__ = cls = rewritten(net)
    assert torch.equal(net(x), expected)
    assert torch.equal(net(x, scale=4.0), 2 * expected)
    assert (cls.__name__, cls.__doc__, cls.__module__) == ("Net", "A net.", __name__)
    assert is_rewritten(net)
    assert not is_rewritten(Net())
    assert str(inspect.signature(cls.forward)).replace(" ", "").startswith("(self,x,scale=2.0)")


def test_sizes_that_are_not_used_are_not_looked_up():
    source = inspect.getsource(rewritten(Net()).forward)
    assert "shape" in source
    assert source.count("getattr_1[") == 1


def test_an_error_in_the_forward_shows_its_line():
    net = Net()
    net.__class__ = rewritten(net)
    try:
        net(torch.randn(3, 5))
    except RuntimeError as error:
        text = "".join(traceback.format_exception(error))
    assert "<forward of net, operations as modules, " in text
    assert "(x)" in text


def test_an_instance_runs_its_own_modules():
    net, other = Net(), Net()
    net.__class__ = other.__class__ = rewritten(net)
    x = torch.randn(5, 2)
    assert torch.equal(other(x), other.layers[0](x) * 2)
