"""Names of files after layers, and files of tensors."""

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.data_loggers.layer_files import layer_file_name, write_tensors
from distiller.errors import StatsError

SAFE = set(string.ascii_letters + string.digits + "._-")


def test_a_name_tells_number_layer_and_part():
    assert layer_file_name(7, "layer1.0.conv1", "output") == "007-layer1.0.conv1-output"


@given(layer=st.text(max_size=400), index=st.integers(0, 99999))
def test_every_file_system_takes_the_name(layer, index):
    name = layer_file_name(index, layer, "output")
    assert set(name) <= SAFE
    assert len(name) <= 140
    assert name[0].isdigit()


def test_layers_whose_names_become_alike_have_names_of_their_own():
    assert layer_file_name(0, "a/b") != layer_file_name(1, "a:b")


def test_what_was_written_is_read_without_running_code(tmp_path):
    content = {"hist": torch.arange(3), "inputs": {0: torch.ones(2)}}
    write_tensors(tmp_path / "x.pt", content)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(found["hist"], content["hist"])
    assert torch.equal(found["inputs"][0], content["inputs"][0])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "missing" / "x.pt"
    with pytest.raises(StatsError) as caught:
        write_tensors(path, {})
    assert str(caught.value) == f"{path}: cannot be written, No such file or directory"
