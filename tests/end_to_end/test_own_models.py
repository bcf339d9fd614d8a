"""What docs/own_models.md shows, run as it stands."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import torch

TEXT = (Path(__file__).resolve().parents[2] / "docs/own_models.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_its_command_lines_run_on_its_model_and_data(program):
    program.write("mine.py", blocks("python")[0])
    (commands,) = blocks("sh")
    lines = commands.replace("\\\n", " ").splitlines()
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["python", "compress_classifier.py"]
        program.run(shlex.join(words[2:])).succeeded()


def test_its_loop_prunes_to_the_level_of_its_schedule(tmp_path, monkeypatch, capsys):
    module, loop = blocks("python")
    (tmp_path / "mine.py").write_text(module)
    (tmp_path / "loop.py").write_text(loop)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        left = runpy.run_path(str(tmp_path / "loop.py"))
    finally:
        sys.modules.pop("mine", None)
    assert "fc.weight" in capsys.readouterr().out
    with left["scheduler"].masked(), torch.no_grad():
        weights = [left["model"].conv.weight, left["model"].fc.weight]
        shares = [1 - int(weight.count_nonzero()) / weight.numel() for weight in weights]
    assert [round(share, 1) for share in shares] == [0.8, 0.8]
