from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distiller.errors import UnknownNameError, UsageError
from distiller.sensitivity.axes import AXES, find_axis, sparsity_levels


def test_levels_of_distillers_default_range_include_its_end():
    """DEFECT of Distiller: --sense-range 0 0.95 0.05 tested 19 levels and never 0.95."""
    levels = sparsity_levels(0.0, 0.95, 0.05)

    assert levels == tuple(hundredths / 100 for hundredths in range(0, 100, 5))
    assert len(levels) == 20


@pytest.mark.parametrize(
    "start, stop, step, levels",
    [
        (0.0, 1.0, 0.5, (0.0, 0.5, 1.0)),
        (0.0, 0.95, 0.4, (0.0, 0.4, 0.8, 0.95)),
        (0.3, 0.3, 0.1, (0.3,)),
        (0.2, 0.3, 1.0, (0.2, 0.3)),
        (0.1, 0.7, 0.1, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
    ],
)
def test_levels_start_at_the_start_and_end_at_the_end(start, stop, step, levels):
    assert sparsity_levels(start, stop, step) == levels


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000))
def test_levels_are_those_of_exact_arithmetic(a, b, step):
    start, stop = sorted((a, b))
    exact = sorted({*range(start, stop + 1, step), stop})

    levels = sparsity_levels(start / 1000, stop / 1000, step / 1000)

    assert levels == tuple(float(Fraction(level, 1000)) for level in exact)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(1e-3, 1))
def test_levels_ascend_within_the_range(a, b, step):
    start, stop = sorted((a, b))

    levels = sparsity_levels(start, stop, step)

    assert list(levels) == sorted(set(levels))
    assert levels[0] == pytest.approx(start, abs=1e-9)
    assert levels[-1] == pytest.approx(stop, abs=1e-9)
    assert all(0 <= level <= 1 for level in levels)
    assert all(np.diff(levels) <= step + 1e-9)


@pytest.mark.parametrize("start, stop", [(-0.1, 0.5), (0.0, 1.5), (0.6, 0.5), (float("nan"), 0.5)])
def test_a_range_outside_of_the_fractions_is_refused(start, stop):
    with pytest.raises(UsageError) as error:
        sparsity_levels(start, stop, 0.1)

    assert str(error.value) == (
        "sensitivity range: start and stop must satisfy 0 <= start <= stop <= 1, "
        f"got {start:g} and {stop:g}; sparsity is a fraction, as in '0 0.95 0.05'"
    )


@pytest.mark.parametrize("step", [0.0, -0.1, 1e-9, 5.0, float("inf"), float("nan")])
def test_a_step_that_is_not_a_small_fraction_is_refused(step):
    with pytest.raises(UsageError) as error:
        sparsity_levels(0.0, 0.5, step)

    assert str(error.value) == (
        f"sensitivity range: step must lie between 1e-06 and 1, got {step:g}; as in '0 0.95 0.05'"
    )


def test_axes_are_found_in_any_case():
    assert find_axis("Filter") is AXES["filter"]


def test_an_unknown_axis_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError) as error:
        find_axis("filters")

    assert str(error.value) == (
        "sensitivity: unknown axis 'filters', not one of element, filter, channel; did you mean 'filter'?"
    )


@pytest.mark.parametrize(
    "module, axes",
    [
        (nn.Linear(3, 2), {"element"}),
        (nn.Conv1d(2, 2, 3), {"element", "filter", "channel"}),
        (nn.Conv2d(2, 2, 3), {"element", "filter", "channel"}),
        (nn.Conv3d(2, 2, 3), {"element", "filter", "channel"}),
        (nn.Conv2d(1, 2, 3), {"element", "filter"}),
        (nn.Conv2d(2, 1, 3), {"element", "channel"}),
        (nn.Conv2d(4, 4, 3, groups=4), {"element", "filter"}),
        (nn.BatchNorm2d(3), set()),
    ],
)
def test_axes_apply_to_weights_that_leave_a_choice(module, axes):
    assert {name for name, axis in AXES.items() if axis.applies_to("layer.weight", module.weight)} == axes


def test_axes_apply_to_weights_only():
    embedding = torch.ones(1, 197, 768)

    assert not any(axis.applies_to("encoder.pos_embedding", embedding) for axis in AXES.values())
    assert AXES["element"].applies_to("rnn.weight_ih_l0", torch.ones(8, 4))


weights = st.integers(0, 2**31).map(lambda seed: torch.randn(6, 5, 3, 2, generator=torch.manual_seed(seed)))
fractions = st.sampled_from([hundredths / 100 for hundredths in range(101)])


@given(weights, fractions)
def test_element_level_zeroes_numpys_choice_of_smallest_magnitudes(weight, level):
    flat = weight.numpy().ravel().copy()
    order = np.argsort(np.abs(flat), kind="stable")
    flat[order[: int(Fraction(str(level)) * flat.size)]] = 0

    compressed = AXES["element"].compress(weight, level)

    np.testing.assert_array_equal(compressed.numpy().ravel(), flat)


@given(weights, fractions, st.sampled_from([("filter", 0), ("channel", 1)]))
def test_structure_level_zeroes_numpys_choice_of_least_mean_magnitudes(weight, level, axis_and_dim):
    axis, dim = axis_and_dim
    expected = np.moveaxis(weight.numpy().copy(), dim, 0)
    means = np.abs(expected.astype(np.float64)).mean(axis=(1, 2, 3))
    expected[np.argsort(means, kind="stable")[: int(Fraction(str(level)) * len(means))]] = 0

    compressed = AXES[axis].compress(weight, level)

    np.testing.assert_array_equal(compressed.numpy(), np.moveaxis(expected, 0, dim))


@pytest.mark.parametrize("axis", AXES.values(), ids=list(AXES))
def test_level_one_prunes_everything_to_positive_zero(axis):
    weight = -torch.ones(2, 2, 2, 2)

    compressed = axis.compress(weight, 1.0)

    assert not compressed.any()
    assert not compressed.signbit().any()


@pytest.mark.parametrize("axis", AXES.values(), ids=list(AXES))
def test_compressing_leaves_the_dense_weight_alone(axis):
    weight = torch.randn(4, 4, 3, 3)
    before = weight.clone()

    axis.compress(weight, 0.5)

    assert torch.equal(weight, before)
