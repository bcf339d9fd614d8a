"""What the README and its neighbours say of files, commands and figures is so."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compress_classifier
from distiller.apputils import classifier_jobs
from distiller.apputils.usage import check_usage
from distiller.config import file_config
from distiller.errors import ScheduleError
from distiller.models import create_model
from tests.test_architecture import LAYERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = "python compress_classifier.py "
LATEST = re.compile(r"(logs/demo/\w+)/latest_log_dir(?:/(.+))?")
"""A run of the demo, and a file of it."""
LEFT_BEHIND = {
    classifier_jobs.train: {"results.json", "checkpoint.pth.tar", "best.pth.tar", "epochs.csv"},
    classifier_jobs.sweep_sensitivity: {
        "sensitivity.csv", "sensitivity.png", "sensitivity.svg", "sensitivity.json",
    },
    classifier_jobs.recommend_schedule: {"schedule.yaml"},
    classifier_jobs.compress_layerwise: {"layerwise.csv"},
    classifier_jobs.pack_checkpoint: {"model.dsz"},
    classifier_jobs.prune_greedily: {"results.json", "greedy.csv"},
    classifier_jobs.thinnify: {"checkpoint_thinned_checkpoint.pth.tar"},
    classifier_jobs.export_to_onnx: {"model.onnx"},
    classifier_jobs.collect_statistics: {"acts_quantization_stats.yaml"},
    classifier_jobs.quantize_and_evaluate: {
        "results.json", "quantized_checkpoint.pth.tar", "layer_quant_params.yaml",
        "quant_stats_after_prepare_model.yaml",
    },
}  # fmt: skip
"""The files of each job that the README lists."""
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{f.name}" for f in ROOT.glob("docs/*.md")),
]


def blocks(text: str, language: str) -> list[str]:
    """The blocks of a document in a language."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for of_block, content in found if of_block == language]


def command_lines(text: str) -> list[str]:
    """The command lines of the program in a shell text, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if "compress_classifier.py" in line]


COMMANDS = [line for block in blocks(README, "sh") for line in command_lines(block)]
OF_DOCUMENTS = [
    pytest.param(line, id=f"{name}-{number}")
    for name in DOCUMENTS
    if name != "README.md"
    for number, line in enumerate(
        line
        for block in blocks((ROOT / name).read_text(encoding="utf-8"), "sh")
        for line in command_lines(block)
        if line.startswith(PROGRAM)
    )
]


def demo_command_lines() -> list[str]:
    """The command lines of `make demo`, with `python` for the environment's."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "VENV")}
    told = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line.replace(".venv/bin/python", "python") for line in command_lines(told.stdout)]


def parsed(line: str):
    """The flags of a command line, as the program takes them."""
    assert line.startswith(PROGRAM)
    parser = compress_classifier.make_parser()
    args = parser.parse_args(shlex.split(line.removeprefix(PROGRAM)))
    check_usage(args)
    return args


def files_of(args) -> list[str]:
    named = (args.compress, args.resumed_checkpoint_path, args.load_model_path, args.qe_stats_file,
             args.qe_config_file, args.sense_resume, args.recommend, args.kd_resume)  # fmt: skip
    return [file for file in named if file]


def test_the_map_has_every_file_of_the_library_as_it_describes_itself():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs/update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.updated(README) == README, "run `make readme`"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_target_of_make_is_one(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_the_layers_that_are_described_are_those_that_are_checked():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| layer \| files \|\n.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    described = [set(re.findall(r"`(\w+)/?`", row)) for row in table.splitlines()]
    assert described[:-1] == [*map(set, LAYERS)]
    assert described[-1] == {"command_line"}  # the program is in no layer of the library


def test_the_environment_is_entered_before_the_first_command():
    (block,) = blocks(README, "sh")
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert lines[0] == ". .venv/bin/activate"


@pytest.mark.parametrize("line", [*COMMANDS, *OF_DOCUMENTS])
def test_a_command_is_one_that_the_program_takes(line):
    parsed(line)


def test_a_recommendation_names_the_axis_where_the_sweep_that_is_shown_has_several():
    text = (ROOT / "docs/sensitivity.md").read_text(encoding="utf-8")
    sweep, recommendation = (parsed(line) for block in blocks(text, "sh") for line in command_lines(block))
    assert recommendation.recommend_axis in sweep.sensitivity
    assert sweep.sense_valid


@pytest.mark.parametrize("line", COMMANDS)
def test_the_files_that_a_command_names_are_there_or_left_by_the_demo(line):
    """Of the demo's checkpoints the network and the data set are those of the command."""
    demo = {args.output_dir: args for args in map(parsed, demo_command_lines())}
    args = parsed(line)
    for file in files_of(args):
        found = LATEST.fullmatch(file)
        if found is None:
            assert (ROOT / file).is_file(), file
            continue
        folder, name = found.groups()
        arch = args.kd_teacher if file == args.kd_resume else args.arch
        assert (demo[folder].arch, demo[folder].dataset) == (arch, args.dataset)
        left = LEFT_BEHIND[classifier_jobs.choose_job(demo[folder])]
        assert name in left if name else file in (args.sense_resume, args.recommend)
        if args.resumed_checkpoint_path and not args.reset_optimizer and not args.thinnify:
            assert args.epochs > demo[folder].epochs
            assert args.compress == demo[folder].compress


def test_every_job_has_an_example():
    jobs = {classifier_jobs.choose_job(args) for line in COMMANDS if not (args := parsed(line)).summary}
    assert jobs == {*LEFT_BEHIND, classifier_jobs.evaluate}


def test_the_files_of_a_run_are_listed():
    listed = README.replace(
        "`sensitivity.csv`, `.png`, `.svg`, `.json`",
        "sensitivity.csv sensitivity.png sensitivity.svg sensitivity.json",
    )
    assert [name for names in LEFT_BEHIND.values() for name in names if name not in listed] == []


def test_the_schedule_loads_and_its_faults_are_told_as_shown(tmp_path, monkeypatch):
    (schedule,) = blocks(README, "yaml")
    (message,) = blocks(README, "")
    model = create_model(False, "mnist", "lenet5", parallel=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.chdir(tmp_path)
    Path("schedule.yaml").write_text(schedule)
    assert len(file_config(model, optimizer, "schedule.yaml").policies) == 2
    wrong = schedule.replace("GradualPruner", "GradualPrunner").replace("starting_epoch", "starting_epch", 1)
    Path("schedule.yaml").write_text(wrong)
    with pytest.raises(ScheduleError) as caught:
        file_config(model, optimizer, "schedule.yaml")
    assert f"ScheduleError: {caught.value}\n" == message


def test_the_results_are_those_that_are_committed():
    folder = ROOT / "docs/results/lenet5_fashion_mnist"
    for name in ("dense", "agp", "int8"):
        measured = json.loads((folder / f"{name}.json").read_text())["measured"]
        (row,) = [
            line for line in README.splitlines() if f"{measured['top1_correct']:,}/{measured['n']:,}" in line
        ]
        low, high = measured["top1_interval_95_percent"]
        assert f"= {measured['top1_percent']:.2f} %, {low:.2f} to {high:.2f} %" in row
        if name == "dense":
            assert f"{measured['parameters']:,} parameters, {measured['bytes_dense']:,} bytes" in row
        if name == "agp":
            assert f"{100 * measured['weight_sparsity']:.2f} % of the weights zero" in row
            assert f"{measured['nonzeros']:,} non-zero" in row
            assert f"{measured['bytes_sparse']:,} bytes stored sparse" in row
        if name == "int8":
            assert f"{measured['bytes_quantized']:,} bytes at the quantized width" in row


def test_no_result_names_a_folder_of_the_machine_that_it_was_measured_on():
    files = list((ROOT / "docs/results").rglob("*.json"))
    assert files
    assert [file.name for file in files if re.search(r'"/\w', file.read_text(encoding="utf-8"))] == []


def test_the_figures_of_the_demo_are_those_in_the_header_of_its_schedule():
    header = (ROOT / "schedules/agp/lenet5_digits.yaml").read_text(encoding="utf-8").partition("version:")[0]
    (dense,) = re.findall(r"dense +(\S.*)", header)
    (pruned,) = re.findall(r"pruned +(\S.*)", header)
    (nonzeros, parameters) = re.findall(r"([\d,]+) non-zero parameters of ([\d,]+)", header)[0]
    (sparse, size) = re.findall(r"stored sparse ([\d,]+) bytes of ([\d,]+)", header)[0]
    first, second = (line for line in README.splitlines() if line.startswith(("| 1. ", "| 2. ")))
    assert f"| {dense} | {parameters} parameters, {size} bytes |" in first
    assert f"| {pruned} | {nonzeros} non-zero parameters " in second
    assert f"{sparse} bytes stored sparse" in second


@pytest.mark.slow
def test_every_command_runs_after_the_demo(tmp_path):
    """As a newcomer runs them: the demo, then each of the README's, in a folder with only program and schedules."""
    if shutil.which("dot") is None:
        pytest.skip("one of them draws with Graphviz's program 'dot', which is not installed")
    for name in ("compress_classifier.py", "distiller", "schedules"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in [*demo_command_lines(), *COMMANDS]:
        argv = [sys.executable, *shlex.split(line)[1:]]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr}"
    for line in demo_command_lines():
        args = parsed(line)
        left = {file.name for file in (tmp_path / args.output_dir / "latest_log_dir").iterdir()}
        assert LEFT_BEHIND[classifier_jobs.choose_job(args)] <= left
