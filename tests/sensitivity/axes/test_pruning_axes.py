from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distiller.errors import UsageError
from distiller.pruning.n_to_m import n_to_m_mask
from distiller.sensitivity.axes import AXES, AxisContext, WeightAxis

PRUNING = {name: AXES[name] for name in ("element", "filter", "channel")}


def weight_axis(name: str) -> WeightAxis:
    axis = AXES[name]
    assert isinstance(axis, WeightAxis)
    return axis


@pytest.mark.parametrize(
    "module, axes",
    [
        (nn.Linear(3, 2), {"element", "n:m"}),
        (nn.Conv1d(2, 2, 3), {"element", "filter", "channel", "n:m"}),
        (nn.Conv2d(2, 2, 3), {"element", "filter", "channel", "n:m"}),
        (nn.Conv3d(2, 2, 3), {"element", "filter", "channel", "n:m"}),
        (nn.Conv2d(1, 2, 3), {"element", "filter"}),
        (nn.Conv2d(2, 1, 3), {"element", "channel", "n:m"}),
        (nn.Conv2d(4, 4, 3, groups=4), {"element", "filter"}),
        (nn.BatchNorm2d(3), set()),
    ],
)
def test_axes_apply_to_weights_that_leave_a_choice(module, axes):
    found = {
        name
        for name in ("element", "filter", "channel", "n:m")
        if weight_axis(name).applies_to("layer.weight", module.weight)
    }

    assert found == axes


def test_axes_apply_to_weights_only():
    embedding = torch.ones(1, 197, 768)

    for name in ("element", "filter", "channel", "n:m"):
        assert not weight_axis(name).applies_to("encoder.pos_embedding", embedding)
    assert weight_axis("element").applies_to("rnn.weight_ih_l0", torch.ones(8, 4))


weights = st.integers(0, 2**31).map(lambda seed: torch.randn(6, 5, 3, 2, generator=torch.manual_seed(seed)))
fractions = st.sampled_from([hundredths / 100 for hundredths in range(101)])


@given(weights, fractions)
def test_element_level_zeroes_numpys_choice_of_smallest_magnitudes(weight, level):
    flat = weight.numpy().ravel().copy()
    order = np.argsort(np.abs(flat), kind="stable")
    flat[order[: int(Fraction(str(level)) * flat.size)]] = 0

    compressed = weight_axis("element").compress(weight, level)

    np.testing.assert_array_equal(compressed.numpy().ravel(), flat)


@given(weights, fractions, st.sampled_from([("filter", 0), ("channel", 1)]))
def test_structure_level_zeroes_numpys_choice_of_least_mean_magnitudes(weight, level, axis_and_dim):
    axis, dim = axis_and_dim
    expected = np.moveaxis(weight.numpy().copy(), dim, 0)
    means = np.abs(expected.astype(np.float64)).mean(axis=(1, 2, 3))
    expected[np.argsort(means, kind="stable")[: int(Fraction(str(level)) * len(means))]] = 0

    compressed = weight_axis(axis).compress(weight, level)

    np.testing.assert_array_equal(compressed.numpy(), np.moveaxis(expected, 0, dim))


def by_loops(weight: np.ndarray, zeros: int, block: int) -> np.ndarray:
    """Each block of neighbouring inputs without its least, but at least `block - zeros` of them."""
    pruned = weight.copy()
    for out in range(weight.shape[0]):
        for position in np.ndindex(weight.shape[2:]):
            for start in range(0, weight.shape[1], block):
                inputs = range(start, min(start + block, weight.shape[1]))
                ranked = sorted(inputs, key=lambda i: abs(weight[(out, i, *position)]))
                for index in ranked[: max(0, len(inputs) - (block - zeros))]:
                    pruned[(out, index, *position)] = 0
    return pruned


@given(weights, st.sampled_from([(k, m) for m in (2, 3, 4, 5, 8) for k in range(1, m)]))
def test_n_to_m_level_zeroes_the_least_of_each_block(weight, ratio):
    zeros, block = ratio
    module = nn.Conv2d(5, 6, (3, 2))
    with torch.no_grad():
        module.weight.copy_(weight)

    (unit,) = AXES["n:m"].units(module, ["weight"], [zeros / block], AxisContext(block=block))
    value = unit.make(unit.levels[0]).tensors["weight"]

    np.testing.assert_array_equal(value.numpy(), by_loops(weight.numpy(), zeros, block))
    assert torch.equal(value, weight * n_to_m_mask(weight, block - zeros, block))  # as the pruner does it


@pytest.mark.parametrize(
    "block, levels",
    [(2, (0.0, 0.5)), (3, (0.0, 0.3333333333, 0.6666666667)), (8, tuple(k / 8 for k in range(8)))],
)
def test_n_to_m_sweeps_every_ratio_of_its_block(block, levels):
    context = AxisContext(block=block)

    assert AXES["n:m"].default_levels(context) == levels
    (unit,) = AXES["n:m"].units(nn.Linear(48, 2), ["weight"], levels, context)
    assert unit.levels == levels[1:]


def test_a_level_between_the_ratios_of_a_block_is_refused_with_its_neighbours():
    with pytest.raises(UsageError) as error:
        AXES["n:m"].units(nn.Linear(8, 2), ["weight"], [0.3], AxisContext(block=4))

    assert str(error.value) == (
        "sensitivity: a level of n:m with blocks of 4 must be k/4 with a whole k, got 0.3; "
        "next to it are 0.25 and 0.5"
    )


@pytest.mark.parametrize("block", [0, 1, 2**16 + 1])
def test_blocks_that_leave_no_ratio_are_refused(block):
    with pytest.raises(UsageError) as error:
        AXES["n:m"].default_levels(AxisContext(block=block))

    assert str(error.value) == (
        f"sensitivity: n:m takes blocks of 2 to 65536 neighbouring inputs, got {block}"
    )


@pytest.mark.parametrize(
    "inputs, level, note",
    [
        (8, 0.5, ""),
        (3, 0.5, "2:4 of 3 inputs: 33.3 % of the elements"),
        (3, 0.25, "3:4 of 3 inputs: 0.0 % of the elements"),
        (7, 0.75, "1:4 of 7 inputs: 71.4 % of the elements"),
    ],
)
def test_n_to_m_says_what_a_short_last_block_makes_of_a_level(inputs, level, note):
    layer = nn.Linear(inputs, 4)
    (unit,) = AXES["n:m"].units(layer, ["weight"], [level], AxisContext())

    assert unit.note(level) == note
    if note:
        zeros = float((unit.make(level).tensors["weight"] == 0).float().mean())
        assert f"{100 * zeros:.1f} %" in note


@pytest.mark.parametrize("name", list(PRUNING))
def test_level_one_prunes_everything_to_positive_zero(name):
    weight = -torch.ones(2, 2, 2, 2)

    compressed = weight_axis(name).compress(weight, 1.0)

    assert not compressed.any()
    assert not compressed.signbit().any()


@pytest.mark.parametrize("name", [*PRUNING, "n:m"])
def test_compressing_leaves_the_dense_weight_alone(name):
    weight = torch.randn(4, 4, 3, 3)
    before = weight.clone()

    weight_axis(name).compress(weight, 0.5)

    assert torch.equal(weight, before)
