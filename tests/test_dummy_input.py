import pytest
import torch

from distiller.dummy_input import get_dummy_input, resolve_input_shape
from distiller.errors import UnknownNameError, UsageError


@pytest.mark.parametrize(
    ("dataset", "shape"),
    [
        ("imagenet", (1, 3, 224, 224)),
        ("cifar10", (1, 3, 32, 32)),
        ("mnist", (1, 1, 28, 28)),
        ("digits", (1, 1, 8, 8)),
    ],
)
def test_a_data_set_gives_a_batch_of_one_image(dataset, shape):
    assert resolve_input_shape(dataset, None) == shape
    assert get_dummy_input(dataset).shape == shape


def test_values_are_standard_normal():
    torch.manual_seed(0)
    x = get_dummy_input(input_shape=(100, 100))
    assert x.mean().abs() < 0.05
    assert x.std() == pytest.approx(1, abs=0.05)


def test_shapes_may_be_nested():
    made = get_dummy_input(input_shape=((1, 2), [(3,), {"a": [4, 5], "b": (6,)}]))
    assert isinstance(made, tuple)
    assert isinstance(made[1], list)
    assert made[0].shape == (1, 2)
    assert made[1][0].shape == (3,)
    assert {key: tuple(value.shape) for key, value in made[1][1].items()} == {"a": (4, 5), "b": (6,)}


def test_every_tensor_is_made_on_the_device_asked_for():
    made = get_dummy_input(device="meta", input_shape=[(1, 2), (3,)])
    assert {tensor.device.type for tensor in made} == {"meta"}


def test_the_data_set_goes_before_the_shape_as_in_distiller():
    assert get_dummy_input("mnist", input_shape=(1, 3, 9, 9)).shape == (1, 1, 28, 28)


def test_an_unknown_data_set_is_a_value_error_with_the_nearest_name():
    with pytest.raises(UnknownNameError) as caught:
        get_dummy_input("cifar11")
    assert str(caught.value) == "dummy input: unknown data set 'cifar11'; did you mean 'cifar10'?"
    assert isinstance(caught.value, ValueError)
    with pytest.raises(UnknownNameError, match="unknown data set 'x'; give input_shape"):
        get_dummy_input("x")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, "dummy input: neither data set nor input_shape given; give one"),
        ((1, -3), "dummy input: a shape has no negative sizes, got (1, -3)"),
        ((), "shapes in tuples, lists and dicts, got ()"),
        ({}, "shapes in tuples, lists and dicts, got {}"),
        ("32", "shapes in tuples, lists and dicts, got '32'"),
        (3, "shapes in tuples, lists and dicts, got 3"),
        (((1, 2), 3), "shapes in tuples, lists and dicts, got 3"),
        ((1, 2.0), "shapes in tuples, lists and dicts, got 1"),
        ((True, True), "shapes in tuples, lists and dicts, got True"),
    ],
)
def test_a_malformed_shape_is_refused(shape, message):
    with pytest.raises(UsageError) as caught:
        get_dummy_input(input_shape=shape)
    assert message in str(caught.value)
