import pytest

from distiller.errors import DistillerError, UnknownNameError
from distiller.pruning.settings import (
    ParameterError,
    SettingsByName,
    as_names,
    check_fraction,
    is_listed,
    naming,
)

NAMES = ("conv1.weight", "conv1.bias", "layer1.0.weight", "layer1.1.weight", "fc.weight")


def test_exact_name_wins_over_patterns_and_the_default():
    settings = SettingsByName("levels", {"*": 0.1, "layer1.*": 0.2, "layer1.0.weight": 0.3})
    assert [settings.get(name) for name in NAMES] == [0.1, 0.1, 0.3, 0.2, 0.1]


def test_patterns_are_tried_in_the_order_given():
    settings = SettingsByName("levels", {"layer1.*": 0.2, "*.weight": 0.5, "layer1.1.*": 0.9})
    assert settings.get("layer1.1.weight") == 0.2
    assert settings.get("fc.weight") == 0.5
    assert settings.get("conv1.bias") is None


def test_names_are_found_with_and_without_the_wrappers_part():
    settings = SettingsByName("levels", {"module.fc.weight": 0.4, "module.layer1.*": 0.2})
    assert settings.get("fc.weight") == 0.4
    assert settings.get("layer1.0.weight") == 0.2
    assert settings.select(NAMES) == ("layer1.0.weight", "layer1.1.weight", "fc.weight")


def test_a_name_as_written_wins_over_one_without_the_wrappers_part():
    settings = SettingsByName("levels", {"fc.weight": 0.4, "module.fc.weight": 0.2})
    assert settings.get("fc.weight") == 0.4


def test_the_default_selects_every_parameter_biases_included():
    assert SettingsByName("levels", {"*": 0.5}).select(NAMES) == NAMES


def test_keys_that_match_nothing_are_refused():
    settings = SettingsByName("levels", {"conv1.weigth": 0.5, "fc.*": 0.1, "layer9.*": 0.1})
    with pytest.raises(UnknownNameError) as error:
        settings.select(NAMES)
    assert str(error.value) == (
        "no parameter 'conv1.weigth' in the model; did you mean 'conv1.weight'?\n"
        "pattern 'layer9.*' matches no parameter of the model"
    )


@pytest.mark.parametrize("value", [1.0, -0.1, 1.5, float("nan")])
def test_values_out_of_range_are_refused_with_key_and_value(value):
    with pytest.raises(DistillerError) as error:
        SettingsByName("levels", {"*": 0.5, "fc.weight": value}, below_one=True)
    assert str(error.value) == f"levels['fc.weight'] must be in [0, 1), got {value!r}"


def test_values_without_an_upper_end_must_not_be_negative():
    with pytest.raises(DistillerError) as error:
        SettingsByName("thresholds", {"*": -1})
    assert str(error.value) == "thresholds['*'] must be 0 or more, got -1"
    assert SettingsByName("thresholds", {"*": 7.5}).get("fc.weight") == 7.5


def test_no_settings_at_all_are_refused():
    with pytest.raises(DistillerError) as error:
        SettingsByName("levels", {})
    assert str(error.value) == "levels: at least one parameter name, pattern or '*' is wanted, got {}"


def test_a_single_name_is_a_list_of_one():
    assert as_names("fc.weight") == ("fc.weight",)
    assert as_names(["a", "b.*"]) == ("a", "b.*")


@pytest.mark.parametrize("weights", ["", [], [""]])
def test_no_weights_are_refused(weights):
    with pytest.raises(DistillerError) as error:
        as_names(weights)
    assert str(error.value) == f"weights: at least one parameter name or pattern is wanted, got {weights!r}"


def test_listed_are_exact_names_patterns_and_wrapped_names():
    requested = ("module.fc.weight", "layer1.*.weight")
    assert [is_listed(name, requested) for name in NAMES] == [False, False, True, True, True]


def test_a_part_of_a_listed_name_is_not_listed():
    assert not is_listed("conv1.weight", ("layer1.0.conv1.weight",))


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_check_fraction_names_argument_value_and_range(value):
    with pytest.raises(DistillerError) as error:
        check_fraction("final_sparsity", value, one_allowed=False)
    assert str(error.value) == f"final_sparsity must be in [0, 1), got {value!r}"
    with pytest.raises(DistillerError) as error:
        check_fraction("desired_sparsity", value, one_allowed=True)
    assert str(error.value) == f"desired_sparsity must be in [0, 1], got {value!r}"


def test_one_is_a_fraction_only_where_allowed():
    assert check_fraction("desired_sparsity", 1.0, one_allowed=True) == 1.0
    with pytest.raises(DistillerError):
        check_fraction("desired_sparsity", 1.0, one_allowed=False)


def test_naming_says_which_pruner_and_parameter():
    with pytest.raises(DistillerError) as error, naming("low_pruner", "fc.weight"):
        raise DistillerError("what is wrong")
    assert str(error.value) == "pruner 'low_pruner', 'fc.weight': what is wrong"
    assert isinstance(error.value, ParameterError)
    assert error.value.param_name == "fc.weight"
