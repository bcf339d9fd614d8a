from __future__ import annotations

import itertools
import math

import pytest
import torch
import yaml
from torch import nn

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.search.mixed_precision import mixed_precision_search

LAYERS = ("conv1", "conv2", "fc")
NUMEL = {"conv1": 54, "conv2": 432, "fc": 320}
MACS = {"conv1": 36 * 54, "conv2": 16 * 432, "fc": 320}
READS = {"conv1": "conv1", "conv2": "conv1", "fc": "conv2"}
"""Whose activations a layer reads: conv1 those that it quantizes itself."""
WIDTHS = (2, 4, 8)


@pytest.fixture
def search(make_quantizer, dummy):
    def run(eval_fn, budgets, quantizer=None, **arguments):
        given = {"weight_widths": WIDTHS, **arguments}
        return mixed_precision_search(quantizer or make_quantizer(), dummy, eval_fn, budgets, **given)

    return run


def weight_bytes(widths):
    return sum(math.ceil(NUMEL[layer] * width / 8) for layer, width in widths.items())


@pytest.mark.parametrize("settings", [{}, {"bits_accum": 16, "bits_activations": 4, "per_channel_wts": True}])
def test_the_sensitivity_of_a_weight_is_that_of_quantizing_it_alone(
    search, loss, quantized_loss, make_quantizer, settings
):
    """Against a model prepared with all else off, which neither saturates nor rounds a bias."""
    result = search(loss, [1000], make_quantizer(**settings), weight_widths=(3,))
    per_channel = {key: value for key, value in settings.items() if key == "per_channel_wts"}
    for layer in LAYERS:
        for width in (3,):
            alone = quantized_loss(
                bits_activations=None,
                bits_parameters=None,
                overrides={layer: {"bits_weights": width}},
                **per_channel,
            )
            expected = alone - result.float_loss
            assert result.weight_sensitivities[layer][width] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert result.activation_sensitivities == {}


def test_the_sensitivity_of_activations_is_that_of_quantizing_them_alone(
    search, loss, network, digits, stats
):
    """conv1's are its input and, behind the ReLU, its output: both rounded by hand in the model in floating point."""
    result = search(loss, [1e9], budget="bit_operations", activation_widths=(3,), weight_widths=())

    def rounded(x, entry, lo=None):
        ends = torch.tensor(entry["min"] if lo is None else lo), torch.tensor(entry["max"])
        grid = affine.scale_and_zero_point(*ends, 3, LinearQuantMode.SYMMETRIC)
        return affine.fake_quantize(x, *grid, -4, 3)

    images, labels = digits
    with torch.no_grad():
        x = network.bn1(network.conv1(rounded(images, stats["conv1"]["inputs"][0])))
        x = rounded(torch.relu(x), stats["relu1"]["output"])
        x = network.fc(network.pool(network.relu2(network.conv2(x))).flatten(1))
        expected = nn.functional.cross_entropy(x, labels).item() - result.float_loss
    assert result.activation_sensitivities["conv1"][3] == pytest.approx(expected, rel=1e-2)
    assert set(result.activation_sensitivities) == set(LAYERS)
    assert result.weight_sensitivities == {}


def test_widths_are_the_best_of_all_combinations(search, loss):
    budgets = [206, 300, 410, 500, 900]
    result = search(loss, budgets)
    combinations = [dict(zip(LAYERS, widths, strict=True)) for widths in itertools.product(WIDTHS, repeat=3)]

    def predicted(widths):
        return sum(result.weight_sensitivities[layer][width] for layer, width in widths.items())

    assert [point.budget for point in result.points] == budgets
    for point in result.points:
        best = min(predicted(widths) for widths in combinations if weight_bytes(widths) <= point.budget)
        assert point.predicted == pytest.approx(best, abs=1e-12)
        assert point.predicted == pytest.approx(predicted(point.weights))
        assert point.cost == weight_bytes(point.weights) <= point.budget
        assert point.activations == {}
    assert result.points[0].predicted > result.points[-1].predicted
    assert loss.calls == 1 + 9 + len({tuple(point.weights.values()) for point in result.points})


def test_widths_of_weights_and_activations_are_chosen_together(search, loss):
    budgets = [82_584, 120_000, 300_000]
    widths = (3, 4, 8)
    result = search(loss, budgets, budget="bit_operations", weight_widths=widths, activation_widths=widths)

    def operations(weights, acts):
        return sum(MACS[layer] * weights[layer] * acts[READS[layer]] for layer in LAYERS)

    def predicted(weights, acts):
        return sum(result.weight_sensitivities[layer][weights[layer]] for layer in LAYERS) + sum(
            result.activation_sensitivities[layer][acts[layer]] for layer in LAYERS
        )

    all_widths = [dict(zip(LAYERS, each, strict=True)) for each in itertools.product(widths, repeat=3)]
    for point in result.points:
        best = min(
            predicted(w, a) for w in all_widths for a in all_widths if operations(w, a) <= point.budget
        )
        assert point.predicted == pytest.approx(best, abs=1e-12)
        assert point.cost == operations(point.weights, point.activations) <= point.budget
    assert len({str(point.overrides) for point in result.points}) > 1


def test_the_measured_value_is_that_of_the_overrides(search, loss, quantized_loss, make_quantizer):
    patterns = {"conv2|relu2": {"bits_activations": 5}}
    result = search(
        loss, [500], weight_widths=(4,), quantizer=make_quantizer(bits_activations=6, overrides=patterns)
    )
    point = result.points[0]
    assert yaml.safe_load(yaml.safe_dump(point.overrides)) == point.overrides
    assert point.overrides["conv2"] == {"bits_activations": 5, "bits_weights": point.weights["conv2"]}
    measured = quantized_loss(bits_activations=6, overrides=point.overrides) - result.float_loss
    assert point.measured == pytest.approx(measured, rel=1e-5, abs=1e-9)


def test_widths_given_by_overrides_stay(search, loss, make_quantizer):
    quantizer = make_quantizer(overrides={"conv1": {"bits_weights": 8}})
    result = search(loss, [54 + 108 + 80], quantizer, weight_widths=(2,))
    assert result.points[0].overrides == {
        "conv1": {"bits_weights": 8},
        "conv2": {"bits_weights": 2},
        "fc": {"bits_weights": 2},
    }
    assert set(result.weight_sensitivities) == {"conv2", "fc"}


def test_divergence_falls_with_the_width(search, loss):
    result = search(loss, [900], metric="kl")
    for by_width in result.weight_sensitivities.values():
        assert by_width[2] > by_width[4] > by_width[8] > 0
    assert math.isnan(result.float_loss)
    assert result.points[0].measured == pytest.approx(
        sum(v[8] for v in result.weight_sensitivities.values()), rel=5
    )


def test_a_budget_out_of_reach_is_refused_before_anything_is_measured(search, loss):
    with pytest.raises(QuantizationError) as caught:
        search(loss, [900, 200])
    assert str(caught.value) == (
        "budget: 200 cannot be reached, the smallest widths cost 202; "
        "give at least that, or smaller widths to choose from"
    )
    assert loss.calls == 0


@pytest.mark.parametrize("metric", ["loss", "kl"])
def test_a_killed_search_goes_on_where_it_was(search, make_loss, tmp_path, metric):
    """The outputs in floating point, which "kl" compares with, are not kept: they are made once more."""
    path = tmp_path / "search.jsonl"
    whole, killed, resumed, replayed = (make_loss() for _ in range(4))
    arguments = {"budgets": [350], "metric": metric, "weight_widths": (3,)}
    expected = search(whole, **arguments)
    killed.killed_at = 3
    with pytest.raises(KeyboardInterrupt):
        search(killed, **arguments, log_path=path)
    seen = []
    result = search(resumed, **arguments, log_path=path, progress=seen.append)
    assert repr(result) == repr(expected)
    assert killed.calls + resumed.calls == whole.calls + (metric == "kl")
    assert seen[-1].left == 0
    assert repr(search(replayed, **arguments, log_path=path)) == repr(expected)
    assert replayed.calls == 0


def test_other_budgets_need_no_new_sensitivities(search, loss, make_loss, tmp_path):
    path, other = tmp_path / "search.jsonl", make_loss()
    search(loss, [900], log_path=path, weight_widths=(2, 8))
    search(other, [300], log_path=path, weight_widths=(2, 8))
    assert other.calls == 1


def test_a_width_at_which_the_model_has_no_loss_is_not_chosen(search, loss, digits):
    def fails_at_two_bits(model):
        weights = [
            layer.wrapped_module.weight
            for layer in (model.conv1, model.conv2, model.fc)
            if hasattr(layer, "wrapped_module")
        ]
        is_coarse = any(len(weight.unique()) <= 4 for weight in weights)
        return math.nan if is_coarse else loss(model)

    result = search(fails_at_two_bits, [900])
    assert all(math.isnan(by_width[2]) for by_width in result.weight_sensitivities.values())
    with pytest.raises(
        QuantizationError, match="^budget: 402 cannot be reached, the smallest widths cost 403"
    ):
        search(fails_at_two_bits, [402])


def test_a_model_without_any_loss_is_refused(search):
    with pytest.raises(QuantizationError) as caught:
        search(lambda model: math.nan, [900], weight_widths=(8,))
    assert str(caught.value) == "sensitivities: none of the weights of conv1 is finite"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"budgets": []}, "budgets: must be a list of at least one number, got []"),
        ({"budgets": 400}, "budgets: must be a list of at least one number, got 400"),
        ({"budgets": [400, 0]}, "budgets: must be finite numbers > 0, got 0"),
        (
            {"budget": "weight_byte"},
            "budget: must be one of weight_bytes, bit_operations, got 'weight_byte'; did you mean 'weight_bytes'?",
        ),
        ({"metric": "mse"}, "metric: must be one of loss, kl, got 'mse'"),
        ({"weight_widths": 4}, "weight_widths: must be a list of widths, got 4"),
        ({"weight_widths": (4, 0)}, "weight_widths: must be 2 to 16 bits, got 0"),
        ({"weight_widths": (4, 32)}, "weight_widths: must be 2 to 16 bits, or 0 or null for none, got 32"),
        ({"weight_widths": ()}, "weight_widths, activation_widths: are both empty; give one of them"),
        (
            {"activation_widths": (4,)},
            "activation_widths: a budget of weight_bytes does not limit them; leave them out, or "
            "give budget 'bit_operations'",
        ),
    ],
)
def test_wrong_arguments_are_refused(search, loss, arguments, text):
    given = {"budgets": [500], **arguments}
    with pytest.raises(QuantizationError) as caught:
        search(loss, **given)
    assert str(caught.value) == f"mixed_precision_search: {text}"


def test_a_model_with_nothing_left_to_choose_is_refused(search, loss, make_quantizer):
    quantizer = make_quantizer(overrides={"conv.|fc": {"bits_weights": 4}})
    with pytest.raises(QuantizationError) as caught:
        search(loss, [500], quantizer)
    assert str(caught.value) == (
        "mixed_precision_search: no quantized layer has a width that is left to choose"
    )
