from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import DistillerError
from distiller.regularization.hard_concrete import location_of, open_probability, sampled_gates, steady_gates

locations = st.floats(-6, 6)
SAMPLES = 100_000


def gate(location: float, u: float) -> float:
    """Equations 10 and 11 of the paper, spelt out, with its beta, gamma and zeta."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + location) / (2 / 3)))
    return min(1.0, max(0.0, s * (1.1 - -0.1) + -0.1))


def sample(location: float) -> torch.Tensor:
    return sampled_gates(torch.full((SAMPLES,), location), torch.rand(SAMPLES))


@given(location=locations, u=st.floats(0.001, 0.999))
def test_a_gate_is_a_stretched_and_clamped_sigmoid_of_logistic_noise(location, u):
    found = sampled_gates(torch.tensor(location, dtype=torch.float64), torch.tensor(u, dtype=torch.float64))
    assert found.item() == pytest.approx(gate(location, u), abs=1e-9)


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_noise_at_the_ends_of_its_interval_gives_finite_gates(u):
    location = torch.zeros(3, requires_grad=True)
    gates = sampled_gates(location, torch.full((3,), u))
    gates.sum().backward()
    assert torch.equal(gates.detach(), torch.full((3,), u))
    assert location.grad is not None
    assert torch.equal(location.grad, torch.zeros(3))


@pytest.mark.parametrize("location", [-3.0, -1.0, 0.0, 0.7, 2.0])
def test_the_share_of_open_gates_is_the_open_probability(location):
    expected = open_probability(torch.tensor(location)).item()
    assert (sample(location) != 0).float().mean().item() == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("location", [-3.0, -1.0, 0.0, 0.7, 2.0])
def test_the_mean_of_the_gates_is_their_expectation(location):
    noise = (np.arange(4000) + 0.5) / 4000
    expectation = np.mean([gate(location, u) for u in noise])
    assert sample(location).mean().item() == pytest.approx(expectation, abs=0.006)


@given(location=locations)
def test_gates_without_noise_are_a_stretched_sigmoid_of_their_location(location):
    expected = min(1.0, max(0.0, 1.2 / (1 + math.exp(-location)) - 0.1))
    assert steady_gates(torch.tensor(location, dtype=torch.float64)).item() == pytest.approx(expected)


def test_gates_reach_both_of_their_ends():
    gates = steady_gates(torch.tensor([-2.5, 0.0, 2.5]))
    assert torch.equal(gates, torch.tensor([0.0, 0.5, 1.0]))


@given(location=st.floats(-5, 5), u=st.floats(0.05, 0.95))
def test_the_gradient_of_a_gate_is_that_of_finite_differences(location, u):
    if min(abs(gate(location, u) - end) for end in (0, 1)) < 1e-4:
        return  # at the kinks there is none
    at = torch.tensor(location, dtype=torch.float64, requires_grad=True)
    sampled_gates(at, torch.tensor(u, dtype=torch.float64)).backward()
    assert at.grad is not None
    expected = (gate(location + 1e-6, u) - gate(location - 1e-6, u)) / 2e-6
    assert at.grad.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("probability", "is_open"), [(0.30, False), (0.32, True)])
def test_gates_without_noise_close_below_an_open_probability_of_31_percent(probability, is_open):
    assert (steady_gates(torch.tensor(location_of(probability))).item() > 0) == is_open


@given(st.floats(0.01, 0.99))
def test_a_location_follows_from_the_open_probability(probability):
    location = torch.tensor(location_of(probability), dtype=torch.float64)
    assert open_probability(location).item() == pytest.approx(probability)


@pytest.mark.parametrize("probability", [0, 1, -0.5, 1.5, math.nan])
def test_probabilities_of_0_and_1_have_no_location(probability):
    with pytest.raises(DistillerError, match=rf"^keep_probability must be in \(0, 1\), got {probability}$"):
        location_of(probability)
