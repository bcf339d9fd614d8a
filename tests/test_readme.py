"""What the README says of files is so."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import compress_classifier

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_has_every_file_of_the_library_as_it_describes_itself():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs/update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.updated(README) == README, "run `make readme`"


def test_every_link_leads_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/migrating.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)", text):
            if not target.startswith("http"):
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_every_flag_that_is_shown_is_known():
    known = set(compress_classifier.make_parser()._option_string_actions)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        flags = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", block))
        assert flags - known == set()


def test_the_results_are_those_that_are_committed():
    folder = ROOT / "docs/results/lenet5_fashion_mnist"
    for name in ("dense", "agp", "int8"):
        measured = json.loads((folder / f"{name}.json").read_text())["measured"]
        assert f"{measured['top1_correct']:,}/{measured['n']:,}" in README
