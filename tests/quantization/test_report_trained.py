"""The report of models that were trained with quantization, against models of which one layer was prepared."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.quantization.report import QuantizationReport, quantization_report
from distiller.quantization.training.binary import BinaryQuantizer
from distiller.quantization.training.dorefa import DorefaQuantizer
from distiller.quantization.training.lsq import LSQQuantizer
from distiller.quantization.training.pact import PACTQuantizer
from distiller.quantization.training.range_linear import (
    NCFQuantAwareTrainQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
)
from distiller.quantization.training.ternary import TernaryQuantizer
from distiller.quantization.training.wrpn import WRPNQuantizer
from tests.quantization.training.low_bit_networks import LowBitNet, low_bit_net, stripes
from tests.quantization.training.qat_networks import IMAGES, Net, net, outputs, sgd, train

FULL = {"bits_weights": None, "bits_activations": None}
TRAINED_LAYERS = ("conv1", "left", "right", "fc", "fc2")


def trained(quantizer: Any, **settings: Any) -> Any:
    model = net()
    optimizer = sgd(model)
    quantizer(model, optimizer, **settings).prepare_model()
    train(model, optimizer)
    return model


def alone(model: nn.Module, quantizer: Any, name: str, **settings: Any) -> nn.Module:
    """A model of which only one layer is prepared, with what the other has learned."""
    layers = [other for other, module in net().named_modules() if not list(module.children())]
    others = {other: FULL for other in layers if other != name}
    single = net()
    quantizer(single, None, overrides=others, **settings).prepare_model()
    learned = canonical(model)
    single.load_state_dict({key: learned[plain] for plain, key in canonical_keys(single).items()})
    return single.eval()


def canonical_keys(model: nn.Module) -> dict[str, str]:
    return {re.sub(r"parametrizations\.(\w+)\.original$", r"\1", key): key for key in model.state_dict()}


def canonical(model: nn.Module) -> dict[str, Tensor]:
    return {plain: model.state_dict()[key] for plain, key in canonical_keys(model).items()}


def in_float(model: nn.Module, **weights: Tensor) -> Any:
    """The network with the parameters that were trained, some replaced."""
    plain = net()
    state = {**canonical(model), **weights}
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    return plain.eval()


def error(model: nn.Module, other: nn.Module) -> float:
    return F.mse_loss(outputs(model), outputs(other)).item()


def names(report: QuantizationReport) -> list[str]:
    return [row.name for row in report.rows]


@pytest.mark.parametrize(
    "quantizer, settings",
    [
        (LSQQuantizer, {"bits_weights": 3, "bits_activations": 4}),
        (LSQQuantizer, {"bits_weights": 3, "per_channel_wts": True}),
        (LSQQuantizer, {"bits_weights": 3, "simulate_bn_folding": True}),
        (WRPNQuantizer, {"bits_weights": 4}),
        (TernaryQuantizer, {"learned_scales": True}),
        (BinaryQuantizer, {}),
        (NCFQuantAwareTrainQuantizer, {"bits_weights": 3, "bits_activations": 4}),
    ],
)
def test_a_layer_alone_is_a_model_of_which_nothing_else_is_prepared(quantizer, settings) -> None:
    model = trained(quantizer, **settings)
    report = quantization_report(net(), model, [IMAGES[:3], IMAGES[3:]])
    plain = in_float(model)
    for row in report.rows:
        single = alone(model, quantizer, row.name, **settings)
        assert row.error == pytest.approx(error(single, plain), rel=1e-3, abs=1e-9), row.name
        assert row.error > 0
    assert report.error == pytest.approx(error(model, plain), rel=1e-4)
    assert sum(row.error_share for row in report.rows) == pytest.approx(1)


def test_the_parameters_of_the_float_model_do_not_matter() -> None:
    model = trained(LSQQuantizer, bits_weights=4, bits_activations=4)
    other = Net().eval()
    first, second = (quantization_report(floats, model, [IMAGES]) for floats in (net(), other))
    assert first == second
    assert first.rows[0].kind == "Conv2d"


def test_figures_of_learned_steps() -> None:
    model = trained(LSQQuantizer, bits_weights=3, bits_activations=4)
    rows: dict[str, Any] = {row.name: row for row in quantization_report(net(), model, [IMAGES]).rows}
    weights = model.conv1.parametrizations.weight
    weight, step = weights.original.detach().double().numpy(), weights[0].step_size.item()
    row = rows["conv1"]
    assert (row.weight.bits, row.input.bits, row.output.bits) == (3, 4, None)
    assert [row.weight.grid_min, row.weight.grid_max] == pytest.approx([-4 * step, 3 * step])
    rounded = np.clip(np.round(weight / step), -4, 3) * step
    noise = np.square(weight - rounded).mean()
    assert row.weight.sqnr_db == pytest.approx(10 * np.log10(np.square(weight).mean() / noise), rel=1e-4)
    assert row.weight.clipped == np.mean((weight / step > 3.501) | (weight / step < -4.501))
    step = model.conv1.input_quantizer.step_size.item()
    images = IMAGES.double().numpy()
    assert row.input.clipped == np.mean((images / step > 7.501) | (images / step < -8.501))
    assert [row.input.min, row.input.max] == pytest.approx([images.min(), images.max()])
    with torch.no_grad():
        clean, noisy = in_float(model).conv1(IMAGES), model.conv1(IMAGES)
    ratio = 10 * torch.log10(clean.square().mean() / (clean - noisy).square().mean()).item()
    assert row.output.sqnr_db == pytest.approx(ratio, rel=1e-4)
    assert row.output.clipped is None


def test_the_input_of_the_model_and_activations_have_rows() -> None:
    model = trained(QuantAwareTrainRangeLinearQuantizer, bits_weights=8, bits_activations=4)
    report = quantization_report(net(), model, [IMAGES])
    assert names(report) == ["(input)", "conv1", "relu1", "left", "right", "relu2", "fc", "fc2"]
    rows: dict[str, Any] = {row.name: row for row in report.rows}
    plain = in_float(model)
    rounded = model.input_quantizer(IMAGES).detach()
    assert rows["(input)"].error == pytest.approx(
        F.mse_loss(outputs(plain, rounded), outputs(plain)).item(), rel=1e-4
    )
    ratio = 10 * torch.log10(IMAGES.square().mean() / (IMAGES - rounded).square().mean()).item()
    assert rows["(input)"].input.sqnr_db == pytest.approx(ratio, rel=1e-4)
    hidden: list[Tensor] = []
    plain.bn1.register_forward_hook(lambda _m, _i, output: hidden.append(output.clone()))
    outputs(plain)
    row, grid = rows["relu1"], model.relu1.grid
    assert (row.kind, row.output.bits, row.weight.bits) == ("ReLU", 4, None)
    assert [row.output.min, row.output.max] == pytest.approx([0.0, hidden[0].max().item()])
    assert row.output.grid_max == pytest.approx(float((grid.qmax - grid.zero_point) * grid.scale))
    clipped = (hidden[0] > row.output.grid_max + 0.501 * grid.scale).double().mean().item()
    assert row.output.clipped == clipped


def test_folded_batch_norms_are_part_of_their_layers() -> None:
    model = trained(LSQQuantizer, bits_weights=8, simulate_bn_folding=True)
    rows: dict[str, Any] = {row.name: row for row in quantization_report(net(), model, [IMAGES]).rows}
    plain = in_float(model)
    factor = (plain.bn2.weight / (plain.bn2.running_var + plain.bn2.eps).sqrt()).detach()
    folded = plain.right.weight.detach() * factor[:, None, None, None]
    assert [rows["right"].weight.min, rows["right"].weight.max] == pytest.approx(
        [folded.min().item(), folded.max().item()], rel=1e-5
    )
    assert "bn2" not in rows
    with torch.no_grad():
        reads: list[Tensor] = []
        plain.right.register_forward_pre_hook(lambda _m, args: reads.append(args[0]))
        outputs(plain)
        [x] = reads
        clean, noisy = plain.bn2(plain.right(x)), model.eval().right(x)
    ratio = 10 * torch.log10(clean.square().mean() / (clean - noisy).square().mean()).item()
    assert rows["right"].output.sqnr_db == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize(
    "quantizer, top", [(DorefaQuantizer, None), (PACTQuantizer, 2.0), (WRPNQuantizer, None)]
)
def test_ends_that_activations_were_trained_with_stay_in_the_float_model(quantizer, top) -> None:
    settings = {} if top is None else {"act_clip_init_val": top}
    model = trained(quantizer, bits_weights=8, bits_activations=8, **settings)
    report = quantization_report(net(), model, [IMAGES])
    assert names(report) == ["conv1", "relu1", "left", "right", "relu2", "fc", "fc2"]
    ends = [1.0, 1.0] if top is None else [model.relu1.clip_val.item(), model.relu2.clip_val.item()]
    weights = {}
    if quantizer is not WRPNQuantizer:
        for name in TRAINED_LAYERS:
            squashed = canonical(model)[f"{name}.weight"].tanh()
            weights[f"{name}.weight"] = squashed / squashed.abs().max()
    plain = in_float(model, **weights)
    plain.relu1, plain.relu2 = nn.Hardtanh(0, ends[0]), nn.Hardtanh(0, ends[1])
    assert report.error == pytest.approx(error(model, plain), rel=1e-3)
    single = copy.deepcopy(plain)
    single.relu1 = model.relu1
    rows: dict[str, Any] = {row.name: row for row in report.rows}
    assert rows["relu1"].error == pytest.approx(error(single, plain), rel=1e-3)
    assert rows["relu1"].output.max > ends[0]  # figures are against the ReLU
    assert 0 < rows["relu1"].output.clipped < 1
    assert rows["conv1"].weight.sqnr_db > 25


def test_binary_activations_have_one_bit_and_no_ends() -> None:
    model = low_bit_net()
    overrides = {"first": FULL, "fc": FULL, "relu1": {}}
    BinaryQuantizer(model, None, bits_activations=1, overrides=overrides).prepare_model()
    images = stripes(16)[0]
    rows: dict[str, Any] = {row.name: row for row in quantization_report(LowBitNet(), model, [images]).rows}
    assert list(rows) == ["conv2", "conv3"]
    assert (rows["conv2"].weight.bits, rows["conv2"].input.bits) == (1, 1)
    assert (rows["conv2"].input.clipped, rows["conv2"].weight.scale_max is None) == (None, False)


class Spare(Net):
    """With a layer that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)


def test_a_layer_that_is_not_called_loses_nothing_and_is_not_run() -> None:
    model = Spare()
    WRPNQuantizer(model, None, bits_weights=3).prepare_model()
    calls: list[nn.Module] = []

    def score(candidate: nn.Module) -> tuple[float, float]:
        calls.append(candidate)
        return 50.0, 1.0

    report = quantization_report(Spare(), model, [IMAGES], score)
    row = report.rows[-1]
    assert (row.name, row.error, row.error_share, row.top1, row.weight.bits) == ("spare", 0.0, 0.0, 50.0, 3)
    assert len(calls) == len(report.rows) - 1 + 2


def test_the_trained_model_stays_as_it_is() -> None:
    model, plain = trained(LSQQuantizer, bits_weights=4, bits_activations=4, simulate_bn_folding=True), net()
    before = [copy.deepcopy(each.state_dict()) for each in (model, plain)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    quantization_report(plain, model, [IMAGES])
    assert model.training
    for each, state in zip((model, plain), before, strict=True):
        assert all(torch.equal(state[key], value) for key, value in each.state_dict().items())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_another_architecture_is_told() -> None:
    model = trained(WRPNQuantizer, bits_weights=4)
    other: Any = net()
    other.fc2 = nn.Linear(7, 6)
    text = (
        "float_model: parameter 'fc2.weight' is (6, 7), in the quantized model (5, 7); "
        "give the architecture that was prepared for training"
    )
    with pytest.raises(QuantizationError, match=f"^{re.escape(text)}$"):
        quantization_report(other, model, [IMAGES])
    with pytest.raises(
        QuantizationError, match=re.escape("'spare.weight' is (3, 3), in the quantized model there is none")
    ):
        quantization_report(Spare(), model, [IMAGES])
