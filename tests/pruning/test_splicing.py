import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.policy import PruningPolicy
from distiller.pruning.splicing import SplicingPruner, splicing_mask
from distiller.scheduler import CompressionScheduler

values = arrays(np.float32, (12,), elements=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]))


@given(values, arrays(np.bool_, (12,)), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([1.0, 2.0]))
def test_the_previous_mask_holds_between_the_thresholds(weights, before, low, high):
    expected = np.where(np.abs(weights) < low, 0, np.where(np.abs(weights) >= high, 1, before))
    found = splicing_mask(torch.from_numpy(weights), torch.from_numpy(before).float(), low, high)
    assert np.array_equal(found.numpy(), expected)


def test_without_a_previous_mask_what_lies_between_is_kept():
    assert splicing_mask(torch.tensor([0.1, 0.5, 0.9]), None, 0.3, 0.7).tolist() == [0, 1, 1]


def context(model, epoch: int = 0) -> StepContext:
    return StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 9), epoch)


def splicing(**settings) -> SplicingPruner:
    good = {"sensitivities": {"weight": 0.5}, "low_thresh_mult": 0.9, "hi_thresh_mult": 1.1}
    return SplicingPruner("dns", **{**good, **settings})


def test_pruned_weights_that_grow_come_back_and_kept_ones_are_slow_to_go():
    model = nn.Linear(4, 1)
    ctx = context(model)
    pruner = splicing()
    weight = torch.tensor([[0.1, 0.4, 0.8, 1.5]])
    magnitudes = np.abs(weight.numpy())
    threshold = magnitudes.mean() + 0.5 * magnitudes.std(ddof=1)  # 1.0
    low, high = 0.9 * threshold, 1.1 * threshold

    def step(values):
        ctx.masks.put("weight", pruner.compute_masks({"weight": torch.tensor([values])}, ctx)["weight"])
        return ctx.masks["weight"].mask.tolist()[0]  # type: ignore[union-attr]

    between = (low + high) / 2
    assert step([0.1, 0.4, 0.8, 1.5]) == [0, 0, 0, 1]
    assert step([-between, high + 0.01, 0.1, -between]) == [0, 1, 0, 1]
    assert step([-high - 0.01, between, 0.1, low - 0.01]) == [1, 1, 0, 0]


def test_moments_are_those_of_the_first_weights_seen_also_after_a_resume():
    """DEFECT of Distiller: kept on the tensor, they were measured anew, on pruned weights, by a resumed run."""
    model = nn.Linear(50, 4)
    first, later = torch.randn(4, 50), torch.randn(4, 50) * 0.1
    pruner = splicing()
    pruner.compute_masks({"weight": first}, context(model))
    resumed = splicing()
    resumed.load_state_dict(pruner.state_dict())
    magnitudes = np.abs(first.numpy().astype(np.float64))
    low = 0.9 * (magnitudes.mean() + 0.5 * magnitudes.std(ddof=1))
    expected = np.abs(later.numpy()) >= low
    for used in (pruner, resumed):
        mask = used.compute_masks({"weight": later}, context(model, 3))["weight"]
        assert np.array_equal(mask.numpy(), expected)


def test_the_sensitivity_grows_with_the_epochs():
    model = nn.Linear(50, 4)
    weight = torch.randn(4, 50)
    magnitudes = np.abs(weight.numpy().astype(np.float64))
    pruner = splicing(sensitivity_multiplier=0.25)
    for epoch in (0, 4, 8):
        low = 0.9 * (magnitudes.mean() + 0.5 * (1 + 0.25 * epoch) * magnitudes.std(ddof=1))
        mask = pruner.compute_masks({"weight": weight}, context(model, epoch))["weight"]
        assert np.array_equal(mask.numpy(), magnitudes >= low)


def test_weights_come_back_while_training(tiny_cnn):
    """With mask_on_forward_only, as in Distiller's schedule of network surgery."""
    scheduler = CompressionScheduler(tiny_cnn)
    pruner = splicing(sensitivities={"conv2.weight": 0.2})
    args = {"mask_on_forward_only": True, "mini_batch_pruning_frequency": 1, "keep_mask": True}
    scheduler.add_policy(PruningPolicy(pruner, args), starting_epoch=0, ending_epoch=1)
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.1)
    scheduler.on_epoch_begin(0, optimizer)
    scheduler.on_minibatch_begin(0, 0, 2, optimizer)
    masks = scheduler.masks
    pruned = masks["conv2.weight"].mask == 0  # type: ignore[operator]
    assert 0 < int(pruned.sum()) < pruned.numel()
    scheduler.on_minibatch_end(0, 0, 2, optimizer)
    tiny_cnn.conv2.weight.data[pruned] = 5.0  # as an optimizer's step might
    scheduler.on_minibatch_begin(0, 1, 2, optimizer)
    assert bool((masks["conv2.weight"].mask == 1).all())  # type: ignore[union-attr]
    assert bool((tiny_cnn.conv2.weight[pruned] == 5.0).all())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"low_thresh_mult": 1.2},
            "low_thresh_mult must not be more than hi_thresh_mult, got 1.2 and 1.1",
        ),
        ({"sensitivity_multiplier": -1}, "sensitivity_multiplier must be 0 or more, got -1"),
        ({"sensitivities": {"weight": -1}}, "sensitivities['weight'] must be 0 or more, got -1"),
    ],
)
def test_arguments_are_checked(settings, text):
    with pytest.raises(DistillerError) as error:
        splicing(**settings)
    assert str(error.value) == text
