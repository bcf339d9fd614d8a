from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.names import named_parameters
from distiller.pruning import (
    GradientRankedFilterPruner,
    GradientRankedFilterPruner_AGP,
    TaylorFORankedFilterPruner,
    TaylorFORankedFilterPruner_AGP,
    loss_removed,
    squared_loss_removed,
)

BOTH = [GradientRankedFilterPruner, TaylorFORankedFilterPruner]


def context(model, epoch: int = 0) -> StepContext:
    return StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 5), epoch)


def feed(pruner, model, batches) -> list[dict[str, np.ndarray]]:
    """Mini-batches without the optimizer; returns the gradients of each."""
    gradients = []
    params = dict(named_parameters(model))
    selected = {name: params[name] for name in pruner.select(list(params))}
    pruner.attach(model)
    for images in batches:
        model.zero_grad()
        model(images).square().mean().backward()
        pruner.after_backward(selected, context(model))
        gradients.append(
            {name: param.grad.numpy().copy() for name, param in params.items() if param.grad is not None}
        )
    pruner.detach()
    return gradients


def gone(pruner, model, name: str, epoch: int = 0) -> list[int]:
    params = {name: param.detach() for name, param in named_parameters(model)}
    mask = pruner.compute_masks(params, context(model, epoch))[name].flatten(1)
    assert bool((mask == mask[:, :1]).all())
    return torch.nonzero(mask[:, 0] == 0).flatten().tolist()


def images(number: int = 4) -> torch.Tensor:
    return torch.randn(number, 1, 8, 8)


@pytest.mark.parametrize(
    ("pruner_class", "of_sum"),
    [(GradientRankedFilterPruner, lambda s: s), (TaylorFORankedFilterPruner, np.square)],
)
@pytest.mark.parametrize("name", ["conv2.weight", "fc.weight"])
def test_the_filters_of_least_score_go(tiny_cnn, pruner_class, of_sum, name):
    pruner = pruner_class("p", "Filters", 0.5, [name])
    gradients = feed(pruner, tiny_cnn, [images() for _ in range(3)])
    weights = dict(tiny_cnn.named_parameters())[name].detach().numpy().astype(np.float64)
    sums = [(weights * step[name]).reshape(len(weights), -1).sum(axis=1) for step in gradients]
    scores = np.mean([of_sum(one) for one in sums], axis=0)
    np.testing.assert_allclose(pruner.scores(name).numpy(), scores, rtol=1e-4, atol=1e-10)
    assert gone(pruner, tiny_cnn, name) == sorted(np.argsort(scores, kind="stable")[: len(scores) // 2])


def test_the_score_is_how_much_the_loss_falls_without_the_filter():
    """Exactly so for a loss that is linear in the weights."""
    weights, slope = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)

    def loss(w: torch.Tensor) -> float:
        return float((w.double() * slope.double()).sum())

    removed = []
    for i in range(5):
        without = weights.clone()
        without[i] = 0
        removed.append(loss(weights) - loss(without))
    np.testing.assert_allclose(loss_removed(weights, slope).numpy(), removed, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        squared_loss_removed(weights, slope).numpy(), np.square(removed), rtol=1e-5, atol=1e-6
    )


def test_half_precision_is_scored_in_single():
    weights, gradients = torch.full((2, 3), 300.0).half(), torch.full((2, 3), 300.0).half()
    assert loss_removed(weights, gradients).tolist() == [270000.0] * 2  # past the largest half


def test_the_split_into_equal_mini_batches_does_not_matter_to_the_gradient_score(tiny_cnn):
    """The mean of the gradients of equal parts is the gradient of the whole; Taylor's score squares each part."""
    tiny_cnn.bn1.eval()  # its statistics in training are those of a mini-batch
    together = images(12)
    scores: dict[type, list[torch.Tensor]] = {}
    for pruner_class in BOTH:
        for size in (12, 4, 2):
            pruner = pruner_class("p", "Filters", 0.5, "conv2.weight")
            feed(pruner, tiny_cnn, together.split(size))
            scores.setdefault(pruner_class, []).append(pruner.scores("conv2.weight"))
    whole, *parts = scores[GradientRankedFilterPruner]
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-9)
    whole, *parts = scores[TaylorFORankedFilterPruner]
    for part in parts:
        assert (part >= whole * (1 - 1e-4)).all()  # by Jensen's inequality


@pytest.mark.parametrize("pruner_class", BOTH)
def test_a_new_window_begins_with_a_reset(tiny_cnn, pruner_class):
    later = [images() for _ in range(2)]
    fresh, reset = (pruner_class("p", "Filters", 0.5, "conv2.weight") for _ in range(2))
    feed(reset, tiny_cnn, [images()])
    reset.reset()
    assert reset.seen == 0
    for pruner in (fresh, reset):
        feed(pruner, tiny_cnn, later)
    assert torch.equal(fresh.scores("conv2.weight"), reset.scores("conv2.weight"))


@pytest.mark.parametrize("pruner_class", [GradientRankedFilterPruner_AGP, TaylorFORankedFilterPruner_AGP])
def test_agp_forms_follow_the_schedule(tiny_cnn, pruner_class):
    pruner = pruner_class("p", 0.2, 0.7, "3D", "conv2.weight")
    feed(pruner, tiny_cnn, [images()])
    less, more = (gone(pruner, tiny_cnn, "conv2.weight", epoch) for epoch in (0, 4))
    assert (len(less), len(more)) == (1, 4)
    assert set(less) < set(more)


@pytest.mark.parametrize("pruner_class", BOTH)
def test_with_a_leader_its_scores_decide_for_all(pruner_class):
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
    led = pruner_class("p", "Filters", 0.5, ["2.weight", "0.weight"], "Leader")
    alone = pruner_class("p", "Filters", 0.5, "2.weight")
    batches = [images()]
    for pruner in (led, alone):
        feed(pruner, model, batches)
    assert gone(led, model, "0.weight") == gone(led, model, "2.weight") == gone(alone, model, "2.weight")


@pytest.mark.parametrize("pruner_class", BOTH)
def test_mini_batches_whose_gradients_do_not_reach_a_parameter_do_not_count_for_it(tiny_cnn, pruner_class):
    expected, pruner = (pruner_class("p", "Filters", 0.5, "conv2.weight") for _ in range(2))
    batches = [images()]
    feed(expected, tiny_cnn, batches)
    tiny_cnn.zero_grad()
    pruner.after_backward({"conv2.weight": tiny_cnn.conv2.weight}, context(tiny_cnn))
    feed(pruner, tiny_cnn, batches)
    assert torch.equal(pruner.scores("conv2.weight"), expected.scores("conv2.weight"))
    assert pruner.seen == 2


def test_a_parameter_that_no_gradient_reaches_is_refused_by_name(tiny_cnn):
    tiny_cnn.conv2.weight.requires_grad_(False)
    pruner = GradientRankedFilterPruner("p", "Filters", 0.5, "conv2.weight")
    feed(pruner, tiny_cnn, [images()])
    with pytest.raises(DistillerError) as error:
        gone(pruner, tiny_cnn, "conv2.weight")
    assert str(error.value) == (
        "pruner 'p', 'conv2.weight': there are no scores to rank by after 1 mini-batches; no gradient reaches "
        "the parameter: train it, or take another pruner"
    )


def test_gradients_that_are_nan_are_refused(tiny_cnn):
    pruner = TaylorFORankedFilterPruner("p", "Filters", 0.5, "conv2.weight")
    feed(pruner, tiny_cnn, [torch.full((2, 1, 8, 8), float("inf"))])
    with pytest.raises(
        DistillerError, match=r"^pruner 'p', 'conv2\.weight': cannot rank by scores, got 6 NaN"
    ):
        gone(pruner, tiny_cnn, "conv2.weight")
