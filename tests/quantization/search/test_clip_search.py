from __future__ import annotations

import copy
import math

import pytest
import torch
import yaml
from torch import nn

from distiller.errors import QuantizationError, StatsError
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.quantizer import rebuild_quantized
from distiller.quantization.search.clip_search import ptq_greedy_search

W3A3 = {"bits_activations": 3, "bits_parameters": 3}
LAYERS = ("conv1", "conv2", "fc")


@pytest.fixture
def search(network, dummy, stats):
    def run(eval_fn, **arguments):
        given = {"act_stats": stats, "settings": W3A3, **arguments}
        return ptq_greedy_search(network, dummy, eval_fn, **given)

    return run


def test_each_layer_gets_the_best_mode_given_those_before_it(search, loss, quantized_loss):
    """Replayed with a model quantized anew for each candidate."""
    model, overrides = search(loss, clip_modes=("NONE", "AVG", "LAPLACE"))
    chosen: dict[str, dict[str, str]] = {}
    for layer in LAYERS:
        losses = {
            mode: quantized_loss(**W3A3, overrides={**chosen, layer: {"clip_acts": mode}})
            for mode in ("NONE", "AVG", "LAPLACE")
        }
        chosen[layer] = {"clip_acts": min(losses, key=lambda mode: losses[mode])}
    assert overrides == chosen
    assert len({mode["clip_acts"] for mode in chosen.values()}) > 1
    with torch.no_grad():
        assert loss(model) == pytest.approx(min(losses.values()), rel=1e-6)


def test_the_loss_falls_and_each_candidate_costs_one_evaluation(search, loss, quantized_loss):
    seen = []
    search(loss, progress=seen.append)
    assert loss.calls == len(seen) == 1 + 3 * len(LAYERS)
    assert len(loss.models) == 1
    assert seen[0].value == pytest.approx(quantized_loss(**W3A3), rel=1e-6)
    assert seen[-1].best < seen[0].value
    assert [p.left for p in seen] == list(reversed(range(len(seen))))


def test_the_result_is_the_model_of_the_overrides(search, loss, network, digits, dummy, stats):
    model, overrides = search(loss, settings={**W3A3, "overrides": {"conv2|relu2": {"bits_activations": 4}}})
    assert yaml.safe_load(yaml.safe_dump(overrides)) == overrides
    assert overrides["conv2"]["bits_activations"] == 4
    assert "relu2" not in overrides
    twin = copy.deepcopy(network)
    PostTrainLinearQuantizer(twin, **W3A3, overrides=overrides, model_activation_stats=stats).prepare_model(
        dummy
    )
    rebuilt = copy.deepcopy(network)
    rebuild_quantized(rebuilt, model.quantizer_metadata)
    rebuilt.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(digits[0])
        assert torch.equal(twin(digits[0]), expected)
        assert torch.equal(rebuilt(digits[0]), expected)


def test_the_given_model_stays_as_it_is(search, loss, network, trained):
    search(loss, clip_modes=["AVG"])
    assert [type(module) for module in network.modules()] == [type(module) for module in trained.modules()]
    for name, value in network.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


def test_layers_with_a_mode_of_their_own_keep_it(search, loss):
    settings = {**W3A3, "overrides": {"conv1|fc": {"clip_acts": "GAUSS"}}}
    _, overrides = search(loss, settings=settings, clip_modes=["AVG"])
    assert loss.calls == 2
    assert overrides["conv1"] == overrides["fc"] == {"clip_acts": "GAUSS"}


def test_weights_are_clipped_where_the_settings_say_so(search, loss, quantized_loss):
    settings = {**W3A3, "also_clip_weights": True}
    model, overrides = search(loss, settings=settings, clip_modes=["LAPLACE"])
    with torch.no_grad():
        assert loss(model) == pytest.approx(quantized_loss(**settings, overrides=overrides), rel=1e-6)
    assert loss(model) < quantized_loss(**settings)


def test_a_search_of_weights_alone_has_nothing_to_choose(search, loss):
    _, overrides = search(loss, settings={"bits_activations": None, "bits_parameters": 4})
    assert overrides == {}
    assert loss.calls == 1


def test_a_killed_search_goes_on_where_it_was(search, make_loss, tmp_path):
    path = tmp_path / "search.jsonl"
    whole, killed, resumed, replayed = (make_loss() for _ in range(4))
    _, expected = search(whole, clip_modes=["AVG", "LAPLACE"])
    killed.killed_at = 4
    with pytest.raises(KeyboardInterrupt):
        search(killed, clip_modes=["AVG", "LAPLACE"], log_path=path)
    seen = []
    arguments = {"clip_modes": ["AVG", "LAPLACE"], "log_path": path}
    assert search(resumed, **arguments, progress=seen.append)[1] == expected
    assert killed.calls + resumed.calls == whole.calls
    assert [p.is_replayed for p in seen] == [True] * 4 + [False] * (whole.calls - 4)
    assert search(replayed, **arguments)[1] == expected
    assert replayed.calls == 0


def test_the_file_of_other_settings_is_refused(search, loss, tmp_path):
    path = tmp_path / "search.jsonl"
    search(loss, log_path=path, clip_modes=["AVG"])
    with pytest.raises(QuantizationError, match="'quantizer.bits_activations' is 3 there, 4 here"):
        search(loss, log_path=path, clip_modes=["AVG"], settings={**W3A3, "bits_activations": 4})
    with pytest.raises(QuantizationError, match=r"'clip_modes' is \[\"AVG\"\] there, \[\"GAUSS\"\] here"):
        search(loss, log_path=path, clip_modes=["GAUSS"])


def test_a_mode_that_gives_no_number_is_not_chosen(search, loss):
    calls = []

    def fails_but_at_first(model):
        calls.append(model)
        return loss(model) if len(calls) == 1 else math.nan

    _, overrides = search(fails_but_at_first, clip_modes=["AVG"])
    assert all(override == {"clip_acts": "NONE"} for override in overrides.values())


def test_any_number_is_better_than_none(search, loss):
    calls = []

    def fails_at_first(model):
        calls.append(model)
        return math.nan if len(calls) == 1 else 5.0

    _, overrides = search(fails_at_first, clip_modes=["AVG"])
    assert [override["clip_acts"] for override in overrides.values()] == ["AVG", "NONE", "NONE"]


def test_statistics_are_collected_by_the_function_for_that(search, make_loss):
    loss, calibration = make_loss(), make_loss()
    _, overrides = search(loss, calib_eval_fn=calibration, act_stats=None, clip_modes=["AVG"])
    assert calibration.calls == 2
    assert loss.calls == 4
    assert set(overrides) == set(LAYERS)


def test_a_model_that_calls_a_layer_twice_is_searched(digits):
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.tanh, self.head = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)

        def forward(self, x):
            x = x.flatten(1)
            for _ in range(2):
                x = self.tanh(self.step(x))
            return self.head(x)

    def loss(model):
        return nn.functional.cross_entropy(model(digits[0]), digits[1])

    _, overrides = ptq_greedy_search(Loop().eval(), digits[0][:1], loss, recurrent=True, clip_modes=["AVG"])
    assert list(overrides) == ["step", "tanh", "head"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"eval_fn": None}, "ptq_greedy_search: eval_fn: must be a function of the model, got NoneType"),
        (
            {"clip_modes": "AVG"},
            "ptq_greedy_search: clip_modes: must be a list of some of NONE, AVG, GAUSS, LAPLACE, got 'AVG'",
        ),
        (
            {"clip_modes": ["AVG", "MSE"]},
            "ptq_greedy_search: clip_modes: must be one of NONE, AVG, N_STD, GAUSS, LAPLACE, got 'MSE'",
        ),
        (
            {"settings": [8, 8]},
            "ptq_greedy_search: settings: must map arguments of PostTrainLinearQuantizer to values, got list",
        ),
        (
            {"settings": {"model_activation_stats": {}}},
            "ptq_greedy_search: act_stats: the settings have model_activation_stats, too; leave one of them out",
        ),
        (
            {"settings": {"bits": 4}},
            "ptq_greedy_search: settings: PostTrainLinearQuantizer.__init__() got an unexpected keyword argument 'bits'",
        ),
    ],
)
def test_wrong_arguments_are_refused(search, loss, arguments, text):
    given = {"eval_fn": loss, **arguments}
    with pytest.raises(QuantizationError) as caught:
        search(given.pop("eval_fn"), **given)
    assert str(caught.value) == text
    assert loss.calls == 0


def test_statistics_that_lack_what_a_mode_needs_are_told(search, loss, stats):
    without = copy.deepcopy(stats)
    del without["conv1"]["inputs"][0]["b"]
    with pytest.raises(StatsError, match="clip mode LAPLACE needs the statistic 'b'"):
        search(loss, act_stats=without)
