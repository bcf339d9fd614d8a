"""High biases go to the next layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distiller.quantization.refinement.equalization import equalize
from distiller.quantization.refinement.folded_norms import norm_statistics


def biased(*layers: nn.Module) -> Any:
    """Behind a convolution and a norm whose channel 0 has mean 5 and deviation 1, channel 1 mean 0."""
    model: Any = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2), *layers)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([5.0, 0.0]))
    model[1].momentum = None
    model(torch.randn(64, 3, 6, 6))
    return model.eval()


def narrow() -> Tensor:
    """Inputs that do not lead below c: of at most 2 deviations."""
    return torch.randn(32, 3, 6, 6).clamp(-0.8, 0.8)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.ReLU(), nn.Conv2d(2, 4, 3)],
        [nn.ReLU(), nn.Conv2d(2, 2, 3, groups=2, bias=False)],
        [nn.ReLU(), nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate")],
        [nn.MaxPool2d(3, padding=1), nn.ReLU(), nn.Conv2d(2, 4, 1)],
        [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3, bias=False)],
        [nn.Conv2d(2, 4, 1)],
    ],
)
def test_the_model_computes_the_same_with_narrower_activations(layers) -> None:
    model, x = biased(*layers), narrow()
    plain, twin = copy.deepcopy(model), copy.deepcopy(model)
    equalize(plain, x[:1])
    report = equalize(twin, x[:1], absorb_bias=True)
    pair = report.pairs[0]
    assert pair.absorbed is not None
    # c = mean - 3 std = 2 in the scale of the model as it was
    torch.testing.assert_close(pair.absorbed * pair.scales, torch.tensor([2.0, 0.0]), atol=1e-3, rtol=1e-3)
    assert report.new_biases == (() if model[-1].bias is not None else (pair.second,))
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), atol=1e-4, rtol=1e-4)
        widest = plain[0](x).amax((0, 2, 3)) * pair.scales
        torch.testing.assert_close(twin[0](x).amax((0, 2, 3)) * pair.scales, widest - torch.tensor([2.0, 0.0]), atol=1e-3, rtol=1e-3)  # fmt: skip
    kept = norm_statistics(twin[0])
    assert kept is not None
    torch.testing.assert_close(kept[0] * pair.scales, torch.tensor([3.0, 0.0]), atol=1e-3, rtol=1e-3)


REFUSED = {
    "'3' pads with zeros, which would have to be shifted too": [nn.ReLU(), nn.Conv2d(2, 4, 3, padding=1)],
    "'2' (LeakyRelu) does not keep a shift": [nn.LeakyReLU(), nn.Conv2d(2, 4, 1)],
    "'2' (AveragePool) does not keep a shift": [nn.AvgPool2d(2, padding=1), nn.Conv2d(2, 4, 1)],
    "'3' is a transposed convolution: zeros are between the values that it reads": [
        nn.ReLU(),
        nn.ConvTranspose2d(2, 4, 2),
    ],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_nothing_is_absorbed_where_it_would_be_wrong(reason) -> None:
    model = biased(*REFUSED[reason])
    report = equalize(model, torch.randn(1, 3, 6, 6), absorb_bias=True)
    assert report.not_absorbed == {"0": reason}
    assert report.pairs[0].absorbed is None


def test_nothing_is_absorbed_of_what_is_not_known_or_not_high() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)
    )
    report = equalize(model.eval(), torch.randn(1, 3, 6, 6), absorb_bias=True)
    assert report.not_absorbed == {
        "0": "no batch norm was folded into it, its mean is not known",
        "2": "no channel is always far above zero",
    }


def test_it_is_done_only_when_asked() -> None:
    report = equalize(biased(nn.ReLU(), nn.Conv2d(2, 4, 3)), torch.randn(1, 3, 6, 6))
    assert report.not_absorbed == {}
    assert report.pairs[0].absorbed is None
