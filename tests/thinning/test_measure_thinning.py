"""The table of families: what it is made of, and what it has to say."""

from __future__ import annotations

import json

import pytest
import torchvision

from distiller.models.imagenet import torchvision_names
from docs.measure_thinning import FAMILIES, MOST_SECONDS, RESULTS, SAME, TABLE, reload, table, thin, zoo


@pytest.fixture
def results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def family_of(arch: str) -> str:
    """The file of torchvision that a network is in."""
    return torchvision.models.get_model_builder(arch).__module__


def test_the_table_has_a_member_of_every_family_and_the_whole_zoo(results):
    assert {family_of(arch) for arch in torchvision_names()} == set(map(family_of, FAMILIES))
    assert set(results) == {*FAMILIES, *zoo()}


def test_at_most_two_families_cannot_be_done_and_none_takes_a_minute(results):
    failed = [arch for arch, result in results.items() if "failure" in result]
    assert len(failed) <= 2
    assert set(failed) <= set(FAMILIES)
    for result in (result for arch, result in results.items() if arch not in failed):
        assert result["seconds"] < MOST_SECONDS
        assert max(result["difference"], result["onnx difference"]) < SAME
        assert result["reload difference"] == 0


def test_the_page_is_written_from_the_results(results):
    assert TABLE.read_text(encoding="utf-8") == table(results)


def test_failures_and_groups_that_stay_are_listed_with_their_reasons():
    done = {
        "arch": "lenet5", "input": [1, 1, 28, 28], "seconds": 0.04, "seconds with trial": 0.1, "groups": 5,
        "removable": 2, "kept": {"fc1.weight": "it is Tuesday"}, "units": 570, "units removed": 171,
        "parameters": [4000, 2000], "macs": [3000, 1000], "difference": 4.1e-7, "onnx difference": 0.0,
    }  # fmt: skip
    page = table({"lenet5": done, "alexnet": {"arch": "alexnet", "failure": "thin: no memory"}})
    assert (
        "| lenet5 (1x28x28) | 0.0 | 0.1 | 2 of 5 | 171 of 570 | 4,000 -> 2,000 (0.50) | 3,000 -> 1,000 (0.33) | "
        "4.1e-07 | 0.0e+00 |\n"
    ) in page
    assert "## What cannot be done\n\n- `alexnet`: thin: no memory\n" in page
    assert page.endswith("beside inputs and classes\n\n- `lenet5`: `fc1.weight`: it is Tuesday\n")
    assert "Every network above can be thinned." in table({"lenet5": done})


def test_a_network_is_thinned_and_reloaded(tmp_path):
    result = thin("lenet5", tmp_path)
    assert (result["groups"], result["removable"], result["units"]) == (5, 3, 20 + 50 + 500)
    assert result["units removed"] == 6 + 15 + 150
    assert result["parameters"][0] == 431080
    assert reload("lenet5", tmp_path) == 0
