"""What docs/schedules.md shows and lists is so: every example loads and runs, every table is that of the code."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import compress_classifier
from distiller.config import config_component_from_file_by_class, file_config
from distiller.errors import ScheduleError
from distiller.models import create_model
from distiller.policy import PruningArgs
from distiller.schedule_shape import SECTION_OF, WINDOW_KEYS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/schedules.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(.*?)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
EXAMPLES = [text for language, text in BLOCKS if language == "yaml"]
(WRONG,) = [text for language, text in BLOCKS if language == "yaml wrong"]
(MESSAGE,) = [text for language, text in BLOCKS if language == ""]
(DRY_RUN,) = [text for language, text in BLOCKS if language == "console"]
(PLUGIN,) = [text for language, text in BLOCKS if language == "python"]


def lenet() -> nn.Module:
    return create_model(False, "mnist", "lenet5", parallel=False)


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    (part,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PROSE, re.MULTILINE | re.DOTALL)
    (table, *_) = re.findall(r"(?:^\|[^\n]*\n)+", part, re.MULTILINE)
    lines = table.splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("text", [text for text in EXAMPLES if "policies:" in text])
def test_an_example_loads_and_runs(text, tmp_path, monkeypatch, caplog):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/pruners.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "s.yaml").write_text(text)
    model = lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugins = ["mine"] if text.startswith("# with --plugin mine\n") else []
    scheduler = file_config(model, optimizer, tmp_path / "s.yaml", plugins=plugins)
    images, labels = torch.randn(2, 1, 28, 28), torch.tensor([0, 1])
    for epoch in range(1 + max(entry.window.last for entry in scheduler.policies)):
        scheduler.on_epoch_begin(epoch, optimizer)
        scheduler.on_minibatch_begin(epoch, 0, 1, optimizer)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss = scheduler.before_backward_pass(epoch, 0, 1, loss, optimizer)
        optimizer.zero_grad()
        loss.backward()
        scheduler.before_parameter_optimization(epoch, 0, 1, optimizer)
        optimizer.step()
        scheduler.on_minibatch_end(epoch, 0, 1, optimizer)
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 10.0})
    zeros = {name: (param == 0).float().mean().item() for name, param in model.named_parameters()}
    promised = {
        name: sparsity
        for pruner in (yaml.safe_load(text).get("pruners") or {}).values()
        for name, sparsity in {
            **pruner.get("levels", {}),
            **({pruner["weights"][0]: pruner["final_sparsity"]} if isinstance(pruner.get("weights"), list)
               and "final_sparsity" in pruner else {}),
        }.items()
    }  # fmt: skip
    for name, sparsity in promised.items():
        assert zeros[name] == pytest.approx(sparsity, abs=1e-3)
    assert caplog.messages == []


def test_the_examples_show_every_kind_of_component():
    shown = {key for text in EXAMPLES for key in yaml.safe_load(text)}
    assert shown >= set(SECTION_OF.values())


def test_the_example_of_a_quantizer_is_a_config_file(tmp_path, monkeypatch):
    (text,) = [text for text in EXAMPLES if "policies:" not in text]
    (tmp_path / "q.yaml").write_text(text)
    monkeypatch.chdir(ROOT)
    quantizer = config_component_from_file_by_class(lenet(), tmp_path / "q.yaml", "PostTrainLinearQuantizer")
    assert quantizer.module_qbits_map["fc2"].wts == 4
    assert quantizer.module_qbits_map["fc1"].wts == 8


def test_levels_fall_again_and_masks_multiply(tmp_path):
    """The claims about the example with three components."""
    (text,) = [text for text in EXAMPLES if "regrow" in text]
    (tmp_path / "s.yaml").write_text(text)
    model = lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = file_config(model, optimizer, tmp_path / "s.yaml")
    sparsity = {}
    for epoch in range(10):
        scheduler.on_epoch_begin(epoch, optimizer)
        mask = scheduler.masks["fc1.weight"].mask
        assert mask is not None
        sparsity[epoch] = 1 - mask.mean().item()
        scheduler.on_epoch_end(epoch, optimizer)
    assert sparsity[0] == 0
    assert [sparsity[epoch] for epoch in (4, 8, 9)] == pytest.approx([0.9, 0.5, 0.5], abs=1e-3)


def test_the_dry_run_is_what_the_program_prints(tmp_path, monkeypatch, capsys):
    command, _, expected = DRY_RUN.partition("\n")
    prompt, argv = command.split(" compress_classifier.py ")
    assert prompt == "$ python"
    monkeypatch.chdir(tmp_path)
    Path("my_schedule.yaml").write_text(EXAMPLES[0])
    compress_classifier.run(compress_classifier.make_parser().parse_args(argv.split()))
    assert capsys.readouterr().out == expected


def test_the_faults_are_told_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_schedule.yaml").write_text(WRONG)
    model = lenet()
    with pytest.raises(ScheduleError) as caught:
        file_config(model, torch.optim.SGD(model.parameters(), lr=0.1), "my_schedule.yaml")
    assert f"ScheduleError: {caught.value}\n" == MESSAGE


def test_the_sections_and_the_keys_of_a_window_are_those_of_the_code():
    assert {names(section)[0]: names(word)[0] for section, word, _ in rows("The shape of a file")} == {
        section: word for word, section in SECTION_OF.items()
    }
    assert {names(key)[0] for key, _ in rows("Epochs")} == set(WINDOW_KEYS)


def test_the_arguments_of_a_policy_are_listed_with_their_defaults():
    listed = {names(argument)[0]: default for argument, default, _ in rows("Arguments of a policy")}
    assert listed == {
        field.name: "none" if field.default is None else f"`{json.dumps(field.default)}`"
        for field in dataclasses.fields(PruningArgs)
    }
