"""Recipes as plain data, ours and Distiller's."""

from __future__ import annotations

import json
import re

import pytest
import torch

from distiller.errors import CheckpointError
from distiller.thinning import ThinningRecipe

RECIPE = ThinningRecipe(
    {"conv.weight": {0: (0, 2), 1: (1,)}, "bn.running_mean": {0: (0, 2)}},
    {"conv": {"out_channels": 2}, "norm": {"normalized_shape": [2], "counted": 3}},
    {"norm": "ThinnedLayerNorm"},
)


def test_a_recipe_survives_json():
    assert ThinningRecipe.from_plain(json.loads(json.dumps(RECIPE.to_plain())), "here") == RECIPE


def test_the_plain_form_is_what_is_stored():
    assert RECIPE.to_plain() == {
        "parameters": {"conv.weight": [[0, [0, 2]], [1, [1]]], "bn.running_mean": [[0, [0, 2]]]},
        "modules": {"conv": {"out_channels": 2}, "norm": {"normalized_shape": [2], "counted": 3}},
        "classes": {"norm": "ThinnedLayerNorm"},
    }


def test_an_empty_recipe_is_one():
    assert ThinningRecipe.from_plain({}, "here") == ThinningRecipe({})


def test_distillers_buffers_stand_among_the_attributes():
    plain = {
        "modules": {"bn": {"num_features": 2, "running_mean": (0, torch.tensor([0, 2]))}},
        "parameters": {},
    }
    recipe = ThinningRecipe.from_plain(plain, "here")
    assert recipe.tensors == {"bn.running_mean": {0: (0, 2)}}
    assert recipe.modules == {"bn": {"num_features": 2}}


def test_distillers_views_of_a_linear_layer_become_columns():
    # (out 4, in 12) seen as (out 4, channels 3, 2, 2); channels 0 and 2 stay
    plain = {"parameters": {"fc.weight": [(1, torch.tensor([0, 2]), (4, 3, 2, 2), (4, 8))]}}
    kept = ThinningRecipe.from_plain(plain, "here").tensors["fc.weight"]
    weight = torch.arange(48.0).view(4, 12)
    expected = weight.view(4, 3, 2, 2)[:, [0, 2]].reshape(4, 8)
    assert torch.equal(weight[:, list(kept[1])], expected)


@pytest.mark.parametrize(
    "plain, fault",
    [
        ({"modules": []}, "thinning recipe: 'modules' must be a dict, got list"),
        ({"parameters": 3}, "thinning recipe: 'parameters' must be a dict, got int"),
        ({"modules": {"conv": 1}}, "thinning recipe: 'conv' must be a dict, got int"),
        (
            {"modules": {"c": {"groups": "2"}}},
            "thinning recipe: c.groups: must be a number or numbers, got '2'",
        ),
        ({"parameters": {"w": "0"}}, "thinning recipe: w: must be a list, got str"),
        ({"parameters": {"w": [[0]]}}, "thinning recipe: w: must be (dimension, indices), got [0]"),
        (
            {"parameters": {"w": [[0, []]]}},
            "thinning recipe: w: must be a dimension and at least one index, got [0, []]",
        ),
        (
            {"parameters": {"w": [[-1, [0]]]}},
            "thinning recipe: w: must be a dimension and at least one index, got [-1, [0]]",
        ),
        ({"parameters": {"w": [[0, [2, 1]]]}}, "thinning recipe: w: indices must ascend, got [2, 1]"),
        ({"parameters": {"w": [[0, [1, 1]]]}}, "thinning recipe: w: indices must ascend, got [1, 1]"),
        (
            {"parameters": {"w": [[1, [0], [4], [4]]]}},
            "thinning recipe: w: must have a view with dimension 1, got [4]",
        ),
        (
            {"parameters": {"w": [[1, [3], [4, 3], [4, 1]]]}},
            "thinning recipe: w: indices [3] are not of dimension 1 of (4, 3)",
        ),
        ({"classes": ["a"]}, "thinning recipe: 'classes' must be names by module"),
        ({"classes": {"norm": 3}}, "thinning recipe: 'classes' must be names by module"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told(plain, fault):
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'here: {fault}')}$"):
        ThinningRecipe.from_plain(plain, "here")
