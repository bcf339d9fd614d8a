"""Units become a recipe, and a recipe is carried out on a model with all that goes with it."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from distiller.channel_groups import find_channel_groups
from distiller.errors import DistillerError, UnknownNameError, UsageError
from distiller.interfaces import Policy
from distiller.masks import MaskStore
from distiller.names import named_parameters
from distiller.pruning.channel_units import unit_masks
from distiller.thinned_layers import ThinnedLayerNorm
from distiller.thinning import ThinningRecipe, apply_recipe, thinning_recipe
from distiller.thinning.trial import measured_change
from tests.thinning.proof import telling, train_step

REMOVED = {"conv1.weight": [1, 3], "conv2.weight": [0]}


@pytest.fixture
def groups(tiny_cnn):
    return find_channel_groups(tiny_cnn, torch.zeros(1, 1, 8, 8))


def test_a_recipe_says_what_stays_of_every_tensor_and_what_modules_are_told(tiny_cnn, groups):
    recipe = thinning_recipe(tiny_cnn, groups, REMOVED)
    first, second = (0, 2), (1, 2, 3, 4, 5)
    assert recipe.tensors == {
        "conv1.weight": {0: first},
        **{f"bn1.{name}": {0: first} for name in ("weight", "bias", "running_mean", "running_var")},
        "conv2.weight": {1: first, 0: second},
        "conv2.bias": {0: second},
        "fc.weight": {1: second},
    }
    assert recipe.modules == {
        "conv1": {"in_channels": 1, "out_channels": 2, "groups": 1},
        "bn1": {"num_features": 2},
        "conv2": {"in_channels": 2, "out_channels": 5, "groups": 1},
        "fc": {"in_features": 5, "out_features": 4},
    }
    assert recipe.classes == {}


def test_groups_that_lose_nothing_are_not_in_the_recipe(tiny_cnn, groups):
    assert thinning_recipe(tiny_cnn, groups, {"conv1.weight": []}) == ThinningRecipe({})


@pytest.mark.parametrize(
    "removed, kind, fault",
    [
        ({"conv9.weight": [0]}, UnknownNameError, "no channel group 'conv9.weight'; did you mean 'conv2.weight'?"),
        ({"conv1.weight": [4]}, UsageError, "channel group 'conv1.weight': units are 0..3, got [4]"),
        ({"conv1.weight": [-1, 2]}, UsageError, "channel group 'conv1.weight': units are 0..3, got [-1, 2]"),
        ({"fc.weight": [0]}, UsageError,
         "channel group 'fc.weight': no unit can be removed, the network returns it"),
        ({"conv1.weight": range(4)}, UsageError,
         "nothing would be left of conv1.weight along dimension 0; remove less"),
    ],
)  # fmt: skip
def test_what_cannot_be_removed_is_told(tiny_cnn, groups, removed, kind, fault):
    with pytest.raises(kind, match=f"^{re.escape(fault)}$"):
        thinning_recipe(tiny_cnn, groups, removed)


def test_a_layer_that_cannot_do_with_less_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.attention = nn.MultiheadAttention(4, 2, add_zero_attn=True, batch_first=True)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.attention(x, x, x)[0])

    model = Odd()
    groups = find_channel_groups(model, torch.zeros(1, 3, 4))
    [group] = groups.of("attention.out_proj.weight", 0)
    fault = "'attention' is attention with add_bias_kv or add_zero_attn, which cannot be made smaller"
    with pytest.raises(DistillerError, match=f"^{re.escape(fault)}$"):
        thinning_recipe(model, groups, {group.name: [0]})


def test_buffers_that_are_not_saved_are_cut_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("scale", torch.rand(4) + 1, persistent=False)

        def forward(self, x):
            return self.fc2(self.fc1(x) * self.scale)

    model = Scaled()
    groups = find_channel_groups(model, torch.zeros(1, 3))
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.fc2.weight[:, 2] = 0
    apply_recipe(model, thinning_recipe(model, groups, {"fc1.weight": [2]}))
    assert model.scale.shape == (3,)
    assert measured_change(masked, model, torch.randn(2, 3)) < 1e-6


def test_layers_that_share_a_weight_are_all_told():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.deep1, self.deep2 = (nn.Conv2d(4, 4, 1, groups=4, bias=False) for _ in range(2))
            self.deep2.weight = self.deep1.weight

        def forward(self, x):
            return self.head(self.deep2(self.conv2(x).relu()) + self.deep1(self.conv1(x)))

    model, x = Tied(), torch.randn(2, 4, 3, 3)
    groups = find_channel_groups(model, x)
    [group] = groups.of("deep1.weight", 0)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.head.weight[:, 1] = 0
    apply_recipe(model, thinning_recipe(model, groups, {group.name: [1]}))
    assert (model.deep1.groups, model.deep2.groups) == (3, 3)
    assert model.deep2.weight is model.deep1.weight
    assert measured_change(masked, model, x) < 1e-6


def masked_by(model, groups, removed):
    params = dict(named_parameters(model))
    for name, mask in unit_masks(params, groups, removed).items():
        params[name].data.mul_(mask)
    return copy.deepcopy(model)


def test_masked_and_thinned_agree_also_where_the_batch_norm_has_a_shift(tiny_cnn, groups):
    model = telling(tiny_cnn)
    masked = masked_by(model, groups, REMOVED)
    apply_recipe(model, thinning_recipe(model, groups, REMOVED))
    assert measured_change(masked, model, torch.randn(4, 1, 8, 8)) < 1e-6


def test_parameters_stay_the_same_objects_and_lose_their_gradients(tiny_cnn, groups):
    before = dict(tiny_cnn.named_parameters())
    tiny_cnn(torch.randn(2, 1, 8, 8)).sum().backward()
    apply_recipe(tiny_cnn, thinning_recipe(tiny_cnn, groups, REMOVED))
    after = dict(tiny_cnn.named_parameters())
    assert all(after[name] is param for name, param in before.items())
    assert after["conv1.weight"].grad is None
    assert after["fc.bias"].grad is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
        lambda params: torch.optim.Adam(params, 0.1, amsgrad=True),
        lambda params: torch.optim.AdamW(params, 0.1, weight_decay=0.1),
        lambda params: torch.optim.RMSprop(params, 0.1, momentum=0.9, centered=True),
    ],
    ids=["SGD", "Adam", "AdamW", "RMSprop"],
)
def test_the_optimizer_goes_on_as_it_would_have_with_the_units_at_zero(tiny_cnn, groups, make):
    """A step of the thinned model is that of the masked one with gradients of masked elements at zero."""
    x, model = torch.randn(4, 1, 8, 8), tiny_cnn
    optimizer = make(model.parameters())
    train_step(model, optimizer, x)
    masked = masked_by(model, groups, REMOVED)
    other = make(masked.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    recipe = thinning_recipe(model, groups, REMOVED)
    apply_recipe(model, recipe, optimizer)
    train_step(model, optimizer, x)
    train_step(masked, other, x)
    apply_recipe(masked, recipe, other)
    for (name, param), twin in zip(model.named_parameters(), masked.parameters(), strict=True):
        assert torch.allclose(param, twin, atol=1e-5), name
        for key, value in optimizer.state[param].items():
            assert torch.allclose(value, other.state[twin][key], atol=1e-5), (name, key)


def test_an_optimizer_that_keeps_something_else_is_refused_and_nothing_changes(tiny_cnn, groups):
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), 0.1)
    optimizer.state[tiny_cnn.conv1.weight]["rows"] = torch.zeros(4)
    before = copy.deepcopy(tiny_cnn.state_dict())
    fault = (
        "thinning: SGD keeps 'rows' of shape (4,) for 'conv1.weight' of shape (4, 1, 3, 3), which cannot be cut "
        "with it; use SGD, Adam or AdamW, or thin the checkpoint after training (--thinnify)"
    )
    with pytest.raises(DistillerError, match=f"^{re.escape(fault)}$"):
        apply_recipe(tiny_cnn, thinning_recipe(tiny_cnn, groups, REMOVED), optimizer)
    assert all(torch.equal(value, before[name]) for name, value in tiny_cnn.state_dict().items())
    assert not hasattr(tiny_cnn, "thinning_recipes")


def test_masks_and_policies_follow(tiny_cnn, groups):
    class Told(Policy):
        def follow_thinning(self, cuts):
            self.cuts = cuts

    store, policy = MaskStore(tiny_cnn), Told()
    masks = unit_masks(dict(tiny_cnn.named_parameters()), groups, REMOVED)
    for name, mask in masks.items():
        store.put(name, mask)
    recipe = thinning_recipe(tiny_cnn, groups, REMOVED)
    apply_recipe(tiny_cnn, recipe, None, store, [policy])
    assert policy.cuts == recipe.tensors
    for name, param in tiny_cnn.named_parameters():
        mask = store[name].mask
        assert mask is None or mask.shape == param.shape
        assert mask is None or mask.eq(1).all()


def test_a_wrapped_model_is_thinned_inside(tiny_cnn, groups):
    recipe = thinning_recipe(tiny_cnn, groups, REMOVED)
    apply_recipe(nn.DataParallel(tiny_cnn), recipe)
    assert tiny_cnn.conv1.weight.shape[0] == tiny_cnn.conv1.out_channels == 2
    assert tiny_cnn.thinning_recipes == [recipe.to_plain()]


def test_carrying_a_recipe_out_again_changes_nothing(tiny_cnn, groups):
    recipe = thinning_recipe(tiny_cnn, groups, REMOVED)
    apply_recipe(tiny_cnn, recipe)
    before = copy.deepcopy(tiny_cnn.state_dict())
    apply_recipe(tiny_cnn, recipe)
    assert all(torch.equal(value, before[name]) for name, value in tiny_cnn.state_dict().items())


def norm_model():
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))


def test_a_layer_norm_is_turned_in_place():
    model, x = telling(norm_model()), torch.randn(4, 3)
    groups = find_channel_groups(model, x)
    masked = masked_by(model, groups, {"0.weight": [1, 2]})
    apply_recipe(model, thinning_recipe(model, groups, {"0.weight": [1, 2]}))
    assert isinstance(model[1], ThinnedLayerNorm)
    assert (model[1].normalized_shape, model[1].counted) == ((3,), 5)
    assert measured_change(masked, model, x) < 1e-6


@pytest.mark.parametrize(
    "recipe, fault",
    [
        (ThinningRecipe({"4.weight": {0: (0,)}}),
         "thinning: the model has no '4.weight'; the recipe is of another model"),
        (ThinningRecipe({"0.weight": {0: (0, 7)}}),
         "thinning: '0.weight' of shape (5, 3) has no index 7 along dimension 0; the recipe is of another model"),
        (ThinningRecipe({"0.bias": {1: (0,)}}),
         "thinning: '0.bias' of shape (5,) has no index 0 along dimension 1; the recipe is of another model"),
        (ThinningRecipe({}, {"conv": {"groups": 1}}),
         "thinning: the model has no module 'conv'; the recipe is of another model"),
        (ThinningRecipe({}, {"0": {"forward": 1}}),
         "thinning: '0.forward' is a method, no number that a recipe could set; the recipe is of another model"),
        (ThinningRecipe({}, {"0": {"weight": 1}}),
         "thinning: '0.weight' is a Parameter, no number that a recipe could set; the recipe is of another model"),
        (ThinningRecipe({}, {}, {"0": "ThinnedLayerNorm"}),
         "thinning: '0' is a Linear, and ThinnedLayerNorm takes over from LayerNorm; the recipe is of another model"),
        (ThinningRecipe({}, {}, {"1": "Linear"}), "unknown thinned layer 'Linear'; known are ThinnedLayerNorm, .*"),
    ],
    ids=range(8),
)  # fmt: skip
def test_a_recipe_of_another_model_is_refused_and_nothing_changes(recipe, fault):
    model = norm_model()
    whole = ThinningRecipe({"1.bias": {0: (0,)}, **recipe.tensors}, recipe.modules, recipe.classes)
    pattern = fault if ".*" in fault else re.escape(fault)
    with pytest.raises(DistillerError, match=f"^{pattern}$"):
        apply_recipe(model, whole)
    assert model[1].bias.shape == (5,)
