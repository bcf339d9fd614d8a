"""Hyper-priors against scipy's densities."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from distiller.errors import DistillerError
from distiller.weight_sharing.priors import BetaPrior, GammaPrior


def test_gamma_is_scipys_up_to_a_constant():
    prior, precisions = GammaPrior.of({"alpha": 7, "beta": 0.5}), torch.tensor([3.0, 12.0]).double()
    first, second = (float(prior.penalty(x.log().reshape(1))) for x in precisions)
    density = stats.gamma(7, scale=1 / 0.5)
    assert second - first == pytest.approx(density.logpdf(3.0) - density.logpdf(12.0))


def test_gamma_by_its_moments():
    prior = GammaPrior.of({"mean": 2500, "variance": 1250})
    assert prior == GammaPrior(5000, 2)
    mode = torch.tensor([4999 / 2]).double().log().requires_grad_()
    prior.penalty(mode).backward()
    assert mode.grad is not None
    assert mode.grad.item() == pytest.approx(0, abs=1e-9)


def test_beta_is_scipys_up_to_a_constant():
    prior = BetaPrior.of({"alpha": 30, "beta": 2})
    first, second = (float(prior.penalty(torch.tensor(x).double().log())) for x in (0.9, 0.99))
    density = stats.beta(30, 2)
    assert second - first == pytest.approx(density.logpdf(0.9) - density.logpdf(0.99))


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (GammaPrior, {"mean": 1}, "x must be {alpha: ..., beta: ...} or {mean: ..., variance: ...}, got {'mean': 1}"),
        (BetaPrior, {"mean": 1, "variance": 1},
         "x must be {alpha: ..., beta: ...}, got {'mean': 1, 'variance': 1}"),
        (GammaPrior, {"alpha": 0, "beta": 1}, "x alpha: must be more than 0 and at most 1e+30, got 0"),
    ],
)  # fmt: skip
def test_what_is_no_prior_is_refused(kind, given, message):
    with pytest.raises(DistillerError) as refusal:
        kind.of(given, "x")
    assert str(refusal.value) == message
