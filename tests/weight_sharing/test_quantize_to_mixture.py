"""The end of soft weight sharing: weights take the values of components, and keep sharing them."""

from __future__ import annotations

import copy

import pytest
import torch

from distiller.errors import CheckpointError, DistillerError
from distiller.quantization.codebook import codebooks_of, quantize_with_codebook
from distiller.scheduler import CompressionScheduler
from distiller.weight_sharing import (
    QuantizeToMixture,
    SoftWeightSharing,
    mixture_of_weights,
    share_weights,
    start_mixture,
)
from distiller.weight_sharing.mixture import Mixture
from distiller.weight_sharing.shared_values import KEPT
from tests.doubles import train

NAMES = ("conv1.weight", "conv2.weight", "fc.weight")
LEARN = {"components": 5, "initial_std": 0.1, "tau": 1e-3}


def scheduled(model, learn=None, **settings):
    """A mixture is learned in epochs 0 and 1, and the weights are quantized to it in 2 and 3."""
    scheduler = CompressionScheduler(model)
    quantize = QuantizeToMixture("q", model, **settings)
    if learn is not None:
        scheduler.add_policy(SoftWeightSharing("m", model, **{**LEARN, **learn}), epochs=[0, 1])
    scheduler.add_policy(quantize, epochs=[2, 3])
    return scheduler, quantize


def weights_of(model):
    params = dict(model.named_parameters())
    return torch.cat([params[name].detach().flatten() for name in NAMES])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_weights_share_few_values_from_its_first_epoch_on(tiny_cnn, optimizer):
    scheduler, quantize = scheduled(tiny_cnn, learn={})
    train(tiny_cnn, scheduler, [0, 1, 2, 3], optimizer(tiny_cnn.parameters(), lr=0.01))
    distinct = weights_of(tiny_cnn).unique()
    assert 2 <= len(distinct) <= 5
    assert 0 in distinct
    assert set(quantize.shared[0].codes) == set(NAMES)


def test_centroids_are_trained_unless_told_otherwise(tiny_cnn):
    for trains in (True, False):
        model = copy.deepcopy(tiny_cnn)
        scheduler, _ = scheduled(model, learn={}, train_centroids=trains)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, scheduler, [0, 1, 2], optimizer)
        before = weights_of(model).unique()
        train(model, scheduler, [3], optimizer)
        assert torch.equal(weights_of(model).unique(), before) is not trains


def test_zeros_stay_zero_after_it_too(tiny_cnn):
    scheduler, quantize = scheduled(tiny_cnn, learn={})
    train(tiny_cnn, scheduler, range(4))
    zero = {name: codes == 0 for name, codes in quantize.shared[0].codes.items()}
    train(tiny_cnn, scheduler, range(4, 6))
    params = dict(tiny_cnn.named_parameters())
    assert any(mask.any() for mask in zero.values())
    assert all((params[name][mask] == 0).all() for name, mask in zero.items())
    assert sum(int(mask.sum()) for mask in zero.values()) == int((weights_of(tiny_cnn) == 0).sum())


@pytest.mark.parametrize("mode", ["p", "zero_bin"])
def test_what_is_only_pruned_goes_its_own_way(tiny_cnn, mode):
    scheduler, quantize = scheduled(tiny_cnn, learn={"initial_std": 0.02}, mode=mode)
    train(tiny_cnn, scheduler, range(4))
    assert set(quantize.shared[0].codes["fc.weight"].unique().tolist()) <= {0, KEPT}
    assert len(weights_of(tiny_cnn).unique()) > 20
    assert (weights_of(tiny_cnn) == 0).any()


def test_mixtures_of_parameters_are_theirs(tiny_cnn):
    scheduler, quantize = scheduled(tiny_cnn, learn={"per_parameter": True})
    train(tiny_cnn, scheduler, range(4))
    assert [tuple(shared.codes) for shared in quantize.shared] == [(name,) for name in NAMES]
    assert all(len(param.unique()) <= 5 for name, param in tiny_cnn.named_parameters() if name in NAMES)


def test_without_a_learned_mixture_one_is_fitted(tiny_cnn):
    scheduler, quantize = scheduled(tiny_cnn, components=4, weights=["fc.weight"])
    train(tiny_cnn, scheduler, range(4))
    assert len(tiny_cnn.fc.weight.unique()) <= 4
    assert [tuple(shared.codes) for shared in quantize.shared] == [("fc.weight",)]


def test_pruning_is_complete_when_it_is_done(tiny_cnn):
    scheduler, _ = scheduled(tiny_cnn, learn={})
    train(tiny_cnn, scheduler, [0, 1])
    assert not scheduler.pruning_is_complete(1)
    train(tiny_cnn, scheduler, [2])
    assert scheduler.pruning_is_complete(2)


def test_recentred_values_are_the_means_of_their_weights():
    torch.manual_seed(0)
    params = {"a": torch.randn(300), "b": torch.randn(50)}
    mixture = start_mixture(torch.cat(list(params.values())), 5)
    shared = share_weights(params, mixture, recentre=True)
    for code in range(1, 5):
        chosen = torch.cat([params[name][codes == code] for name, codes in shared.codes.items()])
        assert shared.values[code].item() == pytest.approx(chosen.mean().item(), abs=1e-6)
    assert shared.values[0] == 0
    zeros = sum(int((codes == 0).sum()) for codes in shared.codes.values())
    assert shared.sparsity == pytest.approx(zeros / 350)


def test_a_component_without_weights_keeps_its_value():
    mixture = start_mixture(torch.zeros(1), 3, means=[-9.0, 0.5])
    shared = share_weights({"a": torch.tensor([0.4, 0.6, 0.0])}, mixture, recentre=True)
    assert shared.values.tolist() == pytest.approx([0.0, -9.0, 0.5])


def test_a_mixture_is_fitted_to_weights():
    torch.manual_seed(0)
    clusters = [torch.randn(2000) * 0.01, 0.5 + 0.02 * torch.randn(100), -0.5 + 0.02 * torch.randn(100)]
    found = mixture_of_weights({"a": torch.cat(clusters)}, 3)
    assert sorted(found.means.tolist()) == pytest.approx([-0.5, 0.0, 0.5], abs=0.02)


def test_what_it_ends_with_is_a_codebook_without_loss(tiny_cnn):
    """So that it is stored, packed and exported as one."""
    scheduler, _ = scheduled(tiny_cnn, learn={})
    train(tiny_cnn, scheduler, range(4))
    tiny_cnn.eval()
    images = torch.randn(4, 1, 8, 8)
    before = tiny_cnn(images)
    quantize_with_codebook(tiny_cnn, 3, keep_zero=True)
    assert len(codebooks_of(tiny_cnn)) == 3
    assert torch.equal(tiny_cnn(images), before)


def test_its_state_comes_back_bit_for_bit(tiny_cnn, tmp_path):
    twin = copy.deepcopy(tiny_cnn)
    (one, _), (other, _) = scheduled(tiny_cnn, learn={}), scheduled(twin, learn={})
    train(tiny_cnn, one, [0, 1, 2], torch.optim.SGD(tiny_cnn.parameters(), lr=0.1))
    torch.save(one.state_dict(), tmp_path / "state")
    twin.load_state_dict(tiny_cnn.state_dict())
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for model, scheduler in ((tiny_cnn, one), (twin, other)):
        torch.manual_seed(7)
        train(model, scheduler, [3, 4], torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(tiny_cnn.parameters(), twin.parameters(), strict=True))


def test_the_state_of_other_parameters_is_refused(tiny_cnn):
    scheduler, quantize = scheduled(tiny_cnn, weights=["fc.weight"])
    train(tiny_cnn, scheduler, [2])
    with pytest.raises(CheckpointError) as refusal:
        QuantizeToMixture("q", tiny_cnn, weights=["conv2.weight"]).load_state_dict(quantize.state_dict())
    assert str(refusal.value) == (
        "the checkpoint's 'q' shares weights of fc.weight, this schedule's of conv2.weight; resume with the same "
        "schedule"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_kl": -1.0}, "merge_kl must be 0 or more, got -1.0"),
        ({"zero_merge_kl": -1.0}, "zero_merge_kl must be 0 or more, got -1.0"),
        ({"components": 256}, "components must be at most 255, got 256"),
        ({"mode": "l1"}, "mode: must be one of l2, p, p_l2, responsibility, zero_bin, got 'l1'"),
    ],
)
def test_settings_out_of_range_are_refused(tiny_cnn, settings, message):
    with pytest.raises(DistillerError) as refusal:
        QuantizeToMixture("q", tiny_cnn, **settings)
    assert str(refusal.value) == message


def test_weights_that_are_not_numbers_are_refused(tiny_cnn):
    scheduler, _ = scheduled(tiny_cnn, weights=["fc.weight"])
    with torch.no_grad():
        tiny_cnn.fc.weight[0, 0] = float("nan")
    with pytest.raises(DistillerError, match="'q', 'fc.weight': cannot be penalised, got 1 NaN"):
        train(tiny_cnn, scheduler, [2])


def test_mixtures_of_the_same_means_are_told_apart_by_their_precisions(tiny_cnn):
    learn = {
        "per_parameter": True,
        "initial_means": [-0.2, -0.1, 0.1, 0.2],
        "mean_lr": 0,
        "precision_lr": 0.1,
    }
    scheduler, quantize = scheduled(tiny_cnn, learn=learn, merge_kl=0)
    train(tiny_cnn, scheduler, [0, 1, 2], torch.optim.SGD(tiny_cnn.parameters(), lr=0.01))
    assert [tuple(shared.codes) for shared in quantize.shared] == [(name,) for name in NAMES]


def test_a_network_that_is_zero_altogether_is_warned_of(tiny_cnn, caplog):
    scheduler, _ = scheduled(tiny_cnn, learn={"initial_std": 5.0}, merge_kl=100)
    train(tiny_cnn, scheduler, [0, 1, 2], torch.optim.SGD(tiny_cnn.parameters(), lr=0.01))
    assert (
        "'q': all weights of conv1.weight, conv2.weight, fc.weight are zero now; let the mixture"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("weights", "settings", "told"),
    [
        ({}, {}, "mixture_of_weights: at least one parameter is wanted, got none"),
        ({"w": torch.ones(3)}, {"components": 1}, "components must be 2 or more, got 1"),
        ({"w": torch.ones(3)}, {"components": 256}, "components must be at most 255, got 256"),
        ({"w": torch.ones(3)}, {"pi_zero": 2.0}, "pi_zero must be in (0, 1), got 2.0"),
        (
            {"w": torch.tensor([1.0, torch.nan])},
            {},
            "a mixture needs weights, all of them finite numbers, got 1 that are not",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(weights, settings, told):
    with pytest.raises(DistillerError) as error:
        mixture_of_weights(weights, **settings)
    assert str(error.value) == told


def test_more_components_than_codes_are_refused():
    many = start_mixture(torch.randn(1000), 255)
    more = Mixture(*(torch.cat([part, part[-1:]]) for part in (many.means, many.precisions, many.mixing)))
    with pytest.raises(DistillerError) as error:
        share_weights({"w": torch.randn(9)}, more)
    assert str(error.value) == "components must be at most 255, got 256"
