"""What is written into the headers of schedules is what was measured; what was measured is not run again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from docs import measure_schedules, schedule_headers
from docs.measure_schedules import keep, logs_of, measure, structures
from docs.schedule_headers import Shipped, classes_of, measured_block, shipped, with_block

BASELINE = """\
# Dense.
#
#   python compress_classifier.py --arch tiny --dataset fashion-mnist -n dense \\
#       --compress schedules/baseline_networks/tiny.yaml --epochs 2
#
# Measured (`make results-schedules`; docs/results/tiny_fashion_mnist/dense.json), pending

policies: []
"""
PRUNED = """\
# Half of the filters.
#
#   python compress_classifier.py --arch tiny --dataset fashion-mnist -n half \\
#       --compress schedules/half/tiny.yaml --resume-from CHECKPOINT --reset-optimizer --epochs 2
#
# Measured (`make results-schedules`; docs/results/tiny_fashion_mnist/half.json), pending
#
# A word more.

pruners:
  half:
    class: L1RankedStructureParameterPruner
    desired_sparsity: 0.5
    group_type: Filters
    weights: [conv.weight]
  idle:
    class: SensitivityPruner
    sensitivities: {conv.weight: 0.5}
policies:
  - pruner: {instance_name: half}
    epochs: [0]
"""


def card(correct: int, sparsity: float, reference: dict | None = None) -> dict:
    measured = {
        "top1_correct": correct,
        "n": 10000,
        "top1_percent": correct / 100,
        "top1_interval_95_percent": [correct / 100 - 0.5, correct / 100 + 0.5],
        "parameters": 1000,
        "nonzeros": round(1000 * (1 - sparsity)),
        "weight_sparsity": sparsity,
        "bytes_sparse": round(4000 * (1 - sparsity)),
        "bytes_dense": 4000,
    }
    return {"measured": measured, "reference": reference}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two schedules, in which a run leaves a results card and a checkpoint at once."""
    for name, text in (("baseline_networks", BASELINE), ("half", PRUNED)):
        path = tmp_path / "schedules" / name / "tiny.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.setattr(schedule_headers, "ROOT", tmp_path)
    monkeypatch.setattr(measure_schedules, "ROOT", tmp_path)
    commands: list[list[str]] = []

    def run(command, cwd, check):
        commands.append(command)
        folder = Path(command[command.index("-o") + 1]) / "latest_log_dir"
        folder.mkdir(parents=True, exist_ok=True)
        weight = torch.ones(4, 2, 3, 3)
        is_pruned = "half" in command
        weight[:2] = 0 if is_pruned else 1
        (folder / "results.json").write_text(json.dumps(card(8900 if is_pruned else 9000, 0.5 * is_pruned)))
        torch.save({"conv.weight": weight}, folder / "checkpoint.pth.tar")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def both() -> tuple[Shipped, Shipped]:
    dense, half = shipped()
    return dense, half


def results_of(schedule: Shipped) -> Path:
    assert schedule.results is not None
    return schedule.results


def test_baselines_come_first(project):
    assert [schedule.path.parent.name for schedule in shipped()] == ["baseline_networks", "half"]


def test_the_baseline_is_run_before_what_resumes_from_it(project):
    _, half = both()
    assert measure([half], shipped(), again=False) == []
    first, second = project
    assert first[first.index("-n") + 1] == "dense"
    assert second[second.index("--resume-from") + 1] == str(
        logs_of(results_of(both()[0])) / "latest_log_dir/checkpoint.pth.tar"
    )


def test_the_teachers_baseline_is_run_before_what_learns_from_it(project, tmp_path):
    distilled = tmp_path / "schedules" / "distilled" / "tiny.yaml"
    distilled.parent.mkdir()
    text = PRUNED.replace(
        "--resume-from CHECKPOINT --reset-optimizer", "--kd-teacher tiny --kd-resume TEACHER"
    )
    distilled.write_text(
        text.replace("half/tiny.yaml", "distilled/tiny.yaml").replace("half.json", "distilled.json")
    )
    assert measure([Shipped(distilled, distilled.read_text())], shipped(), again=False) == []
    first, second = project
    assert first[first.index("-n") + 1] == "dense"
    assert second[second.index("--kd-resume") + 1] == str(
        logs_of(results_of(shipped()[0])) / "latest_log_dir/checkpoint.pth.tar"
    )


def test_what_is_measured_is_not_run_again(project):
    measure(both(), shipped(), again=False)
    project.clear()
    measure(both(), shipped(), again=False)
    assert project == []
    measure(both(), shipped(), again=True)
    assert [command[command.index("-n") + 1] for command in project] == ["dense", "half"]


def test_a_run_that_fails_is_told_and_the_next_one_is_done(project, monkeypatch):
    run = subprocess.run

    def fails_on_dense(command, **kwargs):
        if "dense" in command:
            raise subprocess.CalledProcessError(2, command)
        return run(command, **kwargs)

    measure([both()[0]], shipped(), again=False)  # so that there is a checkpoint
    monkeypatch.setattr(subprocess, "run", fails_on_dense)
    (failure,) = measure(both(), shipped(), again=True)
    assert failure.startswith("schedules/baseline_networks/tiny.yaml: ")
    assert results_of(both()[1]).exists()


def test_a_baseline_that_fails_is_tried_once(project, monkeypatch):
    def fails(command, **kwargs):
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(subprocess, "run", fails)
    assert len(measure([both()[1]], shipped(), again=False)) == 1


def test_a_header_is_written_from_the_results_and_nothing_else_of_the_file_changes(project):
    measure(both(), shipped(), again=False)
    dense, half = both()
    assert measured_block(dense) == (
        "# Measured (`make results-schedules`; docs/results/tiny_fashion_mnist/dense.json), "
        "on the 10,000 test images:\n"
        "#   9,000/10,000 = 90.00 %, 89.50 to 90.50 %\n"
    )
    written = """\
# Measured (`make results-schedules`; docs/results/tiny_fashion_mnist/half.json), on the 10,000 test images:
#   dense     9,000/10,000 = 90.00 %, 89.50 to 90.50 %
#   pruned    8,900/10,000 = 89.00 %, 88.50 to 89.50 %
#   sparsity of the weights 50.00 %, 500 non-zero parameters of 1,000;
#   stored sparse 2,000 bytes of 4,000; latency unchanged (zeros are multiplied)
#   zero filters: 2 of 4 = 50.00 % in conv.weight
"""
    pending = "# Measured (`make results-schedules`; docs/results/tiny_fashion_mnist/half.json), pending\n"
    assert half.text == PRUNED.replace(pending, written)
    assert with_block(half) == half.text


def test_a_network_that_is_dense_at_the_end_is_not_called_pruned(project):
    measure(both(), shipped(), again=False)
    half = both()[1]
    results_of(half).write_text(json.dumps(card(8950, 0.0, card(9010, 0.0)["measured"])))
    assert measured_block(half).splitlines()[1:] == [
        "#   dense     9,010/10,000 = 90.10 %, 89.60 to 90.60 %",
        "#   trained   8,950/10,000 = 89.50 %, 89.00 to 90.00 %",
    ]


def test_a_header_that_says_not_measured_yet_is_measured_and_says_so(project):
    half = both()[1]
    half.path.write_text(PRUNED.replace("# Measured (", "# Not measured yet (").replace("), pending", ")."))
    half = both()[1]
    assert half.is_ours_to_run
    assert half.results == results_of(both()[0]).with_stem("half")
    measure(both(), shipped(), again=False)
    opening = "# Measured (`make results-schedules`; docs/results/tiny_fashion_mnist/half.json), on"
    text = both()[1].text
    assert opening in text
    assert "Not measured yet" not in text


def test_a_network_that_a_quantizer_trained_is_called_quantized_in_its_header_and_has_its_class(project):
    pruned = both()[1]
    quantizer = (
        "quantizers: {q: {class: LSQQuantizer}}\npolicies: [{quantizer: {instance_name: q}, epochs: [0]}]\n"
    )
    pruned.path.write_text(PRUNED.partition("pruners:")[0] + quantizer)
    quantized = both()[1]
    results_of(quantized).parent.mkdir(parents=True)
    results = card(8950, 0.3, card(9010, 0.0)["measured"])  # small weights are rounded to zero
    results["reference"]["bytes_dense"], results["measured"]["bytes_quantized"] = 4000, 600
    results_of(quantized).write_text(json.dumps(results))
    assert measured_block(quantized).splitlines()[2:] == [
        "#   quantized 8,950/10,000 = 89.50 %, 89.00 to 90.00 %",
        "#   weights packed at their bits 600 bytes of 4,000 (6.67x fewer);",
        "#   simulated in floating point, so that nothing is faster",
    ]
    assert classes_of(quantized.data) == ["LSQQuantizer"]


def test_of_a_thinned_network_the_header_and_the_index_say_what_is_gone_and_how_much_faster_it_is(project):
    measure(both(), shipped(), again=False)
    half = both()[1]
    of_thinned, of_dense = card(8950, 0.0)["measured"], card(9010, 0.0)["measured"]
    for figures, share in ((of_dense, 1), (of_thinned, 2)):
        figures.update(macs=6000 // share, parameters=1000 // share, bytes_checkpoint=8000 // share)
        figures["latency_single"] = {"batch_size": 1, "threads": 1, "device": "cpu"}
        figures["latency_batch"] = {"batch_size": 64, "threads": 1, "device": "cpu"}
    thinned = {
        "measured": of_thinned,
        "reference": of_dense,
        "is_thinned": True,
        "ratios": {"macs": 2.0, "latency_single": 1.25, "latency_batch": 1.5},
    }
    results_of(half).write_text(json.dumps(thinned))
    assert measured_block(half).splitlines()[2:] == [
        "#   thinned   8,950/10,000 = 89.50 %, 89.00 to 90.00 %",
        "#   removed: 3,000 of 6,000 MACs left (2.00x fewer), 500 of",
        "#   1,000 parameters, 4,000 of 8,000 bytes; measured in turns with the dense one",
        "#   (cpu, threads: 1): 1.25x as fast at batch 1, 1.50x at batch 64",
    ]
    row = schedule_headers.index().splitlines()[-1]
    assert row.endswith("| 90.10 % | 89.50 % | 0.00 % | 2.00x fewer MACs, 1.50x as fast |")


def test_of_early_exits_the_header_and_the_index_say_who_leaves_and_what_that_saves(project):
    measure(both(), shipped(), again=False)
    half = both()[1]
    whole, leaving = card(8950, 0.0)["measured"], card(8920, 0.0)["measured"]
    latencies = [
        {
            "whole": {"batch_size": size, "threads": 1, "device": "cpu", "median_s": 3.0},
            "early_exit": {"batch_size": size, "threads": 1, "device": "cpu", "median_s": seconds},
        }
        for size, seconds in ((1, 1.5), (64, 2.0))
    ]
    exits = {
        **{key: leaving[key] for key in ("n", "top1_correct", "top1_percent", "top1_interval_95_percent")},
        "layers": ["a.relu", "b.relu"],
        "shares": [0.5, 0.25, 0.25],
        "mean_macs": 3000.0,
        "whole_macs": 6000.0,
        "latencies": latencies,
    }
    resumed_from = card(9010, 0.0)["measured"]  # which is not what the exits are compared with
    results_of(half).write_text(
        json.dumps({"measured": whole, "reference": resumed_from, "ratios": {}, "early_exit": exits})
    )
    assert measured_block(half).splitlines()[1:] == [
        "#   all of it  8,950/10,000 = 89.50 %, 89.00 to 90.00 %",
        "#   with exits 8,920/10,000 = 89.20 %, 88.70 to 89.70 %",
        "#   50.00 % leave at a.relu, 25.00 % at b.relu: 50.0 % of the MACs; measured in turns with all of it",
        "#   (cpu, threads: 1): 2.00x as fast at batch 1, 1.50x at batch 64",
    ]
    row = schedule_headers.index().splitlines()[-1]
    assert row.endswith("| 89.50 % | 89.20 % | 0.00 % | early exits: 50.0 % of the MACs, 1.50x as fast |")


def test_the_index_has_what_was_measured(project):
    assert "| not measured here |" in schedule_headers.index()
    measure(both(), shipped(), again=False)
    row = schedule_headers.index().splitlines()[-1]
    assert row == (
        "| [half/tiny.yaml](half/tiny.yaml) | Half of the filters | `L1RankedStructureParameterPruner` | "
        "90.00 % | 89.00 % | 50.00 % | zero filters: 2 of 4 = 50.00 % |"
    )


def test_a_class_without_a_policy_is_not_one_that_is_used(project):
    assert classes_of(both()[1].data) == ["L1RankedStructureParameterPruner"]


def test_results_hold_the_structures_of_the_checkpoint(project):
    measure(both(), shipped(), again=False)
    keep(both()[1])
    kept = json.loads(results_of(both()[1]).read_text())
    assert kept["structures"] == [{"weight": "conv.weight", "kind": "zero filters", "count": 2, "of": 4}]


WEIGHTS = {
    "conv.weight": torch.ones(4, 8, 3, 3),
    "fc.weight": torch.ones(6, 8),
    "bn.weight": torch.tensor([0.0, 1.0, 0.0]),
}
WEIGHTS["conv.weight"][1] = 0  # a filter
WEIGHTS["conv.weight"][:, 2:5] = 0  # three channels
WEIGHTS["fc.weight"][:, :5] = 0  # five inputs
WEIGHTS["fc.weight"][3] = 0  # an output


@pytest.mark.parametrize(
    "section, component, expected",
    [
        ("pruners", {"weights": ["conv.*"], "group_type": "Filters"}, ("conv.weight", "zero filters", 1, 4)),
        ("pruners", {"weights": "conv.*", "group_type": "Channels"}, ("conv.weight", "zero channels", 3, 8)),
        ("pruners", {"weights": ["fc.weight"], "group_type": "Rows"}, ("fc.weight", "zero inputs", 5, 8)),
        ("regularizers", {"reg_regims": {"fc.*": [0.1, "Cols"]}}, ("fc.weight", "zero inputs", 5, 8)),
        ("regularizers", {"reg_regims": {"fc.*": [0.1, "Rows"]}}, ("fc.weight", "zero outputs", 1, 6)),
        ("extensions", {"reg_regims": {"fc.*": [0.1, "Cols"]}}, ("fc.weight", "zero inputs", 5, 8)),
        ("regularizers", {"reg_regims": {"bn.weight": 0.1}}, ("bn.weight", "zero scales", 2, 3)),
        (
            "pruners",
            {"weights": ["fc.weight"], "group_type": "Blocks", "kwargs": {"block_shape": [1, 4, 1, 1]}},
            ("fc.weight", "zero blocks", 7, 12),
        ),
    ],
)
def test_structures_are_counted(section, component, expected):
    (entry,) = structures({section: {"it": {"class": "Any", **component}}}, WEIGHTS)
    assert tuple(entry.values()) == expected


def test_groups_that_conform_are_counted():
    pruner = {"class": "NMPruner", "weights": ["fc.weight"]}
    (entry,) = structures({"pruners": {"it": pruner}}, WEIGHTS)
    # Row 3 is zero; in each other one the first group is, and the second has three of four.
    assert tuple(entry.values()) == ("fc.weight", "groups with at most 2 of 4", 7, 12)


def test_single_elements_are_no_structures():
    pruner = {"class": "AutomatedGradualPruner", "weights": ["fc.weight", "conv.weight"]}
    assert structures({"pruners": {"it": pruner}}, WEIGHTS) == []
