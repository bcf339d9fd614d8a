import pytest

from distiller.errors import UsageError
from distiller.functional_modules.form_check import OtherForm, as_traced


def test_what_is_as_it_was_passes():
    for value in (None, True, 3, 2.5, "a", ["x", "y"]):
        as_traced(value, value, "layer1")


@pytest.mark.parametrize(
    "value, expected, text",
    [
        (None, 3, "3 then, None now"),
        (4, 3, "3 then, 4 now"),
        (list(range(100)), None, "None then, a list now"),
    ],
)
def test_what_differs_is_refused_with_the_modules_name(value, expected, text):
    with pytest.raises(OtherForm) as error:
        as_traced(value, expected, "layer1.0")
    assert isinstance(error.value, UsageError)
    assert error.value.module_name == "layer1.0"
    assert str(error.value) == (
        f"layer1.0: its operations became modules for inputs of another form ({text}); convert a model that is "
        "not converted yet, with such inputs"
    )


def test_the_model_itself_is_called_the_model():
    with pytest.raises(OtherForm, match="^the model: its operations"):
        as_traced(1, 2, "")
