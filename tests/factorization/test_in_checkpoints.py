"""Factored models in checkpoints: rebuilt in the order in which they came about, or refused with the place."""

from __future__ import annotations

import copy

import pytest
import torch

from distiller.apputils.checkpoint import load_checkpoint, load_state, read_checkpoint, save_checkpoint
from distiller.errors import CheckpointError
from distiller.export.onnx_export import onnx_bytes
from distiller.export.onnx_parity import check_onnx
from distiller.factorization import factorize
from distiller.factorization.replacement import factorizations_of
from distiller.masks import MaskStore
from distiller.models import create_model
from distiller.thinning import remove_filters

X = torch.linspace(-1, 1, 2 * 784).view(2, 1, 28, 28)


def model_of():
    return create_model(False, "mnist", "simplenet_mnist", parallel=False)


def factor(model):
    factorize(
        model,
        {
            "conv2": {"rank": [6, 12], "form": "tucker2"},
            "conv1": {"rank": 3, "form": "spatial"},
            "fc1": {"rank": 20},
            "fc2": {"rank": 9, "sparse": 0.01},
        },
    )


def thin(model, weight, count):
    with torch.no_grad():
        dict(model.named_parameters())[weight][:count] = 0
        bias = dict(model.named_parameters()).get(weight.replace("weight", "bias"))
        if bias is not None:
            bias[:count] = 0
    remove_filters(model, MaskStore(model), None, None, None)


def saved(model, folder):
    return save_checkpoint(0, "simplenet_mnist", model, torch.optim.Adam(model.parameters()), dir=folder)


def factored_then_thinned(model):
    factor(model)
    thin(model, "conv2.core.weight", 4)


def thinned_then_factored(model):
    thin(model, "conv1.weight", 5)
    factorize(model, {"conv2": {"rank": 6}, "fc1": {"rank": 20}})


def all_in_turns(model):
    thin(model, "conv1.weight", 5)
    factorize(model, {"conv2": {"rank": 6}})
    thin(model, "conv2.first.weight", 2)
    factorize(model, {"fc1": {"rank": 20}})


HISTORIES = [factor, factored_then_thinned, thinned_then_factored, all_in_turns]


@pytest.mark.parametrize("make", HISTORIES)
def test_a_factored_model_is_rebuilt_from_its_checkpoint(tmp_path, make):
    model = model_of()
    make(model)
    path = saved(model, tmp_path)
    expected = model.eval()(X)
    for given in (None, model_of()):
        loaded, _, optimizer, _ = load_checkpoint(given, path)
        assert torch.equal(loaded.eval()(X), expected)
        assert loaded.factorization_recipes == model.factorization_recipes
        assert getattr(loaded, "thinning_recipes", []) == getattr(model, "thinning_recipes", [])
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in loaded.parameters()]


def test_thinning_took_something_of_the_factors(tmp_path):
    model = model_of()
    factored_then_thinned(model)
    assert model.conv2.core.weight.shape == (8, 6, 5, 5)
    assert model.conv2.last.weight.shape == (50, 8, 1, 1)
    other = model_of()
    all_in_turns(other)
    assert other.conv2.first.weight.shape == (4, 15, 5, 5)
    assert [recipe.after_thinnings for recipe in factorizations_of(other)] == [1, 2]


def test_an_optimizer_that_is_given_goes_on_with_the_factors(tmp_path):
    model = model_of()
    factor(model)
    path = saved(model, tmp_path)
    fresh = model_of()
    optimizer = torch.optim.Adam(fresh.parameters())
    load_checkpoint(fresh, path, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in fresh.parameters()]


def test_a_model_that_has_gone_part_of_the_way_goes_the_rest(tmp_path):
    model = model_of()
    thin(model, "conv1.weight", 5)
    halfway = copy.deepcopy(model)
    factorize(model, {"conv2": {"rank": 6}})
    load_state(halfway, read_checkpoint(saved(model, tmp_path)))
    assert torch.equal(halfway.eval()(X), model.eval()(X))


def test_files_of_models_that_are_not_factored_have_no_trace_of_it(tmp_path):
    path = saved(model_of(), tmp_path)
    assert "factorization_recipes" not in torch.load(path, weights_only=True)
    assert read_checkpoint(path).factorization_recipes == ()


def refused(model, path):
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(CheckpointError) as error:
        load_state(model, read_checkpoint(path))
    assert [name for name, _ in model.named_modules()] == names
    return str(error.value).removeprefix(f"{path}: ")


def test_a_model_that_was_factored_otherwise_is_refused(tmp_path):
    model, other = model_of(), model_of()
    factor(model)
    factorize(other, {"conv2": {"rank": 6}})
    text = "the model has been thinned or factored otherwise than its own; give a model that is as it was created"
    assert refused(other, saved(model, tmp_path)) == text


def test_a_checkpoint_from_before_is_refused_by_a_factored_model(tmp_path):
    model = model_of()
    path = saved(model, tmp_path)
    factorize(model, {"conv2": {"rank": 6}})
    text = refused(model, path)
    assert text.startswith("is of the model before it was factored: ")
    assert text.endswith("; create the model anew, or give a later checkpoint")


@pytest.fixture(scope="module")
def factored_file(tmp_path_factory):
    model = model_of()
    factor(model)
    return saved(model, tmp_path_factory.mktemp("factored"))


def forged(path, folder, change):
    document = torch.load(path, weights_only=True)
    change(document["factorization_recipes"])
    torch.save(document, folder / path.name)
    return folder / path.name


def within(name, **changes):
    return lambda recipes: recipes[0]["layers"][name].update(changes)


PLACE = "factorization_recipes[0]"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda recipes: recipes.append(3), "'factorization_recipes[1]' must be a dict, got int 3"),
        (
            lambda recipes: recipes[0].pop("layers"),
            f"{PLACE}.layers: must be a dict by name of a layer, got None",
        ),
        (lambda recipes: recipes[0].update(kept=[3]), f"{PLACE}.kept: must be a list of names, got [3]"),
        (
            lambda recipes: recipes[0].update(after_thinnings=-1),
            f"{PLACE}.after_thinnings: must be a whole number from 0, got -1",
        ),
        (
            lambda recipes: recipes[0].update(after_thinnings=1),
            f"{PLACE}.after_thinnings: must be 0 to 0, got 1",
        ),
        (
            within("fc2", form="cp"),
            f"{PLACE}.layers['fc2'].form: must be one of svd, channel, spatial, tucker2, got 'cp'",
        ),
        (
            within("fc2", rank=[0]),
            f"{PLACE}.layers['fc2'].rank: must be a list of 1 whole numbers from 1, got [0]",
        ),
        (
            within("fc2", rank=[2, 3]),
            f"{PLACE}.layers['fc2'].rank: must be a list of 1 whole numbers from 1, got [2, 3]",
        ),
        (
            within("conv2", sparse=True),
            f"{PLACE}.layers['conv2'].sparse: must be true or false, and true of svd and channel only, got True",
        ),
        (
            within("fc2", code="x"),
            f"{PLACE}.layers['fc2']: 'code' is unknown; there are form, rank, shape and sparse",
        ),
        (
            within("fc2", rank=[2**30]),
            f"{PLACE}: the model cannot be factored as the checkpoint's was: factorization: 'fc2': rank must be 1 "
            "to 10, got 1073741824",
        ),
        (
            within("fc2", shape=[10, 501]),
            f"{PLACE}: the model cannot be factored as the checkpoint's was: factorization: 'fc2' has a weight of "
            "shape (10, 500), the recipe is of (10, 501); the recipe is of another model",
        ),
        (
            lambda recipes: recipes[0]["layers"].update({"relu1": recipes[0]["layers"]["fc2"]}),
            f"{PLACE}: the model cannot be factored as the checkpoint's was: factorization: 'relu1' cannot be "
            "factored: it is a ReLU; Linear, Conv1d and Conv2d can be",
        ),
        (
            lambda recipes: recipes[0]["layers"].update({"fc9": recipes[0]["layers"]["fc2"]}),
            f"{PLACE}: the model cannot be factored as the checkpoint's was: factorization: the model has no layer "
            "'fc9'; the recipe is of another model",
        ),
    ],
)
def test_forged_recipes_are_refused_with_their_place(factored_file, tmp_path, change, text):
    path = forged(factored_file, tmp_path, change)
    model = model_of()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, path)
    assert str(error.value) == f"{path}: {text}"
    assert [name for name, _ in model.named_modules()] == names


def test_a_failed_load_leaves_the_optimizer_alone(factored_file, tmp_path):
    def spoil(recipes):
        recipes.append({"layers": {}, "kept": [], "after_thinnings": 0})
        recipes[1]["layers"] = {"fc9": recipes[0]["layers"]["fc2"]}

    path = forged(factored_file, tmp_path, spoil)
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(CheckpointError, match=r"factorization_recipes\[1\]"):
        load_checkpoint(model, path, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert repr(model) == repr(model_of())


def test_factored_models_are_exported_and_agree_with_onnxruntime():
    model = model_of()
    factor(model)
    inputs = torch.randn(1, 1, 28, 28)
    parity = check_onnx(onnx_bytes(model, inputs), model, inputs)
    assert parity.argmax_agreement == 1
    assert parity.max_difference < 1e-4
