"""Quantizing by flags and by YAML file, and the files that are written."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distiller.errors import QuantizationError
from distiller.quantization.clipping import ClipMode
from distiller.quantization.post_train import PostTrainLinearQuantizer
from tests.quantization.networks import ASYMMETRIC, DUMMY, DistillersResNet18, quantized


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
        "fpq_module": None,
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


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"qe_scale_approx_bits": 32}, "--qe-scale-approx-bits: must be 1 to 31 bits, or null, got 32"),
        (
            {"qe_scale_approx_bits": 8, "qe_dynamic": True},
            "--qe-scale-approx-bits: with --qe-dynamic there is no change of scale that is known beforehand; "
            "leave one of them out",
        ),
        (
            {"qe_scale_approx_bits": 8, "qe_bits_acts": 0},
            "--qe-scale-approx-bits: with --qe-bits-acts 0 there is no change of scale that is known beforehand; "
            "leave one of them out",
        ),
    ],
)
def test_an_approximation_of_no_change_of_scale_is_refused(residual, flags, text) -> None:
    with pytest.raises(QuantizationError) as error:
        PostTrainLinearQuantizer.from_args(residual, arguments(**flags))
    assert str(error.value) == text


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
