from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from distiller.errors import QuantizationError
from distiller.quantization.search.distance import Distance, mean_divergence
from distiller.quantization.search.search_log import SearchLog


def distance(model, eval_fn, metric):
    return Distance(model, eval_fn, metric, SearchLog(None, "x", {}), "search")


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 2)])
def test_the_divergence_is_that_of_the_softmax(shape):
    clean, noisy = torch.randn(shape), torch.randn(shape)
    p, q = softmax(clean.double().numpy(), axis=1), softmax(noisy.double().numpy(), axis=1)
    assert mean_divergence(clean, noisy) == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-9)
    assert mean_divergence(clean, clean) == 0
    assert mean_divergence(clean, clean + 3) == pytest.approx(0, abs=1e-6)


def test_by_loss_it_is_the_increase(network, prepared, loss, digits):
    with torch.no_grad():
        clean, noisy = (
            float(torch.nn.functional.cross_entropy(model(digits[0]), digits[1]))
            for model in (network, prepared.model)
        )
    found = distance(network, loss, "loss")
    assert found.of(prepared.model) == pytest.approx(noisy - clean)
    assert found.of(prepared.model) == pytest.approx(noisy - clean)
    assert found.float_loss == pytest.approx(clean)
    assert loss.calls == 3


def test_by_outputs_it_is_the_mean_over_all_samples_of_unequal_batches(network, prepared, digits):
    batches = digits[0][:100], digits[0][100:]

    def run(model):
        for batch in batches:
            model(batch)

    with torch.no_grad():
        expected = mean_divergence(network(digits[0]), prepared.model(digits[0]))
    found = distance(network, run, "kl")
    assert found.of(prepared.model) == pytest.approx(expected, rel=1e-6)
    assert found.of(network) == pytest.approx(0, abs=1e-9)


def test_the_float_model_is_run_in_evaluation_mode_and_keeps_its_own(network, prepared, digits):
    network.train()
    assert not np.isnan(distance(network, lambda model: model(digits[0]), "kl").of(prepared.model))
    assert all(module.training for module in network.modules())
    assert network.bn1.num_batches_tracked == 60


def test_outputs_that_are_no_numbers_have_no_distance(network, digits):
    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 10), math.nan)

    assert math.isnan(distance(network, lambda model: model(digits[0]), "kl").of(Broken()))


class Pair(torch.nn.Module):
    def forward(self, x):
        return x, x


def test_what_cannot_be_compared_is_refused(network, digits):
    sizes = iter([4, 5])
    with pytest.raises(QuantizationError) as caught:
        distance(network, lambda model: model(digits[0][: next(sizes)]), "kl").of(network)
    assert str(caught.value) == (
        "search: eval_fn: must feed the same data each time, its outputs were of shapes (4, 10) and then (5, 10)"
    )
    with pytest.raises(QuantizationError, match="^search: eval_fn: does not run the model that it is given$"):
        distance(network, lambda model: 1.0, "kl").of(network)
    with pytest.raises(QuantizationError) as caught:
        distance(Pair(), lambda model: model(digits[0]), "kl").of(network)
    assert str(caught.value) == (
        "search: metric 'kl' needs a model that returns logits, (samples, classes), got tuple; choose metric 'loss'"
    )
