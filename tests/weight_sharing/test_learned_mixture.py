"""The parameters of a mixture."""

from __future__ import annotations

import math

import pytest
import torch

from distiller.weight_sharing.components import start_mixture
from distiller.weight_sharing.learned_mixture import LearnedMixture
from distiller.weight_sharing.mixture import plain_mixture_penalty
from distiller.weight_sharing.priors import BetaPrior


def start():
    return start_mixture(torch.tensor([-1.0, 1.0]), 4, 0.9, "linspace", 0.25)


@pytest.mark.parametrize("settings", [{}, {"learns_zero_share": True}, {"okz12": True}])
def test_it_begins_where_it_is_asked_to(settings):
    mixture = LearnedMixture(start(), **settings).mixture()
    assert mixture.means.tolist() == pytest.approx([0.0, -1.0, 0.0, 1.0])
    assert mixture.stds.tolist() == pytest.approx([0.25] * 4)
    other = 0.1 / 3
    wanted = other**2 if settings.get("okz12") else other
    assert mixture.mixing.tolist() == pytest.approx([0.9, wanted, wanted, wanted])


def test_the_share_of_zero_is_learned_only_if_asked():
    weights = torch.tensor([0.0, 0.9, 0.1])
    for learns in (False, True):
        learned = LearnedMixture(start(), learns)
        assert learned.logits.shape == ((4,) if learns else (3,))
        learned.penalty(weights).backward()
        with torch.no_grad():
            learned.logits -= 0.5 * learned.logits.grad
        mixing = learned.mixture().mixing
        assert mixing.sum().item() == pytest.approx(1)
        assert (mixing[0].item() == pytest.approx(0.9)) is not learns


def test_the_mean_of_zero_has_no_gradient():
    learned = LearnedMixture(start())
    learned.penalty(torch.randn(20)).backward()
    assert learned.free_means.grad is not None
    assert learned.free_means.grad.shape == (3,)
    assert learned.means()[0] == 0


def test_okz12_differs_by_its_mixing_weights_and_a_constant():
    weights = torch.randn(50, dtype=torch.float64)
    mixture = LearnedMixture(start(), okz12=True)
    plain = plain_mixture_penalty(weights, mixture.means(), mixture.log_precisions, mixture.log_mixing())
    assert mixture.penalty(weights).item() == pytest.approx(
        plain.item() + 25 * math.log(2 * math.pi), abs=1e-5
    )


def test_a_prior_on_the_share_of_zero_is_differentiated():
    learned = LearnedMixture(start(), learns_zero_share=True)
    learned.hyper_penalty(None, None, BetaPrior(50, 2)).backward()
    assert learned.logits.grad is not None
    assert learned.logits.grad[0] < 0


def test_it_is_loaded_from_its_tensors():
    one, other = LearnedMixture(start()), LearnedMixture(start_mixture(torch.randn(9), 4, 0.9, "quantiles"))
    one.load({key: tensor.detach() for key, tensor in other.tensors.items()})
    assert torch.equal(one.means(), other.means())
