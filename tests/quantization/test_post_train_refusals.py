"""Models, settings and statistics that cannot be quantized: the exact messages."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from torch import nn

from distiller.errors import GraphTraceError, QuantizationError, StatsError, UnknownNameError, UsageError
from distiller.quantization.post_train import PostTrainLinearQuantizer
from tests.quantization.networks import quantized


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
        ({"bits_accum": 65}, QuantizationError, "bits_accum: must be 2 to 64 bits, got 65"),
        ({"per_channel_wts": "x"}, QuantizationError, "per_channel_wts: must be true or false, got 'x'"),
        (
            {"model_activation_stats": 5},
            UsageError,
            "activation statistics: must be a YAML file or its content, got int",
        ),
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
            "scale_approx_mult_bits: needs model_activation_stats, dynamic scales are not known beforehand",
        ),
        (
            {"overrides": {"fc": {"scale_approx_mult_bits": 8}}},
            QuantizationError,
            "fc: scale_approx_mult_bits: needs model_activation_stats, dynamic scales are not known beforehand",
        ),
        (
            {"scale_approx_mult_bits": 32},
            QuantizationError,
            "scale_approx_mult_bits: must be 1 to 31 bits, or null, got 32",
        ),
        (
            {"overrides": {7: {"bits_weights": 4}}},
            QuantizationError,
            "overrides[7]: must be text, a layer's name or a pattern; write '7' in quotes",
        ),
        (
            {"overrides": {"fc": {"input_overrides": {True: {"bits_activations": 4}}}}},
            QuantizationError,
            "fc: input_overrides: must map indices of inputs, from 0, to settings, got {True: {'bits_activations': 4}}",
        ),
        (
            {"overrides": {"conv3": {}}},
            UnknownNameError,
            "overrides: 'conv3' matches no layer of the model; did you mean 'conv2'?",
        ),
        (
            {"overrides": {"conv1": {"quantize_outputs": True}}},
            QuantizationError,
            "overrides['conv1']: unknown key 'quantize_outputs'; the layers it matches take bits_activations, "
            "bits_weights, bits_bias, mode, clip_acts, clip_n_stds, clip_half_range, fpq_module, fp16, fake, "
            "scale_approx_mult_bits, inputs_quant_auto_fallback, input_overrides, per_channel_wts",
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


@pytest.mark.parametrize(
    ("key", "index", "text"),
    [
        ("fc", 7, "overrides['fc']: input_overrides[7]: no such input, 'fc' has 0"),
        ("add", 2, "overrides['add']: input_overrides[2]: no such input, 'add' has 0, 1"),
        ("conv.*", 1, "overrides['conv.*']: input_overrides[1]: no such input, 'conv1' has 0"),
    ],
)
def test_inputs_that_no_layer_has_are_refused(residual, residual_stats, key, index, text) -> None:
    with pytest.raises(QuantizationError) as error:
        quantized(
            residual, residual_stats, overrides={key: {"input_overrides": {index: {"bits_activations": 4}}}}
        )
    assert str(error.value) == text


def test_an_input_that_one_of_the_layers_has_is_enough(residual) -> None:
    overrides = {
        "add|fc": {"input_overrides": {1: {"bits_activations": 4}}, "inputs_quant_auto_fallback": True}
    }
    with pytest.warns(UserWarning, match="not quantized"):
        quantized(residual, None, overrides=overrides)


def test_statistics_of_another_model_are_refused(residual, residual_stats) -> None:
    other = {f"other.{name}": entry for name, entry in residual_stats.items()}
    with pytest.raises(StatsError, match=r"^activation statistics: 14 of 14 layers are not in the model"):
        PostTrainLinearQuantizer(residual, model_activation_stats=other)
    mixed = {
        **residual_stats,
        "conv9": residual_stats["fc"],
    }  # may be a functional operation, as far as one knows
    with pytest.raises(
        StatsError, match=r"^activation statistics: 1 of 15 layers are not in the model \('conv9'\)"
    ):
        quantized(residual, mixed)


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


@pytest.mark.parametrize("model", [5, None])
def test_a_model_that_is_none_is_refused(model) -> None:
    with pytest.raises(UsageError) as caught:
        PostTrainLinearQuantizer(model)
    assert str(caught.value) == (
        f"PostTrainLinearQuantizer: model: must be a torch.nn.Module, got {type(model).__name__}"
    )
