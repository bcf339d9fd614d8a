from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from distiller.errors import DistillerError, UnknownNameError, UsageError
from distiller.names import unwrap
from distiller.sensitivity.axes import AXES, AxisContext, input_ranges
from distiller.sensitivity.engine import perform_sensitivity_analysis

WEIGHTS = ("conv1.weight", "conv2.weight", "conv3.weight", "fc.weight")


class Recorder:
    """A test function that keeps the weights it is called on."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, *, model):
        self.seen.append({name: value.clone() for name, value in unwrap(model).state_dict().items()})
        return 100.0 - len(self.seen), 100.0, 0.5


def smallest_zeroed(weight, level):
    """Numpy's choice: the int(level * n) smallest magnitudes, set to zero."""
    flat = weight.numpy().ravel().copy()
    flat[np.argsort(np.abs(flat), kind="stable")[: int(round(level * flat.size, 9))]] = 0
    return flat.reshape(weight.shape)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(before, after):
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def test_every_parameter_is_pruned_alone_to_every_level(model):
    dense = state(model)
    record = Recorder()

    result = perform_sensitivity_analysis(model, names_of(model), [0.25, 0.5], record, "element")

    assert list(result) == list(WEIGHTS)
    assert len(record.seen) == 8
    for index, seen in enumerate(record.seen):
        name, level = WEIGHTS[index // 2], (0.25, 0.5)[index % 2]
        np.testing.assert_array_equal(seen.pop(name).numpy(), smallest_zeroed(dense[name], level))
        assert all(torch.equal(seen[other], dense[other]) for other in seen)


def test_points_of_a_decreasing_range_are_pruned_from_the_dense_weights(model):
    """DEFECT of Distiller: the masks of one parameter accumulated, so 0.2 after 0.8 measured 0.8."""
    dense = model.conv2.weight.detach().clone()
    record = Recorder()

    perform_sensitivity_analysis(model, ["conv2.weight"], [0.8, 0.5, 0.2], record, "element")

    for seen, level in zip(record.seen, (0.8, 0.5, 0.2), strict=True):
        np.testing.assert_array_equal(seen["conv2.weight"].numpy(), smallest_zeroed(dense, level))


def test_result_is_distillers(model):
    scores = iter([(91.0, 99.0, 0.3), (90.0, 98.0, 0.4)])

    result = perform_sensitivity_analysis(
        model, ["fc.weight"], np.arange(0, 1, 0.5), lambda model: next(scores), "element"
    )

    assert result == OrderedDict({"fc.weight": {0.0: (91.0, 99.0, 0.3), 0.5: (90.0, 98.0, 0.4)}})
    assert type(result) is OrderedDict


def test_dense_point_is_evaluated_once_for_all_parameters(model):
    record = Recorder()

    result = perform_sensitivity_analysis(model, names_of(model), [0.0, 0.5], record, "element")

    assert len(record.seen) == 1 + len(WEIGHTS)
    assert {points[0.0] for points in result.values()} == {(99.0, 100.0, 0.5)}


def test_levels_come_back_without_float_noise(model):
    result = perform_sensitivity_analysis(
        model, ["fc.weight"], np.arange(0.05, 0.4, 0.05), Recorder(), "element"
    )

    assert list(result["fc.weight"]) == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35]


@pytest.mark.parametrize(
    "group, names",
    [
        ("element", WEIGHTS),
        ("filter", ("conv1.weight", "conv2.weight", "conv3.weight")),
        ("channel", ("conv2.weight", "conv3.weight")),
    ],
)
def test_parameters_that_the_axis_is_not_meant_for_are_passed_over(model, group, names):
    result = perform_sensitivity_analysis(model, names_of(model), [0.5], Recorder(), group)

    assert tuple(result) == names


@pytest.mark.parametrize("group", list(AXES))
def test_model_comes_back_bit_for_bit(model, group):
    before = state(model)
    images = torch.randn(2, 1, 8, 8)
    context = AxisContext(dummy_input=images, activation_ranges=input_ranges(model, [images]))
    axis = AXES[group]

    levels = [axis.dense_level, *axis.default_levels(context)]
    result = perform_sensitivity_analysis(model, ["*"], levels, Recorder(), group, context)

    assert_same_state(before, state(model))
    assert {tuple(points) for points in result.values()} == {tuple(dict.fromkeys(levels))}


def test_model_comes_back_bit_for_bit_when_the_test_fails(model):
    before = state(model)
    model.train()

    def fail(*, model):
        model.bn(torch.randn(2, 4, 3, 3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform_sensitivity_analysis(model, ["conv1.weight"], [0.5], fail, "filter")

    assert_same_state(before, state(model))
    assert model.bn.training


def test_parameters_and_their_storage_stay_the_same_objects(model):
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}

    perform_sensitivity_analysis(model, ["*"], [0.5], Recorder(), "element")

    after = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    assert all(after[name][0] is before[name][0] and after[name][1] == before[name][1] for name in before)


def test_points_are_measured_in_evaluation_mode_and_modes_come_back(model):
    model.train()
    model.bn.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []

    def note_modes(*, model):
        seen.append(any(module.training for module in model.modules()))
        return 1.0, 1.0, 1.0

    perform_sensitivity_analysis(model, ["*"], [0.0, 0.5], note_modes, "element")

    assert not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_batch_norm_statistics_are_the_same_for_every_point_even_if_the_test_trains(model):
    torch.manual_seed(0)
    images = torch.randn(4, 1, 8, 8)
    means = []

    def train(*, model):
        model.train()
        means.append(model.bn.running_mean.clone())
        model(images)
        return 1.0, 1.0, 1.0

    perform_sensitivity_analysis(model, ["*"], [0.0, 0.5], train, "element")

    assert all(torch.equal(mean, torch.zeros(4)) for mean in [*means, model.bn.running_mean])


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_models_give_the_same_points_by_canonical_names(model, wrap):
    plain = Recorder()
    expected = perform_sensitivity_analysis(model, ["conv2.weight"], [0.5], plain, "channel")
    wrapped = Recorder()

    result = perform_sensitivity_analysis(wrap(model), ["module.conv2.weight"], [0.5], wrapped, "channel")

    assert result == expected
    assert_same_state(plain.seen[0], wrapped.seen[0])


def test_unknown_names_are_refused_with_the_nearest(model):
    with pytest.raises(UnknownNameError) as error:
        perform_sensitivity_analysis(model, ["conv1.weigth"], [0.5], Recorder(), "element")

    assert str(error.value) == "no parameter 'conv1.weigth' in the model; did you mean 'conv1.weight'?"


def test_an_axis_without_a_parameter_is_refused(model):
    with pytest.raises(UsageError) as error:
        perform_sensitivity_analysis(model, ["fc.weight", "fc.bias"], [0.5], Recorder(), "filter")

    assert str(error.value) == (
        "sensitivity: axis 'filter' takes convolution weights of several filters, "
        "got 2 parameters without one; choose another axis or other parameters"
    )


@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan")])
def test_a_sparsity_that_is_no_fraction_is_refused(model, level):
    with pytest.raises(UsageError) as error:
        perform_sensitivity_analysis(model, ["fc.weight"], [0.5, level], Recorder(), "element")

    assert str(error.value) == f"sensitivity: a sparsity must lie in 0..1, got {level:g}"


def test_a_weight_with_nan_is_named(model):
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")

    with pytest.raises(DistillerError, match=r"^sensitivity of 'fc\.weight': .*NaN"):
        perform_sensitivity_analysis(model, ["fc.weight"], [0.5], Recorder(), "element")


def test_model_is_dense_between_points(model):
    before = state(model)

    def names(*, model):
        return 1.0, 1.0, 1.0

    for level in (0.5, 0.9):
        perform_sensitivity_analysis(model, ["*"], [level], names, "element")
        assert_same_state(before, state(model))


def test_parameters_are_asked_for_by_patterns(model):
    assert tuple(perform_sensitivity_analysis(model, ["conv*"], [0.5], Recorder(), "element")) == WEIGHTS[:3]
