"""The section `post_training_steps` of a file that is given with --qe-config-file."""

from __future__ import annotations

import pytest

from distiller.config import post_training_steps
from distiller.errors import ScheduleError


def test_steps_after_training_are_read_beside_a_quantizer(tmp_path):
    path = tmp_path / "q.yaml"
    path.write_text("quantizers:\n  q: {class: PostTrainLinearQuantizer}\n")
    assert post_training_steps(path).names == ()
    path.write_text(
        path.read_text() + "post_training_steps:\n  lapq: {maxfev: 9}\n  bias_correction: false\n"
    )
    steps = post_training_steps(path)
    assert steps.names == ("lapq",)
    assert steps.lapq == {"maxfev": 9}


def test_every_fault_of_the_steps_is_told_with_its_line(tmp_path):
    path = tmp_path / "q.yaml"
    path.write_text(
        "post_training_steps:\n"
        "  mixed_precision: true\n"
        "  adaround:\n"
        "    iterations: 9\n"
        "    beta: [2, 20]\n"
        "  lapq: {init_mode: L2, init_method: quadratic}\n"
        "  cross_layer_equalization: {absorb_bias: 1}\n"
        "  clip_search: {clip_modes: [AVG, SOME]}\n"
        "  mse_weight_scales: {x: 1}\n"
    )
    with pytest.raises(ScheduleError) as error:
        post_training_steps(path)
    assert [(fault.line, fault.path.removeprefix("post_training_steps."), fault.text) for fault in error.value.faults] == [
        (2, "mixed_precision", "needs one budget of average_bits, weight_bytes, bit_operations, got none"),
        (5, "adaround.beta", "beta must be two numbers, start >= end >= 2, got [2, 20]"),
        (6, "lapq.init_method", "init_method 'quadratic' chooses the norm, init_mode 'L2' gives it; leave one of them out"),
        (7, "cross_layer_equalization.absorb_bias", "absorb_bias: must be true or false, got 1"),
        (8, "clip_search.clip_modes[1]", "clip_modes: must be one of NONE, AVG, N_STD, GAUSS, LAPLACE, got 'SOME'"),
        (9, "mse_weight_scales.x", "no setting 'x'; it has none"),
    ]  # fmt: skip
