"""Whole models: what is folded, fused, narrowed and connected, and what is refused."""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from distiller.errors import GraphTraceError, QuantizationError, StatsError, UnknownNameError
from distiller.modules import EltwiseAdd
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.clipping import ClipMode
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.quantizer import rebuild_quantized

ASYMMETRIC = {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"}
DUMMY = torch.randn(1, 3, 8, 8)


class DistillersBlock(nn.Module):
    """A residual block with the names that Distiller's statistics of ResNet-18 have."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        self.add = EltwiseAdd()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(self.add(x, shortcut))


class DistillersResNet18(nn.Module):
    """ResNet-18 with those names, and few channels: scales come from the statistics alone."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 3, 32, 32)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        for index, width in enumerate((4, 8, 16, 32)):
            blocks = (
                DistillersBlock(max(4, width // 2), width, 2 if index else 1),
                DistillersBlock(width, width, 1),
            )
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for index in range(4):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def quantized(model: nn.Module, stats: Any, dummy: Tensor = DUMMY, **kwargs: Any) -> Any:
    """A quantized copy of the model; its quantizer is attached as `quantizer`."""
    twin: Any = copy.deepcopy(model)
    quantizer = PostTrainLinearQuantizer(twin, model_activation_stats=stats, **kwargs)
    quantizer.prepare_model(dummy)
    twin.quantizer = quantizer
    return twin


def signal_to_noise(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """In dB."""
    with torch.no_grad():
        clean, noisy = model(x), other(x)
    return 10 * torch.log10(clean.square().mean() / (clean - noisy).square().mean()).item()


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
def test_8_bits_come_close_and_14_bits_closer(residual, residual_stats, images, mode, per_channel) -> None:
    kwargs: dict[str, Any] = {"mode": mode, "per_channel_wts": per_channel}
    noise = [
        signal_to_noise(residual, quantized(residual, residual_stats, **kwargs), images),
        signal_to_noise(
            residual,
            quantized(residual, residual_stats, bits_activations=14, bits_parameters=14, **kwargs),
            images,
        ),
    ]
    assert noise[0] > 25
    assert noise[1] > noise[0] + 20


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
@pytest.mark.filterwarnings("ignore:not quantized")
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
    twin = quantized(model, stats, images[:1], mode=ASYMMETRIC, per_channel_wts=True)
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
        "not quantized, since they return something else than one tensor of real numbers: 'lstm'",
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


@pytest.mark.parametrize(
    ("kwargs", "kind", "text"),
    [
        (
            {"bits_activations": 17},
            QuantizationError,
            "bits_activations: must be 2 to 16 bits, or 0 or null for none, got 17",
        ),
        (
            {"bits_parameters": 1},
            QuantizationError,
            "bits_weights: must be 2 to 16 bits, or 0 or null for none, got 1",
        ),
        ({"bits_accum": 64}, QuantizationError, "bits_accum: must be 2 to 32 bits, got 64"),
        (
            {"mode": "ASYM"},
            QuantizationError,
            "mode: must be one of SYMMETRIC, SYMMETRIC_RESTRICTED, ASYMMETRIC_UNSIGNED, ASYMMETRIC_SIGNED, got 'ASYM'",
        ),
        (
            {"clip_acts": "N_STD"},
            QuantizationError,
            "clip_n_stds: clip mode N_STD needs clip_n_stds, a number of standard deviations > 0, got None",
        ),
        (
            {"scale_approx_mult_bits": 8},
            QuantizationError,
            "scale_approx_mult_bits: needs statistics; dynamic scales are not known beforehand",
        ),
        (
            {"overrides": {"conv3": {}}},
            UnknownNameError,
            "overrides: 'conv3' matches no layer of the model; did you mean 'conv2'?",
        ),
        (
            {"overrides": {"conv1": {"fpq_module": 16}}},
            QuantizationError,
            "overrides['conv1']: unknown key 'fpq_module'; the layers it matches take bits_activations, "
            "bits_weights, bits_bias, mode, clip_acts, clip_n_stds, clip_half_range, scale_approx_mult_bits, "
            "inputs_quant_auto_fallback, input_overrides, per_channel_wts",
        ),
        (
            {"overrides": {"conv1": {"clip_acts": "AVERAGE"}}},
            QuantizationError,
            "conv1: clip_acts: must be one of NONE, AVG, N_STD, GAUSS, LAPLACE, got 'AVERAGE'; did you mean 'AVG'?",
        ),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_changed(residual, kwargs, kind, text) -> None:
    with pytest.raises(kind) as error:
        PostTrainLinearQuantizer(residual, **kwargs)
    assert str(error.value) == text


def test_statistics_of_another_model_are_refused(residual, residual_stats) -> None:
    with pytest.raises(
        StatsError, match=r"^activation statistics: 1 of 15 layers are not in the model \('conv9'\)"
    ):
        PostTrainLinearQuantizer(
            residual, model_activation_stats={**residual_stats, "conv9": residual_stats["fc"]}
        )


def test_missing_statistics_are_named(residual, residual_stats) -> None:
    stats = {name: entry for name, entry in residual_stats.items() if name not in ("left", "fc")}
    with pytest.raises(StatsError) as error:
        quantized(residual, stats)
    assert str(error.value) == (
        "activation statistics: has no statistics of 2 of the layers to be quantized ('left', 'fc'); "
        "collect them from this model"
    )


def test_missing_statistics_of_an_input_are_named(residual, residual_stats, tmp_path) -> None:
    stats = copy.deepcopy(residual_stats)
    stats["conv1"]["inputs"] = {}
    file = tmp_path / "stats.yaml"
    file.write_text(yaml.safe_dump(stats))
    with pytest.raises(StatsError) as error:
        quantized(residual, str(file))
    assert str(error.value) == (
        f"{file}: conv1: has no statistics of input 0, which has to be quantized; collect them from this model"
    )


def test_a_dummy_input_is_needed(residual) -> None:
    with pytest.raises(QuantizationError) as error:
        PostTrainLinearQuantizer(residual, bits_activations=None).prepare_model()
    assert str(error.value) == (
        "prepare_model: an input is needed to trace the model with; "
        "pass distiller.get_dummy_input(input_shape=model.input_shape)"
    )


def test_a_model_that_cannot_be_traced_says_who_asked() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x if x.sum() > 0 else -x)

    with pytest.raises(GraphTraceError, match="post-training quantization"):
        PostTrainLinearQuantizer(Net(), bits_activations=None).prepare_model(torch.randn(1, 3))


def arguments(**changes: Any) -> Namespace:
    """The program's `--qe-*` flags at their defaults."""
    defaults = {
        "qe_mode": "sym",
        "qe_mode_acts": None,
        "qe_mode_wts": None,
        "qe_bits_acts": 8,
        "qe_bits_wts": 8,
        "qe_bits_accum": 32,
        "qe_clip_acts": "none",
        "qe_clip_n_stds": None,
        "qe_no_clip_layers": [],
        "qe_no_quant_layers": [],
        "qe_per_channel": False,
        "qe_scale_approx_bits": None,
        "qe_save_fp_weights": False,
        "qe_stats_file": None,
        "qe_dynamic": False,
    }
    return Namespace(**{**defaults, **changes})


def test_flags_become_settings(residual, residual_stats) -> None:
    args = arguments(
        qe_mode="asym_s",
        qe_mode_wts="sym_restr",
        qe_bits_wts=4,
        qe_clip_acts="n_std",
        qe_clip_n_stds=2.5,
        qe_no_clip_layers=["fc", "left"],
        qe_no_quant_layers=["module.left"],
        qe_per_channel=True,
        qe_scale_approx_bits=8,
        qe_save_fp_weights=True,
        qe_stats_file=residual_stats,
    )
    quantizer = PostTrainLinearQuantizer.from_args(residual, args)
    settings = quantizer.settings()
    assert settings.pop("model_activation_stats") == residual_stats
    assert settings == {
        "bits_activations": 8,
        "bits_parameters": 4,
        "bits_accum": 32,
        "overrides": {
            "fc": {"clip_acts": "NONE"},
            "left": {"bits_activations": None, "bits_weights": None},
        },
        "mode": {"activations": "ASYMMETRIC_SIGNED", "weights": "SYMMETRIC_RESTRICTED"},
        "clip_acts": "N_STD",
        "per_channel_wts": True,
        "clip_n_stds": 2.5,
        "clip_half_range": False,
        "scale_approx_mult_bits": 8,
        "inputs_quant_auto_fallback": True,
        "save_fp_weights": True,
        "also_clip_weights": False,
    }


def test_flags_for_dynamic_and_weights_only(residual) -> None:
    assert (
        PostTrainLinearQuantizer.from_args(residual, arguments(qe_dynamic=True)).model_activation_stats
        is None
    )
    assert PostTrainLinearQuantizer.from_args(residual, arguments(qe_bits_acts=0)).default_qbits.acts is None
    with pytest.raises(QuantizationError) as error:
        PostTrainLinearQuantizer.from_args(residual, arguments())
    assert str(error.value) == (
        "post-training quantization: activations need statistics; give --qe-stats-file, --qe-calibration "
        "or --qe-dynamic, or --qe-bits-acts 0 for weights only"
    )


def test_parameters_are_written_in_distillers_form(residual, residual_stats, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = quantized(residual, residual_stats, mode=ASYMMETRIC, overrides={"fc": {"per_channel_wts": True}})
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / "logs"
    folder.mkdir()
    files = model.quantizer.save_per_layer_parameters(folder)
    assert files == [folder / "layer_quant_params.yaml", folder / "quant_stats_after_prepare_model.yaml"]
    written = yaml.safe_load(files[0].read_text())
    assert list(written) == [
        "conv1",
        "conv2",
        "add",
        "left",
        "right",
        "concat",
        "tanh",
        "pool",
        "fc",
        "linear_quant_params",
    ]
    assert written["conv1"] == {
        "bits_activations": 8,
        "bits_weights": 8,
        "bits_bias": 32,
        "mode": ASYMMETRIC,
        "clip_acts": "NONE",
        "clip_n_stds": None,
        "clip_half_range": True,
        "per_channel_wts": False,
        "scale_approx_mult_bits": None,
        "model_activation_stats": model.quantizer.model_activation_stats["conv1"],
    }
    params = written["linear_quant_params"]
    assert params["conv1.output_scale"] == pytest.approx(255 / residual_stats["bn1"]["output"]["max"])
    assert params["conv1.output_zero_point"] == 0
    assert len(params["fc.w_scale"]) == 5
    stats_after = yaml.safe_load(files[1].read_text())
    assert stats_after == model.quantizer.model_activation_stats


def test_folder_that_cannot_be_written_is_named(residual, residual_stats, tmp_path) -> None:
    model = quantized(residual, residual_stats)
    with pytest.raises(QuantizationError) as error:
        model.quantizer.save_per_layer_parameters(tmp_path / "missing")
    assert str(error.value) == f"{tmp_path / 'missing'}: cannot be written, No such file or directory"


def test_parameters_of_an_unprepared_model_are_not_written(residual, tmp_path) -> None:
    with pytest.raises(QuantizationError, match="^save_per_layer_parameters: call prepare_model first$"):
        PostTrainLinearQuantizer(residual).save_per_layer_parameters(tmp_path)


def test_a_yaml_file_configures_it(residual, residual_stats, tmp_path) -> None:
    from distiller.config import config_component_from_file_by_class

    stats_file = tmp_path / "stats.yaml"
    stats_file.write_text(yaml.safe_dump(residual_stats))
    schedule = {
        "bits_activations": 6,
        "bits_parameters": 4,
        "mode": ASYMMETRIC,
        "clip_acts": "AVG",
        "per_channel_wts": True,
        "model_activation_stats": str(stats_file),
        "overrides": {"fc": {"clip_acts": "NONE", "bits_weights": 8}},
    }
    file = tmp_path / "ptq.yaml"
    component = {"post_train_quantizer": {"class": "PostTrainLinearQuantizer", **schedule}}
    file.write_text(yaml.safe_dump({"quantizers": component}))
    quantizer = config_component_from_file_by_class(residual, file, "PostTrainLinearQuantizer")
    quantizer.prepare_model(DUMMY)
    model: Any = residual
    assert model.conv1.output_quant_settings.clip_mode is ClipMode.AVG
    assert model.conv1.wts_quant_settings.num_bits == 4
    assert model.fc.output_quant_settings.clip_mode is ClipMode.NONE


def test_distillers_own_config_file_is_understood(compat, monkeypatch) -> None:
    from distiller.config import config_component_from_file_by_class

    folder = compat / "schedules" / "quantization" / "post_train_quant"
    quantizer = config_component_from_file_by_class(
        DistillersResNet18(),
        folder / "resnet18_imagenet_post_train.yaml",
        "PostTrainLinearQuantizer",
        model_activation_stats=str(compat / "stats" / "resnet18_quant_stats.yaml"),
    )
    quantizer.prepare_model(torch.randn(1, 3, 32, 32))
    assert quantizer.model.conv1.output_quant_settings.num_bits == 6
    assert Path(str(quantizer._stats_source)).name == "resnet18_quant_stats.yaml"
