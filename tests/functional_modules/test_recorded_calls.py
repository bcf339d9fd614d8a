import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.functional_modules.forward_trace import RecordedCall
from distiller.functional_modules.recorded_calls import computing_modules, copied


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x, scale=None):
        y = F.relu(self.layer(x.view(-1, 2))) + (self.gain * 2)
        return y * y + x.new_zeros(1)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.unused = Inner()
        self.plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def forward(self, x):
        y = self.inner(self.inner(x), scale=3)
        return 1 - torch.cat([self.plain(y), y])


def test_modules_that_compute_are_found_the_inner_ones_first():
    model, x = Outer().eval(), torch.randn(3, 2)
    with torch.no_grad():
        found = computing_modules(model, (x,))
    assert [(item.name, item.operations) for item in found] == [
        ("inner", ("relu", "mul", "add")),
        ("", ("cat", "sub")),
    ]
    assert found[0].module is model.inner


def test_the_first_call_of_each_form_is_kept():
    model, x = Outer().eval(), torch.randn(3, 2)
    with torch.no_grad():
        found = computing_modules(model, (x,))[0]
    assert [call.kwargs for call in found.calls] == [{}, {"scale": 3}]
    assert torch.equal(found.calls[0].args[0], x)


def test_arguments_are_those_that_the_forward_sees_and_are_not_changed_later():
    class InPlace(Inner):
        def forward(self, x):
            x += 1
            return x

    model, x = nn.Sequential(InPlace()).eval(), torch.zeros(3, 2)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 5,))
    with torch.no_grad():
        found = computing_modules(model, (x,))[0]
    assert found.name == "0"
    assert torch.equal(found.calls[0].args[0], torch.full((3, 2), 5.0))


def test_no_hook_stays_also_after_an_error():
    model = nn.Sequential(Inner())
    with pytest.raises(RuntimeError):
        computing_modules(model, (torch.zeros(3),))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_copied_call_has_tensors_of_its_own_and_one_stays_one():
    x = torch.randn(2)
    call = copied(RecordedCall((x, [x, 3]), {"y": {"x": x}}))
    first, (second, number) = call.args
    assert first is second is call.kwargs["y"]["x"]
    assert first is not x
    assert torch.equal(first, x)
    assert number == 3
