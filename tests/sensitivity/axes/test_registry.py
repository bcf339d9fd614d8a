import copy
import pickle

import pytest
import torch
from torch import nn

from distiller.errors import UnknownNameError, UsageError
from distiller.names import named_parameters
from distiller.replay import applied
from distiller.sensitivity.axes import AXES, AxisContext, find_axis, input_ranges

SHARES = (0.0, 0.95, 0.05)
PERCENT_5 = tuple(hundredths / 100 for hundredths in range(0, 100, 5))


@pytest.fixture
def context(tiny_cnn) -> AxisContext:
    return AxisContext(activation_ranges=input_ranges(tiny_cnn, [torch.randn(2, 1, 8, 8)]))


def test_axes_are_found_in_any_case():
    assert find_axis("Filter") is AXES["filter"]
    assert find_axis("Weight-Bits") is AXES["weight-bits"]


def test_an_unknown_axis_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError) as error:
        find_axis("filters")

    assert str(error.value) == (
        "sensitivity: unknown axis 'filters', not one of element, filter, channel, group, n:m, weight-bits, "
        "activation-bits, rank; did you mean 'filter'?"
    )


@pytest.mark.parametrize(
    "name, dense, default_range, default_levels, is_sparsity",
    [
        ("element", 0.0, SHARES, PERCENT_5, True),
        ("filter", 0.0, SHARES, PERCENT_5, True),
        ("channel", 0.0, SHARES, PERCENT_5, True),
        ("group", 0.0, SHARES, PERCENT_5, True),
        ("n:m", 0.0, (0.0, 0.75, 0.25), (0.0, 0.25, 0.5, 0.75), True),
        ("weight-bits", 32.0, (8.0, 2.0, 1.0), (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0), False),
        ("activation-bits", 32.0, (8.0, 2.0, 1.0), (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0), False),
        ("rank", 0.0, SHARES, PERCENT_5, False),
    ],
)
def test_what_an_axis_says_of_itself(name, dense, default_range, default_levels, is_sparsity):
    axis = find_axis(name)

    assert (axis.name, axis.dense_level, axis.is_sparsity) == (name, dense, is_sparsity)
    assert axis.default_range == default_range
    assert axis.default_levels(AxisContext()) == axis.levels(*default_range) == default_levels
    for level in (*default_levels, dense):
        axis.check_level(level)


@pytest.mark.parametrize(
    "axes, wrong, text",
    [
        (("element", "filter", "channel", "group"), 1.5, "a sparsity must lie in 0..1, got 1.5"),
        (("element",), -0.1, "a sparsity must lie in 0..1, got -0.1"),
        (("element",), float("nan"), "a sparsity must lie in 0..1, got nan"),
        (("n:m",), 1.0, "a level of n:m must be at least 0 and less than 1, got 1"),
        (
            ("weight-bits",),
            2.5,
            "a level of weight-bits must be a whole number of bits, 2 to 16 (32: dense), got 2.5",
        ),
        (
            ("activation-bits",),
            1.0,
            "a level of activation-bits must be a whole number of bits, 2 to 16 (32: dense), got 1",
        ),
        (("rank",), 2.0, "a level of rank is the share taken away and must lie in 0..1, got 2"),
    ],
)
def test_a_level_that_an_axis_does_not_have_is_refused(axes, wrong, text, tiny_cnn, context):
    for name in axes:
        with pytest.raises(UsageError) as error:
            find_axis(name).check_level(wrong)
        assert str(error.value) == f"sensitivity: {text}"
        with pytest.raises(UsageError):
            find_axis(name).units(tiny_cnn, ["*"], [wrong], context)


@pytest.mark.parametrize("name", list(AXES))
def test_units_have_the_levels_asked_for_once_and_without_the_dense_one(name, tiny_cnn, context):
    axis = find_axis(name)
    few = axis.default_levels(context)[1:3]

    units = axis.units(tiny_cnn, ["*"], [few[0], axis.dense_level, few[1] + 1e-12, few[0]], context)

    assert units
    assert {unit.levels for unit in units} == {few}
    assert {unit.axis for unit in units} == {name}


@pytest.mark.parametrize("name", list(AXES))
def test_curves_are_named_by_weights_in_the_order_asked_for(name, tiny_cnn, context):
    weights = [unit.parameter for unit in find_axis(name).units(tiny_cnn, ["*"], [], context)]

    assert (
        weights
        == {
            "element": ["conv1.weight", "conv2.weight", "fc.weight"],
            "filter": ["conv1.weight", "conv2.weight"],
            "channel": ["conv2.weight"],
            "group": ["conv1.weight", "conv2.weight"],
            "n:m": ["conv2.weight", "fc.weight"],
            "weight-bits": ["conv1.weight", "conv2.weight", "fc.weight"],
            "activation-bits": ["conv1.weight", "conv2.weight", "fc.weight"],
            "rank": ["conv1.weight", "conv2.weight", "fc.weight"],
        }[name]
    )
    if name != "group":
        reversed_ = find_axis(name).units(tiny_cnn, list(reversed(weights)), [], context)
        assert [unit.parameter for unit in reversed_] == list(reversed(weights))


@pytest.mark.parametrize("name", list(AXES))
def test_names_are_patterns_with_or_without_wrapper_parts(name, tiny_cnn, context):
    units = find_axis(name).units(nn.DataParallel(tiny_cnn), ["module.conv2*"], [], context)

    assert [unit.parameter for unit in units] == ["conv2.weight"]


@pytest.mark.parametrize("name", list(AXES))
def test_a_name_that_matches_nothing_is_refused(name, tiny_cnn, context):
    with pytest.raises(UnknownNameError) as error:
        find_axis(name).units(tiny_cnn, ["conv3.weight"], [], context)

    assert str(error.value) == "no parameter 'conv3.weight' in the model; did you mean 'conv2.weight'?"


@pytest.mark.parametrize("name", list(AXES))
def test_an_axis_without_anything_is_refused_with_what_it_takes(name, tiny_cnn, context):
    with pytest.raises(UsageError) as error:
        find_axis(name).units(tiny_cnn, ["fc.bias"], [], context)

    takes = {
        "element": "weights of two or more dimensions",
        "filter": "convolution weights of several filters",
        "channel": "convolution weights of several channels",
        "group": "weights, biases and norms of channel groups that thinning can remove channels from",
        "n:m": "weights of two or more dimensions with several input channels",
        "weight-bits": "weights of convolutions and linear layers",
        "activation-bits": "weights of convolutions and linear layers that the images reach",
        "rank": "weights of linear layers and of convolutions (1-d, 2-d) without groups, of a rank above 1",
    }[name]
    assert str(error.value) == (
        f"sensitivity: axis '{name}' takes {takes}, got 1 parameters without one; "
        "choose another axis or other parameters"
    )


@pytest.mark.parametrize("name", list(AXES))
def test_variants_touch_what_the_unit_says_and_keep_shapes(name, tiny_cnn, context):
    axis = find_axis(name)
    parameters = dict(named_parameters(tiny_cnn))

    for unit in axis.units(tiny_cnn, ["*"], axis.default_levels(context), context):
        changed = False
        for level in unit.levels:
            variant = unit.make(level)
            assert set(variant.tensors) <= set(unit.tensors)
            assert set(variant.inputs) == set(unit.inputs)
            for key, value in variant.tensors.items():
                assert (value.shape, value.dtype) == (parameters[key].shape, parameters[key].dtype)
                changed = changed or not torch.equal(value, parameters[key])
            x = torch.randn(3, 2, dtype=torch.float64)
            for transform in variant.inputs.values():
                before = x.clone()
                value = transform(x)
                assert (value.shape, value.dtype) == (x.shape, x.dtype)
                assert torch.equal(x, before)
                changed = changed or not torch.equal(value, x)
        assert changed


@pytest.mark.parametrize("name", list(AXES))
def test_variants_are_of_the_model_at_the_time_of_the_units(name, tiny_cnn, context):
    """DEFECT of Distiller: masks accumulated on one copy, so that levels depended on those before."""
    axis = find_axis(name)
    low, high = axis.default_levels(context)[1:3]
    units, again = (axis.units(copy.deepcopy(tiny_cnn), ["*"], [low, high], context) for _ in range(2))
    before = copy.deepcopy(tiny_cnn.state_dict())

    for unit, other in zip(axis.units(tiny_cnn, ["*"], [low, high], context), again, strict=True):
        with applied(tiny_cnn, unit.make(high)):
            tensors = unit.make(low).tensors
            expected = other.make(low).tensors
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[key], expected[key]) for key in tensors)

    assert len(units) == len(again)
    for key, value in tiny_cnn.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", list(AXES))
def test_units_survive_pickling(name, tiny_cnn, context):
    axis = find_axis(name)
    level = axis.default_levels(context)[2]
    units = axis.units(tiny_cnn, ["*"], [level], context)

    copies = pickle.loads(pickle.dumps(units))

    x = torch.randn(3, 2)
    for unit, other in zip(units, copies, strict=True):
        assert (other.axis, other.parameter, other.levels) == (unit.axis, unit.parameter, unit.levels)
        assert other.note(level) == unit.note(level)
        mine, theirs = unit.make(level), other.make(level)
        assert all(torch.equal(value, theirs.tensors[key]) for key, value in mine.tensors.items())
        assert all(torch.equal(value(x), theirs.inputs[key](x)) for key, value in mine.inputs.items())


@pytest.mark.parametrize("name", ["element", "filter", "channel", "group", "n:m", "weight-bits", "rank"])
def test_a_weight_that_cannot_be_compressed_is_named(name, tiny_cnn, context):
    with torch.no_grad():
        tiny_cnn.conv2.weight[0] = float("nan")
    axis = find_axis(name)
    (unit,) = axis.units(tiny_cnn, ["conv2.weight"], [], context)

    with pytest.raises(ValueError, match=r"^sensitivity of 'conv2\.weight': "):
        unit.make(axis.default_levels(context)[-1])
