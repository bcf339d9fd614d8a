"""Hooks: on which modules, when they see what, and that they are gone afterwards."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from distiller.data_loggers.collector import ActivationCollector, collector_context
from distiller.errors import UnknownNameError, UsageError
from distiller.interfaces import Collector


class Recorder(ActivationCollector):
    """Copies of what it sees, in order."""

    def __init__(self, model, classes=None) -> None:
        super().__init__(model, classes)
        self.reset()

    def on_inputs(self, name, module, inputs):
        self.seen.append((name, "in", inputs[0].tolist()))

    def on_output(self, name, module, output):
        self.seen.append((name, "out", output.tolist()))

    def reset(self):
        self.seen = []

    def value(self):
        return {name: None for name, _, _ in self.seen}

    def save(self, fname):
        pytest.fail("a collector writes only when it is told to")


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)),
        nn.Sequential(),
        parametrizations.weight_norm(nn.Linear(2, 2)),
    )


def test_leaf_modules_are_looked_at_but_identities_and_empty_containers_are_not(model):
    assert list(Recorder(model).modules) == ["0.1", "2"]


def test_classes_narrow_the_choice(model):
    assert list(Recorder(model, classes=(nn.ReLU, nn.Tanh)).modules) == ["0.1"]


def test_inputs_are_seen_before_an_operation_in_place_and_outputs_after(model):
    recorder = Recorder(model, [nn.ReLU])
    with recorder:
        model(torch.tensor([[-1.0, 2.0]]))
    assert recorder.seen == [("0.1", "in", [[-1.0, 2.0]]), ("0.1", "out", [[0.0, 2.0]])]


def test_hooks_are_gone_after_the_block_and_after_an_error(model):
    recorder = Recorder(model)
    with recorder:
        assert hook_count(model) == 4
    assert hook_count(model) == 0
    with pytest.raises(RuntimeError), collector_context(recorder):
        model(torch.ones(1, 7))
    assert hook_count(model) == 0
    recorder.stop()


def test_only_the_modules_asked_for_are_attached(model):
    recorder = Recorder(model)
    with collector_context(recorder, ["module.2"]):
        model(torch.ones(1, 2))
    assert list(recorder.value()) == ["2"]


def test_an_unknown_module_is_an_error_and_attaches_nothing(model):
    recorder = Recorder(model)
    with pytest.raises(UnknownNameError, match=r"^no module '0\.7' in the model; did you mean '0\.1'\?$"):
        recorder.start(["2", "0.7"])
    assert hook_count(model) == 0


def test_starting_twice_is_an_error(model):
    recorder = Recorder(model)
    with recorder, pytest.raises(UsageError) as caught:
        recorder.start()
    assert str(caught.value) == "Recorder: is attached already; call stop() first"


def test_wrappers_are_looked_through(model):
    wrapped = nn.DataParallel(model)
    assert list(Recorder(wrapped).modules) == ["0.1", "2"]


def test_copies_on_several_devices_are_refused(model):
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    with pytest.raises(UsageError) as caught:
        Recorder(wrapped)
    assert str(caught.value) == (
        "Recorder: the model is a DataParallel over 2 devices, whose copies cannot be looked into; "
        "give the model inside (model.module)"
    )


def test_a_collector_is_what_the_interfaces_call_one(model):
    assert isinstance(Recorder(model), Collector)
