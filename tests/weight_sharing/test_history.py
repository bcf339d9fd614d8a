"""What is kept of each epoch."""

from __future__ import annotations

import torch

from distiller.tensor_cuts import cut
from distiller.weight_sharing.components import start_mixture
from distiller.weight_sharing.history import SharingHistory

MIXTURE = {"all": start_mixture(torch.randn(9), 3)}


def test_samples_are_shared_out_by_size_and_spread_evenly():
    params = {"a": torch.arange(90.0).view(9, 10), "b": torch.arange(10.0)}
    history = SharingHistory({name: param.shape for name, param in params.items()}, 10)
    history.begin(params)
    assert history.before["a"].tolist() == [5, 15, 25, 35, 45, 55, 65, 75, 85]
    assert history.before["b"].tolist() == [5]


def test_all_weights_are_kept_where_there_are_few():
    history = SharingHistory({"a": (2, 3)}, 100)
    history.begin({"a": torch.arange(6.0).view(2, 3)})
    assert history.before["a"].tolist() == [0, 1, 2, 3, 4, 5]


def test_none_are_kept_if_none_are_asked_for():
    history = SharingHistory({"a": (2, 3)}, 0)
    history.add(0, {"a": torch.zeros(2, 3)}, MIXTURE, {})
    assert history.epochs[0].weights["a"].numel() == 0


def test_the_beginning_is_kept_once():
    history = SharingHistory({"a": (4,)}, 4)
    history.begin({"a": torch.zeros(4)})
    history.begin({"a": torch.ones(4)})
    assert history.before["a"].tolist() == [0, 0, 0, 0]


def test_samples_follow_a_thinning():
    param, kept = torch.arange(24.0).view(4, 6), {0: [0, 2, 3], 1: [1, 4, 5]}
    history = SharingHistory({"a": (4, 6), "b": (2,)}, 13)
    params = {"a": param, "b": torch.zeros(2)}
    history.begin(params)
    history.add(0, params, MIXTURE, {})
    sampled = set(history.before["a"].tolist())
    thinned = cut(param, kept)
    history.follow_thinning({"a": kept, "other": {0: [0]}})
    history.add(1, {"a": thinned, "b": torch.zeros(2)}, MIXTURE, {})
    left = [value for value in thinned.flatten().tolist() if value in sampled]
    assert history.before["a"].tolist() == left
    assert all(entry.weights["a"].tolist() == left for entry in history.epochs)


def test_its_state_comes_back(tmp_path):
    history = SharingHistory({"a": (4,)}, 4)
    history.begin({"a": torch.zeros(4)})
    history.add(3, {"a": torch.ones(4)}, MIXTURE, {"top1": 50.0})
    torch.save(history.state_dict(), tmp_path / "state")
    fresh = SharingHistory({"a": (4,)}, 4)
    fresh.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    [entry] = fresh.epochs
    assert (entry.epoch, entry.figures["top1"], entry.weights["a"].tolist()) == (3, 50.0, [1, 1, 1, 1])
    assert torch.equal(entry.mixtures["all"].means, MIXTURE["all"].means)
