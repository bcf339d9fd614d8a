"""docs/reference/ has every class that a schedule may name; its examples load, and it is current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from distiller.component_kinds import KINDS
from distiller.config import config_component_from_file_by_class, file_config
from distiller.models import RNNModel, create_model
from docs.update_reference import END, HEADINGS, REFERENCE, index, is_pytorchs, pages, updated

ROOT = Path(__file__).resolve().parents[1]
PAGES = pages()
TEXTS = {
    path.stem: path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md") if path.stem != "README"
}
EXAMPLES = [
    pytest.param(page, text, id=page if number == 0 else f"{page}, {number}")
    for page in PAGES
    for number, text in enumerate(
        re.findall(r"^```yaml\n(.*?)^```", TEXTS.get(page, ""), re.MULTILINE | re.DOTALL)
    )
]


def model_of(example: str) -> nn.Module:
    """The model that the first line of an example names."""
    first, _, _ = example.partition("\n")
    if "RNNModel" in first:
        return RNNModel(20, 8, 8)
    (arch,) = re.findall(r"^# For --arch (\w+)", first)
    return create_model(False, None, arch, parallel=False)


def part(page: str, heading: str) -> str:
    """What stands below a heading of the part that is written by hand."""
    by_hand = TEXTS[page].partition(END)[2]
    return re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", by_hand, re.MULTILINE | re.DOTALL)[
        0
    ].strip()


def test_every_class_that_is_not_pytorchs_is_on_a_page():
    classes = {name for kind in KINDS for name, factory in kind.registry.items() if not is_pytorchs(factory)}
    assert {name for page in PAGES.values() for _, name, _ in page} == classes


def test_every_page_is_there_and_none_besides():
    assert set(TEXTS) == set(PAGES), "run `make reference`"


@pytest.mark.parametrize("page", PAGES)
def test_the_generated_part_is_current(page):
    assert updated(page, TEXTS[page]) == TEXTS[page], "run `make reference`"


def test_the_index_is_current():
    assert (REFERENCE / "README.md").read_text(encoding="utf-8") == index(), "run `make reference`"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_is_promised(page):
    for heading in HEADINGS:
        assert len(part(page, heading)) > 60, heading
    assert re.search(r"arXiv \d{4}\.\d{4,5}|Distiller's own", TEXTS[page]), "where does it come from?"


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_show_each_of_its_classes(page):
    shown = set()
    for text in re.findall(r"^```yaml\n(.*?)^```", part(page, "Example"), re.MULTILINE | re.DOTALL):
        schedule = yaml.safe_load(text)
        shown |= {entry["class"] for kind in KINDS for entry in schedule.get(kind.section, {}).values()}
    assert shown >= {name for _, name, _ in PAGES[page]}


@pytest.mark.parametrize(("page", "text"), EXAMPLES)
def test_an_example_loads(page, text, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "example.yaml"
    file.write_text(text)
    model = model_of(text)
    if "policies" in yaml.safe_load(text):
        file_config(model, torch.optim.SGD(model.parameters(), lr=0.1), file)
    else:
        config_component_from_file_by_class(model, file, page)
    assert [record.message for record in caplog.records if record.name.startswith("distiller")] == []


@pytest.mark.parametrize("page", ["README", *PAGES])
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(
        r"\]\(([^)#]*)(#[^)]*)?\)", (REFERENCE / f"{page}.md").read_text(encoding="utf-8")
    ):
        assert (REFERENCE / target).exists(), target
        titles = (
            re.findall(r"^## (.*)$", (REFERENCE / target).read_text(encoding="utf-8"), re.MULTILINE)
            if anchor
            else []
        )
        assert not anchor or anchor[1:] in [title.lower().replace(" ", "-") for title in titles]
