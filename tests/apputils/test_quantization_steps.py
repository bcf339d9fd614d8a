"""From flags to steps, and the record that an interrupted run leaves."""

from __future__ import annotations

import pytest

from compress_classifier import make_parser
from distiller.apputils.quantization_steps import (
    FLAGS,
    RECORD,
    begin_record,
    check_resumable,
    steps_identity,
    steps_of_flags,
    told_of_flags,
)
from distiller.errors import QuantizationError, UsageError
from distiller.quantization.data_steps import DataSteps
from distiller.quantization.search.lapq_settings import LapqSettings
from distiller.quantization.with_data import STATE_FILES, check_steps

LAPQ = {
    "method": "Powell",
    "maxiter": None,
    "maxfev": None,
    "basinhopping": False,
    "basinhopping_niter": 100,
    "init_mode": "NONE",
    "init_method": None,
    "search_clipping": False,
}


def steps(command: str) -> DataSteps:
    return steps_of_flags(make_parser().parse_args(command.split()))


@pytest.mark.parametrize(
    "command, plain",
    [
        ("", {}),
        ("--qe-equalize", {"cross_layer_equalization": {"replace_relu6": False, "absorb_bias": False}}),
        (
            "--qe-cle --qe-equalize-relu6 --qe-absorb-bias",
            {"cross_layer_equalization": {"replace_relu6": True, "absorb_bias": True}},
        ),
        ("--qe-mixed-precision 4.5", {"mixed_precision": {"average_bits": 4.5}}),
        ("--qe-mixed-precision-bytes 999", {"mixed_precision": {"weight_bytes": 999}}),
        ("--qe-mixed-precision-bitops 1e6", {"mixed_precision": {"bit_operations": 1e6}}),
        ("--qe-clip-search", {"clip_search": {}}),
        ("--qe-mse-scales", {"mse_weight_scales": {}}),
        ("--qe-adaround", {"adaround": {"iterations": 2000}}),
        ("--qe-adaround --qe-adaround-iterations 7", {"adaround": {"iterations": 7}}),
        ("--qe-bias-correction", {"bias_correction": {}}),
        ("--qe-lapq", {"lapq": LAPQ}),
        (
            "--qe-coordinate-search --lapq-maxiter 2 --lapq-maxfev 9 --lapq-method cobyla --lapq-bh "
            "--lapq-bh-niter 3 --lapq-init-mode l2 --lapq-init-method Powell --lapq-search-clipping",
            {
                "lapq": {
                    "method": "cobyla",
                    "maxiter": 2,
                    "maxfev": 9,
                    "basinhopping": True,
                    "basinhopping_niter": 3,
                    "init_mode": "L2",
                    "init_method": "Powell",
                    "search_clipping": True,
                }
            },
        ),
    ],
)
def test_each_flag_is_a_step_with_its_settings(command, plain):
    found = steps(command)
    assert {name: getattr(found, name) for name in found.names} == plain
    check_steps(found)


def test_every_step_has_a_flag():
    assert set(FLAGS) == set(DataSteps.__dataclass_fields__)
    assert steps("--qe-cle --qe-mixed-precision 5 --qe-clip-search --qe-mse-scales --qe-lapq --qe-adaround "
                 "--qe-bias-correction").names == tuple(FLAGS)  # fmt: skip


def test_the_number_of_hops_reaches_the_search_as_a_number():
    """A defect of Distiller: without a type it stayed text."""
    found = LapqSettings(**(steps("--qe-lapq --lapq-bh --lapq-bh-niter 12").lapq or {}))
    assert found.basinhopping_niter == 12


@pytest.mark.parametrize(
    "command, told",
    [
        (
            "--lapq-method Powel",
            "--lapq-method: must be one of Powell, Nelder-Mead, COBYLA, COBYQA, CG, BFGS, L-BFGS-B, TNC, SLSQP, "
            "trust-constr, got 'Powel'; did you mean 'Powell'?",
        ),
        (
            "--lapq-init-mode L2 --lapq-init-method quadratic",
            "--qe-lapq: init_method 'quadratic' chooses the norm, init_mode 'L2' gives it; leave one of them out",
        ),
    ],
)
def test_what_is_wrong_with_a_setting_is_told_of_its_flag(command, told):
    with pytest.raises(QuantizationError) as error:
        steps(f"--qe-lapq {command}")
    assert str(error.value) == told


def test_a_folder_without_a_record_is_nothing_to_go_on_with(tmp_path):
    with pytest.raises(UsageError) as error:
        check_resumable(tmp_path, {})
    assert str(error.value) == (
        f"--qe-resume {tmp_path}: nothing to go on with, there is no quantization_steps.jsonl; give the run folder of "
        "an interrupted quantization with a search or AdaRound, or leave the flag out"
    )


def test_states_of_other_settings_are_refused_and_other_limits_are_none(tmp_path):
    begin_record(tmp_path, steps_identity(steps("--qe-lapq --lapq-maxfev 5"), model="a"), None)
    check_resumable(tmp_path, steps_identity(steps("--qe-lapq --lapq-maxfev 9"), model="a"))
    for others in ({"model": "b"}, {"model": "a"}):
        command = "--qe-lapq" if others["model"] == "b" else "--qe-lapq --lapq-method COBYLA"
        with pytest.raises(
            QuantizationError, match=f"{RECORD}: is of another search, '(model|steps.lapq.method)' is "
        ):
            check_resumable(tmp_path, steps_identity(steps(command), **others))


def test_the_states_of_an_interrupted_run_are_copied_and_stay_where_they_were(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    for name in STATE_FILES[:2]:
        (old / name).write_bytes(b"state")
    (old / "results.json").write_text("{}")
    begin_record(new, {"steps": {}}, old)
    assert {path.name for path in new.iterdir()} == {*STATE_FILES[:2], RECORD}
    assert (old / STATE_FILES[0]).read_bytes() == b"state"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("lapq.jsonl", b'{"search": "scales", "settings": {}}\n{"poi\n', ":2: is damaged; "),
        ("lapq.jsonl", b'{"search": "scales", "settings": {}}\n[1]\n', ":2: is neither a point nor a note of a search; "),
        ("clip_search.jsonl", b"what\n", ":1: is no record of a search; "),
        ("adaround.pt", b"what", ": is damaged, or no state of AdaRound; "),
    ],
)  # fmt: skip
def test_a_damaged_state_is_told_of_in_the_folder_that_was_given(tmp_path, name, content, told):
    begin_record(tmp_path, {"steps": {}}, None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuantizationError) as error:
        check_resumable(tmp_path, {"steps": {}})
    assert str(error.value).startswith(f"{tmp_path / name}{told}give another f")


def test_what_a_kill_left_of_a_state_is_no_damage(tmp_path):
    begin_record(tmp_path, {"steps": {}}, None)
    (tmp_path / "lapq.jsonl").write_bytes(b'{"search": "scales", "settings": {}}\n{"poi')
    (tmp_path / "clip_search.jsonl").write_bytes(b"")
    check_resumable(tmp_path, {"steps": {}})
    assert (tmp_path / "lapq.jsonl").read_bytes().endswith(b'{"poi')


def test_a_budget_is_told_of_by_its_flag():
    unit = "mixed_precision: weight_bytes: 9 cannot be reached, the smallest widths cost 356 bytes; give at least that"
    widths = ", or smaller widths to choose from (weight_widths, activation_widths)"
    assert str(told_of_flags(QuantizationError(unit + widths))) == (
        "--qe-mixed-precision-bytes: 9 cannot be reached, the smallest widths cost 356 bytes; give at least that"
    )
    other = QuantizationError("adaround: wrong")
    assert told_of_flags(other) is other
