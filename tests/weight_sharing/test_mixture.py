"""The mixture penalty against the plain expression in double precision, and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.weight_sharing import mixture as module
from distiller.weight_sharing.components import assign_to_components, merge_components, start_mixture
from distiller.weight_sharing.learned_mixture import LearnedMixture
from distiller.weight_sharing.mixture import mixture_moments, mixture_penalty, plain_mixture_penalty
from distiller.weight_sharing.priors import GammaPrior

MNIST_LENET = Path(__file__).resolve().parents[2] / "../shared/compat/checkpoints/mnist_lenet.pt"


def mixture_of(count: int, precision: float = 16.0, pi_zero: float = 0.99):
    means = torch.cat((torch.zeros(1), torch.linspace(-1, 1, count - 1)))
    mixing = torch.tensor([pi_zero, *[(1 - pi_zero) / (count - 1)] * (count - 1)])
    return means, torch.full((count,), precision).log(), mixing.log()


def gradients(penalty, weights, mixture, kind):
    leaves = [x.detach().to(kind).requires_grad_() for x in (weights, *mixture)]
    value = penalty(*leaves)
    value.backward()
    return value.detach().double(), [leaf.grad.double() for leaf in leaves]


def scales(weights, mixture):
    """What the terms of each gradient add up to in size: sums of r lambda |d|, and the like, in float64."""
    weights, means, log_precisions, log_mixing = (x.detach().double() for x in (weights.flatten(), *mixture))
    distances = weights.unsqueeze(1) - means
    logs = log_mixing + log_precisions / 2 - log_precisions.exp() * distances.square() / 2
    shares, precisions = logs.softmax(1), log_precisions.exp()
    pulls = shares * precisions * distances.abs()
    excesses = shares * (precisions * distances.square() + 1) / 2
    return [pulls.sum(1), pulls.sum(0), excesses.sum(0), shares.sum(0)]


def assert_equals_plain(weights, mixture, share=1e-5):
    value, ours = gradients(mixture_penalty, weights, mixture, weights.dtype)
    exact, theirs = gradients(plain_mixture_penalty, weights, mixture, torch.float64)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5 * weights.numel())
    for one, other, scale in zip(ours, theirs, scales(weights, mixture), strict=True):
        excess = (one - other).abs().flatten() - share * scale.flatten()
        assert (excess <= 1e-8 * share**0.5 * scale.max() + 1e-20).all(), excess.max() / scale.max()


def test_a_single_component_is_a_gaussian():
    weights = torch.tensor([0.5, -0.25])
    mixture = (torch.tensor([0.1]), torch.tensor([4.0]).log(), torch.zeros(1))
    value, (of_weights, of_mean, of_precision, of_share) = gradients(
        mixture_penalty, weights, mixture, torch.float64
    )
    distances = np.array([0.4, -0.35])
    assert float(value) == pytest.approx((2 * distances**2 - 0.5 * math.log(4 / (2 * math.pi))).sum())
    assert of_weights.tolist() == pytest.approx((4 * distances).tolist())
    assert of_mean.tolist() == pytest.approx([-4 * distances.sum()])
    assert of_precision.tolist() == pytest.approx([(4 * distances**2 - 1).sum() / 2])
    assert of_share.tolist() == pytest.approx([-2.0])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 8),
    precisions=st.floats(0.0, 12.0),
    spread=st.floats(0.0, 4.0),
    size=st.integers(1, 60),
)
def test_gradients_are_those_of_the_plain_expression(seed, count, precisions, spread, size):
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(count, generator=draw)
    means[0] = 0
    log_precisions = precisions * torch.rand(count, generator=draw)
    log_mixing = (spread * torch.randn(count, generator=draw)).log_softmax(0)
    weights = means[torch.randint(count, (size,), generator=draw)] + torch.randn(size, generator=draw) / 10
    weights[:2] = torch.tensor([5.0, -5.0])[:size]
    assert_equals_plain(weights, (means, log_precisions, log_mixing))


@pytest.mark.parametrize("precision", [16.0, 1e3, 1e5])
def test_several_blocks_are_one_sum(precision):
    torch.manual_seed(0)
    assert_equals_plain(torch.randn(20_003) * 0.31, mixture_of(16, precision))


def test_weights_far_from_every_component_are_right():
    assert_equals_plain(torch.tensor([5.0, -5.0, 40.0, 0.0]), mixture_of(16, 1e5))


def test_all_weights_may_be_equal():
    assert_equals_plain(torch.full((300,), 0.07), mixture_of(5, 1e3))
    assert_equals_plain(torch.zeros(300), mixture_of(5, 1e5))


def test_float64_weights_are_done_in_float64():
    torch.manual_seed(0)
    assert_equals_plain(torch.randn(400).double(), mixture_of(16, 400.0), share=1e-11)


def test_half_precision_weights_are_summed_in_float32():
    torch.manual_seed(0)
    weights = torch.randn(400).bfloat16().requires_grad_()
    value = mixture_penalty(weights, *mixture_of(4))
    value.backward()
    assert value.dtype == torch.float32
    assert weights.grad is not None
    assert weights.grad.dtype == torch.bfloat16


def test_the_gradient_of_a_softmax_does_not_drown():
    """At the optimum of the mixing weights their gradient is a small difference of large numbers."""
    torch.manual_seed(0)
    weights = torch.cat((0.01 * torch.randn(50_000), 0.5 + 0.01 * torch.randn(1000)))
    logits = torch.tensor([50.0, 1.0]).log().double().requires_grad_()
    mixture = torch.tensor([0.0, 0.5]), torch.tensor([1e4, 1e4]).log()
    mixture_penalty(weights, *mixture, logits.log_softmax(0)).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 0.01


def test_no_weights_cost_nothing():
    weights = torch.zeros(0, requires_grad=True)
    value = mixture_penalty(weights, *mixture_of(3))
    value.backward()
    assert value == 0
    assert weights.grad is not None
    assert weights.grad.shape == (0,)


def test_what_is_not_a_number_is_not_hidden():
    assert mixture_penalty(torch.tensor([0.1, math.nan, 900.0]), *mixture_of(3)).isnan()


def test_only_what_needs_a_gradient_has_one():
    weights = torch.randn(10, requires_grad=True)
    means, log_precisions, log_mixing = mixture_of(3)
    mixture_penalty(weights, means, log_precisions, log_mixing).backward()
    assert weights.grad is not None
    assert means.grad is None


def test_the_number_of_threads_comes_back_and_does_not_count():
    torch.manual_seed(0)
    weights, mixture, before = torch.randn(70_001), mixture_of(16), torch.get_num_threads()
    values = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = mixture_moments(weights, *mixture)
            assert torch.get_num_threads() == threads
            values.append((found.penalty, found.weight_gradient, found.pulls))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*values, strict=True))


def test_what_is_far_may_be_more_than_a_part_of_rows(monkeypatch):
    monkeypatch.setattr(module, "_FAR_ROWS", 7)
    assert_equals_plain(torch.linspace(-9, 9, 50), mixture_of(4, 1e5))


# ------------------------------------------------------------- okz12/NeuralNetworkCompression


@pytest.fixture(scope="module")
def mnist_lenet():
    if not MNIST_LENET.is_file():
        pytest.skip(f"{MNIST_LENET.name} of okz12/NeuralNetworkCompression is not at hand")
    return torch.load(MNIST_LENET, weights_only=True, map_location="cpu")


def okz12_start(kind=torch.float64):
    means = torch.linspace(-1, 1, 15, dtype=kind).tolist()
    return start_mixture(torch.zeros(1), 16, 0.99, means, 0.25)


def test_okz12_reproduces_the_terms_of_the_first_batch(mnist_lenet):
    """Its notebook's figures, with three digits more: a term for each parameter, then those of the priors."""
    learned = LearnedMixture(okz12_start(), okz12=True)
    terms = [learned.penalty(param.double()).item() for param in mnist_lenet.values()]
    wanted = [289534.997, 251.706, 34082.003, 150.885, 811.361, 22.138]
    assert terms == pytest.approx(wanted, abs=6e-4)
    zero, others = GammaPrior(5000, 2), GammaPrior.of({"mean": 100, "variance": 10})
    assert others == GammaPrior(1000, 10)
    assert learned.hyper_penalty(zero, None, None).item() == pytest.approx(-13828.171, abs=2e-3)
    assert learned.hyper_penalty(None, others, None).item() == pytest.approx(-39147.242, abs=5e-3)


def test_okz12_finds_the_zeros_of_untouched_weights(mnist_lenet):
    """In float32 the middle one of its other means is -4.5e-8, and takes all small weights below zero."""
    weights = torch.cat([param.flatten() for param in mnist_lenet.values()])
    start = okz12_start(torch.float32)
    codes = assign_to_components(weights, start, "l2")
    assert weights.numel() == 266_610
    assert round(100 * (codes == 0).double().mean().item(), 2) == 16.46
    merged = assign_to_components(weights, merge_components(start, 1e-9), "l2")
    assert round(100 * (merged == 0).double().mean().item(), 2) == 36.36
