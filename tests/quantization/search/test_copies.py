from __future__ import annotations

import warnings

import pytest
import torch

from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.errors import QuantizationError
from distiller.quantization.search.copies import (
    changed,
    check_arguments,
    explicit_overrides,
    identity_of,
    loss_of,
    prepared_copy,
    with_statistics,
)
from distiller.quantization.search.search_log import SearchLog

PATTERNS = {
    "conv1|relu1": {"bits_activations": 5, "bits_weights": 5},
    "conv2|relu2|fc": {"bits_activations": 6, "clip_acts": "AVG"},
}


def outputs(quantizer, digits):
    with torch.no_grad():
        return quantizer.model(digits[0])


def test_a_prepared_copy_leaves_the_quantizer_and_its_model_as_they_are(make_quantizer, digits, dummy):
    quantizer = make_quantizer()
    before = {name: value.clone() for name, value in quantizer.model.state_dict().items()}
    copied = prepared_copy(quantizer, dummy, bits_activations=4)
    assert not quantizer.is_prepared
    assert copied.is_prepared
    assert copied.settings()["bits_activations"] == 4
    after = quantizer.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_copy_warns_only_if_it_is_to(make_quantizer, dummy):
    quantizer = make_quantizer(bits_accum=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared_copy(quantizer, dummy)
    with pytest.warns(UserWarning, match="accumulators of 10 bits can overflow"):
        prepared_copy(quantizer, dummy, is_quiet=False)


def test_explicit_overrides_make_the_same_model(make_quantizer, digits, dummy):
    quantizer = make_quantizer(overrides=PATTERNS)
    copied = prepared_copy(quantizer, dummy)
    explicit = explicit_overrides(copied)
    assert explicit == {
        "conv1": {"bits_activations": 5, "bits_weights": 5},
        "conv2": {"bits_activations": 6, "clip_acts": "AVG"},
        "fc": {"bits_activations": 6, "clip_acts": "AVG"},
    }
    again = prepared_copy(quantizer, dummy, overrides=explicit)
    assert torch.equal(outputs(again, digits), outputs(copied, digits))


def test_what_follows_a_layer_follows_its_changed_override(make_quantizer, dummy):
    """The ReLU stays part of conv2 and the pooling on its grid, although a pattern names both layer and ReLU."""
    quantizer = make_quantizer(overrides=PATTERNS)
    explicit = explicit_overrides(prepared_copy(quantizer, dummy))
    overrides = changed(explicit, {"conv2": {"bits_activations": 3, "clip_acts": "NONE"}})
    model = prepared_copy(quantizer, dummy, overrides=overrides).model
    conv2, pool = model.conv2, model.pool
    assert isinstance(model.relu2, torch.nn.Identity)
    assert conv2.output_quant.settings.clip_half_range
    assert conv2.output_quant.settings.num_bits == 3
    assert pool.output_quant is conv2.output_quant


def test_layers_that_were_to_go_still_go(make_quantizer, digits, dummy):
    quantizer = make_quantizer(
        overrides={"pool|relu2": {"bits_activations": 8}, "relu1": {"make_identity": True}}
    )
    copied = prepared_copy(quantizer, dummy)
    explicit = explicit_overrides(copied)
    assert explicit["relu1"] == {"make_identity": True}
    again = prepared_copy(quantizer, dummy, overrides=explicit)
    assert torch.equal(outputs(again, digits), outputs(copied, digits))


def test_overrides_change_by_layer_and_setting():
    given = {"a": {"x": 1, "y": 2}, "b": {"x": 3}}
    assert changed(given, {"a": {"y": 4}, "c": {"z": 5}}) == {
        "a": {"x": 1, "y": 4},
        "b": {"x": 3},
        "c": {"z": 5},
    }
    assert given == {"a": {"x": 1, "y": 2}, "b": {"x": 3}}


def test_the_identity_tells_models_statistics_and_settings_apart(make_quantizer, stats):
    first, same = identity_of(make_quantizer()), identity_of(make_quantizer())
    assert first == same
    other = make_quantizer()
    with torch.no_grad():
        other.model.fc.bias[0] += 1e-3
    assert identity_of(other)["model"] != first["model"]
    without = {name: entry for name, entry in stats.items() if name != "relu1"}
    assert identity_of(make_quantizer(model_activation_stats=without))["statistics"] != first["statistics"]
    assert identity_of(make_quantizer(bits_activations=4))["quantizer"]["bits_activations"] == 4


def test_statistics_are_collected_where_there_are_none_and_never_again(make_quantizer, loss, tmp_path):
    quantizer = make_quantizer(model_activation_stats=None)
    path = tmp_path / "log.jsonl"
    ready = with_statistics(quantizer, loss, SearchLog(path, "x", {}))
    expected = collect_quant_stats(make_quantizer().model, lambda model: loss(model))
    assert loss.calls == 4
    assert (
        ready.settings()["model_activation_stats"]
        == make_quantizer(model_activation_stats=expected).settings()["model_activation_stats"]
    )
    assert quantizer.settings()["model_activation_stats"] is None
    again = with_statistics(quantizer, loss, SearchLog(path, "x", {}))
    assert again.settings() == ready.settings()
    assert loss.calls == 4


def test_no_statistics_are_collected_where_none_are_needed(make_quantizer, loss):
    given = make_quantizer()
    weights_only = make_quantizer(model_activation_stats=None, bits_activations=None)
    for quantizer in (given, weights_only):
        assert with_statistics(quantizer, loss, SearchLog(None, "x", {})) is quantizer
    assert loss.calls == 0


def refusal(*arguments):
    with pytest.raises(QuantizationError) as caught:
        check_arguments("search", *arguments)
    return str(caught.value)


def test_wrong_arguments_are_refused(make_quantizer, prepared, loss):
    assert refusal("resnet", loss) == "search: quantizer: must be a PostTrainLinearQuantizer, got str"
    assert refusal(prepared, loss) == (
        "search: quantizer: its model is prepared already; give one whose prepare_model was not called"
    )
    assert refusal(make_quantizer(), 3) == "search: eval_fn: must be a function of the model, got int"


@pytest.mark.parametrize("value", [None, "low", [1.0], torch.zeros(2)])
def test_a_loss_that_is_no_number_is_refused(network, value):
    with pytest.raises(QuantizationError) as caught:
        loss_of(network, lambda model: value, "search")
    assert str(caught.value) == f"search: eval_fn: must return a number, the loss, got {type(value).__name__}"


def test_a_loss_may_be_a_tensor(network):
    assert loss_of(network, lambda model: torch.tensor(0.5), "search") == 0.5
