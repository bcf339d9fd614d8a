import pytest
import torch
from torch import nn

from distiller.functional_modules.convert_forward import convert_forward
from distiller.functional_modules.forward_trace import RecordedCall, Untraceable
from distiller.functional_modules.recorded_calls import ComputingModule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) + x + 1


class Drawing(Net):
    def forward(self, x):
        return self.layer(x) + torch.rand_like(x) * x


class Random(Net):
    """Gives another result each time, whatever the seed."""

    calls = 0

    def forward(self, x):
        Random.calls += 1
        return self.layer(x) * Random.calls


def found(net):
    return ComputingModule("net", net.eval(), ("add",), [RecordedCall((torch.randn(3, 2),), {})])


@torch.no_grad()
def test_a_conversion_tells_what_it_did_and_can_be_undone():
    net = Net()
    conversion = convert_forward(found(net))
    assert conversion.sites == {"Add": "add", "Add_1": "add_1"}
    assert list(conversion.modules) == ["add", "add_1"]
    assert (conversion.name, conversion.operations, conversion.left) == ("net", ("add",), {})
    x = torch.randn(3, 2)
    expected = net(x)
    conversion.undo()
    assert type(net) is Net
    assert [name for name, _ in net.named_children()] == ["layer"]
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_a_forward_that_draws_numbers_is_compared_under_the_same_seed():
    assert convert_forward(found(Drawing())).sites == {"Mul": "mul", "Add": "add"}


@torch.no_grad()
def test_a_forward_whose_values_differ_afterwards_is_left():
    net = Random()
    with pytest.raises(Untraceable):
        convert_forward(found(net))
    assert type(net) is Random
    assert [name for name, _ in net.named_children()] == ["layer"]
