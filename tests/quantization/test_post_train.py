"""Whole models: what is folded, fused, narrowed and connected."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from distiller.errors import QuantizationError
from distiller.modules import EltwiseAdd
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.clipping import ClipMode
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.quantizer import rebuild_quantized
from tests.quantization.networks import ASYMMETRIC, DUMMY, DistillersResNet18, quantized, signal_to_noise


def test_golden_scales_of_distillers_resnet18_by_the_decks_snippet(compat) -> None:
    import distiller
    import distiller.quantization as quant

    model = DistillersResNet18()
    quant_mode = {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"}
    dummy_input = distiller.get_dummy_input(input_shape=model.input_shape)
    quantizer: Any = quant.PostTrainLinearQuantizer(
        copy.deepcopy(model),
        bits_activations=8,
        bits_parameters=8,
        mode=quant_mode,
        model_activation_stats=str(compat / "stats" / "resnet18_quant_stats.yaml"),
        overrides=None,
    )
    quantizer.prepare_model(dummy_input)
    # 255 / 7.357358932495117, the largest output of bn1, in Distiller's convention
    assert quantizer.model.conv1.output_scale.item() == pytest.approx(34.65918, abs=5e-6)
    assert quantizer.model.conv1.output_zero_point.item() == 0
    assert quantizer.linear_quant_params["maxpool.output_scale"].item() == pytest.approx(34.65918, abs=5e-6)
    assert quantizer.linear_quant_params["layer1.0.conv1.output_scale"].item() == pytest.approx(
        57.1096, abs=5e-5
    )


def test_batch_norms_are_folded_and_relus_fused(residual, residual_stats) -> None:
    model = quantized(residual, residual_stats, mode=ASYMMETRIC)
    assert [type(model.get_submodule(n)).__name__ for n in ("bn1", "relu1", "bn2", "relu2")] == [
        "Identity"
    ] * 4
    assert [
        type(model.get_submodule(n)).__name__ for n in ("conv1", "add", "concat", "tanh", "pool", "fc")
    ] == [
        "RangeLinearQuantParamLayerWrapper",
        "RangeLinearQuantEltwiseAddWrapper",
        "RangeLinearQuantConcatWrapper",
        "RangeLinearFakeQuantWrapper",
        "RangeLinearFakeQuantWrapper",
        "RangeLinearQuantParamLayerWrapper",
    ]
    assert isinstance(model.dropout, nn.Dropout)
    half_range = {
        n: model.get_submodule(n).output_quant_settings.clip_half_range for n in ("conv1", "conv2", "add")
    }
    assert half_range == {"conv1": True, "conv2": False, "add": True}


def test_statistics_follow_folding_and_what_is_read(residual, residual_stats) -> None:
    model = quantized(residual, residual_stats, mode=ASYMMETRIC)
    expected = copy.deepcopy(residual_stats)
    for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
        expected[conv]["output"] = expected.pop(norm)["output"]
    for layer, reader, lo, hi in (
        ("conv1", "relu1", 0, 1e9),
        ("add", "relu2", 0, 1e9),
        ("concat", "tanh", -4, 4),
    ):
        for key in ("min", "max", "avg_min", "avg_max"):
            expected[layer]["output"][key] = min(max(expected[layer]["output"][key], lo), hi)
        expected[reader]["inputs"][0] = expected[layer]["output"]
    assert model.quantizer.model_activation_stats == expected


def test_inputs_are_quantized_once_where_they_first_appear(residual, residual_stats) -> None:
    model = quantized(residual, residual_stats, mode=ASYMMETRIC)
    assert list(model.conv1.inputs_quant) == ["0"]
    links = {
        ("conv2", 0): "conv1",  # past the fused ReLU
        ("add", 0): "conv2",  # past the folded batch norm
        ("add", 1): "conv1",
        ("left", 0): "add",
        ("concat", 1): "right",
        ("fc", 0): "pool",  # past dropout and flatten
    }
    for (name, index), source in links.items():
        wrapper = model.get_submodule(name)
        assert not wrapper.inputs_quant
        assert wrapper.input_grids[index] is model.get_submodule(source).output_quant


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("per_channel", [False, True])
def test_8_bits_come_close_and_16_bits_with_wide_accumulators_closer(
    residual, residual_stats, images, mode, per_channel
) -> None:
    kwargs: dict[str, Any] = {"mode": mode, "per_channel_wts": per_channel}
    wide: dict[str, Any] = {"bits_activations": 16, "bits_parameters": 16, "bits_accum": 40}
    noise = [
        signal_to_noise(residual, quantized(residual, residual_stats, **settings, **kwargs), images)
        for settings in ({}, wide)
    ]
    assert noise[0] > 25
    assert noise[1] > noise[0] + 30


@pytest.mark.parametrize("clip", ["AVG", "N_STD", "GAUSS", "LAPLACE"])
@pytest.mark.parametrize("mode", [Mode.SYMMETRIC, Mode.ASYMMETRIC_UNSIGNED])
@pytest.mark.parametrize("bits", [4, 8, 12])
def test_every_clip_mode_works_at_every_width(residual, residual_stats, images, clip, mode, bits) -> None:
    model = quantized(
        residual,
        residual_stats,
        mode=mode,
        clip_acts=clip,
        clip_n_stds=3,
        bits_activations=bits,
        also_clip_weights=True,
    )
    assert signal_to_noise(residual, model, images) > 5


def test_weights_only_needs_no_statistics(residual, images) -> None:
    model = quantized(residual, None, bits_activations=None, per_channel_wts=True)
    assert signal_to_noise(residual, model, images) > 35
    assert model.conv1.output_quant is None
    assert isinstance(model.bn1, nn.Identity)
    assert isinstance(model.relu1, nn.ReLU)
    assert isinstance(model.add, EltwiseAdd)


def test_activations_only_leaves_the_weights(residual, residual_stats, images) -> None:
    model = quantized(residual, residual_stats, mode=ASYMMETRIC, bits_parameters=0)
    assert type(model.fc).__name__ == "RangeLinearFakeQuantWrapper"
    assert torch.equal(model.fc.wrapped_module.weight, residual.fc.weight)
    assert list(model.conv1.inputs_quant) == ["0"]
    assert model.conv2.input_grids[0] is model.conv1.output_quant
    assert signal_to_noise(residual, model, images) > 25


def test_a_layer_can_be_left_out(residual, residual_stats) -> None:
    overrides = {"conv1": {"bits_activations": None, "bits_weights": None}}
    model = quantized(residual, residual_stats, mode=ASYMMETRIC, overrides=overrides)
    assert isinstance(model.conv1, nn.Conv2d)
    assert type(model.relu1).__name__ == "RangeLinearFakeQuantWrapper"
    assert model.conv2.input_grids[0] is model.relu1.output_quant


def test_overrides_reach_the_layers(residual, residual_stats) -> None:
    overrides = {
        "left|right": {"bits_weights": 4, "per_channel_wts": True},
        "fc": {"clip_acts": "NONE", "bits_activations": 6, "mode": "SYMMETRIC_RESTRICTED", "bits_bias": 16},
    }
    model = quantized(residual, residual_stats, mode=ASYMMETRIC, clip_acts="AVG", overrides=overrides)
    assert model.left.wts_quant_settings.num_bits == model.right.wts_quant_settings.num_bits == 4
    assert model.left.weight_scale.shape == (4,)
    assert model.conv1.output_quant_settings.clip_mode is ClipMode.AVG
    settings = model.fc.output_quant_settings
    assert (settings.num_bits, settings.quant_mode, settings.clip_mode) == (
        6,
        Mode.SYMMETRIC_RESTRICTED,
        ClipMode.NONE,
    )
    assert model.fc.bits_bias == 16


def test_a_relu_with_settings_of_its_own_is_not_fused(residual, residual_stats) -> None:
    model = quantized(residual, residual_stats, mode=ASYMMETRIC, overrides={"relu1": {"bits_activations": 4}})
    assert model.relu1.output_quant_settings.num_bits == 4
    assert not model.conv1.output_quant_settings.clip_half_range
    both = quantized(residual, residual_stats, mode=ASYMMETRIC, overrides={".*1": {"bits_activations": 4}})
    assert isinstance(both.relu1, nn.Identity)
    assert both.conv1.output_quant_settings.num_bits == 4


def test_input_overrides_apply_to_inputs_that_come_unquantized(residual, residual_stats) -> None:
    overrides = {"conv1": {"input_overrides": {0: {"bits_activations": 4, "mode": "SYMMETRIC"}}}}
    model = quantized(residual, residual_stats, mode=ASYMMETRIC, overrides=overrides)
    settings = model.conv1.inputs_quant["0"].settings
    assert (settings.num_bits, settings.quant_mode) == (4, Mode.SYMMETRIC)
    overrides = {"conv1": {"input_overrides": {0: {"from_output": True}}}}
    model = quantized(residual, residual_stats, mode=ASYMMETRIC, overrides=overrides)
    assert torch.equal(model.conv1.inputs_quant["0"].scale, model.conv1.output_quant.scale)


def test_input_override_of_a_quantized_input_is_refused(residual, residual_stats) -> None:
    overrides = {"conv2": {"input_overrides": {0: {"bits_activations": 4}}}}
    with pytest.raises(QuantizationError) as error:
        quantized(residual, residual_stats, overrides=overrides)
    assert str(error.value) == (
        "conv2: input_overrides[0]: this input is the output of 'conv1' and quantized already; "
        "override that layer's output instead"
    )


def test_without_fallback_an_unquantized_input_is_refused(residual, residual_stats) -> None:
    with pytest.raises(QuantizationError) as error:
        quantized(residual, residual_stats, inputs_quant_auto_fallback=False)
    assert str(error.value) == (
        "conv1: input 0 comes from no quantized layer; set inputs_quant_auto_fallback, or input_overrides for it"
    )


def test_other_layers_can_be_dropped_or_have_their_inputs_quantized(residual, residual_stats) -> None:
    overrides = {"tanh": {"make_identity": True}, "pool": {"quantize_inputs": True}}
    model = quantized(residual, residual_stats, overrides=overrides)
    assert isinstance(model.tanh, nn.Identity)
    assert model.pool.input_grids[0] is model.concat.output_quant


def test_relu_takes_the_spread_of_its_input_for_gauss(stats_of, images) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.ReLU())
    stats = stats_of(model, images)
    stats["1"]["output"]["max"] += 1  # the pool is read by the ReLU alone: keep it from being fused
    kwargs: dict[str, Any] = {"overrides": {"2": {"bits_activations": 4}}, "clip_acts": "GAUSS"}
    relu = quantized(model, stats, mode="ASYMMETRIC_UNSIGNED", **kwargs)[2]
    # 4 bits, half a Gauss: 2.93 standard deviations over 15 steps
    assert relu.output_quant.scale.item() == pytest.approx(2.93 * stats["2"]["inputs"][0]["std"] / 15)


def test_dynamic_ranges_need_no_statistics(residual, images) -> None:
    with pytest.warns(UserWarning, match="^not quantized, since") as warned:
        model = quantized(residual, None, mode=ASYMMETRIC, per_channel_wts=True)
    assert [str(warning.message) for warning in warned] == [
        "not quantized, since without statistics the scale of their output is not known beforehand: 'add', 'concat'"
    ]
    assert signal_to_noise(residual, model, images) > 25
    assert isinstance(model.add, EltwiseAdd)
    assert isinstance(model.relu1, nn.Identity)
    assert model.conv2.input_grids[0] is model.conv1.output_quant
    assert not any("scale" in name and "weight" not in name for name in model.state_dict())


def test_quantized_model_is_an_ordinary_module(residual, residual_stats, images) -> None:
    model = quantized(residual, residual_stats, mode=ASYMMETRIC)
    with torch.no_grad():
        expected = model(images)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(images), expected)
        assert twin.conv2.input_grids[0] is twin.conv1.output_quant
        assert torch.equal(torch.compile(model, backend="eager")(images), expected)
        with torch.inference_mode():
            assert torch.equal(model(images), expected)
    with pytest.raises(QuantizationError, match=r"a quantized model works in evaluation mode only"):
        model.train()(images)
    assert not any(parameter.is_leaf is False for parameter in model.parameters())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore:not quantized", "ignore:accumulators of 12 bits can overflow")
def test_a_rebuilt_model_takes_the_state(residual, residual_stats, images, dynamic) -> None:
    stats = None if dynamic else residual_stats
    model = quantized(
        residual,
        stats,
        mode=ASYMMETRIC,
        per_channel_wts=True,
        bits_accum=12,
        overrides={"fc": {"mode": Mode.SYMMETRIC}},
    )
    metadata = yaml.safe_load(yaml.safe_dump(_as_lists(model.quantizer_metadata)))
    other: Any = type(residual)()
    rebuild_quantized(other, metadata)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images), model(images))


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def test_weights_are_quantized_again_from_their_copies(residual, residual_stats, images) -> None:
    model = quantized(residual, residual_stats, mode=ASYMMETRIC, save_fp_weights=True)
    assert torch.equal(model.fc.wrapped_module.float_weight, residual.fc.weight)
    with torch.no_grad():
        before = model(images)
        model.fc.wrapped_module.weight.zero_()
        assert not torch.equal(model(images), before)
        model.quantizer.quantize_params()
        assert torch.equal(model(images), before)


def test_without_copies_quantizing_again_changes_nothing(residual, residual_stats, images) -> None:
    model = quantized(residual, residual_stats, mode=ASYMMETRIC)
    before = copy.deepcopy(model.state_dict())
    model.quantizer.quantize_params()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_torchvisions_functional_additions_are_quantized_where_they_are_read(stats_of) -> None:
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).eval()
    images = torch.randn(8, 3, 32, 32)
    stats = stats_of(model, images)
    with pytest.warns(UserWarning, match="operations stay in floating point") as warned:
        twin = quantized(model, stats, images[:1], mode=ASYMMETRIC, per_channel_wts=True)
    assert [str(warning.message) for warning in warned] == [
        "operations stay in floating point ('layer1.0.Add', 'layer2.0.Add', 'layer3.0.Add', 'layer4.0.Add'): "
        "make modules of them with distiller.functional_modules.to_modules(model, dummy_input), and collect "
        "statistics then"
    ]
    block = twin.layer1[0]
    assert isinstance(twin.relu, nn.Identity)
    # called after the convolution and after the addition: not fused, but the convolution spares negative values
    assert type(block.relu).__name__ == "RangeLinearFakeQuantWrapper"
    assert block.conv1.output_quant.zero_point.item() == 0
    assert block.conv2.input_grids[0] is block.relu.output_quant
    assert signal_to_noise(model, twin, images) > 20


def test_functional_relus_and_views_are_seen(stats_of, images) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(36, 2)

        def forward(self, x):
            return self.fc(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))

    model = Net()
    twin = quantized(model, stats_of(model, images), mode=ASYMMETRIC)
    assert twin.conv.output_quant.zero_point.item() == 0
    assert twin.fc.input_grids[0] is twin.conv.output_quant


def test_layers_that_cannot_be_quantized_stay_with_a_warning(stats_of) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc, self.unused = (
                nn.LSTM(3, 4, batch_first=True),
                nn.Linear(4, 2),
                nn.Linear(4, 2),
            )

        def forward(self, x):
            return self.fc(self.lstm(x)[0])

    model, x = Net().eval(), torch.randn(2, 5, 3)
    with pytest.warns(UserWarning, match="^not quantized, since") as warned:
        twin = quantized(model, stats_of(model, x), x, mode=ASYMMETRIC)
    assert [str(warning.message) for warning in warned] == [
        "not quantized, since they are quantized piece by piece, after convert_model_to_distiller_lstm(model): 'lstm'",
        "not quantized, since the model does not call them in evaluation: 'unused'",
    ]
    assert isinstance(twin.lstm, nn.LSTM)
    assert list(twin.fc.inputs_quant) == ["0"]


def test_parallel_model_is_quantized_inside(residual, residual_stats, images) -> None:
    model = nn.DataParallel(copy.deepcopy(residual))
    quantizer = PostTrainLinearQuantizer(model, mode=ASYMMETRIC, model_activation_stats=residual_stats)
    quantizer.prepare_model(DUMMY)
    assert "conv1.output_scale" in quantizer.linear_quant_params
    with torch.no_grad():
        assert torch.equal(model(images), quantized(residual, residual_stats, mode=ASYMMETRIC)(images))
