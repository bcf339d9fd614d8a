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


def faults_of(tmp_path, text):
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(ScheduleError) as error:
        post_training_steps(path)
    return [(fault.line, fault.path, fault.text) for fault in error.value.faults]


def test_all_wrong_settings_of_a_step_are_told_at_once(tmp_path):
    text = (
        "post_training_steps:\n"
        "  adaround:\n"
        "    iterations: 0\n"
        "    beta: [2, 20]\n"
        "    seeds: 1\n"
        "  mixed_precision:\n"
        "    bit_operations: -1\n"
        "    metric: los\n"
        "    activation_widths: [1]\n"
    )
    found = faults_of(tmp_path, text)
    assert [line for line, _, _ in found] == [3, 4, 5, 7, 8, 9]
    assert found[2][2].startswith("no setting 'seeds'")


def test_steps_that_do_not_go_together_are_a_fault_of_the_file(tmp_path):
    [(line, path, text)] = faults_of(
        tmp_path, "post_training_steps:\n  lapq: true\n  mse_weight_scales: true\n"
    )
    assert text.startswith("mse_weight_scales: not with lapq, whose scales of weights it would replace")
    assert line in (2, 3)
    assert path.startswith("post_training_steps")


@pytest.mark.parametrize("nothing", ["", " {}"])
def test_a_section_without_steps_is_told_of(tmp_path, caplog, nothing):
    path = tmp_path / "q.yaml"
    path.write_text(f"quantizers:\n  q: {{class: PostTrainLinearQuantizer}}\npost_training_steps:{nothing}\n")
    assert post_training_steps(path).names == ()
    assert caplog.messages == [f"{path}:3  'post_training_steps' is empty: no step is done"]
