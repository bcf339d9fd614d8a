"""What is kept of batch norms."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from distiller.quantization.refinement.folded_norms import fold_keeping_norms, norm_statistics


def test_mean_and_standard_deviation_of_the_outputs_are_kept_but_not_saved() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    nn.init.uniform_(model[1].weight, -2, 2)
    nn.init.uniform_(model[1].bias, -2, 2)
    model[1].momentum = None
    x = torch.randn(64, 3, 9, 9)
    with torch.no_grad():
        model(x)  # the running statistics are those of x
    model.eval()
    saved = set(model.state_dict())
    fold_keeping_norms(model, x[:1])
    assert norm_statistics(model[3]) is None
    kept = norm_statistics(copy.deepcopy(model)[0])
    assert kept is not None
    with torch.no_grad():
        outputs = model[0](x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(kept[0], outputs.mean(1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(kept[1], outputs.std(1), atol=1e-4, rtol=1e-3)
    assert set(model.state_dict()) == {name for name in saved if not name.startswith("1.")} | {"0.bias"}


def test_a_norm_without_weights_has_mean_zero_and_deviation_one() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False)).eval()
    fold_keeping_norms(model, torch.randn(1, 3))
    kept = norm_statistics(model[0])
    assert kept is not None
    assert [value.tolist() for value in kept] == [[0, 0], [1, 1]]


def test_statistics_stay_when_there_is_nothing_more_to_fold() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    fold_keeping_norms(model, torch.randn(1, 3))
    fold_keeping_norms(model, torch.randn(1, 3))
    assert norm_statistics(model[0]) is not None
