import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from distiller.errors import DistillerError
from distiller.norms import l1_norm, l2_norm, max_norm
from distiller.pruning.criteria import (
    create_mask_level_criterion,
    create_mask_sensitivity_criterion,
    create_mask_threshold_criterion,
    expand_group_map,
    group_count,
    group_magnitudes,
    group_threshold_mask,
    lowest,
    snap,
    standard_deviation,
)

# Few distinct values, so that ties are the rule.
tensors = arrays(
    np.float32,
    array_shapes(max_dims=4, max_side=5),
    elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]),
).map(torch.from_numpy)
fractions = st.floats(0, 1)

GROUP_TYPES = ["2D", "Rows", "Cols", "3D", "Filters", "Channels"]


def weight_for(group_type: str) -> torch.Tensor:
    return torch.randn(4, 5) if group_type in ("Rows", "Cols") else torch.randn(4, 3, 2, 5)


def pruned(mask: torch.Tensor) -> int:
    return int((mask == 0).sum())


# --- threshold


def test_threshold_prunes_values_equal_to_it():
    t = torch.tensor([-0.5, 0.2, 0.5, -0.6, 0.0])
    assert create_mask_threshold_criterion(t, 0.5).tolist() == [0, 0, 0, 1, 0]


def test_threshold_zero_prunes_only_zeros():
    assert create_mask_threshold_criterion(torch.tensor([0.0, -0.0, 1e-30]), 0).tolist() == [0, 0, 1]


@given(t=tensors, threshold=st.floats(0, 3))
def test_threshold_agrees_with_numpy(t, threshold):
    expected = (np.abs(t.numpy()) > np.float32(threshold)).astype(np.float32)
    np.testing.assert_array_equal(create_mask_threshold_criterion(t, threshold).numpy(), expected)


# --- level


def test_level_prunes_the_smallest_magnitudes():
    t = torch.tensor([[3.0, -1.0], [-2.0, 4.0]])
    assert create_mask_level_criterion(t, 0.5).tolist() == [[1, 0], [0, 1]]


@given(t=tensors, sparsity=fractions)
def test_level_prunes_exactly_k_ties_included(t, sparsity):
    assert pruned(create_mask_level_criterion(t, sparsity)) == int(snap(sparsity * t.numel()))


@given(t=tensors, sparsity=fractions)
def test_level_agrees_with_a_stable_sort(t, sparsity):
    magnitudes = np.abs(t.numpy()).ravel()
    expected = np.ones(t.numel(), np.float32)
    expected[np.argsort(magnitudes, kind="stable")[: int(snap(sparsity * t.numel()))]] = 0
    np.testing.assert_array_equal(create_mask_level_criterion(t, sparsity).numpy().ravel(), expected)


@given(t=tensors, sparsities=st.tuples(fractions, fractions))
def test_level_masks_are_nested_when_sparsity_grows(t, sparsities):
    low, high = sorted(sparsities)
    assert (create_mask_level_criterion(t, high) <= create_mask_level_criterion(t, low)).all()


@given(sparsity=fractions, seed=st.integers(0, 99))
@settings(max_examples=50)
def test_level_equals_distillers_where_nothing_ties(sparsity, seed):
    t = torch.randperm(60, generator=torch.Generator().manual_seed(seed)).float().view(3, 4, 5) + 1
    count = int(snap(sparsity * t.numel()))
    if count == 0:
        return
    threshold = torch.topk(t.abs().view(-1), count, largest=False, sorted=True).values[-1]
    assert torch.equal(create_mask_level_criterion(t, sparsity), (t.abs() > threshold).float())


@pytest.mark.parametrize("sparsity", [0.0, 0.05])
def test_defect_level_criterion_with_nothing_to_prune_is_no_index_error(sparsity):
    """DEFECT of Distiller: k == 0 raised an IndexError; AGP with initial_sparsity 0 hit it."""
    assert create_mask_level_criterion(torch.randn(10), sparsity).tolist() == [1.0] * 10


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_defect_level_criterion_does_not_prune_all_of_a_constant_tensor(value):
    """DEFECT of Distiller: all elements that tie with the k-th were pruned, at any level."""
    mask = create_mask_level_criterion(torch.full((2, 5), value), 0.3)
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("sparsity", "count", "wanted"),
    [(0.7, 10, 7), (0.29, 100, 29), (0.57, 100, 57), (0.1 * 3, 10, 3), (0.999, 10, 9)],
)
def test_level_counts_as_written_in_spite_of_float_rounding(sparsity, count, wanted):
    assert pruned(create_mask_level_criterion(torch.randn(count), sparsity)) == wanted


@given(numerator=st.integers(0, 1000), count=st.integers(1, 10**9))
def test_snap_takes_every_decimal_product_for_what_was_meant(numerator, count):
    assert int(snap(numerator / 1000 * count)) == numerator * count // 1000


def test_level_one_prunes_everything():
    assert pruned(create_mask_level_criterion(torch.randn(3, 3), 1.0)) == 9


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_level_out_of_range_is_refused(sparsity):
    with pytest.raises(DistillerError) as error:
        create_mask_level_criterion(torch.randn(3), sparsity)
    assert str(error.value) == f"desired_sparsity must be in [0, 1], got {sparsity!r}"


@given(values=st.lists(st.integers(0, 4), min_size=1, max_size=30), data=st.data())
def test_lowest_are_those_of_a_stable_sort(values, data):
    count = data.draw(st.integers(0, len(values)))
    expected = set(sorted(range(len(values)), key=lambda index: values[index])[:count])
    found = lowest(torch.tensor(values, dtype=torch.float32), count)
    assert set(found.nonzero().flatten().tolist()) == expected


# --- sensitivity


def test_sensitivity_is_a_multiple_of_the_unbiased_standard_deviation():
    t = torch.randn(50)
    expected = np.abs(t.numpy()) > 0.6 * np.std(t.numpy(), ddof=1)
    np.testing.assert_array_equal(
        create_mask_sensitivity_criterion(t, 0.6).numpy(), expected.astype(np.float32)
    )


def test_sensitivity_goes_by_the_deviation_given():
    t = torch.tensor([0.1, 0.5, -2.0])
    assert create_mask_sensitivity_criterion(t, 0.5, stddev=1.0).tolist() == [0, 0, 1]


@pytest.mark.parametrize("t", [torch.tensor([3.0]), torch.full((4,), 3.0)])
def test_without_spread_sensitivity_keeps_what_is_not_zero(t):
    assert create_mask_sensitivity_criterion(t, 2.0).tolist() == [1.0] * len(t)


def test_infinite_weights_have_no_standard_deviation():
    with pytest.raises(DistillerError) as error:
        standard_deviation(torch.tensor([1.0, float("inf")]))
    assert str(error.value) == "the standard deviation must be finite, got nan for shape (2,)"


def test_half_precision_deviation_is_measured_in_single_precision():
    t = torch.full((2000,), 200.0, dtype=torch.float16)
    t[::2] = -200
    assert standard_deviation(t) == pytest.approx(200.05, abs=0.01)


# --- groups


@pytest.mark.parametrize("group_type", GROUP_TYPES)
@pytest.mark.parametrize(
    ("criteria", "measure"),
    [
        ("L1", lambda g: np.abs(g).sum()),
        ("L2", lambda g: np.sqrt((g**2).sum())),
        ("Max", lambda g: np.abs(g).max()),
        ("Mean_Abs", lambda g: np.abs(g).mean()),
        ("Mean_L1", lambda g: np.abs(g).mean()),
        ("Mean_L2", lambda g: np.sqrt((g**2).sum()) / g.size),
    ],
)
def test_group_threshold_agrees_with_a_loop_over_groups(group_type, criteria, measure):
    w = weight_for(group_type)
    n = w.numpy().astype(np.float64)
    slices = {
        "2D": [(i, j) for i in range(4) for j in range(3)],
        "Rows": list(range(4)),
        "Cols": [(slice(None), j) for j in range(5)],
        "3D": list(range(4)),
        "Filters": list(range(4)),
        "Channels": [(slice(None), j) for j in range(3)],
    }[group_type]
    magnitudes = [measure(n[where]) for where in slices]
    threshold = float(np.median(magnitudes) * 1.0001)
    expected = np.ones_like(n)
    for where, magnitude in zip(slices, magnitudes, strict=True):
        expected[where] = magnitude > threshold

    mask, binary_map = group_threshold_mask(w, group_type, threshold, criteria)

    np.testing.assert_array_equal(mask.numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(binary_map.numpy(), np.array(magnitudes) > threshold)
    assert mask.dtype == binary_map.dtype == w.dtype


def test_group_threshold_is_strict():
    w = torch.tensor([[1.0, -1.0], [1.0, 1.5]])
    assert group_threshold_mask(w, "Rows", 1.0, "Mean_Abs")[1].tolist() == [0, 1]


def test_group_threshold_takes_a_map_instead():
    w = torch.randn(2, 3, 1, 1)
    binary_map = torch.tensor([1.0, 0.0, 1.0])
    mask, returned = group_threshold_mask(w, "Channels", 0.0, "L1", binary_map)
    assert returned is binary_map
    assert mask.view(2, 3).tolist() == [[1, 0, 1], [1, 0, 1]]


@pytest.mark.parametrize("group_type", ["Filters", "Channels"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 2, 2), (3, 4, 2, 2, 2)])
def test_filters_and_channels_are_those_of_dim_0_and_1_of_any_weight(group_type, shape):
    w = torch.randn(shape)
    dim = 0 if group_type == "Filters" else 1
    others = tuple(other for other in range(w.dim()) if other != dim)
    expected = np.abs(w.numpy()).mean(axis=others)
    np.testing.assert_allclose(group_magnitudes(w, group_type).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("norm", "expected"), [(l1_norm, 7.0), (l2_norm, 5.0), (max_norm, 4.0)])
def test_magnitudes_are_norms_divided_by_the_group_size_when_asked(norm, expected):
    w = torch.tensor([[3.0, -4.0]])
    assert group_magnitudes(w, "Rows", norm, is_mean=False).tolist() == [expected]
    assert group_magnitudes(w, "Rows", norm).tolist() == [expected / 2]


def test_half_precision_magnitudes_do_not_overflow():
    w = torch.full((2, 1000), 100.0, dtype=torch.float16)
    assert group_magnitudes(w, "Filters", is_mean=False).tolist() == [1e5, 1e5]


@pytest.mark.parametrize(("group_type", "wanted"), [("2D", 12), ("Filters", 4), ("3D", 4), ("Channels", 3)])
def test_group_count(group_type, wanted):
    assert group_count(weight_for(group_type), group_type) == wanted


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: group_threshold_mask(torch.randn(2, 2), "Row", 0.1, "L1"),
            "group_type must be one of 2D, Rows, Cols, 3D, Filters, Channels, 4D, got 'Row'; "
            "did you mean 'Rows'?",
        ),
        (
            lambda: group_threshold_mask(torch.randn(2, 2), "Rows", 0.1, "Mean_abs"),
            "criteria must be one of L1, L2, Max, Mean_Abs, Mean_L1, Mean_L2, got 'Mean_abs'; "
            "did you mean 'Mean_Abs'?",
        ),
        (
            lambda: group_threshold_mask(torch.randn(2, 2), "2D", 0.1, "L1"),
            "group_type '2D' wants a tensor of 4 dimensions, got shape (2, 2)",
        ),
        (
            lambda: group_magnitudes(torch.randn(2), "Filters"),
            "group_type 'Filters' wants a tensor of 2 dimensions or more, got shape (2,)",
        ),
        (
            lambda: expand_group_map(torch.ones(2), torch.randn(4, 3, 1, 1), "Channels"),
            "binary_map: one value for each of 3 Channels is wanted, got 2",
        ),
    ],
)
def test_group_errors(call, text):
    with pytest.raises(DistillerError) as error:
        call()
    assert str(error.value) == text


# --- all of them

CRITERIA = {
    "threshold": lambda t: create_mask_threshold_criterion(t, 0.4),
    "level": lambda t: create_mask_level_criterion(t, 0.4),
    "sensitivity": lambda t: create_mask_sensitivity_criterion(t, 0.4),
    "filters": lambda t: group_threshold_mask(t, "Filters", 0.4, "Mean_Abs")[0],
    "channels": lambda t: group_threshold_mask(t, "Channels", 0.4, "Mean_L2")[0],
    "kernels": lambda t: group_threshold_mask(t, "2D", 0.4, "Max")[0],
}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_masks_keep_dtype_and_memory_format_and_leave_the_input_alone(criterion, dtype, memory_format):
    t = torch.randn(4, 3, 2, 2).to(dtype).to(memory_format=memory_format).requires_grad_()
    before = t.detach().clone()
    mask = criterion(t)
    assert mask.dtype == dtype
    assert mask.stride() == t.stride()
    assert not mask.requires_grad
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(t.detach(), before)


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_the_memory_format_does_not_change_the_mask(criterion):
    t = torch.randn(4, 3, 2, 2)
    assert torch.equal(criterion(t), criterion(t.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_nan_is_refused(criterion):
    t = torch.randn(4, 3, 2, 2)
    t[1, 2, 0, 1] = float("nan")
    with pytest.raises(DistillerError) as error:
        criterion(t)
    assert str(error.value) == (
        "cannot be pruned, got 1 NaN in 48 elements; "
        "training has diverged: resume from an earlier checkpoint with a lower learning rate"
    )


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_a_single_element_has_a_mask(criterion):
    assert criterion(torch.full((1, 1, 1, 1), 2.0)).tolist() == [[[[1.0]]]]


def test_defect_a_whole_layer_can_be_thresholded():
    """Distiller's group_threshold_mask refused the group type '4D' that its regularizers have."""
    weight = torch.linspace(-1, 1, 24).view(2, 3, 2, 2)
    mean = float(weight.abs().numpy().mean())
    for threshold, kept in ((mean * 0.99, 1.0), (mean * 1.01, 0.0)):
        mask, binary_map = group_threshold_mask(weight, "4D", threshold, "Mean_Abs")
        assert torch.equal(mask, torch.full_like(weight, kept))
        assert binary_map.tolist() == [kept]
    with pytest.raises(DistillerError, match="'4D' wants a tensor of 4 dimensions, got shape"):
        group_threshold_mask(torch.ones(2, 3), "4D", 0.1, "Max")
