import math

import pytest
import torch
from torch import fx, nn

from distiller.functional_modules.trace_patches import patched


class Recorder:
    """A tracer that notes what it is told."""

    is_running = False

    def __init__(self):
        self.told = []
        self.tensor = torch.ones(1)

    def called(self, module, call, args, kwargs):
        self.told.append("call")
        return call(module, *args, **kwargs)

    def read(self, module, name, value):
        self.told.append(name)
        return value

    def mode(self, module):
        self.told.append("mode")
        return vars(module)["training"]

    def value(self, stand_in):
        return self.tensor

    def call_function(self, function, args, kwargs):
        self.told.append(function.__name__)


def names():
    """What the patches replace."""
    return [
        *(vars(nn.Module).get(name) for name in ("__call__", "__getattr__", "training")),
        *(vars(torch)[name] for name in ("is_tensor", "zeros", "arange")),
        math.sqrt,
        globals().get("isinstance"),
        globals().get("len"),
    ]


def test_names_lead_to_the_tracer_within_the_block():
    recorder, layer, x = Recorder(), nn.Linear(2, 2), torch.ones(2)
    stand_in = fx.Proxy(fx.Graph().placeholder("x"))
    with patched(recorder, globals(), nn.Linear):
        layer(x)
        assert layer.training
        assert isinstance(stand_in, torch.Tensor)
        assert torch.is_tensor(stand_in)
        assert not torch.is_tensor(3)
        assert len([1, 2]) == 2
        assert math.sqrt(4) == 2
        math.sqrt(stand_in)
        len(stand_in)
        torch.zeros(3)
    assert recorder.told == ["call", "weight", "bias", "mode", "sqrt", "len", "zeros"]


def test_names_mean_what_they_always_do_while_values_are_computed():
    recorder, layer = Recorder(), nn.Linear(2, 2)
    recorder.is_running = True
    with patched(recorder, globals(), nn.Linear):
        layer(torch.zeros(2))
        assert isinstance(layer, nn.Linear)
        assert layer.eval().training is False
    assert recorder.told == []


def test_names_are_what_they_were_also_after_an_error():
    before = names()
    with pytest.raises(KeyError), patched(Recorder(), globals(), nn.Linear):
        assert names() != before
        raise KeyError
    assert names() == before
    assert isinstance(nn.Linear(2, 2).training, bool)
