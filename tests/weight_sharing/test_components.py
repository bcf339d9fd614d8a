"""Where components begin, how they merge, and which of them a weight belongs to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.errors import DistillerError
from distiller.weight_sharing.components import (
    assign_to_components,
    divergence,
    fit_mixture,
    merge_components,
    start_mixture,
)
from distiller.weight_sharing.mixture import Mixture
from distiller.weight_sharing.shared_values import KEPT, component_values


def mixture(means, stds, mixing=None):
    shares = mixing or [1 / len(means)] * len(means)
    means, stds, shares = (torch.tensor(x, dtype=torch.float64) for x in (means, stds, shares))
    return Mixture(means, stds**-2, shares)


@pytest.mark.parametrize(
    ("way", "wanted"),
    [
        ("linspace", [-1.0, 0.0, 1.0, 2.0]),
        ("quantiles", [-0.5, 0.5, 0.5, 2.0]),
        ([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]),
    ],
)
def test_means_begin_where_they_are_asked_to(way, wanted):
    values = torch.tensor([-1.0, -0.5, 0.5, 0.5, 0.5, 0.5, 2.0, 2.0])
    start = start_mixture(values, 5, 0.9, way, 0.5)
    assert start.means.tolist() == pytest.approx([0.0, *wanted])
    assert start.stds.tolist() == pytest.approx([0.5] * 5)
    assert start.mixing.tolist() == pytest.approx([0.9, *[0.025] * 4])


def test_kmeans_begins_at_the_clusters():
    torch.manual_seed(0)
    values = torch.cat([centre + 0.01 * torch.randn(200) for centre in (-1.0, 0.0, 0.7)])
    means = start_mixture(values, 3, means="kmeans").means
    assert means.tolist() == pytest.approx([0.0, -1.0, 0.7], abs=0.01)


def test_means_of_equal_weights_are_equal():
    for way in ("linspace", "quantiles", "kmeans"):
        assert start_mixture(torch.full((9,), 0.5), 4, means=way).means.tolist() == [0.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("means", "message"),
    [
        ([1.0], "initial_means: must be 3 numbers, one for each component but zero, got 1"),
        ("kmean", "initial_means: must be linspace, quantiles, kmeans or a list of numbers, got 'kmean'; "
                  "did you mean 'kmeans'?"),
    ],
)  # fmt: skip
def test_means_that_cannot_be_are_refused(means, message):
    with pytest.raises(DistillerError) as refusal:
        start_mixture(torch.randn(9), 4, means=means)
    assert str(refusal.value) == message


def test_expectation_maximization_finds_the_mixture():
    torch.manual_seed(0)
    values = torch.cat(
        (0.02 * torch.randn(9000), -0.5 + 0.1 * torch.randn(500), 0.5 + 0.05 * torch.randn(500))
    )
    found = fit_mixture(values, start_mixture(values, 3, 0.8, [-0.3, 0.4], 0.2), steps=60)
    assert found.means.tolist() == pytest.approx([0.0, -0.5, 0.5], abs=0.02)
    assert found.stds.tolist() == pytest.approx([0.02, 0.1, 0.05], rel=0.1)
    assert found.mixing.tolist() == pytest.approx([0.9, 0.05, 0.05], abs=0.01)


def test_divergence_is_the_lesser_kl():
    pair = mixture([0.0, 0.3], [0.1, 0.4])

    def kl(first, second):
        (m1, s1), (m2, s2) = first, second
        return np.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5

    wanted = min(kl((0, 0.1), (0.3, 0.4)), kl((0.3, 0.4), (0, 0.1)))
    assert divergence(pair)[0, 1].item() == pytest.approx(wanted)
    assert divergence(pair).diagonal().tolist() == pytest.approx([0, 0])


def test_overlapping_neighbours_merge_into_their_moments():
    merged = merge_components(
        mixture([0.0, 1.0, 0.9, -1.0], [0.05, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]), 1.0
    )
    assert merged.means.tolist() == pytest.approx([0.0, -1.0, 0.95])
    assert merged.mixing.tolist() == pytest.approx([0.7, 0.1, 0.2])
    assert merged.stds[2].item() == pytest.approx((0.01 + 0.05**2) ** 0.5)


def test_what_merges_with_zero_becomes_zero_so_that_more_weights_are_pruned():
    """A narrow zero component loses weights to one beside it: methods.md, 1.3."""
    beside = mixture([0.0, -0.035, 0.5], [0.01, 0.0316, 0.03])
    weights = torch.tensor([-0.04, -0.03, -0.02, -0.01, 0.0, 0.4])
    merged = merge_components(beside, 0.0, zero_threshold=2.0)
    assert merged.means.tolist() == pytest.approx([0.0, 0.5])
    assert merged.stds[0].item() == pytest.approx(0.01)
    assert int((assign_to_components(weights, beside) == 0).sum()) == 2
    assert int((assign_to_components(weights, merged) == 0).sum()) == 5


def test_nothing_merges_at_a_threshold_of_zero():
    twice = mixture([0.0, 0.5, 0.5], [0.1, 0.1, 0.1])
    assert merge_components(twice, 0.0).means.tolist() == [0.0, 0.5, 0.5]
    assert merge_components(twice, 1e-9).means.tolist() == [0.0, 0.5]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0.01, 1)), min_size=1, max_size=10), st.floats(0, 5))
def test_merging_keeps_the_whole_and_leaves_no_overlap(components, threshold):
    before = mixture([0.0, *(mean for mean, _ in components)], [0.1, *(std for _, std in components)])
    after = merge_components(before, threshold)
    assert after.mixing.sum().item() == pytest.approx(1)
    assert after.means[0] == 0
    assert (after.means[1:].diff() >= 0).all()
    line = after.means.argsort(stable=True)
    apart = divergence(after)[line[:-1], line[1:]]
    assert (apart >= threshold).all()


MODES = {
    "l2": [1, 0, 0, 0, 2, 2],
    "zero_bin": [KEPT, 0, 0, 0, KEPT, KEPT],
    "responsibility": [1, 1, 0, 0, 2, 2],
    "p": [KEPT, KEPT, 0, 0, KEPT, KEPT],
    "p_l2": [1, 0, 0, 0, 2, 2],
}


@pytest.mark.parametrize("mode", MODES)
def test_weights_belong_to_components(mode):
    three = mixture([0.0, -0.5, 0.5], [0.02, 0.1, 0.1], [0.9, 0.05, 0.05])
    weights = torch.tensor([-0.5, -0.2, 0.03, 0.0, 0.26, 9.0])
    codes = assign_to_components(weights, three, mode)
    assert codes.tolist() == MODES[mode]
    assert codes.dtype == torch.uint8
    values = component_values(weights, codes, three.means)
    wanted = [
        w if code == KEPT else three.means[int(code)].item() for w, code in zip(weights, codes, strict=True)
    ]
    assert values.tolist() == pytest.approx([float(value) for value in wanted])


def test_zero_by_responsibility_adds_to_zero_by_the_nearest_mean():
    wide = mixture([0.0, 0.1], [0.2, 0.01], [0.9, 0.1])
    weights = torch.tensor([0.2])
    assert [int(assign_to_components(weights, wide, mode)) for mode in ("l2", "p", "p_l2")] == [1, 0, 0]


def test_a_pruned_weight_stays_pruned():
    beside = mixture([0.0, 0.01], [1e-3, 0.5], [1e-9, 1 - 1e-9])
    assert assign_to_components(torch.zeros(2), beside, "responsibility").tolist() == [0, 0]


def test_of_equal_means_zero_comes_first():
    assert assign_to_components(torch.tensor([1e-3]), mixture([0.0, 0.0, 1.0], [1.0] * 3)).tolist() == [0]


def test_another_mode_is_refused():
    with pytest.raises(DistillerError) as refusal:
        assign_to_components(torch.zeros(1), mixture([0.0, 1.0], [1.0, 1.0]), "l3")  # type: ignore[arg-type]
    assert str(refusal.value) == "mode: must be one of l2, p, p_l2, responsibility, zero_bin, got 'l3'"


def test_numbers_that_cannot_be_are_refused():
    mixture = start_mixture(torch.randn(100), 4)
    with pytest.raises(DistillerError, match="^threshold must be 0 or more, got nan$"):
        merge_components(mixture, float("nan"))
    with pytest.raises(DistillerError) as error:
        start_mixture(torch.randn(100), 3, means=[float("nan"), 0.2])
    assert str(error.value) == "initial_means: must be finite numbers, got [nan, 0.2]"
