from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import scipy.optimize
import torch
import yaml
from torch import nn

from distiller.errors import QuantizationError
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.quantizer import rebuild_quantized
from distiller.quantization.search.copies import prepared_copy
from distiller.quantization.search.lapq import coordinate_search, ptq_coordinate_search
from distiller.quantization.search.lapq_settings import LapqSettings
from distiller.quantization.search.lapq_space import plain_params
from distiller.quantization.search.search_log import SearchLog

W4A4 = {"bits_activations": 4, "bits_parameters": 4}
SHORT = LapqSettings(init_mode="L2", maxfev=40)


@pytest.fixture
def search(make_quantizer, dummy):
    def run(eval_fn, settings=SHORT, quantizer=None, **arguments):
        return coordinate_search(quantizer or make_quantizer(**W4A4), dummy, eval_fn, settings, **arguments)

    return run


def bare(model, loss):
    with torch.no_grad():
        return loss(model)


class OneLayer(nn.Module):
    """A linear layer, and noisy data of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.x = torch.randn(64, 8)
        self.y = self.fc(self.x).detach() + 0.1 * torch.randn(64, 4)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize("method", ["Powell", "Nelder-Mead", "COBYLA"])
def test_on_one_layer_it_finds_what_scipy_finds_by_itself(method):
    """The loss as a function of the weight's one scale, written down in numpy."""
    model = OneLayer().eval()
    x, y = model.x.double().numpy(), model.y.double().numpy()
    w, b = model.fc.weight.detach().double().numpy(), model.fc.bias.detach().double().numpy()
    start = 3 / np.abs(w).max()  # 3 bits, symmetric restricted, Distiller's convention

    def loss_at(v):
        scale = start * 2.0 ** (np.round(v[0] * 256) / 256)
        rounded = np.clip(np.round(w * scale), -3, 3) / scale
        return np.mean((x @ rounded.T + b - y) ** 2)

    first = {
        "Powell": {"direc": [[0.25]]},
        "Nelder-Mead": {"initial_simplex": [[0.0], [0.25]]},
        "COBYLA": {"rhobeg": 0.25},
    }
    expected = scipy.optimize.minimize(loss_at, [0.0], method=method, options=first[method])

    result = coordinate_search(
        PostTrainLinearQuantizer(model, None, 3, mode="SYMMETRIC_RESTRICTED"),
        model.x,
        lambda model_: (model_(model.x) - model.y).square().mean(),
        LapqSettings(method=method),
    )
    assert result.initial_loss == pytest.approx(loss_at([0.0]), rel=1e-5)
    assert result.loss <= expected.fun * (1 + 1e-5)
    assert result.loss == pytest.approx(loss_at([math.log2(result.params["fc.w_scale"] / start)]), rel=1e-5)
    assert result.loss < result.initial_loss


@pytest.mark.parametrize("clipping", [False, True])
def test_it_improves_on_its_start_and_gives_the_model_of_its_loss(search, loss, clipping, digits):
    result = search(loss, LapqSettings(maxiter=1, search_clipping=clipping))
    assert result.loss < 0.7 * result.initial_loss
    assert bare(result.quantizer.model, loss) == pytest.approx(result.loss, rel=1e-6)


def test_all_points_are_of_one_model(search, loss):
    search(loss)
    assert len(loss.models) == 1


def test_it_goes_on_from_the_norm_that_was_chosen(search, loss):
    result = search(loss, LapqSettings(init_method="quadratic", maxfev=30))
    assert 2 <= result.norm <= 4
    full = search(loss, LapqSettings(maxfev=1))
    assert result.loss <= result.initial_loss < full.initial_loss


def test_limits_count_evaluations(search, loss):
    seen = []
    result = search(loss, LapqSettings(maxfev=12), progress=seen.append)
    assert result.evaluations == loss.calls == len(seen) == 12
    assert [p.left for p in seen] == list(reversed(range(12)))
    assert min(p.value for p in seen) == seen[-1].best == result.loss


def test_basin_hopping_goes_on_and_is_the_same_each_time(search, make_loss):
    settings = LapqSettings(basinhopping=True, basinhopping_niter=1, maxiter=1)
    losses = [make_loss(), make_loss()]
    results = [search(loss, settings) for loss in losses]
    once = search(make_loss(), LapqSettings(maxiter=1))
    assert results[0].params == results[1].params
    assert losses[0].calls == losses[1].calls > once.evaluations
    assert results[0].loss <= once.loss


def test_distillers_arguments_give_the_same(make_quantizer, dummy, loss, search):
    model, params = ptq_coordinate_search(make_quantizer(**W4A4), dummy, loss, maxfev=40, init_mode="L2")
    result = search(loss)
    assert params == result.params
    assert bare(model, loss) == pytest.approx(result.loss, rel=1e-6)


def test_the_parameters_are_distillers_and_plain(search, loss, make_quantizer, dummy):
    per_channel = make_quantizer(**W4A4, per_channel_wts=True, save_fp_weights=True)
    result = search(loss, LapqSettings(maxfev=3), per_channel)
    conv1 = result.quantizer.model.conv1
    assert result.params["conv1.output_scale"] == pytest.approx(1 / float(conv1.output_quant.scale))
    assert result.params["conv1.w_scale"] == pytest.approx((1 / conv1.weight_scale).tolist())
    assert yaml.safe_load(yaml.safe_dump(result.params)) == result.params
    again = prepared_copy(per_channel, dummy)
    again.update_linear_quant_params({key: torch.tensor(value) for key, value in result.params.items()})
    assert bare(again.model, loss) == pytest.approx(result.loss, rel=1e-6)


def test_the_given_quantizer_and_model_stay_as_they_are(search, loss, make_quantizer, trained):
    quantizer = make_quantizer(**W4A4)
    result = search(loss, LapqSettings(maxfev=3), quantizer)
    assert not quantizer.is_prepared
    assert result.quantizer.model is not quantizer.model
    for name, value in quantizer.model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


@pytest.mark.parametrize("keeps", [False, True])
def test_the_result_reloads_bit_for_bit(search, loss, make_quantizer, trained, digits, keeps):
    model = search(loss, quantizer=make_quantizer(**W4A4, save_fp_weights=keeps)).quantizer.model
    assert any("float_weight" in name for name in model.state_dict()) is keeps
    rebuilt = copy.deepcopy(trained)
    rebuild_quantized(rebuilt, model.quantizer_metadata)
    rebuilt.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(digits[0]), model(digits[0]))


def test_the_best_model_so_far_is_tested_after_each_iteration(search, loss):
    tested = []
    result = search(
        loss, LapqSettings(maxiter=3, init_mode="L2"), test_fn=lambda model: tested.append(bare(model, loss))
    )
    assert 1 <= len(tested) <= 3
    assert tested == sorted(tested, reverse=True)
    assert tested[-1] == pytest.approx(result.loss, rel=1e-6)


SEARCHES = {
    "powell": (LapqSettings(maxfev=45, init_mode="L3"), {}),
    "quadratic": (LapqSettings(maxfev=30, init_method="quadratic"), {}),
    "hopping": (LapqSettings(basinhopping=True, basinhopping_niter=1, maxiter=1, maxfev=80), {}),
    "no statistics": (SHORT, {"model_activation_stats": None}),
}


@pytest.mark.parametrize(
    ("kind", "killed_at"), [("powell", 25), ("quadratic", 4), ("hopping", 70), ("no statistics", 1)]
)
def test_a_killed_search_goes_on_where_it_was(search, make_quantizer, make_loss, tmp_path, kind, killed_at):
    """At most the evaluation in which it was killed, and one in floating point for the start, are repeated."""
    settings, changes = SEARCHES[kind]
    path = tmp_path / "search.jsonl"
    whole, killed, resumed, replayed = (make_loss() for _ in range(4))

    def run(loss, **arguments):
        return search(loss, settings, make_quantizer(**{**W4A4, **changes}), **arguments)

    expected = run(whole)
    killed.killed_at = killed_at
    with pytest.raises(KeyboardInterrupt):
        run(killed, log_path=path)
    result = run(resumed, log_path=path)
    assert (result.params, result.loss, result.norm) == (expected.params, expected.loss, expected.norm)
    assert 0 <= killed.calls + resumed.calls - whole.calls <= 1
    tested = []
    again = run(replayed, log_path=path, test_fn=tested.append)
    assert again.params == expected.params
    assert replayed.calls == again.evaluations == 0
    assert tested == []


def test_a_search_can_go_on_beyond_its_limit(search, make_loss, tmp_path):
    path = tmp_path / "search.jsonl"
    first, more = make_loss(), make_loss()
    search(first, LapqSettings(maxfev=10), log_path=path)
    result = search(more, LapqSettings(maxfev=25), log_path=path)
    assert (first.calls, more.calls) == (10, 15)
    assert result.loss == search(make_loss(), LapqSettings(maxfev=25)).loss


def test_the_file_of_another_search_is_refused(search, loss, tmp_path):
    path = tmp_path / "search.jsonl"
    search(loss, LapqSettings(maxfev=2), log_path=path)
    with pytest.raises(QuantizationError, match=r"'search_clipping' is false there, true here"):
        search(loss, LapqSettings(maxfev=2, search_clipping=True), log_path=path)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_loss_that_is_no_number_is_never_the_best(search, loss, bad):
    calls = []

    def every_third_fails(model):
        calls.append(model)
        return bad if len(calls) % 3 == 0 else loss(model)

    result = search(every_third_fails, LapqSettings(maxfev=60))
    assert math.isfinite(result.loss)
    assert result.loss < result.initial_loss
    assert bare(result.quantizer.model, loss) == pytest.approx(result.loss, rel=1e-6)


def test_a_start_without_a_loss_is_refused(search):
    with pytest.raises(QuantizationError) as caught:
        search(lambda model: math.nan)
    assert str(caught.value) == (
        "ptq_coordinate_search: the loss is nan at the start; choose another init_mode, check the model"
    )


def test_weights_alone_are_searched_without_statistics(search, loss, make_quantizer):
    quantizer = make_quantizer(bits_activations=None, bits_parameters=3, model_activation_stats=None)
    result = search(loss, LapqSettings(maxfev=40), quantizer)
    assert set(result.params) == {
        f"{n}.w_{v}" for n in ("conv1", "conv2", "fc") for v in ("scale", "zero_point")
    }
    assert result.loss < result.initial_loss
    assert result.evaluations == loss.calls == 40


def test_far_points_are_not_evaluated(search, loss, tmp_path):
    """A method that jumps by hundreds of octaves is told a value above all losses."""
    jump = {"options": {"rhobeg": 500.0}}
    result = search(loss, LapqSettings(method="COBYLA", maxiter=20, minimizer_kwargs=jump))
    assert result.loss <= result.initial_loss
    assert loss.calls < 20


def test_wrong_arguments_are_refused(search, loss, make_quantizer, dummy, prepared):
    with pytest.raises(QuantizationError) as caught:
        search(loss, test_fn="test")
    assert str(caught.value) == "ptq_coordinate_search: test_fn: must be a function of the model, got str"
    with pytest.raises(
        QuantizationError, match="^ptq_coordinate_search: quantizer: its model is prepared already"
    ):
        search(loss, quantizer=prepared)
    with pytest.raises(QuantizationError, match=r"^ptq_coordinate_search: method: must be one of"):
        ptq_coordinate_search(make_quantizer(), dummy, loss, method="Newton")
    assert loss.calls == 0


def test_the_record_holds_every_point(search, loss, tmp_path):
    path = tmp_path / "search.jsonl"
    result = search(loss, LapqSettings(maxfev=5), log_path=path)
    text = path.read_text()
    assert text.count('"point"') == 5
    assert f'"value": {result.loss!r}' in text


def test_the_scales_at_the_start_are_those_without_a_search(search, loss, make_quantizer, dummy):
    result = search(loss, LapqSettings(maxfev=1))
    assert result.params == pytest.approx(plain_params(prepared_copy(make_quantizer(**W4A4), dummy)))


def test_a_log_needs_no_file():
    assert SearchLog(None, "x", {}).done == 0
