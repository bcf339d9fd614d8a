from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.policy import PruningPolicy
from distiller.pruning import MovementPruner, agp_sparsity, movement_mask
from distiller.scheduler import CompressionScheduler

STRAIGHT_THROUGH = {"mask_on_forward_only": True, "use_double_copies": True}


class Weights(nn.Module):
    """Four weights, whose gradients a test sets."""

    def __init__(self, values=(1.0, 2.0, 3.0, 4.0)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


class Run:
    """Epochs of one mini-batch, with gradients as given."""

    def __init__(self, model: Weights, pruner: MovementPruner, args=None, epochs: int = 10) -> None:
        self.model, self.scheduler = model, CompressionScheduler(model)
        self.scheduler.add_policy(PruningPolicy(pruner, args), starting_epoch=0, ending_epoch=epochs)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.epoch = 0

    def step(self, gradients) -> list[int]:
        """One epoch; returns which weights are pruned at its end."""
        where = self.epoch, 0, 1, self.optimizer
        self.scheduler.on_epoch_begin(self.epoch, self.optimizer)
        self.scheduler.on_minibatch_begin(*where)
        self.optimizer.zero_grad()
        (self.model.w * torch.tensor(gradients)).sum().backward()
        self.scheduler.before_parameter_optimization(*where)
        self.optimizer.step()
        self.scheduler.on_minibatch_end(*where)
        with self.scheduler.masked():
            pruned = torch.nonzero(self.model.w == 0).flatten().tolist()
        self.scheduler.on_epoch_end(self.epoch, self.optimizer, {})
        self.epoch += 1
        return pruned


def scores_of(pruner: MovementPruner) -> Tensor:
    return pruner.state_dict()["scores"]["w"]


def test_scores_are_minus_the_sum_of_weight_times_gradient_over_all_steps():
    model, pruner = Weights(), MovementPruner("p", 0.0, 0.01, "w")
    run = Run(model, pruner)
    rng = np.random.default_rng(0)
    weights, scores = np.array([1.0, 2, 3, 4]), np.zeros(4)
    for _ in range(5):  # masks are computed, and `seen` reset, after each
        gradients = rng.normal(size=4)
        run.step([float(g) for g in gradients])
        scores -= weights * gradients
        weights -= 0.1 * gradients
    np.testing.assert_allclose(scores_of(pruner).numpy(), scores, rtol=1e-5)
    assert pruner.seen == 0


def test_what_moves_towards_zero_goes_however_large_it_is():
    run = Run(Weights(), MovementPruner("p", 0.5, 0.6, "w"))
    assert run.step([-1.0, 1.0, -1.0, 5.0]) == [1, 3]


@pytest.mark.parametrize(
    ("args", "after"),
    [
        (STRAIGHT_THROUGH, [0, 2]),  # weights 1 and 3 move away from zero: they are back
        ({}, [1, 3]),  # what is pruned is zero, does not move and stays pruned
    ],
)
def test_pruned_weights_return_if_the_policy_lets_them_move(args, after):
    model = Weights()
    run = Run(model, MovementPruner("p", 0.5, 0.6, "w"), args)
    run.step([-1.0, 1.0, -1.0, 1.0])
    assert run.step([-1.0, 1.0, -1.0, 1.0]) == [1, 3]
    for _ in range(3):
        pruned = run.step([4.0, -4.0, 4.0, -4.0])
    assert pruned == after
    if args:  # with the values that they have been trained to while they were pruned
        np.testing.assert_allclose(model.w[[1, 3]].detach(), [2 - 0.2 + 1.2, 4 - 0.2 + 1.2], rtol=1e-6)


def test_gradients_pass_straight_through_the_mask_to_the_dense_weight():
    """The score of a pruned weight is of its dense value, which the forward pass does not see."""
    pruner = MovementPruner("p", 0.25, 0.3, "w")
    run = Run(Weights(), pruner, STRAIGHT_THROUGH)
    assert run.step([1.0, 0.0, 0.0, 0.0]) == [0]
    before = scores_of(pruner)[0].item()
    run.step([2.0, 0.0, 0.0, 0.0])
    assert scores_of(pruner)[0].item() == pytest.approx(before - 2.0 * 0.9)


def test_the_sparsity_follows_the_papers_cubic():
    torch.manual_seed(1)
    model, epochs = Weights(torch.randn(1000).tolist()), 5
    run = Run(model, MovementPruner("p", 0.1, 0.9, "w"), epochs=epochs)
    counts = [len(run.step(torch.randn(1000).tolist())) for _ in range(epochs)]
    assert counts == [int(1000 * agp_sparsity(e / (epochs - 1), 0.1, 0.9) + 1e-6) for e in range(epochs)]


def test_of_equal_scores_the_lower_index_goes_and_zeros_first():
    assert movement_mask(torch.zeros(5), torch.ones(5), 0.4).tolist() == [0, 0, 1, 1, 1]
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert movement_mask(torch.tensor([0.0, 1.0, 9.0, 2.0]), weights, 0.5).tolist() == [0, 1, 0, 1]


def test_a_parameter_without_gradients_is_refused_by_name():
    model = Weights()
    pruner = MovementPruner("p", 0.1, 0.5, "w")
    ctx = StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 5), 0)
    pruner.after_backward({"w": model.w}, ctx)
    with pytest.raises(DistillerError) as error:
        pruner.compute_masks({"w": model.w}, ctx)
    assert str(error.value) == (
        "pruner 'p', 'w': there are no scores to rank by after 1 mini-batches; no gradient reaches the "
        "parameter: train it, or take another pruner"
    )


def test_scores_that_are_nan_are_refused():
    with pytest.raises(DistillerError, match="^cannot rank by scores, got 1 NaN in 2 of them"):
        movement_mask(torch.tensor([0.0, float("nan")]), torch.ones(2), 0.5)
