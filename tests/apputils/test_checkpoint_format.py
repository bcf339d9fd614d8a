from collections import OrderedDict
from enum import Enum
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distiller.apputils.checkpoint_format import FORMAT, FORMAT_VERSION, document_of, optimizer_param_names
from distiller.apputils.checkpoint_schema import _Extras
from distiller.apputils.legacy_checkpoint import load_plain
from distiller.errors import CheckpointError


class Colour(Enum):
    RED = 1


def document(model=None, **kwargs):
    return document_of(0, "tiny", model or nn.Linear(2, 2), **kwargs)


def test_document_says_its_format_and_version():
    assert (document()["format"], document()["format_version"]) == (FORMAT, FORMAT_VERSION)


@pytest.mark.parametrize(
    ("extras", "place", "kind"),
    [
        ({"best": Colour.RED}, "extras.best", "Colour"),
        ({"scores": [1, 2, object()]}, "extras.scores[2]", "builtins.object"),
        ({"a": {"b": ({"c": PurePosixPath("x")},)}}, "extras.a.b[0].c", "pathlib.PurePosixPath"),
        ({"f": len}, "extras.f", "builtins.builtin_function_or_method"),
        ({"s": {1, 2}}, "extras.s", "builtins.set"),
        ({"x": np.zeros(2)}, "extras.x", "numpy.ndarray"),
        ({"x": nn.Linear(1, 1)}, "extras.x", "torch.nn.modules.linear.Linear"),
        ({"x": torch.float32}, "extras.x", "torch.dtype"),
        ({"x": b"1"}, "extras.x", "builtins.bytes"),
        ({"x": True, "y": Ellipsis}, "extras.y", "builtins.ellipsis"),
    ],
)
def test_extras_that_are_not_plain_data_are_refused_with_their_place(extras, place, kind):
    with pytest.raises(CheckpointError) as caught:
        document(extras=extras)
    text = str(caught.value)
    assert text.startswith(f"save_checkpoint: '{place}' is a ")
    assert kind in text
    assert text.endswith("which is not plain data; use numbers, strings, tensors, lists, tuples and dicts")


def test_extras_must_be_a_dict():
    with pytest.raises(CheckpointError) as caught:
        document(extras=[1])
    assert str(caught.value) == "save_checkpoint: 'extras' must be a dict, got a list"


def test_keys_that_are_not_plain_are_refused():
    with pytest.raises(CheckpointError) as caught:
        document(extras={"a": {(1, 2): 3}})
    assert str(caught.value) == "save_checkpoint: 'extras.a' has a tuple for a key; use strings or numbers"


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(2).to_sparse(), torch.empty(2, device="meta")],
    ids=["sparse", "meta"],
)
def test_tensors_that_could_not_be_read_back_are_refused(tensor):
    with pytest.raises(CheckpointError) as caught:
        document(extras={"x": tensor})
    assert str(caught.value) == (
        "save_checkpoint: 'extras.x' is a tensor that is not stored as plain dense numbers"
    )


def test_numpy_numbers_become_pythons():
    extras = document(extras={"top1": np.float64(91.25), "n": np.int32(3), "ok": np.bool_(True)})["extras"]
    assert extras == {"top1": 91.25, "n": 3, "ok": True}
    assert [type(value) for value in extras.values()] == [float, int, bool]


def test_ordered_dicts_and_shapes_become_plain_ones():
    extras = document(extras={"d": OrderedDict(a=1), "shape": torch.Size([1, 2])})["extras"]
    assert (type(extras["d"]), type(extras["shape"])) == (dict, tuple)


def test_scheduler_and_optimizer_states_must_be_plain_too():
    class Scheduler:
        def state_dict(self):
            return {"policies": [{"state": Colour.RED}]}

    with pytest.raises(CheckpointError, match=r"'scheduler\.policies\[0\]\.state' is a "):
        document(scheduler=Scheduler())


def test_arch_and_epoch_are_checked():
    with pytest.raises(CheckpointError) as caught:
        document_of("3", "tiny", nn.Linear(1, 1))  # pyright: ignore
    assert str(caught.value) == "save_checkpoint: 'epoch' must be a whole number, got str '3'"


def test_models_attributes_are_kept_where_it_has_them():
    model = nn.Linear(2, 2)
    assert [document(model)[key] for key in ("dataset", "input_shape", "quantizer")] == [None] * 3
    model.dataset, model.input_shape = "digits", [1, 1, 8, 8]  # pyright: ignore
    model.quantizer_metadata = {"class": "PostTrainLinearQuantizer", "params": {"bits": 8}}  # pyright: ignore
    model.thinning_recipes = [{"modules": {}, "parameters": {}}]  # pyright: ignore
    kept = document(model)
    assert (kept["dataset"], kept["input_shape"]) == ("digits", (1, 1, 8, 8))
    assert kept["quantizer"] == {"class": "PostTrainLinearQuantizer", "params": {"bits": 8}}
    assert kept["thinning_recipes"] == [{"modules": {}, "parameters": {}}]


def test_quantizer_in_extras_takes_the_place_of_the_models():
    model = nn.Linear(2, 2)
    model.quantizer_metadata = {"class": "A"}  # pyright: ignore
    given_extras = {"quantizer_metadata": {"class": "B"}, "top1": 1.0}
    kept = document(model, extras=given_extras)
    assert (kept["quantizer"], kept["extras"]) == ({"class": "B"}, {"top1": 1.0})
    assert set(given_extras) == {"quantizer_metadata", "top1"}


def test_attributes_of_a_wrapped_model_are_found():
    model = nn.Linear(2, 2)
    model.dataset = "digits"  # pyright: ignore
    kept = document(nn.DataParallel(model))
    assert (kept["dataset"], list(kept["state_dict"])) == ("digits", ["weight", "bias"])


def test_optimizer_parameters_are_named_by_group_in_their_own_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    stranger = nn.Parameter(torch.zeros(1))
    groups = [{"params": [model[1].weight, model[0].bias]}, {"params": [stranger]}]
    assert optimizer_param_names(model, torch.optim.SGD(groups, lr=1.0)) == [["1.weight", "0.bias"], [None]]


READ_BY_US = {"quantizer_metadata", *_Extras.model_fields}
"""Extras that must be of a certain form."""
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text().filter(lambda key: key not in READ_BY_US), plain_values, max_size=4))
def test_plain_data_of_any_shape_reads_back_equal(tmp_path_factory, extras):
    file: Path = tmp_path_factory.getbasetemp() / "any.pth.tar"
    torch.save(document(extras=extras), file)
    assert load_plain(file)["extras"] == extras
