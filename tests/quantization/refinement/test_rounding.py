"""Learned and tried roundings against all roundings, in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from distiller.quantization.refinement.adaround_settings import AdaRoundSettings
from distiller.quantization.refinement.rounding import (
    RoundingProblem,
    best_rounding,
    better_rows,
    learned_rounding,
    losses,
    nearest,
    objective_slope,
    rounded,
)

SETTINGS = AdaRoundSettings(iterations=300, batch_size=128)


def problem(
    weight: Tensor,
    inputs: Tensor,
    relu: bool = False,
    scale: float = 1.0,
    bits: int = 4,
    bias: Tensor | None = None,
    targets: Tensor | None = None,
) -> RoundingProblem:
    """Of one group: weight (outputs, fan-in), inputs (samples, fan-in)."""
    bias = torch.zeros(len(weight)) if bias is None else bias
    targets = inputs @ weight.T + bias if targets is None else targets
    return RoundingProblem(
        weight[None],
        torch.tensor(scale),
        torch.tensor(0, dtype=torch.int32),
        -(2 ** (bits - 1)),
        2 ** (bits - 1) - 1,
        inputs[None],
        targets[None],
        bias[None, None],
        relu,
    )


def numpy_loss(p: RoundingProblem, levels: np.ndarray, output: int) -> float:
    x, t = p.inputs[0].double().numpy(), p.targets[0, :, output].double().numpy()
    y = x @ (levels * float(p.scale)) + float(p.bias[0, 0, output])
    if p.relu:
        y, t = np.maximum(y, 0), np.maximum(t, 0)
    return float(np.mean((y - t) ** 2))


def numpy_optimum(p: RoundingProblem, output: int) -> float:
    below = np.floor(p.weight[0, output].double().numpy() / float(p.scale))
    ways = itertools.product((0, 1), repeat=len(below))
    return min(numpy_loss(p, np.clip(below + way, p.qmin, p.qmax), output) for way in ways)


def correlated(samples: int, fan_in: int, seed: int = 0) -> Tensor:
    """Not negative, as behind a ReLU, and alike."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(samples, 2, generator=generator) @ torch.randn(2, fan_in, generator=generator)
    return torch.relu(common + 0.3 * torch.randn(samples, fan_in, generator=generator))


def test_where_inputs_are_equal_as_many_weights_go_up_as_keep_the_sum() -> None:
    # All four inputs are the same x: only the sum of the weights counts, 1.6. To nearest they are 0.
    p = problem(torch.tensor([[0.37, 0.39, 0.41, 0.43]]), torch.randn(64, 1).expand(64, 4))
    assert nearest(p).sum() == 0
    assert learned_rounding(p, SETTINGS, torch.Generator().manual_seed(0)).sum() == 2
    assert best_rounding(p).sum() == 2


@pytest.mark.parametrize("relu", [False, True])
def test_all_roundings_are_tried(relu) -> None:
    weight = torch.randn(5, 8) * 2
    p = problem(weight, correlated(200, 8), relu, scale=0.7, bias=0.3 * torch.randn(5))
    found = losses(p, rounded(p, best_rounding(p)))[0]
    for output, loss in enumerate(found.tolist()):
        assert loss == pytest.approx(numpy_optimum(p, output), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("relu", [False, True])
def test_learned_rounding_comes_near_the_optimum(relu) -> None:
    p = problem(torch.randn(12, 10) * 2, correlated(400, 10), relu, bias=0.3 * torch.randn(12))
    up = learned_rounding(p, SETTINGS, torch.Generator().manual_seed(0))
    learned, plain = losses(p, rounded(p, up)).sum().item(), losses(p, rounded(p, nearest(p))).sum().item()
    optimum = sum(numpy_optimum(p, output) for output in range(12))
    assert plain > 2 * optimum
    assert learned - optimum < 0.35 * (plain - optimum)


def test_losses_are_those_of_numpy() -> None:
    p = problem(torch.randn(3, 6), correlated(100, 6), relu=True, bias=torch.randn(3), scale=0.25)
    up = (torch.rand(1, 3, 6) < 0.5).float()
    weight = rounded(p, up)
    for output in range(3):
        levels = np.clip(np.floor(p.weight[0, output].numpy() * 4) + up[0, output].numpy(), -8, 7)
        np.testing.assert_allclose(weight[0, output].numpy(), levels / 4, rtol=1e-6)
        expected = numpy_loss(p, levels, output)
        assert losses(p, weight)[0, output].item() == pytest.approx(expected, rel=1e-5)


def test_rounding_to_nearest_is_half_to_even() -> None:
    p = problem(torch.tensor([[0.5, 1.5, 2.5, -0.5, 0.6, -1.2]]), torch.ones(1, 6))
    assert rounded(p, nearest(p)).flatten().tolist() == [0, 2, 2, 0, 1, -1]


def test_weights_beyond_the_grid_stay_at_its_ends() -> None:
    p = problem(torch.tensor([[9.0, -20.0, 1.0]]), torch.randn(32, 3))
    for up in (best_rounding(p), learned_rounding(p, SETTINGS, torch.Generator())):
        assert rounded(p, up).flatten().tolist()[:2] == [7, -8]


def test_pruned_weights_stay_zero() -> None:
    weight = torch.tensor([[0.4, 0.0, 0.4, 0.0]])
    x = torch.randn(64, 1).expand(64, 4)
    p = problem(weight, x, targets=x @ torch.full((4, 1), 1.0))  # 0.8 is asked to be 4: all would go up
    for up in (best_rounding(p), learned_rounding(p, SETTINGS, torch.Generator())):
        assert rounded(p, up).flatten().tolist() == [1, 0, 1, 0]


def test_errors_below_the_relu_do_not_count() -> None:
    # The first output is always negative: nothing to be gained. The second has to be right.
    x = torch.ones(16, 4)
    weight = torch.tensor([[-0.37, -0.39, -0.41, -0.43], [0.37, 0.39, 0.41, 0.43]])
    with_relu, without = problem(weight, x, relu=True), problem(weight, x)
    assert losses(with_relu, rounded(with_relu, nearest(with_relu)))[0].tolist() == [0, pytest.approx(2.56)]
    assert losses(without, rounded(without, nearest(without)))[0].tolist() == pytest.approx([2.56, 2.56])
    kept = rounded(with_relu, learned_rounding(with_relu, SETTINGS, torch.Generator()))
    assert losses(with_relu, kept)[0, 1].item() == pytest.approx(0.16)


def test_inputs_that_are_wrong_are_made_up_for() -> None:
    # What is read is half of what it was: the sum of the weights has to be twice as large, 2.4.
    x = torch.randn(64, 1).expand(64, 3)
    weight = torch.tensor([[0.38, 0.4, 0.42]])
    p = problem(weight, 0.5 * x, targets=x @ weight.T)
    assert best_rounding(p).sum() == 2
    assert learned_rounding(p, SETTINGS, torch.Generator()).sum() >= 2


@pytest.mark.parametrize("strength, exponent", [(0.0, 20.0), (3.0, 20.0), (3.0, 2.5)])
@pytest.mark.parametrize("relu", [False, True])
def test_the_slope_is_that_of_autograd(relu, strength, exponent) -> None:
    weight = (torch.randn(2, 3, 12) * 4).double()  # two groups; some beyond the grid
    weight[0, 0, 0] = 0
    inputs, targets = torch.randn(2, 50, 12).double(), torch.randn(2, 50, 3).double()
    scale, zero_point = torch.rand(2, 3, 1).double() + 0.2, torch.randint(-2, 3, (2, 3, 1))
    bias, shares = torch.randn(2, 1, 3).double(), torch.rand(2, 1, 3).double()
    p = RoundingProblem(weight, scale, zero_point, -8, 7, inputs, targets, bias, relu)
    logits = (2 * torch.randn(2, 3, 12)).double().requires_grad_()
    chosen = torch.tensor([3, 3, 17, 40])

    up = torch.clamp(1.2 * torch.sigmoid(logits) - 0.1, 0, 1) * (weight != 0)
    levels = torch.clamp(torch.floor(weight / scale) + up + zero_point, -8, 7)
    outputs = inputs[:, chosen] @ ((levels - zero_point) * scale).transpose(1, 2) + bias
    wanted = targets[:, chosen]
    if relu:
        outputs, wanted = outputs.relu(), wanted.relu()
    loss = (shares * (outputs - wanted) ** 2).sum()
    penalty = strength * (1 - (2 * up - 1).abs() ** exponent)
    is_beyond = (levels.detach() - levels.detach().round()).abs() < 1e-12  # clamped, or rounded fully
    (loss + penalty[~is_beyond].sum()).backward()
    with torch.no_grad():
        slope = objective_slope(p, logits, chosen, shares, strength, exponent)
    assert logits.grad is not None
    torch.testing.assert_close(slope, torch.where(is_beyond, 0, logits.grad))
    assert 0.2 < (slope != 0).double().mean() < 0.9


def test_rounding_is_learned_the_same_from_one_seed_and_gradients_off() -> None:
    p = problem(torch.randn(4, 20), correlated(100, 20))
    first = learned_rounding(p, SETTINGS, torch.Generator().manual_seed(3))
    with torch.inference_mode():
        second = learned_rounding(p, SETTINGS, torch.Generator().manual_seed(3))
    assert torch.equal(first, second)


def test_scales_of_the_outputs_do_not_matter() -> None:
    weight, x = torch.randn(6, 20), correlated(100, 20)
    small, large = problem(weight, x), problem(weight, 2.0**20 * x)
    chosen = [learned_rounding(p, SETTINGS, torch.Generator().manual_seed(0)) for p in (small, large)]
    assert torch.equal(*chosen)


def test_the_better_weight_is_chosen_output_by_output() -> None:
    p = problem(torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 3.0]]), torch.eye(2))
    first = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]])
    second = torch.tensor([[[0.0, 2.0], [1.0, 1.0], [4.0, 3.0]]])
    assert better_rows(p, first, second).tolist() == [[[1.0, 2.0], [1.0, 1.0], [3.0, 4.0]]]
