from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.quantization.activation_quant import QuantSettings
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.search.copies import loss_of, prepared_copy
from distiller.quantization.search.lapq_settings import LapqSettings
from distiller.quantization.search.lapq_space import plain_params
from distiller.quantization.search.lapq_start import NORMS, started
from distiller.quantization.search.lp_ranges import best_share, norm_error
from distiller.quantization.search.search_log import SearchLog

W4A4 = {"bits_activations": 4, "bits_parameters": 4}


@pytest.fixture
def start(make_quantizer, dummy, loss):
    def run(settings, log=None, evaluate=loss, **others):
        quantizer = make_quantizer(**W4A4, **others)
        log = log or SearchLog(None, "x", {})
        return started(quantizer, dummy, settings, log, lambda ready: loss_of(ready.model, evaluate, "x"))

    return run


@pytest.mark.parametrize("mode", ["NONE", "GAUSS"])
def test_a_clip_mode_starts_as_the_quantizer_does(start, make_quantizer, dummy, mode, loss):
    quantizer, norm = start(LapqSettings(init_mode=mode))
    expected = prepared_copy(make_quantizer(**W4A4), dummy, clip_acts=mode)
    assert plain_params(quantizer) == plain_params(expected)
    assert norm is None
    assert loss.calls == 0


def test_a_norm_starts_at_the_ranges_of_least_error(start, network, digits, loss):
    """Of conv2's weight and of what is behind its ReLU, computed from the model in floating point."""
    quantizer, _ = start(LapqSettings(init_mode="L2.5"))
    params = plain_params(quantizer)
    settings = QuantSettings(4, LinearQuantMode.SYMMETRIC)
    weight = network.conv2.weight.detach().flatten()
    with torch.no_grad():
        values = network.relu2(network.conv2(network.relu1(network.bn1(network.conv1(digits[0]))))).flatten()
    for key, x in (("conv2.w_scale", weight), ("conv2.output_scale", values)):
        hi = x.abs().max()
        share = best_share(x, -hi, hi, settings, norm_error(2.5))
        assert share < 1
        assert params[key] == pytest.approx(7.5 / float(hi * share), rel=0.05 if "output" in key else 1e-5)
    assert loss.calls == 1


def test_a_norm_starts_with_less_loss_than_the_full_range(start, loss):
    losses = {}
    for mode in ("NONE", "L2"):
        quantizer, _ = start(LapqSettings(init_mode=mode))
        losses[mode] = loss_of(quantizer.model, loss, "x")
    assert losses["L2"] < 0.5 * losses["NONE"]


def test_an_error_of_ones_own_is_minimised(start):
    by_norm, _ = start(LapqSettings(init_mode="L2"))
    by_function, _ = start(LapqSettings(init_mode=lambda x, q: (x - q).square().mean()))
    assert plain_params(by_function) == plain_params(by_norm)


def test_layers_can_start_in_ways_of_their_own(start, make_quantizer, dummy):
    patterns = {"overrides": {"conv1|relu1": {"bits_activations": 5}}}
    quantizer, _ = start(LapqSettings(init_mode={"conv1": "AVG", "fc": "L2"}), **patterns)
    params = plain_params(quantizer)
    by_clip = prepared_copy(make_quantizer(**W4A4, **patterns), dummy, clip_acts="AVG")
    by_norm, _ = start(LapqSettings(init_mode="L2"), **patterns)
    full = prepared_copy(make_quantizer(**W4A4, **patterns), dummy)
    for layer, expected in (("conv1", by_clip), ("conv2", full), ("fc", by_norm)):
        of_layer = {
            key: value for key, value in plain_params(expected).items() if key.startswith(f"{layer}.")
        }
        assert {key: params[key] for key in of_layer} == of_layer
    assert isinstance(quantizer.model.relu1, nn.Identity)


def test_outputs_with_a_clip_mode_of_their_own_keep_it(start, make_quantizer, dummy):
    own = {"overrides": {"fc": {"clip_acts": "AVG"}}}
    quantizer, _ = start(LapqSettings(init_mode="L2"), **own)
    expected = plain_params(prepared_copy(make_quantizer(**W4A4, **own), dummy))
    params = plain_params(quantizer)
    assert params["fc.output_scale"] == expected["fc.output_scale"]
    assert params["fc.w_scale"] != expected["fc.w_scale"]
    assert params["conv1.output_scale"] != expected["conv1.output_scale"]


def test_a_start_that_was_found_is_not_looked_for_again(start, loss, tmp_path):
    path = tmp_path / "log.jsonl"
    first, _ = start(LapqSettings(init_mode="L3"), SearchLog(path, "x", {}))
    assert loss.calls == 1
    again, _ = start(LapqSettings(init_mode="L3"), SearchLog(path, "x", {}))
    assert loss.calls == 1
    assert plain_params(again) == plain_params(first)


def test_quadratic_takes_the_vertex_of_the_parabola(start):
    """Losses that lie on a parabola with its minimum at 2.8, in the order in which they are asked for."""
    log = SearchLog(None, "x", {})
    losses = iter([*((p - 2.8) ** 2 + 1 for p in NORMS), 0.5])
    for p in NORMS:
        log.evaluated({"norm": p}, lambda: next(losses))
    _, norm = start(LapqSettings(init_method="quadratic"), log)
    assert norm == 2.8
    assert log.has({"norm": 2.8})


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([5, 4, 3, 2, 1], 4.0),  # no minimum inside
        ([1, 3, 4, 3, 2], 2.0),  # upside down
        ([float("nan"), 4, float("nan"), float("inf"), 3], 4.0),  # too few for a parabola
    ],
)
def test_quadratic_takes_the_best_norm_where_there_is_no_vertex(start, losses, best):
    log = SearchLog(None, "x", {})
    for p, value in zip(NORMS, losses, strict=True):
        log.evaluated({"norm": p}, lambda value=value: value)
    quantizer, norm = start(LapqSettings(init_method="quadratic"), log)
    expected, _ = start(LapqSettings(init_mode=f"L{best:g}"))
    assert norm == best
    assert plain_params(quantizer) == plain_params(expected)
