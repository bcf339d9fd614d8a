"""Factors of matrices and kernels, beside numpy's and scipy's own decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distiller.errors import DistillerError, UsageError
from distiller.factorization.decompositions import (
    channel_svd,
    low_rank_plus_sparse,
    mode_energies,
    singular_values,
    spatial_svd,
    truncated_svd,
    tucker2,
    whitened_svd,
)


def matrix(m, n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((m, n)))


def tail(values, rank):
    """What Eckart and Young say is lost: the root of the sum of squares of the values left out."""
    return float(np.sqrt((np.asarray(values)[rank:] ** 2).sum()))


@given(st.integers(2, 9), st.integers(2, 9), st.data())
@settings(max_examples=30, deadline=None)
def test_the_error_of_a_truncated_svd_is_that_of_the_values_left_out(m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    weight = matrix(m, n, seed=m * 10 + n)
    left, right = truncated_svd(weight, rank)
    assert left.shape == (m, rank)
    assert right.shape == (rank, n)
    error = np.linalg.norm(weight.numpy() - (left @ right).numpy())
    assert error == pytest.approx(tail(scipy.linalg.svdvals(weight.numpy()), rank), abs=1e-9)


def test_no_other_factors_of_the_rank_are_nearer():
    weight = matrix(12, 8)
    left, right = truncated_svd(weight, 3)
    least = (weight - left @ right).norm()
    for seed in range(20):
        moved = left + 0.1 * matrix(12, 3, seed=seed)
        best = torch.linalg.lstsq(moved, weight).solution
        assert (weight - moved @ best).norm() >= least - 1e-9


def test_the_roots_of_the_singular_values_are_in_both_factors():
    left, right = truncated_svd(matrix(7, 5), 4)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_factors_have_the_type_of_the_weight():
    assert {factor.dtype for factor in truncated_svd(matrix(4, 4).float(), 2)} == {torch.float32}


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_is_not_there_is_refused(rank):
    with pytest.raises(UsageError) as error:
        truncated_svd(matrix(4, 6), rank)
    assert str(error.value) == f"SVD: rank: must be 1 to 4 of a matrix (4, 6), got {rank}"


def test_a_weight_of_nan_is_refused():
    with pytest.raises(DistillerError) as error:
        truncated_svd(torch.full((3, 3), float("nan")), 1)
    assert str(error.value) == (
        "SVD: the weight holds NaN or infinity; give weights from before the training diverged"
    )


def inputs(samples, n, seed=1):
    """Correlated inputs: a few directions have nearly all of the energy."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, n)) * np.logspace(0, -2, n)
    return torch.from_numpy(x @ np.linalg.qr(rng.standard_normal((n, n)))[0])


def test_whitened_factors_have_the_least_error_on_the_inputs():
    weight, x = matrix(10, 8), inputs(200, 8)
    plain, white = truncated_svd(weight, 3), whitened_svd(weight, 3, x.T @ x, damping=1e-12)
    errors = [float((x @ (weight - left @ right).T).norm()) for left, right in (plain, white)]
    # Closed form: the error is ||X W^T - best rank-3 matrix|| = what the SVD of the outputs leaves out.
    assert errors[1] == pytest.approx(tail(scipy.linalg.svdvals((x @ weight.T).numpy()), 3), rel=1e-5)
    assert errors[1] < 0.8 * errors[0]


def test_whitened_factors_are_those_of_cholesky():
    weight, x = matrix(6, 5), inputs(50, 5)
    root = np.linalg.cholesky((x.T @ x).numpy())
    u, s, vt = np.linalg.svd(weight.numpy() @ root)
    expected = (u[:, :2] * s[:2]) @ vt[:2] @ np.linalg.inv(root)
    left, right = whitened_svd(weight, 2, x.T @ x, damping=1e-13)
    np.testing.assert_allclose((left @ right).numpy(), expected, atol=1e-6)


def test_whitening_by_white_inputs_changes_nothing():
    weight = matrix(6, 5)
    left, right = whitened_svd(weight, 2, 7.0 * torch.eye(5))
    plain = truncated_svd(weight, 2)
    torch.testing.assert_close(left @ right, plain[0] @ plain[1])


def test_inputs_that_were_never_seen_do_no_harm():
    weight, moments = matrix(6, 5), torch.zeros(5, 5)
    moments[0, 0] = 3.0
    for given_ in (moments, torch.zeros(5, 5)):
        assert all(factor.isfinite().all() for factor in whitened_svd(weight, 2, given_))


def test_moments_of_another_size_are_refused():
    with pytest.raises(DistillerError) as error:
        whitened_svd(matrix(6, 5), 2, torch.eye(4))
    assert str(error.value) == (
        "whitened SVD: the moments of the inputs must be finite, of shape (5, 5), got shape (4, 4); "
        "collect them from inputs of this layer"
    )


def spiked():
    """Rank 3, noise, and 40 large elements."""
    weight = matrix(30, 3) @ matrix(3, 20, seed=1) + 0.05 * matrix(30, 20, seed=2)
    places = np.random.default_rng(3).choice(600, 40, replace=False)
    weight.view(-1)[places] += 8 * torch.sign(matrix(1, 40, seed=4))[0]
    return weight


def test_low_rank_plus_sparse_beats_either_alone_at_equal_budget():
    weight = spiked()
    left, right, sparse = low_rank_plus_sparse(weight, 3, 50)
    assert int((sparse != 0).sum()) == 50
    budget = 3 * (30 + 20) + 50  # 200 numbers
    both = (weight - left @ right - sparse).norm()
    low, high = truncated_svd(weight, budget // (30 + 20))
    alone = weight.flatten().abs().sort(descending=True).values[budget:].norm()
    assert both < 0.2 * (weight - low @ high).norm()
    assert both < 0.2 * alone


def test_more_sweeps_never_raise_the_error():
    weight = spiked()
    errors = []
    for sweeps in (1, 2, 4, 8):
        left, right, sparse = low_rank_plus_sparse(weight, 2, 30, sweeps)
        errors.append(float((weight - left @ right - sparse).norm()))
    assert errors == sorted(errors, reverse=True)


def test_a_sparse_part_of_nothing_leaves_the_truncated_svd():
    left, right, sparse = low_rank_plus_sparse(matrix(6, 5), 2, 0)
    plain = truncated_svd(matrix(6, 5), 2)
    assert not sparse.any()
    torch.testing.assert_close(left @ right, plain[0] @ plain[1])


def test_more_elements_than_there_are_is_refused():
    with pytest.raises(UsageError) as error:
        low_rank_plus_sparse(matrix(3, 4), 1, 13)
    assert str(error.value) == "low rank plus sparse: non-zero elements: must be 0 to 12, got 13"


def kernel(m, n, *size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((m, n, *size)))


def test_a_spatial_svd_is_the_nearest_pair_of_one_dimensional_kernels():
    weight = kernel(6, 4, 3, 5)
    for rank in (1, 7, 12):
        vertical, horizontal = spatial_svd(weight, rank)
        assert vertical.shape == (rank, 4, 3, 1)
        assert horizontal.shape == (6, rank, 1, 5)
        product = torch.einsum("riy,orx->oiyx", vertical[..., 0], horizontal[:, :, 0])
        unfolded = np.einsum("oiyx->iyox", weight.numpy()).reshape(12, 30)
        lost = tail(scipy.linalg.svdvals(unfolded), rank)
        assert float((weight - product).norm()) == pytest.approx(lost, abs=1e-9)


def test_a_channel_svd_is_the_nearest_of_its_rank():
    weight = kernel(8, 3, 3, 3)
    first, second = channel_svd(weight, 4)
    assert (first.shape, second.shape) == ((4, 3, 3, 3), (8, 4, 1, 1))
    product = torch.einsum("or,riyx->oiyx", second[:, :, 0, 0], first)
    lost = tail(scipy.linalg.svdvals(weight.reshape(8, -1).numpy()), 4)
    assert float((weight - product).norm()) == pytest.approx(lost, abs=1e-9)


def test_a_whitened_channel_svd_is_best_on_patches():
    weight, x = kernel(8, 3, 3, 3), torch.rand(4, 3, 7, 7, dtype=torch.float64)
    patches = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    errors = []
    for moments in (None, patches.T @ patches):
        first, second = channel_svd(weight, 2, moments)
        errors.append(float((F.conv2d(F.conv2d(x, first), second) - F.conv2d(x, weight)).norm()))
    assert errors[1] < errors[0]


def rebuilt(parts):
    first, core, last = parts
    return torch.einsum("ob,ba...,ai->oi...", last.flatten(1), core, first.flatten(1))


def test_tucker_at_full_rank_is_exact_and_has_orthonormal_factors():
    weight = kernel(6, 4, 3, 3)
    first, core, last = tucker2(weight, 4, 6)
    torch.testing.assert_close(rebuilt((first, core, last)), weight)
    torch.testing.assert_close(first.flatten(1) @ first.flatten(1).T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(last.flatten(1).T @ last.flatten(1), torch.eye(6, dtype=torch.float64))


def test_tucker_without_sweeps_is_the_higher_order_svd_of_numpy():
    weight = kernel(6, 4, 3, 3)
    u_in = np.linalg.svd(np.moveaxis(weight.numpy(), 1, 0).reshape(4, -1))[0][:, :2]
    u_out = np.linalg.svd(weight.numpy().reshape(6, -1))[0][:, :3]
    expected = np.einsum("oiyx,ia,ja,ob,pb->pjyx", weight.numpy(), u_in, u_in, u_out, u_out)
    np.testing.assert_allclose(rebuilt(tucker2(weight, 2, 3, sweeps=0)).numpy(), expected, atol=1e-9)


def test_sweeps_of_tucker_bring_it_nearer_within_the_bounds_of_the_modes():
    weight = kernel(10, 8, 3, 3, seed=5)
    errors = [float((weight - rebuilt(tucker2(weight, 3, 4, sweeps=n))).norm()) for n in (0, 1, 10)]
    assert errors[2] <= errors[1] <= errors[0]
    assert errors[2] < errors[0]
    energies = mode_energies(weight)
    lost = [float(own[rank:].sum()) for own, rank in zip(energies, (3, 4), strict=True)]
    assert max(lost) <= errors[2] ** 2 <= errors[0] ** 2 <= sum(lost)


def test_ranks_that_cannot_be_beside_each_other_are_refused():
    with pytest.raises(UsageError) as error:
        tucker2(kernel(8, 8, 1, 1), 2, 3)
    assert str(error.value) == (
        "tucker2: ranks: must be 1 to 3 (in) and 1 to 2 (out) beside each other, got 2 and 3"
    )


def test_one_dimensional_kernels_are_taken_too():
    weight = kernel(6, 4, 5)
    torch.testing.assert_close(rebuilt(tucker2(weight, 4, 6)), weight)
    first, second = channel_svd(weight, 6)
    assert (first.shape, second.shape) == ((6, 4, 5), (6, 6, 1))


def test_singular_values_are_those_of_scipy():
    np.testing.assert_allclose(singular_values(matrix(5, 9)), scipy.linalg.svdvals(matrix(5, 9).numpy()))
