from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import CheckpointError
from distiller.packing.plain_json import from_json, to_json

ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.integers() | st.just("$tuple") | st.just(math.inf)
PLAIN = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(st.text(), inner)
    ),
    max_leaves=20,
)


def typed(value):
    """A value that is equal to another of the same types only."""
    if isinstance(value, dict):
        return "dict", [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [typed(item) for item in value]
    return type(value).__name__, repr(value)


@given(PLAIN)
def test_plain_data_come_back_through_json(value):
    text = json.dumps(to_json(value, "x", []), allow_nan=False)
    found = from_json(json.loads(text), lambda index: torch.zeros(0))
    assert typed(found) == typed(value)


def test_tensors_are_put_aside_with_their_places():
    tensors: list = []
    weight, bias = torch.ones(2), torch.zeros(1)
    plain = to_json({"a": [weight, {"b": (bias,)}]}, "structure", tensors)
    assert [place for place, _ in tensors] == ["structure.a[0]", "structure.a[1].b[0]"]
    found = from_json(json.loads(json.dumps(plain)), lambda index: tensors[index][1])
    assert found == {"a": [weight, {"b": (bias,)}]}


def test_what_is_no_plain_data_is_refused_by_its_place():
    with pytest.raises(CheckpointError) as error:
        to_json({"extras": [1, {2}]}, "structure", [])
    assert str(error.value) == "pack: 'structure.extras[1]' is a set, which is not plain data"
    deep: list = []
    deep.append(deep)
    with pytest.raises(CheckpointError, match="is nested more than 200 deep$"):
        to_json(deep, "structure", [])


@pytest.mark.parametrize(
    "value",
    [{"$tuple": 1}, {"$what": 1}, {"$float": 1.0}, {"$tensor": "0"}, {"$dict": [[1]]}, {"$dict": [[[1], 2]]},
     {"$dict": [[{"$tuple": [[1]]}, 2]]}, {"$tuple": [], "other": 1}],
    ids=str,
)  # fmt: skip
def test_an_unknown_mark_is_refused(value):
    with pytest.raises(ValueError, match=r"^'\$\w+' is (unknown, or holds something else|not alone)$"):
        from_json(value, lambda index: torch.zeros(0))
