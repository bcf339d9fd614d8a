from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from distiller.apputils.checkpoint import (
    load_checkpoint,
    load_lean_checkpoint,
    load_state,
    read_checkpoint,
    restore_quantizer,
    save_checkpoint,
)
from distiller.apputils.rewind import WeightRewinder
from distiller.apputils.structure import cut_by, recipes_of, restore_structure, unchanged_on_error
from distiller.channel_groups import find_channel_groups
from distiller.errors import CheckpointError
from distiller.quantization import PostTrainLinearQuantizer
from distiller.scheduler import CompressionScheduler
from distiller.thinning import ThinningRecipe, apply_recipe, thinning_recipe
from distiller.thinning.trial import model_groups

FIRST, SECOND = {"conv1.weight": [0, 3]}, {"conv1.weight": [1], "conv2.weight": [5]}


def thinned(model, *steps):
    for removed in steps:
        groups = find_channel_groups(model, torch.zeros(1, 1, 8, 8))
        apply_recipe(model, thinning_recipe(model, groups, removed))
    return model


def look(model):
    """All that loading could change."""
    return (
        {name: (value.shape, value.tolist()) for name, value in model.state_dict().items()},
        {name: (type(module), repr(module)) for name, module in model.named_modules()},
        recipes_of(model),
    )


def message(call, *args):
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    return str(caught.value)


@pytest.fixture
def saved(tiny_cnn, tmp_path):
    """`saved(FIRST, SECOND)`: the model after so many steps, and its checkpoint."""

    def save(*steps):
        model = thinned(copy.deepcopy(tiny_cnn), *steps)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.randn(2, 1, 8, 8)).sum().backward()
        optimizer.step()
        scheduler = CompressionScheduler(model)
        scheduler.masks.put("conv2.weight", torch.ones_like(model.conv2.weight))
        path = save_checkpoint(0, "tiny", model, optimizer, scheduler, name=str(len(steps)), dir=tmp_path)
        return model, path

    return save


def same(model, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("before", [(), (FIRST,), (FIRST, SECOND)])
def test_a_model_at_any_stage_becomes_as_thin_as_the_checkpoint(tiny_cnn, saved, before):
    model, path = saved(FIRST, SECOND)
    here = thinned(tiny_cnn, *before)
    load_state(here, read_checkpoint(path))
    assert same(model, here)
    assert repr(here) == repr(model)
    assert recipes_of(here) == recipes_of(model)
    assert len(recipes_of(here)) == 2
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(here.eval()(images), model.eval()(images))


def test_masks_optimizer_and_epoch_come_with_it(tiny_cnn, saved):
    model, path = saved(FIRST)
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.1, momentum=0.9)
    tiny_cnn(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    _, scheduler, given, start = load_checkpoint(tiny_cnn, path, optimizer)
    assert given is optimizer
    assert start == 1
    assert scheduler is not None
    assert scheduler.masks["conv2.weight"].slots["pruner"].shape == model.conv2.weight.shape
    for param in tiny_cnn.parameters():
        assert optimizer.state[param]["momentum_buffer"].shape == param.shape
    tiny_cnn(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()


def test_weights_alone_are_loaded_likewise(tiny_cnn, saved):
    model, path = saved(FIRST)
    assert same(model, load_lean_checkpoint(tiny_cnn, path))


def test_a_file_of_weights_only_fits_a_model_that_is_as_thin(tiny_cnn, saved, tmp_path):
    model, _ = saved(FIRST)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    load_state(thinned(tiny_cnn, FIRST), read_checkpoint(tmp_path / "w.pt"))
    assert same(model, tiny_cnn)
    assert len(recipes_of(tiny_cnn)) == 1


def test_a_model_made_as_thin_by_hand_takes_the_checkpoint_with_its_recipes(tiny_cnn, saved):
    model, path = saved(FIRST)
    del thinned(tiny_cnn, FIRST).thinning_recipes
    load_state(tiny_cnn, read_checkpoint(path))
    assert same(model, tiny_cnn)
    assert recipes_of(tiny_cnn) == recipes_of(model)


def test_of_removed_units_it_does_not_matter_which_they_were(tiny_cnn, saved):
    model, path = saved(FIRST)
    load_state(thinned(tiny_cnn, {"conv1.weight": [1, 2]}), read_checkpoint(path))
    assert same(model, tiny_cnn)
    assert recipes_of(tiny_cnn) == recipes_of(model)


def test_a_dense_checkpoint_does_not_fit_a_thinned_model(tiny_cnn, saved):
    _, path = saved()
    thinned(tiny_cnn, FIRST)
    before = look(tiny_cnn)
    text = message(load_state, tiny_cnn, read_checkpoint(path))
    assert text.startswith(f"{path}: is of the model before it was thinned: the checkpoint is of 'tiny', ")
    assert text.endswith("; create the model anew, or give a later checkpoint")
    assert look(tiny_cnn) == before


def test_a_model_that_was_thinned_otherwise_is_refused(tiny_cnn, saved):
    _, path = saved(FIRST, SECOND)
    thinned(tiny_cnn, {"conv1.weight": [2]})
    before = look(tiny_cnn)
    assert message(load_state, tiny_cnn, read_checkpoint(path)) == (
        f"{path}: carries 2 thinning recipes, and the model has been thinned otherwise, by 1; "
        "give a model that is not thinned yet"
    )
    assert look(tiny_cnn) == before


def test_when_the_second_recipe_fails_the_first_is_undone(tiny_cnn, saved):
    _, path = saved(FIRST, SECOND)
    document = torch.load(path, weights_only=True)
    document["thinning_recipes"][1]["parameters"]["conv3.weight"] = [[0, [0]]]
    torch.save(document, path)
    before = look(tiny_cnn)
    assert message(load_state, tiny_cnn, read_checkpoint(path)) == (
        f"{path}: thinning_recipes[1]: the model cannot be thinned as the checkpoint's was: "
        "thinning: the model has no 'conv3.weight'; the recipe is of another model"
    )
    assert look(tiny_cnn) == before


def test_a_class_that_is_not_one_of_the_thinned_layers_is_refused(tiny_cnn, saved):
    _, path = saved(FIRST)
    document = torch.load(path, weights_only=True)
    document["thinning_recipes"][0]["classes"] = {"fc": "Linear"}
    torch.save(document, path)
    before = look(tiny_cnn)
    assert message(load_state, tiny_cnn, read_checkpoint(path)).startswith(
        f"{path}: thinning_recipes[0]: the model cannot be thinned as the checkpoint's was: "
        "unknown thinned layer 'Linear'; known are "
    )
    assert look(tiny_cnn) == before


@pytest.mark.parametrize("fault", ["weights", "masks", "optimizer"])
def test_a_load_that_fails_late_leaves_structure_weights_and_optimizer_as_they_were(tiny_cnn, saved, fault):
    _, path = saved(FIRST)
    document = torch.load(path, weights_only=True)
    if fault == "weights":
        document["state_dict"]["fc.weight"] = torch.ones(4, 5)
    elif fault == "masks":
        document["scheduler"]["masks"]["conv2.weight"]["pruner"] = torch.ones(6, 4, 3, 3)
    else:
        document["optimizer"]["state_dict"]["state"][0]["momentum_buffer"] = torch.ones(4, 1, 3, 3)
    torch.save(document, path)
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.1, momentum=0.9)
    tiny_cnn(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    before = look(tiny_cnn)
    message(load_checkpoint, tiny_cnn, path, optimizer)
    assert look(tiny_cnn) == before
    tiny_cnn.zero_grad()
    tiny_cnn(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()


def test_a_quantized_model_is_thinned_before_it_is_quantized(tiny_cnn, tmp_path):
    model = thinned(copy.deepcopy(tiny_cnn), FIRST)
    PostTrainLinearQuantizer(model, bits_activations=None).prepare_model(torch.zeros(1, 1, 8, 8))
    path = save_checkpoint(0, "tiny", model, dir=tmp_path)
    checkpoint = read_checkpoint(path)
    restore_quantizer(tiny_cnn, checkpoint)
    load_state(tiny_cnn, checkpoint)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(tiny_cnn.eval()(images), model.eval()(images))


class Flat(nn.Module):
    """A convolution whose channels a linear layer reads flattened."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def test_distillers_recipe_tells_a_linear_layer_of_its_inputs(tmp_path):
    """DEFECT: Distiller set 'in_channels' of a linear layer, which goes by in_features."""
    model: Any = Flat()
    thin = copy.deepcopy(model)
    thin.conv.weight.data = thin.conv.weight.data[[1, 2]]
    thin.conv.bias = nn.Parameter(model.conv.bias.data[[1, 2]])
    thin.fc.weight.data = thin.fc.weight.data[:, 4:12]
    legacy = {"fc.weight": [(1, [1, 2], (2, 4, 2, 2), (2, 8))]}
    legacy |= {f"conv.{name}": [(0, [1, 2])] for name in ("weight", "bias")}
    recipe = ThinningRecipe.from_plain({"modules": {"fc": {}}, "parameters": legacy}, "file")
    path = save_checkpoint(0, "flat", thin, dir=tmp_path)
    document = torch.load(path, weights_only=True)
    document["thinning_recipes"] = [ThinningRecipe(recipe.tensors).to_plain()]
    torch.save(document, path)
    load_checkpoint(model, path)
    assert (model.conv.out_channels, model.fc.in_features) == (2, 8)
    images = torch.randn(2, 1, 4, 4)
    assert torch.equal(model(images), thin(images))


def test_another_architecture_is_told(tiny_cnn, saved):
    _, path = saved(FIRST)
    tiny_cnn.arch = "other"
    assert message(restore_structure, tiny_cnn, read_checkpoint(path)) == (
        f"{path}: is of another model: the checkpoint is of 'tiny', the model is 'other'; "
        "create the model as 'tiny'"
    )


def test_values_are_put_back_where_asked(tiny_cnn):
    before = look(tiny_cnn)
    with pytest.raises(ZeroDivisionError), unchanged_on_error(tiny_cnn, values=True):
        tiny_cnn.fc.weight.data.zero_()
        thinned(tiny_cnn, FIRST)
        raise ZeroDivisionError
    assert look(tiny_cnn) == before


def test_a_state_is_cut_as_the_model_was(tiny_cnn):
    dense = {name: value.clone() for name, value in tiny_cnn.state_dict().items()}
    thinned(tiny_cnn, FIRST, SECOND)
    state = cut_by(recipes_of(tiny_cnn), dense)
    assert all(torch.equal(value, state[name]) for name, value in tiny_cnn.state_dict().items())


def test_a_rewinder_takes_what_is_left_of_a_checkpoint_from_before_thinning(tiny_cnn, saved):
    model, path = saved()
    thinned(tiny_cnn, FIRST)
    state = WeightRewinder("r", tiny_cnn, checkpoint=str(path)).state_dict()["weights"]
    assert torch.equal(state["conv1.weight"], model.conv1.weight[[1, 2]])
    assert torch.equal(state["conv2.weight"], model.conv2.weight[:, [1, 2]])


def small_swin(version: int) -> nn.Module:
    blocks = {
        1: torchvision.models.swin_transformer.SwinTransformerBlock,
        2: torchvision.models.swin_transformer.SwinTransformerBlockV2,
    }
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer(
        [4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=6, block=blocks[version]
    )
    model.input_shape = (1, 3, 32, 32)  # type: ignore[assignment]
    return model.eval()


@pytest.mark.parametrize("version", [1, 2])
def test_attention_without_a_head_is_loaded_into_a_whole_model(tmp_path, version):
    """Its thinned class has a setting, head_dim, that the whole layer lacks."""
    model = small_swin(version)
    groups = model_groups(model, "the test")
    (heads,) = groups.of("features.1.0.attn.proj.weight", 1)
    apply_recipe(model, thinning_recipe(model, groups, {heads.name: [0]}))
    path = save_checkpoint(0, "swin", model, dir=tmp_path)
    loaded = load_checkpoint(small_swin(version), path)[0].eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("setting", [{"stride": [0, 0]}, {"padding": [10**5, 10**5]}, {"dilation": [2, 2]}])
def test_what_thinning_never_tells_a_layer_is_refused(tmp_path, tiny_cnn, setting):
    path = save_checkpoint(0, "tiny", tiny_cnn, dir=tmp_path)
    document = torch.load(path, weights_only=True)
    document["thinning_recipes"] = [{"modules": {"conv1": setting}, "parameters": {}, "classes": {}}]
    torch.save(document, path)
    ((name, value),) = setting.items()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tiny_cnn, path)
    assert str(caught.value) == (
        f"{path}: thinning_recipes[0]: 'conv1.{name}' must be left out, got {value!r}"
    )
