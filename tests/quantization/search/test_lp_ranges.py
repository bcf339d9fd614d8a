from __future__ import annotations

import numpy as np
import pytest
import torch

from distiller.errors import QuantizationError
from distiller.quantization.activation_quant import QuantSettings
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.clipping import ClipMode
from distiller.quantization.search.lp_ranges import best_share, init_name, norm_error, parse_init

SYMMETRIC = QuantSettings(4, LinearQuantMode.SYMMETRIC)
ASYMMETRIC = QuantSettings(4, LinearQuantMode.ASYMMETRIC_UNSIGNED)


def error_in_numpy(x, share, lo, hi, p, bits=4, symmetric=True):
    if symmetric:
        scale, zero, qmin, qmax = (
            share * max(-lo, hi) / ((2**bits - 1) / 2),
            0,
            -(2 ** (bits - 1)),
            2 ** (bits - 1) - 1,
        )
    else:
        scale = share * (hi - lo) / (2**bits - 1)
        zero, qmin, qmax = -np.round(share * lo / scale), 0, 2**bits - 1
    q = np.clip(np.round(x / scale) + zero, qmin, qmax)
    return np.mean(np.abs(x - (q - zero) * scale) ** p)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("settings", [SYMMETRIC, ASYMMETRIC])
def test_no_share_of_a_fine_grid_has_a_smaller_error(p, settings):
    x = torch.distributions.Laplace(0.0, 1.0).sample((4000,))
    lo, hi = (-x.abs().max(), x.abs().max()) if settings is SYMMETRIC else (x.min(), x.max())
    share = best_share(x, lo, hi, settings, norm_error(p))
    symmetric = settings is SYMMETRIC
    numbers = x.double().numpy()
    ends = float(lo), float(hi)
    found = error_in_numpy(numbers, float(share), *ends, p, symmetric=symmetric)
    least = min(
        error_in_numpy(numbers, s, *ends, p, symmetric=symmetric) for s in np.geomspace(1 / 32, 1, 800)
    )
    assert 0 < share <= 1
    assert found <= 1.02 * least


def test_a_larger_p_keeps_more_of_the_range():
    x = torch.distributions.Laplace(0.0, 1.0).sample((4000,))
    hi = x.abs().max()
    shares = [float(best_share(x, -hi, hi, SYMMETRIC, norm_error(p))) for p in (1.0, 2.0, 4.0)]
    assert shares[0] < shares[1] < shares[2] < 1


def test_values_that_are_on_the_grid_keep_all_of_it():
    x = torch.arange(16.0)
    assert float(best_share(x, x.min(), x.max(), ASYMMETRIC, norm_error(2.0))) == 1.0


def test_each_channel_has_the_share_it_would_have_alone():
    rows = torch.randn(3, 500) ** 3 * torch.tensor([[1.0], [10.0], [0.1]])
    hi = rows.abs().amax(1)
    together = best_share(rows, -hi, hi, SYMMETRIC, norm_error(2.0))
    alone = [
        best_share(row, -end, end, SYMMETRIC, norm_error(2.0)) for row, end in zip(rows, hi, strict=True)
    ]
    assert together.tolist() == [float(share) for share in alone]
    assert len(set(together.tolist())) > 1


def test_an_error_of_all_rows_together_gives_them_one_share():
    rows = torch.randn(3, 500) ** 3
    hi = rows.abs().amax(1)
    share = best_share(rows, -hi, hi, SYMMETRIC, lambda x, q: (x - q).square().mean())
    assert share.shape == (3,)
    assert len(set(share.tolist())) == 1


@pytest.mark.parametrize("method", ["Powell", "Nelder-Mead"])
def test_a_method_of_scipy_finds_about_the_same(method):
    x = torch.distributions.Laplace(0.0, 1.0).sample((4000,))
    hi = x.abs().max()
    error = norm_error(2.0)
    by_grid = best_share(x, -hi, hi, SYMMETRIC, error)
    by_method = best_share(x, -hi, hi, SYMMETRIC, error, method)
    ends = -float(hi), float(hi)
    least = error_in_numpy(x.numpy(), float(by_grid), *ends, 2)
    assert error_in_numpy(x.numpy(), float(by_method), *ends, 2) == pytest.approx(least, rel=0.05)


def test_dead_channels_are_no_trouble():
    rows = torch.stack([torch.zeros(20), torch.linspace(-1, 1, 20)])
    share = best_share(rows, torch.tensor([-7.5, -1]), torch.tensor([7.5, 1]), SYMMETRIC, norm_error(2.0))
    assert share[0] == 1
    assert torch.isfinite(share).all()


def test_starts_are_read_by_name():
    def error(x, q):
        return x

    assert parse_init("avg", "init_mode") is ClipMode.AVG
    assert parse_init(ClipMode.GAUSS, "init_mode") is ClipMode.GAUSS
    assert parse_init("L2", "init_mode") == 2.0
    assert parse_init("l2.5", "init_mode") == 2.5
    assert parse_init(error, "init_mode") is error
    assert [init_name(mode) for mode in (ClipMode.AVG, 2.0, 2.5)] == ["AVG", "L2", "L2.5"]
    assert init_name(error).endswith("error")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("L0", "init_mode: a norm is of p > 0, got 'L0'"),
        (
            "LAPLAS",
            "init_mode: must be one of NONE, AVG, N_STD, GAUSS, LAPLACE, got 'LAPLAS'; did you mean 'LAPLACE'?; "
            "norms (L1, L2, L2.5, ...) and functions are taken, too",
        ),
        (
            3,
            "init_mode: must be one of NONE, AVG, N_STD, GAUSS, LAPLACE, got 3; "
            "norms (L1, L2, L2.5, ...) and functions are taken, too",
        ),
    ],
)
def test_other_starts_are_refused(value, text):
    with pytest.raises(QuantizationError) as caught:
        parse_init(value, "init_mode")
    assert str(caught.value) == text
