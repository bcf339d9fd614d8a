"""The files that a quantization leaves beside its checkpoint."""

from __future__ import annotations

import pytest

from distiller.quantization import PostTrainLinearQuantizer
from tests.golden.conftest import FOLDER


@pytest.fixture(scope="module")
def stats() -> str:
    """Of the same network, on the same images."""
    return str(FOLDER / "acts_quantization_stats.yaml")


def test_layers_settings_scales_and_the_statistics_they_are_from(
    golden, fixed_net, fixed_images, stats, tmp_path
):
    quantizer = PostTrainLinearQuantizer(
        fixed_net,
        bits_activations=8,
        bits_parameters=6,
        overrides={"fc": {"bits_weights": 8, "clip_acts": "NONE"}},
        mode={"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"},
        clip_acts="AVG",
        model_activation_stats=stats,
    )
    quantizer.prepare_model(fixed_images[:1])
    for path in quantizer.save_per_layer_parameters(tmp_path):
        golden(path.name, path.read_text())
