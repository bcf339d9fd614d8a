"""Checkpoints made by hand: every part replaced by junk is refused with its place, or harmless.

A sound checkpoint is changed in one place at a time; what reads without an error must train on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distiller.apputils import checkpoint as checkpoints
from distiller.apputils import checkpoint_format
from distiller.apputils.checkpoint import (
    load_checkpoint,
    load_state,
    read_checkpoint,
    restore_optimizer,
    restore_quantizer,
    restore_rng_state,
    restore_scheduler,
    save_checkpoint,
)
from distiller.apputils.measurement import Measurement, measurement_of
from distiller.apputils.rng_state import capture_rng_state
from distiller.apputils.scores import ScoreTracker
from distiller.errors import CheckpointError, DistillerError
from distiller.masks import MaskRules
from distiller.policy import LRPolicy, PruningPolicy
from distiller.quantization import PostTrainLinearQuantizer
from distiller.scheduler import CompressionScheduler
from tests.doubles import HalfPruner

JUNK = [
    None, True, -1, 2.5, math.nan, 10**400, "junk", b"junk", [1], (1,), {}, {"junk": 1}, {3: 4},
    torch.zeros(3), torch.zeros((), dtype=torch.complex64),
]  # fmt: skip
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
}


OF_NORM = ("weight", "bias", "running_mean", "running_var")
STAY = {"fc.weight": [(1, [0, 1, 3])], **{f"norm.{name}": [(0, [0, 1, 3])] for name in OF_NORM}}


class Net(nn.Module):
    """Of 3 inputs; not `thin`, of 4, so that a checkpoint's recipe is carried out."""

    def __init__(self, thin=False):
        super().__init__()
        self.arch, self.dataset, self.input_shape = "net", "digits", (1, 3)
        if thin:
            told = {"norm": {"num_features": 3}, "fc": {"in_features": 3}}
            self.thinning_recipes = [{"modules": told, "parameters": STAY, "classes": {}}]
        self.norm = nn.BatchNorm1d(3 if thin else 4)
        self.fc = nn.Linear(3 if thin else 4, 2)

    def forward(self, x):
        return self.fc(self.norm(x))


def made(kind, thin=False):
    """A model, its optimizer of class `kind`, and its scheduler."""
    model = Net(thin)
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = CompressionScheduler(model)
    scheduler.add_policy(PruningPolicy(HalfPruner("fc.weight")), epochs=[0, 1, 2], name="pruner half")
    rates = LRPolicy(torch.optim.lr_scheduler.StepLR(optimizer, 1))
    scheduler.add_policy(rates, epochs=[0, 1, 2], name="lr_scheduler step")
    return model, optimizer, scheduler


def train(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()


def sound(folder: Path, kind: str) -> dict[str, Any]:
    """A checkpoint after one step, with masks, dense copies and all that the program keeps."""
    model, optimizer, scheduler = made(kind, thin=True)
    train(model, optimizer)
    tracker = ScoreTracker()
    tracker.step(0, 50.0, 90.0, 1.0, 0.5, 10, True)
    reference = dict.fromkeys(Measurement.__dataclass_fields__, 1) | {
        "latency_single": None,
        "latency_batch": None,
    }
    extras = {"seed": 3, "tracker": tracker.state_dict(), "reference": reference | {"source": None}}
    scheduler.masks.put(
        "fc.weight", torch.tensor([[1.0, 0, 1], [0, 1, 0]]), rules=MaskRules(forward_only=True)
    )
    with scheduler.masked():
        path = save_checkpoint(0, "net", model, optimizer, scheduler, extras, dir=folder)
    document = torch.load(path, weights_only=True)
    document["rng"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    return document


def resumed(path: Path, kind: str) -> None:
    """All that a run takes from a checkpoint, and a step from there."""
    checkpoint = read_checkpoint(path)
    model, optimizer, scheduler = made(kind)
    load_state(model, checkpoint)
    restore_scheduler(scheduler, checkpoint)
    restore_optimizer(model, checkpoint, optimizer)
    if checkpoint.rng is not None:
        restore_rng_state(checkpoint.rng)
    if checkpoint.extras.get("reference") is not None:
        measurement_of(checkpoint.extras["reference"], str(path))
    tracker = ScoreTracker()
    tracker.load_state_dict(checkpoint.extras.get("tracker", {"scores": []}))
    assert tracker.step(1, 100.0, 100.0, 0.0, 0.5, 10, True)
    assert int(checkpoint.extras.get("seed", 0)) >= 0
    assert checkpoint.epoch is None or checkpoint.epoch >= 0
    scheduler.on_epoch_begin(1, optimizer)
    scheduler.on_minibatch_begin(1, 0, 1, optimizer)
    train(model, optimizer)
    scheduler.on_minibatch_end(1, 0, 1, optimizer)
    scheduler.on_epoch_end(1, optimizer, {"loss": 1.0, "top1": 50.0})
    train(model, optimizer)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    load_checkpoint(Net(), path)


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every branch and leaf; of what there is many times of one kind only the first."""
    if place:
        yield place
    if isinstance(value, dict):
        is_table = len(value) > 2 and (0 in value or place[-1:] == ("reference",))
        for key in list(value)[: 2 if is_table else None]:
            yield from places(value[key], (*place, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value[: 1 if len(value) > 9 else None]):
            yield from places(item, (*place, index))


def changed(value: Any, place: tuple[Any, ...], junk: Any) -> Any:
    """A copy with `junk` at `place`; LEFT_OUT removes the key."""
    key, *rest = place
    if isinstance(value, dict) and junk is LEFT_OUT and not rest:
        return {name: item for name, item in value.items() if name != key}
    replaced = changed(value[key], tuple(rest), junk) if rest else junk
    if isinstance(value, dict):
        return {**value, key: replaced}
    items = [*value[:key], *([] if junk is LEFT_OUT and not rest else [replaced]), *value[key + 1 :]]
    return type(value)(items)


LEFT_OUT = object()


def copied(value: Any) -> Any:
    """As far as a run could write into it."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.fixture(autouse=True)
def _generators_left_as_they_were():
    state = capture_rng_state()
    yield
    restore_rng_state(state)


@pytest.fixture
def put(monkeypatch):
    """Puts a document in the place of what `junk.pth.tar` holds: a file for each would take long."""
    monkeypatch.setattr(checkpoint_format, "_check_sums", lambda path: None)

    def put(document: Any) -> Path:
        monkeypatch.setattr(checkpoints, "load_plain", lambda path: copied(document))
        return Path("junk.pth.tar")

    return put


def escapes(put, document: Any, starts: tuple[Any, ...], run: Any) -> list[Any]:
    """What is not refused with the file named, and fails otherwise: (place, junk, error)."""
    escaped = []
    for place in places(document):
        if place[: len(starts)] != starts:
            continue
        for junk in [*JUNK, LEFT_OUT]:
            path = put(changed(document, place, junk))
            try:
                run(path)
            except DistillerError as error:
                if not str(error).startswith(str(path)):
                    escaped.append((place, junk, f"no file: {error}"))
            except Exception as error:
                escaped.append((place, junk, repr(error)))
    return escaped


@pytest.mark.parametrize(("kind", "starts"), [("SGD", ()), ("Adam", ("optimizer",))])
def test_whatever_is_replaced_by_junk_is_refused_with_the_file_named_or_harmless(tmp_path, put, kind, starts):
    document = sound(tmp_path, kind)
    resumed(put(document), kind)
    assert escapes(put, document, starts, lambda path: resumed(path, kind)) == []


def test_so_is_junk_in_a_checkpoint_of_distiller(put):
    document = {
        "epoch": 7,
        "arch": "net",
        "dataset": "digits",
        "state_dict": {f"module.{name}": value for name, value in Net(thin=True).state_dict().items()},
        "optimizer_type": "torch.optim.sgd.SGD",
        "compression_sched": {"masks_dict": {"module.fc.weight": torch.ones(2, 3), "module.fc.bias": None}},
        "thinning_recipes": [
            {
                "class": "distiller.thinning.ThinningRecipe",
                "args": (
                    {
                        "module.norm": {
                            "num_features": 3,
                            **{name: STAY[f"norm.{name}"][0] for name in OF_NORM[2:]},
                        }
                    },
                    {f"module.{name}": kept for name, kept in STAY.items() if "running" not in name},
                ),
            }
        ],
        "extras": {"best_top1": 91.78},
    }
    resumed(put(document), "SGD")
    assert escapes(put, document, (), lambda path: resumed(path, "SGD")) == []


def test_so_is_junk_in_the_description_of_a_quantizer(tmp_path, put, tiny_cnn):
    twin = copy.deepcopy(tiny_cnn)
    PostTrainLinearQuantizer(
        tiny_cnn, bits_activations=None, overrides={"fc": {"bits_weights": 4}}
    ).prepare_model(torch.zeros(1, 1, 8, 8))
    document = torch.load(save_checkpoint(0, "tiny", tiny_cnn, dir=tmp_path), weights_only=True)

    def rebuilt(path: Path) -> None:
        model = copy.deepcopy(twin)
        checkpoint = read_checkpoint(path)
        restore_quantizer(model, checkpoint)
        load_state(model, checkpoint)

    rebuilt(put(document))
    assert escapes(put, document, ("quantizer",), rebuilt) == []


WHOLE = "must be a whole number"
FRESH = "start with a fresh optimizer"


@pytest.mark.parametrize(
    ("place", "junk", "text"),
    [
        (("epoch",), -1, "'epoch' must be at least 0, got int -1"),
        (("epoch",), True, f"'epoch' {WHOLE}, got bool True"),
        (("epoch",), "1", f"'epoch' {WHOLE}, got str '1'"),
        (("epoch",), None, f"'epoch' {WHOLE}, got NoneType None"),
        (("arch",), 3, "'arch' must be text, got int 3"),
        (("arch",), LEFT_OUT, "'arch' is missing"),
        (("format",), 3, "'format' must be 'distiller checkpoint', got int 3"),
        (("format_version",), "1", f"'format_version' {WHOLE}, got str '1'"),
        (("archs",), "x", "'archs' is unknown; did you mean 'arch'?"),
        (("input_shape",), [1], "'input_shape' must be a tuple, got list [1]"),
        (("input_shape",), (1, -1), "'input_shape' must be a tuple of whole numbers from 0, or of such tuples, "
         "got tuple (1, -1)"),
        (("extras", "seed"), "x", f"'extras.seed' {WHOLE}, got str 'x'"),
        (("extras", "seed"), 2**70, f"'extras.seed' must be less than 2**63, got int {2**70}"),
        (("epoch",), 2**63, f"'epoch' must be less than 2**63, got int {2**63}"),
        (("extras", "best_top1"), "x", "'extras.best_top1' must be a finite number, got str 'x'"),
        (("extras", "quantized_top1"), [1], "'extras.quantized_top1' must be a finite number, got list [1]"),
        (("extras", "reference"), {}, "'extras.reference' must be a model's figures, with 'top1_correct' as on a "
         "results card, got dict {}"),
        (("extras", "reference"), {"a": 1}, "'extras.reference' must be a model's figures, with 'top1_correct' as on "
         "a results card, got dict {'a': 1}"),
        (("extras", "before_quantization"), {}, "'extras.before_quantization' must be a model's figures, with "
         "'top1_correct' as on a results card, got dict {}"),
        (("extras", "tracker"), 3, "'extras.tracker' must be a dict, got int 3"),
        (("extras", "tracker", "scores", 0, "top1"), "x",
         "'extras.tracker.scores[0].top1' must be a finite number, got str 'x'"),
        (("extras", "reference", "n"), "x",
         "'extras.reference' must be a model's figures, with 'n' as on a results card, got a dict of 20"),
        (("rng", "torch"), torch.zeros(3),
         "'rng.torch' must be a state of PyTorch's generator of random numbers, got a tensor of shape (3,)"),
        (("rng", "numpy", 2), 10**6, "'rng.numpy' must be a state of numpy's generator of random numbers, "
         "got a tuple of 5"),
        (("scheduler", "masks", "fc.weight"), 3, "'scheduler.masks['fc.weight']' must be a dict, got int 3"),
        (("scheduler", "masks", "fc.weight", "pruner"), "x",
         "'scheduler.masks['fc.weight'].pruner' must be a tensor, got str 'x'"),
        (("scheduler", "masks", "fc.weight", "pruner"), torch.ones(3), "scheduler.masks['fc.weight']['pruner']: "
         "must be a real tensor of the parameter's shape (2, 3), got shape (3,)"),
        (("scheduler", "masks", "fc.weight", "pruner"), torch.full((2, 3), math.nan),
         "scheduler.masks['fc.weight']['pruner']: must not be negative, NaN or infinite"),
        (("scheduler", "rules", "fc.weight", "pruner", "forward"), True,
         "'scheduler.rules['fc.weight'].pruner.forward' is unknown"),
        (("scheduler", "rules", "fc.weight", "pruner", "forward_only"), 1,
         "'scheduler.rules['fc.weight'].pruner.forward_only' must be true or false, got int 1"),
        (("scheduler", "dense", "fc.weight"), torch.ones(3, 2), "scheduler.dense['fc.weight']: must be a real tensor "
         "of the parameter's shape (2, 3), got shape (3, 2)"),
        (("scheduler", "dense", "fc9.weight"), torch.ones(2, 3),
         "scheduler.dense['fc9.weight']: the model has no such parameter"),
        (("scheduler", "policies", 0), "x", "'scheduler.policies[0]' must be a dict, got str 'x'"),
        (("scheduler", "policies", 0, "state"), {},
         "'scheduler.policies' has a state that does not fit its policy (KeyError: 'epochs'); "
         "start anew from the checkpoint's weights"),
        (("scheduler", "policies", 1, "state", "gamma"), "x",
         "'scheduler.policies[1].state.gamma' must be a finite number from 0, got str 'x'"),
        (("scheduler", "policies", 1, "state", "_last_lr"), [1e308],
         "'scheduler.policies[1].state._last_lr[0]' must be at most 3.4e+38, got float 1e+308"),
        (("scheduler", "policies", 1, "state", "get_lr"), 1, "'scheduler.policies[1].state.get_lr' is unknown"),
        (("thinning_recipes", 0, "parameters", "fc.weight", 0), 3, "thinning_recipes[0]: thinning recipe: fc.weight: "
         "must be (dimension, indices), got 3"),
        (("thinning_recipes", 0, "modules", "fc", "in_features"), 4, "thinning_recipes[0]: 'fc' would be told that "
         "its weight has the sizes (2, 4), it has (2, 3)"),
        (("thinning_recipes", 0, "modules", "fc", "forward"), 4, "thinning_recipes[0]: 'fc.forward' must be left out, "
         "got 4"),
        (("thinning_recipes", 0, "modules", "norm", "num_features"), "x", "thinning_recipes[0]: thinning recipe: "
         "norm.num_features: must be a number or numbers, got 'x'"),
        (("thinning_recipes", 0, "classes"), {"fc": 3}, "'thinning_recipes[0].classes.fc' must be text, got int 3"),
        (("thinning_recipes",), LEFT_OUT, "'thinning_recipes' is missing"),
        (("optimizer", "param_names"), LEFT_OUT, "'optimizer.param_names' is missing"),
        (("optimizer", "state_dict", "param_groups", 0, "lr"), -1, "'optimizer.state_dict.param_groups[0].lr' "
         f"must be a finite number from 0, got int -1; {FRESH}"),
        (("optimizer", "state_dict", "param_groups", 0, "lr"), 1e308, "'optimizer.state_dict.param_groups[0].lr' "
         f"must be at most 3.4e+38, got float 1e+308; {FRESH}"),
        (("optimizer", "state_dict", "param_groups", 0, "foreach"), 5,
         f"'optimizer.state_dict.param_groups[0].foreach' must be true, false or null, got int 5; {FRESH}"),
        (("optimizer", "state_dict", "param_groups", 0, "initial_lr"), "x",
         f"'optimizer.state_dict.param_groups[0].initial_lr' must be a finite number from 0, got str 'x'; {FRESH}"),
        (("optimizer", "state_dict", "param_groups", 0, "momentum"), LEFT_OUT,
         f"'optimizer.state_dict.param_groups[0].momentum' is missing; {FRESH}"),
        (("optimizer", "state_dict", "param_groups", 0, "params"), [0, 1, 2, 2],
         f"'optimizer.state_dict.param_groups[0].params' must be [0, 1, 2, 3], got [0, 1, 2, 2]; {FRESH}"),
        (("optimizer", "state_dict", "state", 2, "momentum_buffer"), torch.ones(3),
         "'optimizer.state_dict.state[2].momentum_buffer' must be a tensor of real numbers, of the parameter's "
         f"shape (2, 3), got a tensor of shape (3,); {FRESH}"),
        (("optimizer", "state_dict", "state", 9), {},
         f"'optimizer.state_dict.state[9]' is of no parameter, the optimizer has 4; {FRESH}"),
        (("optimizer", "state_dict", "state", 0, "exp_avg"), torch.ones(3),
         "'optimizer.state_dict.state[0].exp_avg' must be left out: SGD keeps no such thing, "
         f"got a tensor of shape (3,); {FRESH}"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_the_place_is_told_with_what_was_wanted_and_what_was_got(tmp_path, put, place, junk, text):
    path = put(changed(sound(tmp_path, "SGD"), place, junk))
    with pytest.raises(CheckpointError) as caught:
        resumed(path, "SGD")
    assert str(caught.value) == f"junk.pth.tar: {text}"
