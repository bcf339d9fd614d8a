"""The table of ranks: what is measured, what the page says, and when the bar is missed."""

from __future__ import annotations

import torch

from distiller.config import dict_config
from distiller.dataset_facts import DATASET_FACTS
from distiller.factorization import factorize
from distiller.models import create_model, input_shape_for
from docs.dense_networks import read_results
from docs.measure_low_rank import (
    BAR,
    NETWORKS,
    PAGE,
    RESULTS,
    TIMES,
    Cell,
    cells,
    missed,
    page,
    pair,
    schedule,
    settings,
)

OWN = {
    "ranks": {"fc1": [90]},
    "break_even": {"fc1": [216]},
    "parameters": [266610, 133000],
    "macs": [266200, 132600],
    "n": 10000,
    "dense_correct": 8939,
    "before_correct": 8700,
    "after_correct": 8900,
}
TIMES_OF_ONE = {
    "single": [[0.05, 0.04], [0.05, 0.05], [0.06, 0.04]],
    "batch": [[2.0, 1.0], [2.1, 1.0], [1.9, 1.0]],
    "threads": 2,
}


def all_measured(**changes):
    return {cell.name: {**OWN, **changes} for cell in cells()}


def all_timed(**changes):
    return {cell.name: {**TIMES_OF_ONE, **changes} for cell in cells()}


def test_every_network_is_measured_at_half_of_its_macs():
    assert {(cell.arch, cell.macs) for cell in cells()} >= {(arch, BAR) for arch in NETWORKS}


def test_the_page_has_a_row_for_each_cell():
    text = page(all_measured(), all_timed())
    assert (
        "| svd | 50 % | 266,610 -> 133,000 (0.50) | 266,200 -> 132,600 (0.50) | fc1 90 of 216 | 89.39 % | 87.00 % | "
        "89.00 % | 0.050 -> 0.040 (1.25x; 1.00-1.50) | 2.000 -> 1.000 (2.00x; 1.90-2.10) |\n"
    ) in text
    assert text.count("89.00 %") == len(list(cells()))
    assert text.endswith("and faster with a batch in each of 9 rounds: held by both networks.\n")


def test_a_bar_is_missed_by_accuracy_and_by_time():
    assert missed(all_measured(), all_timed()) == []
    text = (
        "LeNet-300-100: at 50% of the MACs no form is within a point of the whole network and faster with a batch "
        "in each of 9 rounds"
    )
    assert missed(all_measured(after_correct=8838), all_timed())[0] == text
    assert missed(all_measured(), all_timed(batch=[[2.0, 1.0], [1.0, 1.0], [2.0, 1.0]]))[0] == text
    assert len(missed({}, {})) == len(missed(all_measured(), {})) == len(NETWORKS)


def test_what_is_not_measured_yet_is_told():
    assert page({}, {}).count("| not measured yet |") == len(NETWORKS)
    assert page(all_measured(), {}).count("| not timed | not timed |") == len(list(cells()))


def test_the_page_is_written_from_the_results():
    if RESULTS.exists():
        assert PAGE.read_text(encoding="utf-8") == page(read_results(RESULTS), read_results(TIMES))


def test_the_networks_that_are_timed_are_whole_and_of_the_ranks():
    cell = Cell("vgg13_bn_025_cifar", "tucker2", 0.5)
    whole, factored, shape = pair(cell, {"features.3": [5, 6]})
    assert shape == (1, 32, 32)
    old, new = (dict(model.named_parameters()) for model in (whole, factored))
    assert "features.3.weight" in old
    assert [new[f"features.3.{part}.weight"].shape[0] for part in ("first", "core", "last")] == [5, 6, 16]
    assert old["features.7.weight"].is_contiguous(memory_format=torch.channels_last)
    timed_images = torch.randn(2, *shape)
    assert factored(timed_images).shape == whole(timed_images).shape


def test_the_schedule_of_a_cell_is_one_that_its_network_takes():
    facts = DATASET_FACTS["fashion-mnist"]
    for arch, network in NETWORKS.items():
        shape = input_shape_for(arch, facts.channels, facts.size)
        model = create_model(False, "fashion-mnist", arch, parallel=False, input_shape=(1, *shape))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cell = Cell(arch, network.forms[0], BAR)
        dict_config(model, optimizer, schedule(cell))
        report = factorize(model, **settings(cell))
        assert report.macs[1] <= BAR * report.macs[0]
