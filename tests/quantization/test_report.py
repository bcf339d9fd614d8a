"""The quantization report: each layer alone against models computed by hand in numpy, or prepared that way."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.errors import QuantizationError, UsageError
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.refinement import float_twin
from distiller.quantization.report import QuantizationReport, Score, quantization_report
from distiller.quantization.report_rows import LayerRow, TensorFigures
from tests.quantization.networks import WordModel, quantized

UNSIGNED = {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC_RESTRICTED"}


class TwoLayers(nn.Module):
    """conv, relu, fc; for 2x4x4 images and 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 2, 4, 4)
        self.conv, self.relu, self.fc = nn.Conv2d(2, 3, 4), nn.ReLU(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).flatten(1))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def two() -> Any:
    return TwoLayers().eval()


def stats_of(model: nn.Module, x: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        return collect_quant_stats(model, lambda model: model(x))


def prepared(model: nn.Module, x: Tensor, dynamic: bool = False, **settings: Any) -> Any:
    stats = None if dynamic else stats_of(model, x)
    return quantized(model, stats, x[:1], **{"mode": UNSIGNED, **settings})


def rows_of(report: QuantizationReport) -> dict[str, Any]:
    return {row.name: row for row in report.rows}


def on_grid(values: np.ndarray, scale: Any, zero_point: Any, qmin: int, qmax: int) -> np.ndarray:
    return (np.clip(np.round(values / scale) + zero_point, qmin, qmax) - zero_point) * scale


def decibels(values: np.ndarray, rounded: np.ndarray) -> float:
    return 10 * np.log10(np.square(values).mean() / np.square(values - rounded).mean())


class ByHand:
    """`TwoLayers` in numpy, in double precision; unsigned activations, restricted symmetric weights."""

    def __init__(self, model: Any, x: Tensor, bits_weights: int, bits: int) -> None:
        self.x = x.double().flatten(1).numpy()
        self.conv_w, self.conv_b, self.fc_w, self.fc_b = (
            tensor.detach().double().flatten(1 if tensor.dim() > 1 else 0).numpy()
            for tensor in (model.conv.weight, model.conv.bias, model.fc.weight, model.fc.bias)
        )
        self.top, self.most = 2**bits - 1, 2 ** (bits_weights - 1) - 1
        self.hidden = np.maximum(self.x @ self.conv_w.T + self.conv_b, 0)
        self.logits = self.hidden @ self.fc_w.T + self.fc_b

    def grid(self, values: np.ndarray) -> tuple[float, int]:
        lo, hi = min(values.min(), 0.0), max(values.max(), 0.0)
        scale = (hi - lo) / self.top
        return scale, int(-np.round(lo / scale))

    def rounded(self, values: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        """On the grid over the range of `like`, or of the values."""
        return on_grid(values, *self.grid(values if like is None else like), 0, self.top)

    def rounded_weight(self, weight: np.ndarray) -> np.ndarray:
        return on_grid(weight, np.abs(weight).max() / self.most, 0, -self.most, self.most)

    def bias(self, bias: np.ndarray, weight: np.ndarray, inputs_scale: float) -> np.ndarray:
        scale = np.abs(weight).max() / self.most * inputs_scale
        return np.round(bias / scale) * scale

    def hidden_with_conv_quantized(self) -> np.ndarray:
        bias = self.bias(self.conv_b, self.conv_w, self.grid(self.x)[0])
        return self.rounded(
            np.maximum(self.rounded(self.x) @ self.rounded_weight(self.conv_w).T + bias, 0), self.hidden
        )

    def logits_with_conv_quantized(self) -> np.ndarray:
        return self.hidden_with_conv_quantized() @ self.fc_w.T + self.fc_b

    def logits_with_fc_quantized(self, is_dynamic: bool = False) -> np.ndarray:
        bias = self.bias(self.fc_b, self.fc_w, self.grid(self.hidden)[0])
        values = self.hidden @ self.rounded_weight(self.fc_w).T + bias
        return self.rounded(values, values if is_dynamic else self.logits)


def test_figures_and_errors_are_those_computed_by_hand(two, x) -> None:
    hand = ByHand(two, x, bits_weights=4, bits=6)
    model = prepared(two, x, bits_activations=6, bits_parameters=4)
    report = quantization_report(two, model, [x[:5], x[5:]])
    rows = rows_of(report)
    assert [(row.name, row.kind) for row in report.rows] == [("conv", "Conv2d"), ("fc", "Linear")]

    errors = [
        np.square(hand.logits_with_conv_quantized() - hand.logits).mean(),
        np.square(hand.logits_with_fc_quantized() - hand.logits).mean(),
    ]
    assert [rows["conv"].error, rows["fc"].error] == pytest.approx(errors, rel=1e-4)
    shares = [error / sum(errors) for error in errors]
    assert [rows["conv"].error_share, rows["fc"].error_share] == pytest.approx(shares, rel=1e-4)
    together = np.square(model(x).detach().double().numpy() - hand.logits).mean()
    assert report.error == pytest.approx(together, rel=1e-4)

    weight = rows["conv"].weight
    scale = np.abs(hand.conv_w).max() / 7
    assert (weight.bits, weight.clipped) == (4, 0.0)
    assert [weight.min, weight.max, weight.grid_min, weight.grid_max, weight.scale_min, weight.scale_max] == (
        pytest.approx([hand.conv_w.min(), hand.conv_w.max(), -7 * scale, 7 * scale, scale, scale])
    )
    assert weight.sqnr_db == pytest.approx(decibels(hand.conv_w, hand.rounded_weight(hand.conv_w)), rel=1e-4)

    scale, zero_point = hand.grid(hand.x)
    inputs = rows["conv"].input
    assert inputs.bits == 6
    assert [inputs.min, inputs.max, inputs.grid_min, inputs.grid_max, inputs.scale_min] == pytest.approx(
        [hand.x.min(), hand.x.max(), -zero_point * scale, (63 - zero_point) * scale, scale]
    )
    assert inputs.sqnr_db == pytest.approx(decibels(hand.x, hand.rounded(hand.x)), rel=1e-3)

    output = rows["conv"].output  # behind the ReLU that its quantizer is as well
    assert output.bits == 6
    assert [output.min, output.max, output.grid_min, output.grid_max] == pytest.approx(
        [0.0, hand.hidden.max(), 0.0, hand.hidden.max()], rel=1e-5
    )
    assert output.sqnr_db == pytest.approx(decibels(hand.hidden, hand.hidden_with_conv_quantized()), rel=1e-3)
    assert rows["fc"].input == TensorFigures()  # the convolution has quantized it
    assert rows["fc"].output.sqnr_db == pytest.approx(
        decibels(hand.logits, hand.logits_with_fc_quantized()), rel=1e-3
    )


def test_scales_of_channels_are_told_by_their_smallest_and_largest(two, x) -> None:
    model = prepared(two, x, per_channel_wts=True, bits_parameters=5)
    weight = rows_of(quantization_report(two, model, [x]))["conv"].weight
    rows = two.conv.weight.detach().flatten(1).double().numpy()
    scales = np.abs(rows).max(1) / 15
    assert [weight.scale_min, weight.scale_max] == pytest.approx([scales.min(), scales.max()])
    assert [weight.grid_min, weight.grid_max] == pytest.approx([-15 * scales.max(), 15 * scales.max()])
    rounded = on_grid(rows, scales[:, None], 0, -15, 15)
    assert weight.sqnr_db == pytest.approx(decibels(rows, rounded), rel=1e-4)


def test_in_dynamic_mode_the_bias_is_rounded_by_the_scale_that_the_layer_before_would_have(two, x) -> None:
    hand = ByHand(two, x, bits_weights=3, bits=3)
    model = prepared(two, x, dynamic=True, bits_activations=3, bits_parameters=3)
    model(torch.full_like(x, 40.0))  # leaves another scale behind
    report = quantization_report(two, model, [x])
    expected = np.square(hand.logits_with_fc_quantized(is_dynamic=True) - hand.logits).mean()
    assert rows_of(report)["fc"].error == pytest.approx(expected, rel=1e-4)


def test_ranges_of_each_batch_are_taken_together(two, x) -> None:
    model = prepared(two, x, dynamic=True)
    inputs = rows_of(quantization_report(two, model, [x, 0.25 * x]))["conv"].input
    scale = (x.max() - x.min()).item() / 255
    assert [inputs.scale_min, inputs.scale_max] == pytest.approx([0.25 * scale, scale])


def test_values_beyond_the_grid_count_as_clipped(two, x) -> None:
    model = prepared(two, x, clip_acts="N_STD", clip_n_stds=1.0)
    rows = rows_of(quantization_report(two, model, [x]))
    hidden, top = two.relu(two.conv(x)).detach(), model.conv.output_quant
    highest = float((255 - top.zero_point) * top.scale)
    share = (hidden > highest + 0.501 * top.scale).float().mean().item()
    assert 0.05 < share < 0.5
    assert rows["conv"].output.clipped == pytest.approx(share)
    assert rows["conv"].output.max == pytest.approx(hidden.max().item())
    assert rows["conv"].output.grid_max == pytest.approx(highest, rel=1e-5)


@pytest.mark.parametrize("activation, ends", [(nn.ReLU6(), (0, 6)), (nn.Tanh(), (-4, 4))])
def test_what_the_reader_of_an_output_cannot_tell_apart_is_not_lost(x, activation, ends) -> None:
    """The grid of the convolution covers only what ReLU6 reads: the rest is no clipping and no noise."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), activation, nn.Flatten(), nn.Linear(12, 2)).eval()
    with torch.no_grad():
        model[0].weight.mul_(20)
    whole = prepared(model, x)
    output = rows_of(quantization_report(model, whole, [x]))["0"].output
    with torch.no_grad():
        clean = model[0](x).clamp(*ends).double().numpy()
        noisy = whole[0](x).clamp(*ends).double().numpy()
    assert [output.min, output.max] == pytest.approx([*ends])
    assert output.clipped == 0.0
    assert output.sqnr_db == pytest.approx(decibels(clean, noisy), rel=1e-3)
    assert output.sqnr_db > 35


def test_weights_that_are_on_the_grid_lose_nothing(two, x) -> None:
    with torch.no_grad():
        two.fc.weight.copy_(torch.randint(-7, 8, (3, 3)) / 8)
        two.fc.weight[0, 0] = 7 / 8
    model = prepared(two, x, bits_activations=None, bits_parameters=4)
    rows = rows_of(quantization_report(two, model, [x]))
    assert rows["fc"].weight.sqnr_db == math.inf
    assert rows["fc"].output == TensorFigures(
        None, rows["fc"].output.min, rows["fc"].output.max, sqnr_db=math.inf
    )
    assert (rows["fc"].error, rows["fc"].error_share, rows["conv"].error_share) == (0.0, 0.0, 1.0)


def test_shares_of_a_model_that_loses_nothing_are_zero(x) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 2, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randint(0, 2, (2, 32)) * 2.0 - 1)
    report = quantization_report(model, prepared(model, x, bits_activations=None, bits_parameters=2), [x])
    assert [(row.error, row.error_share) for row in report.rows] == [(0.0, 0.0)]


def test_a_layer_alone_is_a_model_of_which_nothing_else_is_prepared(residual, images, residual_stats) -> None:
    """Joined, added and grouped layers, against models whose other layers the quantizer left in float."""
    settings = {"bits_activations": None, "bits_parameters": 3, "mode": UNSIGNED}
    twin = float_twin(residual, images[:1])
    whole = quantized(residual, residual_stats, images[:1], **settings)
    report = quantization_report(twin, whole, [images])
    assert [row.name for row in report.rows] == ["conv1", "conv2", "left", "right", "fc"]
    for row in report.rows:
        others = {other.name: {"bits_weights": None} for other in report.rows if other is not row}
        alone = quantized(residual, residual_stats, images[:1], overrides=others, **settings)
        with torch.no_grad():
            expected = F.mse_loss(alone(images), twin(images)).item()
        assert row.error == pytest.approx(expected, rel=1e-3)
    assert sum(row.error_share for row in report.rows) == pytest.approx(1.0)


def test_every_kind_of_layer_has_a_row(residual, images, residual_stats) -> None:
    twin = float_twin(residual, images[:1])
    report = quantization_report(twin, quantized(residual, residual_stats, images[:1]), [images])
    kinds = {row.name: row.kind for row in report.rows}
    assert list(kinds) == ["conv1", "conv2", "add", "left", "right", "concat", "tanh", "pool", "fc"]
    assert kinds["add"] == "EltwiseAdd"
    assert all(row.output.bits == 8 and row.output.sqnr_db > 20 for row in report.rows)
    assert rows_of(report)["add"].weight == TensorFigures()


def test_what_stays_on_the_grid_of_its_input_has_no_row(x) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2)).eval()
    assert list(rows_of(quantization_report(model, prepared(model, x), [x]))) == ["0", "3"]


def test_words_come_with_a_row_of_the_embedding() -> None:
    words = torch.randint(20, (5, 3))
    model = WordModel().eval()
    twin = float_twin(model, words)
    report = quantization_report(twin, quantized(model, stats_of(model, words), words), [words])
    row = rows_of(report)["encoder"]
    weight = model.encoder.weight.detach().double().numpy()
    scale = np.abs(weight).max() / 127.5
    assert (row.kind, row.weight.bits) == ("Embedding", 8)
    assert row.weight.sqnr_db == pytest.approx(
        decibels(weight, on_grid(weight, scale, 0, -128, 127)), rel=1e-3
    )
    assert row.error > 0


def test_half_precision_has_a_row_without_a_grid(two, x) -> None:
    model = prepared(
        two, x, overrides={"fc": {"fpq_module": 16, "bits_activations": None, "bits_weights": None}}
    )
    row = rows_of(quantization_report(two, model, [x]))["fc"]
    weight = two.fc.weight.detach().double().numpy()
    assert (row.weight.bits, row.weight.grid_min, row.output.bits) == (16, None, None)
    assert row.weight.sqnr_db == pytest.approx(decibels(weight, weight.astype(np.float16)), rel=1e-6)
    assert 0 < row.error < 1e-5


class Twice(TwoLayers):
    """With a layer that is called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2 = self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(super().forward(x)))


def test_a_layer_with_two_names_is_quantized_at_both(x) -> None:
    model = Twice().eval()
    with pytest.warns(UserWarning, match="references to same module"):
        whole = quantized(model, None, x[:1], bits_activations=None, bits_parameters=3, mode=UNSIGNED)
    report = quantization_report(model, whole, [x])
    assert [row.name for row in report.rows] == ["conv", "fc"]
    hand = copy.deepcopy(model)
    with torch.no_grad():
        hand.fc.weight.copy_(whole.fc.weight)
        expected = F.mse_loss(hand(x), model(x)).item()
    assert rows_of(report)["fc"].error == pytest.approx(expected, rel=1e-4)


def test_in_place_operations_do_not_spoil_what_is_compared(x) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2)).eval()
    settings = {"overrides": {"1": {"clip_acts": "AVG"}}}  # which keeps the ReLU a layer of its own
    row = rows_of(quantization_report(model, prepared(model, x, **settings), [x]))["1"]
    assert row.kind == "ReLU"
    assert row.output.min == 0.0
    assert row.output.sqnr_db < 40


def test_scores_are_those_of_each_layer_alone(two, x) -> None:
    model = prepared(two, x, bits_activations=4, bits_parameters=3)
    labels = torch.randint(3, (12,))
    seen: list[Tensor] = []

    def score(candidate: nn.Module) -> tuple[float, float]:
        assert not any(module.training for module in candidate.modules())
        assert not torch.is_grad_enabled()
        seen.append(candidate(x))
        return float(100 * len(seen)), F.cross_entropy(seen[-1], labels).item()

    told: list[str] = []
    report = quantization_report(two, model, [x[:6], x[6:]], score, progress=told.append)
    hand = ByHand(two, x, bits_weights=3, bits=4)
    with torch.no_grad():
        expected = [two(x), model(x)]
    torch.testing.assert_close(seen[:2], expected)
    for output, by_hand in zip(
        seen[2:], [hand.logits_with_conv_quantized(), hand.logits_with_fc_quantized()], strict=True
    ):
        np.testing.assert_allclose(output.numpy(), by_hand, atol=1e-5)
    losses = [F.cross_entropy(output, labels).item() for output in seen]
    assert (report.float_score, report.quantized_score) == (Score(100, losses[0]), Score(200, losses[1]))
    assert [(row.top1, row.loss) for row in report.rows] == [(300, losses[2]), (400, losses[3])]
    assert told == [
        "quantization report: batch 1, 2 layers one by one",
        "quantization report: batch 2, 2 layers one by one",
        f"quantization report [1/4] floating point: top-1 100.00 %, loss {losses[0]:.4g}",
        f"quantization report [2/4] all quantized: top-1 200.00 %, loss {losses[1]:.4g}",
        f"quantization report [3/4] conv: top-1 300.00 %, loss {losses[2]:.4g}",
        f"quantization report [4/4] fc: top-1 400.00 %, loss {losses[3]:.4g}",
    ]


def test_both_models_stay_as_they_are_also_after_a_failure(two, x) -> None:
    model = prepared(two.train(), x)
    two.train()
    before = [
        (list(net.named_modules()), copy.deepcopy(net.state_dict()), [m.training for m in net.modules()])
        for net in (two, model)
    ]

    def fail(_model: nn.Module) -> tuple[float, float]:
        raise RuntimeError("stop")

    quantization_report(two, model, [x])
    with pytest.raises(RuntimeError, match="stop"):
        quantization_report(two, model, [x], fail)
    for net, (modules, state, modes) in zip((two, model), before, strict=True):
        assert list(net.named_modules()) == modules
        assert [m.training for m in net.modules()] == modes
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_batches_may_come_from_a_function_and_be_tuples(two, x) -> None:
    model = prepared(two, x)
    report = quantization_report(
        nn.DataParallel(two), nn.DataParallel(model), lambda: ((part,) for part in x.split(4))
    )
    other = quantization_report(two, model, list(x.split(4)))
    assert report == other


def fails(text: str, *arguments: Any, kind: type[Exception] = QuantizationError) -> None:
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        quantization_report(*arguments)


def test_wrong_arguments_are_told(two, x) -> None:
    model = prepared(two, x)
    where = "quantization_report: "
    fails(f"{where}float_model: must be a torch.nn.Module, got str", "a", model, [x], kind=UsageError)
    fails(f"{where}model: must be a torch.nn.Module, got NoneType", two, None, [x], kind=UsageError)
    text = f"{where}eval_fn: must be a function of the model, or None, got int"
    fails(text, two, model, [x], 3, kind=UsageError)
    fails("batches: there are none; give at least one batch of inputs", two, model, [], kind=UsageError)
    text = f"{where}nothing of the model is quantized; prepare it with a quantizer first"
    fails(text, two, copy.deepcopy(two), [x])
    text = "float_model: is quantized itself; give the model in floating point that was quantized"
    fails(text, model, model, [x])


@pytest.mark.parametrize("value", [None, 3.0, (1.0, 2.0, 3.0), ("high", "low")])
def test_an_eval_fn_must_return_two_numbers(two, x, value) -> None:
    text = f"quantization_report: eval_fn: must return two numbers, (top-1 in percent, loss), got {value!r}"
    fails(text, two, prepared(two, x), [x], lambda _model: value)


def test_models_that_do_not_fit_are_told(two, x, residual, residual_stats, images) -> None:
    whole = quantized(residual, residual_stats, images[:1])
    text = (
        "float_model: 'bn1' is a batch norm, which the quantized model has folded; "
        "make the model with float_twin(model, dummy_input)"
    )
    fails(text, residual, whole, [images])
    model, other = prepared(two, x), copy.deepcopy(two)
    other.fc = nn.Linear(3, 4)
    text = (
        "float_model: the weight of 'fc' is (4, 3), in the quantized model (3, 3); "
        "quantize a copy of the float model"
    )
    fails(text, other, model, [x])
    other.fc = nn.Bilinear(3, 3, 3)
    text = "float_model: 'fc' is Bilinear, in the quantized model Linear; quantize a copy of the float model"
    fails(text, other, model, [x])
    del other.fc
    other.fcc = nn.Linear(3, 3)
    text = (
        "float_model: has no 'fc', which is quantized in the other; did you mean 'fcc'?; make modules of "
        "functional operations first (to_modules), if any, and quantize a copy of the float model"
    )
    fails(text, other, model, [x])


def test_outputs_that_are_not_finite_are_told(two, x) -> None:
    model, bad = prepared(two, x), x.clone()
    bad[3] = math.nan
    text = "batches[1]: the model in floating point returns values that are not finite; check the inputs"
    fails(text, two, model, [x, bad])
    with torch.no_grad():
        model.conv.wrapped_module.bias.fill_(math.nan)
    fails("quantization_report: the quantized model returns values that are not finite", two, model, [x])


def some_report(count: int, has_scores: bool = True) -> QuantizationReport:
    rows = [
        LayerRow(
            f"layer{index}",
            "Conv2d",
            TensorFigures(8, -1.0, 1.0, -1.0, 0.9, 0.1, 0.2, 0.01 * (index % 3), 30.0 + index % 7),
            TensorFigures(),
            TensorFigures(4, 0.0, 2.0, sqnr_db=math.inf if index == 1 else 20.0),
            float(index),
            index / sum(range(count)) if count > 1 else 0.0,
            *((90.0 - index, 0.5 + index) if has_scores else ()),
        )
        for index in range(count)
    ]
    return QuantizationReport(tuple(rows), 3.0, Score(91.0, 0.25) if has_scores else None)


def test_the_worst_layers_are_those_with_the_largest_errors() -> None:
    report = some_report(7)
    assert [row.name for row in report.worst(2)] == ["layer6", "layer5"]
    assert len(report.worst()) == 5
    assert len(report.worst(50)) == 7
    for n in (0, 1.5, True):
        with pytest.raises(
            UsageError, match=re.escape(f"worst: n: must be a number of layers from 1, got {n!r}")
        ):
            report.worst(n)  # type: ignore[arg-type]


def test_csv_reads_back_as_it_was(tmp_path: Path) -> None:
    report = some_report(4)
    path = report.to_csv(tmp_path / "report.csv")
    frame = pd.read_csv(path)
    assert list(frame.layer) == ["layer0", "layer1", "layer2", "layer3"]
    assert list(frame.weight_bits) == [8] * 4
    assert frame.input_bits.isna().all()
    assert list(frame.output_sqnr_db) == [20.0, math.inf, 20.0, 20.0]
    assert list(frame.error_share) == [row.error_share for row in report.rows]
    assert list(frame.top1_drop) == [1.0, 2.0, 3.0, 4.0]
    assert list(frame.loss_rise) == [0.25, 1.25, 2.25, 3.25]
    assert len(frame.columns) == 2 + 3 * 9 + 2 + 4
    assert path.read_text().splitlines()[1].startswith("layer0,Conv2d,8,-1.0,1.0,-1.0,0.9,0.1,0.2,0.0,30.0,,")


def test_without_scores_there_are_no_columns_of_them() -> None:
    columns = some_report(2, has_scores=False).to_frame().columns
    assert not {"top1", "loss", "top1_drop", "loss_rise"} & set(columns)


def test_pictures_are_written_whole_and_alike(tmp_path: Path) -> None:
    report = some_report(2, has_scores=False)
    png, svg = report.to_png(tmp_path / "a.png"), report.to_png(tmp_path / "a.SVG")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()
    assert report.to_png(tmp_path / "b.svg").read_bytes() == svg.read_bytes()
    text = "quantization report: the picture must end in .png or .svg, got 'a.jpg'"
    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        report.to_png(tmp_path / "a.jpg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.SVG", "a.png", "b.svg"]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = tmp_path / "none" / "report.csv"
    with pytest.raises(
        QuantizationError, match=f"^{re.escape(f'{path}: cannot be written, No such file or directory')}$"
    ):
        some_report(2).to_csv(path)


def test_nothing_of_the_report_is_needed_to_prepare_a_model(two, x) -> None:
    """A quantizer's own object works, too, without copies of weights in full precision."""
    model = copy.deepcopy(two)
    PostTrainLinearQuantizer(model, model_activation_stats=stats_of(two, x)).prepare_model(x[:1])
    assert not hasattr(model.fc.wrapped_module, "float_weight")
    assert rows_of(quantization_report(two, model, [x]))["fc"].weight.sqnr_db > 35
