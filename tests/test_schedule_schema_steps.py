"""The schema says of the steps of quantization after training what the loader says."""

from __future__ import annotations

from typing import Any

from distiller.quantization.data_steps import DataSteps
from distiller.schedule_shape import STEPS, shape_faults
from distiller.schedule_yaml import Document
from tests.test_schedule_schema import SCHEMA, VALIDATOR, every_mutation, faults_of_shape


def every_step() -> dict[str, Any]:
    """Steps of quantization after training, with every setting that there is."""
    return {
        STEPS: {
            "cross_layer_equalization": {"replace_relu6": True, "absorb_bias": False},
            "mixed_precision": {
                "bit_operations": 1e9, "weight_widths": [2, 4], "activation_widths": [8], "metric": "kl",
            },
            "clip_search": {"clip_modes": ["NONE", "AVG"]},
            "mse_weight_scales": False,
            "lapq": {
                "method": "Powell", "maxiter": 3, "maxfev": None, "basinhopping": True, "basinhopping_niter": 2,
                "init_mode": "L2", "init_method": None, "search_clipping": False, "minimizer_kwargs": {"tol": 0.1},
            },
            "adaround": {
                "iterations": 5, "batch_size": 2, "learning_rate": 0.1, "regularization": 1.0, "warm_start": 0.5,
                "beta": [20, 2], "samples": 9, "scales": "kept", "seed": 3,
            },
            "bias_correction": True,
        }
    }  # fmt: skip


def test_the_schema_knows_every_setting_of_every_step():
    data = every_step()
    assert VALIDATOR.is_valid(data)
    assert faults_of_shape(data) == []
    offered = SCHEMA["properties"][STEPS]["properties"]
    assert list(offered) == list(DataSteps.__dataclass_fields__)
    assert all("description" in step for step in offered.values())
    for name, settings in data[STEPS].items():
        if isinstance(settings, dict) and name != "mixed_precision":
            assert set(offered[name]["properties"]) == set(settings)


def test_steps_that_the_schema_refuses_the_loader_refuses():
    refused = 0
    for label, mutant in every_mutation({"steps": every_step()}):
        if isinstance(mutant, dict) and not VALIDATOR.is_valid(mutant):
            refused += 1
            assert faults_of_shape(mutant), label
    assert refused > 100


def test_a_file_is_a_schedule_or_has_steps_after_training_and_not_both():
    both = {**every_step(), "policies": []}
    for needs_policies in (True, False):
        (fault,) = shape_faults(Document("<data>", both, {}), needs_policies)
        assert fault.text == (
            "is of quantization after training, which has no policies; give such a file with "
            "--evaluate --quantize-eval --qe-config-file"
        )
    assert not VALIDATOR.is_valid(both)
