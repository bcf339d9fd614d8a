from __future__ import annotations

import copy

import pytest
import torch
import yaml
from torch import nn

from distiller.config import document_config
from distiller.errors import UsageError
from distiller.schedule_yaml import parse_document
from distiller.sensitivity.schedule_text import (
    Chosen,
    pruning_epochs,
    recommended_schedule,
    schedule_text,
)
from tests.sensitivity.test_prunables import Residual

LAYERS = [Chosen(("conv1.weight",), 0.25), Chosen(("conv2.weight",), 0.5), Chosen(("conv3.weight",), 0.5)]
COUPLED = [Chosen(("conv1.weight", "conv3.weight"), 0.5), Chosen(("conv2.weight",), 0.25)]
BY_SENSITIVITY = [Chosen(("conv2.weight",), 0.5, 0.71)]
RANKS = [Chosen(("conv2.weight",), 0.5, rank=2), Chosen(("fc.weight",), 0.4, rank=1)]
BITS = [Chosen(("conv2.weight",), 4.0), Chosen(("fc.weight",), 8.0)]
WINDOW = {"starting_epoch": 0, "frequency": 1}


def parsed(text: str):
    return yaml.safe_load(text)


def accepted(schedule) -> nn.Module:
    """The program reads it; returns the model that it was read for."""
    model = copy.deepcopy(Residual())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    document_config(model, optimizer, parse_document(schedule_text(schedule, ["x"]), "s.yaml"))
    return model


@pytest.mark.parametrize("epochs, pruned", [(2, 1), (3, 2), (5, 3), (10, 6), (20, 12)])
def test_six_of_ten_epochs_prune_and_one_at_least_trains_on(epochs, pruned):
    assert pruning_epochs(epochs) == pruned


@pytest.mark.parametrize("epochs", [2, 10])
@pytest.mark.parametrize(
    "axis, chosen, pruner",
    [
        ("element", LAYERS, "agp"), ("element", BY_SENSITIVITY, "sensitivity"), ("channel", LAYERS[1:], "agp"),
        ("filter", COUPLED, "agp"), ("group", COUPLED, "agp"), ("n:m", LAYERS[1:], "agp"),
        ("weight-bits", BITS, "agp"), ("rank", RANKS, "agp"),
    ],
)  # fmt: skip
def test_the_text_says_what_the_data_say_and_the_program_takes_it(axis, chosen, pruner, epochs):
    schedule = recommended_schedule(axis, chosen, epochs, pruner)
    assert parsed(schedule_text(schedule, ["of a sweep"])) == schedule
    accepted(schedule)


def test_elements_of_one_level_share_a_pruner():
    schedule = recommended_schedule("element", LAYERS, 10)
    assert schedule == {
        "version": 1,
        "pruners": {
            "to_25_percent": {"class": "AutomatedGradualPruner", "initial_sparsity": 0.125,
                              "final_sparsity": 0.25, "weights": ["conv1.weight"]},
            "to_50_percent": {"class": "AutomatedGradualPruner", "initial_sparsity": 0.25,
                              "final_sparsity": 0.5, "weights": ["conv2.weight", "conv3.weight"]},
        },
        "lr_schedulers": {"cosine": {"class": "CosineAnnealingLR", "T_max": 10, "eta_min": 0.0002}},
        "policies": [
            {"pruner": {"instance_name": "to_25_percent"}, **WINDOW, "ending_epoch": 6},
            {"pruner": {"instance_name": "to_50_percent"}, **WINDOW, "ending_epoch": 6},
            {"lr_scheduler": {"instance_name": "cosine"}, **WINDOW, "ending_epoch": 9},
        ],
    }  # fmt: skip


def test_filters_that_go_together_are_pruned_as_one_group_and_removed_when_all_are_pruned():
    schedule = recommended_schedule("filter", COUPLED, 5)
    assert schedule["pruners"] == {
        "to_levels": {"class": "StructuredGroupPruner", "initial_sparsity": 0.125,
                      "levels": {"conv1.weight": 0.5, "conv2.weight": 0.25}},
    }  # fmt: skip
    assert schedule["extensions"] == {"smaller": {"class": "FilterRemover"}}
    assert [policy.get("ending_epoch", policy.get("epochs")) for policy in schedule["policies"]] == [
        3,
        [3],
        4,
    ]
    highest = recommended_schedule("group", [Chosen(("conv1.weight",), 0.95)], 5)["pruners"]["to_levels"]
    assert highest["max_sparsity"] == 0.95


def test_sensitivities_are_by_weight():
    schedule = recommended_schedule("element", BY_SENSITIVITY, 10, "sensitivity")
    assert schedule["pruners"] == {
        "by_sensitivity": {"class": "SensitivityPruner", "sensitivities": {"conv2.weight": 0.71}}
    }


def test_a_level_of_n_to_m_is_a_pruner_of_its_n():
    schedule = recommended_schedule("n:m", LAYERS, 10, block=4)
    assert schedule["pruners"] == {
        "3_of_4": {"class": "NMPruner", "n": 3, "m": 4, "weights": ["conv1.weight"]},
        "2_of_4": {"class": "NMPruner", "n": 2, "m": 4, "weights": ["conv2.weight", "conv3.weight"]},
    }
    assert [policy.get("epochs") for policy in schedule["policies"]] == [[0], [0], None]


def test_ranks_are_those_of_layers():
    schedule = recommended_schedule("rank", RANKS, 4)
    assert schedule["extensions"] == {
        "low_rank": {"class": "LowRankFactorization", "layers": {"conv2": {"rank": 2}, "fc": {"rank": 1}}}
    }
    assert schedule["policies"][0] == {"extension": {"instance_name": "low_rank"}, "epochs": [0]}


def test_bits_are_overrides_of_the_layers_and_the_others_stay_in_floating_point():
    schedule = recommended_schedule("weight-bits", BITS, 10)
    (quantizer,) = schedule["quantizers"].values()
    assert quantizer["overrides"] == {"conv2": {"bits_weights": 4}, "fc": {"bits_weights": 8}}
    assert "bits_weights" not in quantizer
    model = accepted(schedule)
    modules = dict(model.named_modules())
    assert nn.utils.parametrize.is_parametrized(modules["conv2"], "weight")
    assert not nn.utils.parametrize.is_parametrized(modules["conv1"])


def test_comments_are_wrapped_but_for_lines_that_begin_with_a_blank():
    long = "word " * 40
    text = schedule_text({"version": 1}, [long.strip(), "  table " + "x" * 120])
    lines = text.splitlines()
    assert lines[0].startswith("# word word")
    assert all(len(line) <= 110 for line in lines if "table" not in line)
    assert f"#   table {'x' * 120}" in lines
    assert text.endswith("\n\nversion: 1\n")
    assert parsed(text) == {"version": 1}


@pytest.mark.parametrize(
    "axis, epochs, pruner, told",
    [
        ("element", 1, "agp", "epochs: pruning and training on need 2 at the least, got 1"),
        ("filter", 5, "sensitivity", "pruner 'sensitivity': prunes elements, got axis 'filter'; take 'agp'"),
        ("activation-bits", 5, "agp", "axis 'activation-bits': no schedule is made of it, only of element, channel, "
         "filter, group, weight-bits, rank, n:m"),
    ],
)  # fmt: skip
def test_what_no_schedule_is_made_of_is_refused(axis, epochs, pruner, told):
    with pytest.raises(UsageError) as error:
        recommended_schedule(axis, LAYERS, epochs, pruner)
    assert str(error.value) == told
