from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distiller.early_exit import (
    CRITERIA,
    EarlyExitMgr,
    ExitRule,
    attach_exits_to,
    certainty,
    early_exits,
    every_exit,
    exit_names,
    exits_of,
)
from distiller.errors import DistillerError, UsageError
from distiller.models import create_model
from distiller.names import named_modules
from tests.early_exit.nets import Chain, Residual, images, seeded

COUNT = 24


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = seeded(Residual)
    attach_exits_to(model, ["stem", "block1", "block2"])
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)  # answers of all certainties
    return model.eval()


def all_outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with every_exit(model), torch.no_grad():
        return model.eval()(x)


def chosen_afterwards(model: nn.Module, rule: ExitRule, x: torch.Tensor):
    """Every exit of every image computed, and the choice made then, image by image."""
    outputs = all_outputs(model, x)
    logits, exits = [], []
    for image in range(len(x)):
        for index in range(len(outputs)):
            if index == len(outputs) - 1 or rule.leaves(index, outputs[index][image : image + 1])[0]:
                logits.append(outputs[index][image])
                exits.append(index)
                break
    return torch.stack(logits), exits


def quantile(model: nn.Module, index: int, criterion: str, share: float) -> float:
    sure = certainty(all_outputs(model, images(COUNT))[index], criterion)
    between = float(sure.quantile(1 - share, interpolation="midpoint"))
    return between if criterion == "confidence" else -between


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(CRITERIA),
    st.lists(st.sampled_from([None, 0.1, 0.37, 0.63, 0.9]), min_size=3, max_size=3),
)
def test_answers_are_those_of_computing_all_exits_and_choosing_afterwards(model, criterion, shares):
    thresholds = tuple(
        None if share is None else quantile(model, index, criterion, share)
        for index, share in enumerate(shares)
    )
    rule, x = ExitRule(criterion, thresholds), images(COUNT)
    expected, where = chosen_afterwards(model, rule, x)
    with early_exits(model, rule) as answer:
        logits, exits = answer(x)
    assert exits.tolist() == where
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_layers_see_only_the_images_that_are_left(model):
    thresholds = (quantile(model, 0, "entropy", 0.5), quantile(model, 1, "entropy", 0.8), None)
    seen: dict[str, list[int]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.setdefault(name, []).append(len(inputs[0]))
        )
        for name, module in named_modules(model)
        if name.endswith(("conv", "fc", "branch_net"))
    ]
    with early_exits(model, ExitRule("entropy", thresholds)) as answer:
        exits = answer(images(COUNT)).exits
    for handle in handles:
        handle.remove()
    first, second = (int((exits == index).sum()) for index in (0, 1))
    assert first > 0
    assert second > 0
    assert seen["stem.branch_net"] == [COUNT]
    assert seen["block1.branched_module.conv"] == seen["block1.branch_net"] == [COUNT - first]
    assert seen["block2.branched_module.conv"] == seen["fc"] == [COUNT - first - second]
    assert "block2.branch_net" not in seen  # it is closed


def test_when_all_have_left_nothing_behind_runs(model):
    ran = []
    handle = model.block2.register_forward_hook(lambda *_: ran.append(1))
    with early_exits(model, ExitRule("confidence", (0.0, 1.0, 1.0))) as answer:
        logits, exits = answer(images(5))
    handle.remove()
    assert not ran
    assert exits.tolist() == [0] * 5
    torch.testing.assert_close(logits, all_outputs(model, images(5))[0])


@pytest.mark.parametrize("size", [1, 2, 7])
def test_any_batch_size_is_answered_alike(model, size):
    rule = ExitRule("entropy", (quantile(model, 0, "entropy", 0.5),) * 3)
    x = images(14)
    with early_exits(model, rule) as answer:
        whole = answer(x)
        parts = [answer(part) for part in x.split(size)]
    assert torch.cat([part.exits for part in parts]).tolist() == whole.exits.tolist()
    torch.testing.assert_close(torch.cat([part.logits for part in parts]), whole.logits)


def test_labels_decide_nothing():
    """Distiller let an image leave by its loss, which takes the label: nobody has it in use.

    The session is not even given labels; the job's exits are the same with shuffled labels
    (`tests/apputils/test_early_exit_job.py`).
    """
    model = seeded(Chain)
    attach_exits_to(model, ["relu1"])
    with early_exits(model, ExitRule("confidence", (0.11,))) as answer, pytest.raises(TypeError):
        answer(images(2), torch.zeros(2))  # type: ignore[call-arg]


def test_afterwards_the_model_is_as_before(model):
    with early_exits(model, ExitRule("confidence", (0.5, 0.5, 0.5))) as answer:
        answer(images(3))
        with pytest.raises(RuntimeError):
            answer(torch.zeros(3, 2, 8, 8))
    assert all(point.gate is None for point in exits_of(model))
    copy.deepcopy(model)
    assert isinstance(model(images(2)), torch.Tensor)
    model.train()
    with early_exits(model, ExitRule("confidence", (0.5, 0.5, 0.5))):
        assert not model.training
    assert model.training
    model.eval()


def test_a_residual_network_of_ours():
    model = create_model(False, "digits", "resnet20_cifar_earlyexit").eval()
    x = images(9)
    rule = ExitRule("entropy", (float(-certainty(all_outputs(model, x)[0], "entropy").median()) + 1e-5,))
    expected, where = chosen_afterwards(model, rule, x)
    with early_exits(model, rule) as answer:
        logits, exits = answer(x)
    assert exits.tolist() == where
    assert 0 < sum(where) < 9
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_models_and_rules_that_do_not_fit_are_refused(model):
    with (
        pytest.raises(UsageError, match="^early exit: the model has no exits; attach some$"),
        early_exits(seeded(Chain), ExitRule("entropy", ())),
    ):
        pass
    with (
        pytest.raises(UsageError, match="^early exit: the model has 3 exits, got 1 thresholds"),
        early_exits(model, ExitRule("entropy", (0.5,))),
    ):
        pass


def test_an_exit_that_sees_no_row_an_image_is_refused():
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.fc = nn.Linear(8, 6), nn.Linear(6, 10)
            self.input_shape = (1, 1, 8, 8)

        def forward(self, x):
            rows = self.rows(x.reshape(-1, 8))
            return self.fc(rows.reshape(len(x), 8, 6).mean(1))

    model = Rows()
    EarlyExitMgr().attach_exits(model, [("rows", nn.Linear(6, 10))])
    with (
        early_exits(model, ExitRule("confidence", (0.5,))) as answer,
        pytest.raises(DistillerError) as caught,
    ):
        answer(images(3))
    assert str(caught.value) == (
        "early exit: exit 1 sees a batch of 24 where 3 images are left; it must read a tensor of one row an image"
    )
    assert exit_names(model) == ("rows",)
