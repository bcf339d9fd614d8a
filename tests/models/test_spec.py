import pytest
from torch import nn

from distiller.errors import UsageError
from distiller.models.spec import ModelSpec, register_model
from distiller.registry import MODELS


def spec_of(smallest_size, any_channels=True):
    return ModelSpec(
        "net", lambda classes, _: nn.Linear(1, classes), "cifar10", (3, 32, 32), smallest_size, any_channels
    )


@pytest.mark.parametrize(
    ("smallest_size", "size", "expected"),
    [(8, 8, 8), (8, 28, 28), (8, 224, 224), (8, 7, 32), (None, 32, 32), (None, 28, 32), (None, 224, 32)],
)
def test_images_keep_their_size_where_the_model_takes_it(smallest_size, size, expected):
    assert spec_of(smallest_size).input_shape(1, size) == (1, expected, expected)


def test_images_keep_their_channels_where_the_model_takes_them():
    assert spec_of(8).input_shape(1, 28) == (1, 28, 28)
    assert spec_of(8, any_channels=False).input_shape(1, 28) == (3, 28, 28)


def test_the_shape_for_a_shape_is_itself():
    for spec in (spec_of(8), spec_of(None), spec_of(40, any_channels=False)):
        shape = spec.input_shape(1, 28)
        assert spec.input_shape(*shape[:2]) == shape


def test_calling_a_spec_builds_an_untrained_model():
    model = spec_of(8)(7, 3)
    assert isinstance(model, nn.Linear)
    assert model.out_features == 7


def test_a_name_is_registered_once():
    taken = next(iter(MODELS))
    spec = ModelSpec(taken, lambda classes, _: nn.Linear(1, classes), "mnist", (1, 28, 28), None)
    with pytest.raises(UsageError) as caught:
        register_model(spec)
    assert (
        str(caught.value)
        == f"register_model: there is an architecture '{taken}' already; choose another name"
    )
