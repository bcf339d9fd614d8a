"""What all pruners that look at training have in common, in training under a schedule."""

from __future__ import annotations

import gc
import io
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.config import file_config
from distiller.errors import ScheduleError
from distiller.interfaces import DataDrivenPruner
from distiller.policy import PruningPolicy
from distiller.registry import PRUNERS
from distiller.scheduler import CompressionScheduler

CONSTANT = """
    group_type: Filters
    desired_sparsity: 0.5
    weights: [conv1.weight, conv2.weight]
"""
GRADUAL = """
    initial_sparsity: 0.25
    final_sparsity: 0.5
    group_type: 3D
    weights: [conv1.weight, conv2.weight]
"""
SETTINGS = {
    **{
        f"{score}RankedFilterPruner{rate}": settings
        for score in ("ActivationAPoZ", "ActivationMean", "Gradient", "TaylorFO")
        for rate, settings in {"": CONSTANT, "_AGP": GRADUAL}.items()
    },
    "MovementPruner": """
    initial_sparsity: 0.1
    final_sparsity: 0.5
    weights: [conv1.weight, conv2.weight]
""",
    "FMReconstructionChannelPruner": """
    group_type: Channels
    desired_sparsity: 0.5
    weights: [conv2.weight]
""",
}
"""The settings of one schedule for each class; all aim at 50 %."""

every_class = pytest.mark.parametrize("class_name", SETTINGS)


def schedule_of(class_name: str, args: str = "{}") -> str:
    return textwrap.dedent("""\
        version: 1
        pruners:
          the_pruner:
            class: {class_name}{settings}
        policies:
          - pruner:
              instance_name: the_pruner
              args: {args}
            starting_epoch: 0
            ending_epoch: 4
            frequency: 1
        """).format(class_name=class_name, settings=SETTINGS[class_name], args=args)


class Session:
    """A model, its optimizer and a schedule read from a file."""

    def __init__(self, model: nn.Module, path) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        self.scheduler = file_config(model, self.optimizer, path)
        (entry,) = self.scheduler.policies
        assert isinstance(entry.policy, PruningPolicy)
        assert isinstance(entry.policy.pruner, DataDrivenPruner)
        self.pruner = entry.policy.pruner

    def train(self, epochs, batches: int = 3, fail_at: int | None = None) -> None:
        for epoch in epochs:
            self.model.train()
            self.scheduler.on_epoch_begin(epoch, self.optimizer)
            for step in range(batches):
                generator = torch.Generator().manual_seed(100 * epoch + step)
                images = torch.randn(8, 1, 8, 8, generator=generator)
                where = epoch, step, batches, self.optimizer
                self.scheduler.on_minibatch_begin(*where)
                loss = F.cross_entropy(self.model(images), torch.arange(8) % 4)
                if step == fail_at:
                    raise KeyboardInterrupt
                self.optimizer.zero_grad()
                loss.backward()
                self.scheduler.before_parameter_optimization(*where)
                self.optimizer.step()
                self.scheduler.on_minibatch_end(*where)
            with self.scheduler.masked(), torch.no_grad():
                self.model.eval()(torch.randn(4, 1, 8, 8))  # validation
            self.scheduler.on_epoch_end(epoch, self.optimizer, {"loss": 1.0, "top1": 1.0})

    def saved(self) -> dict:
        stored = io.BytesIO()
        with self.scheduler.masked():
            parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
            torch.save({name: part.state_dict() for name, part in parts.items()}, stored)
        stored.seek(0)
        return torch.load(stored, weights_only=True)

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def start(tmp_path, tiny_cnn):
    """A session under the schedule of a class; each begins with the same weights."""
    weights = {name: value.clone() for name, value in tiny_cnn.state_dict().items()}

    def begin(class_name: str, args: str = "{}") -> Session:
        path = tmp_path / "schedule.yaml"
        path.write_text(schedule_of(class_name, args))
        model = type(tiny_cnn)()
        model.load_state_dict(weights)
        return Session(model, path)

    return begin


def test_every_data_driven_pruner_is_here():
    """That of whole groups masks many parameters at different shares: `test_structured_taylor.py` is on it."""
    classes = {name: found for name, found in PRUNERS.items() if isinstance(found, type)}
    found = {name for name, found in classes.items() if issubclass(found, DataDrivenPruner)}
    assert set(SETTINGS) == found - {"StructuredGroupTaylorPruner"}


@every_class
def test_a_schedule_prunes_what_it_promises_and_leaves_no_hooks(class_name, start):
    session = start(class_name)
    session.train(range(5))
    assert hooks(session.model) == 0
    for name, mask in session.scheduler.masks.masked().items():
        assert (mask == 0).float().mean().item() == pytest.approx(0.5)
        with session.scheduler.masked():
            assert not session.model.get_parameter(name)[mask == 0].any()


@every_class
@pytest.mark.parametrize("batches", [3, 12])
def test_a_resumed_run_is_bit_equal(class_name, start, batches):
    """Of 12 mini-batches the first 10 led to masks: the state has 2, and the next masks come of them."""
    whole, killed, resumed = (start(class_name) for _ in range(3))
    whole.train(range(4), batches)
    killed.train(range(2), batches)
    assert killed.pruner.seen == (12 if batches == 12 else 0)
    state = killed.saved()
    resumed.load(state)
    assert resumed.pruner.seen == killed.pruner.seen
    resumed.train(range(2, 4), batches)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    for name, mask in whole.scheduler.masks.masked().items():
        assert torch.equal(resumed.scheduler.masks.masked()[name], mask)


@every_class
def test_an_epoch_that_fails_leaves_nothing_that_the_next_one_minds(class_name, start):
    failed, fresh = start(class_name), start(class_name)
    with pytest.raises(KeyboardInterrupt):
        failed.train([0], fail_at=2)
    failed.load(fresh.saved())
    for session in (failed, fresh):
        session.train([0])
        assert hooks(session.model) == 0
    for name, value in fresh.model.state_dict().items():
        assert torch.equal(failed.model.state_dict()[name], value)


@every_class
def test_masks_may_be_computed_anew_every_few_mini_batches(class_name, start):
    session = start(class_name, "{mini_batch_pruning_frequency: 4}")
    session.train(range(2), batches=12)
    assert session.pruner.seen == 4  # since the masks of the 9th mini-batch of the second epoch
    assert session.scheduler.masks.masked()


def test_what_activations_cannot_tell_is_refused_with_its_line(tmp_path, tiny_cnn):
    path = tmp_path / "schedule.yaml"
    path.write_text(schedule_of("ActivationAPoZRankedFilterPruner").replace("conv2.weight", "fc.weight"))
    with pytest.raises(ScheduleError) as error:
        file_config(tiny_cnn, None, path)
    (fault,) = error.value.faults
    assert fault.line == 7
    assert fault.text.startswith("pruner 'the_pruner', 'fc.weight': no ReLU follows 'fc' (")


def test_functions_cannot_come_from_a_schedule(tmp_path, tiny_cnn):
    path = tmp_path / "schedule.yaml"
    text = schedule_of("FMReconstructionChannelPruner")
    path.write_text(text.replace("desired_sparsity: 0.5", "desired_sparsity: 0.5\n    magnitude_fn: l2_norm"))
    with pytest.raises(ScheduleError) as error:
        file_config(tiny_cnn, None, path)
    (fault,) = error.value.faults
    assert (fault.line, fault.path) == (7, "pruners.the_pruner.magnitude_fn")


def test_one_pruner_may_serve_one_policy_after_the_other(tiny_cnn):
    pruner = PRUNERS["ActivationMeanRankedFilterPruner"]("p", "Filters", 0.5, "conv1.weight")
    scheduler = CompressionScheduler(tiny_cnn)
    for epochs in ([0], [2]):
        scheduler.add_policy(PruningPolicy(pruner), epochs=epochs)
    seen = []
    for epoch in range(3):
        scheduler.on_epoch_begin(epoch)
        seen.append(hooks(tiny_cnn))
        scheduler.on_epoch_end(epoch)
    assert seen == [1, 0, 1]


@every_class
def test_an_epoch_that_is_abandoned_leaves_nothing_on_the_model(class_name, start, tiny_cnn):
    session = start(class_name)
    session.scheduler.on_epoch_begin(0)
    session.scheduler = session.pruner = None
    gc.collect()
    assert hooks(tiny_cnn) == 0
