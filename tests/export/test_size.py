import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from torch import nn

from distiller.errors import QuantizationError, UnknownNameError
from distiller.export.size import (
    bitmap_tensor_bytes,
    csr_tensor_bytes,
    dense_bytes,
    dense_tensor_bytes,
    quantized_bytes,
    serialized_bytes,
    sparse_bytes,
)


def with_non_zeros(count: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    tensor = torch.zeros(*shape, dtype=dtype)
    tensor.view(-1)[:count] = 1
    return tensor


# ---------------------------------------------------------------------------- dense


def test_dense_counts_each_tensor_at_its_type():
    state = {
        "weight": torch.zeros(10, 3),  # 120
        "half": torch.zeros(5, dtype=torch.float16),  # 10
        "int8": torch.zeros(7, dtype=torch.int8),  # 7
        "steps": torch.tensor(0),  # 8
        "empty": torch.zeros(0),
    }
    assert dense_bytes(state) == 145


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert dense_bytes(model.state_dict()) == sparse_bytes(model.state_dict()) == 64
    assert quantized_bytes(model.state_dict(), {"1.weight": 8}) == 16 + 5


def test_empty_tensors_are_not_taken_for_each_other():
    assert quantized_bytes({"a": torch.zeros(0), "b": torch.zeros(0)}, {"a": 8, "b": 8}) == 10


# --------------------------------------------------------------------------- sparse


def test_bitmap_is_a_bit_per_element_and_the_values():
    assert bitmap_tensor_bytes(with_non_zeros(10, 9, 9)) == 11 + 40  # ceil(81 / 8)


def test_csr_is_row_pointers_columns_and_values():
    assert csr_tensor_bytes(with_non_zeros(10, 100, 50)) == 101 * 4 + 10 * 2 + 10 * 4


def test_csr_of_a_filter_bank_has_a_row_per_filter():
    assert csr_tensor_bytes(with_non_zeros(10, 16, 3, 5, 5)) == 17 * 4 + 10 * 2 + 10 * 4


def test_csr_of_a_vector_is_one_row():
    assert csr_tensor_bytes(with_non_zeros(1, 1000)) == 2 * 4 + 2 + 4


@pytest.mark.parametrize("columns, index_bytes", [(2**16, 2), (2**16 + 1, 4)])
def test_csr_needs_four_bytes_an_index_past_65536_columns(columns, index_bytes):
    assert csr_tensor_bytes(with_non_zeros(3, 1, columns)) == 8 + 3 * (index_bytes + 4)


def test_csr_agrees_with_scipys_arrays():
    tensor = torch.randn(40, 70).mul_(torch.rand(40, 70) > 0.9)
    arrays = sparse.csr_array(tensor.numpy())
    expected = (
        arrays.data.nbytes + arrays.indptr.astype("int32").nbytes + arrays.indices.astype("uint16").nbytes
    )
    assert csr_tensor_bytes(tensor) == expected


def test_each_tensor_takes_its_smallest_format():
    dense, bitmap, csr = with_non_zeros(100, 10, 10), with_non_zeros(50, 10, 10), with_non_zeros(1, 10, 1000)
    assert sparse_bytes({"dense": dense}) == 400
    assert sparse_bytes({"bitmap": bitmap}) == 13 + 200
    assert sparse_bytes({"csr": csr}) == 11 * 4 + 2 + 4
    assert sparse_bytes({"dense": dense, "bitmap": bitmap, "csr": csr}) == 400 + 213 + 50


@given(st.integers(0, 200))
def test_sparse_never_takes_more_than_dense_and_less_with_fewer_values(count):
    tensor = with_non_zeros(count, 20, 10)
    assert sparse_bytes({"w": tensor}) <= dense_tensor_bytes(tensor)
    if count:
        assert sparse_bytes({"w": with_non_zeros(count - 1, 20, 10)}) <= sparse_bytes({"w": tensor})


# ------------------------------------------------------------------------ quantized


def test_quantized_packs_named_tensors_and_leaves_the_others():
    state = {"w": torch.zeros(10, 5), "b": torch.zeros(10)}
    assert quantized_bytes(state, {"w": 8}) == (50 + 4 + 1) + 40
    assert quantized_bytes(state, {"w": 3}) == (19 + 4 + 1) + 40  # ceil(150 / 8)
    assert quantized_bytes(state, {"w": 16}) == (100 + 4 + 2) + 40
    assert quantized_bytes(state, {}) == dense_bytes(state)


def test_per_channel_has_a_scale_and_zero_point_for_each_output_channel():
    state = {"w": torch.zeros(10, 5)}
    assert quantized_bytes(state, {"w": 8}, per_channel={"w"}) == 50 + 10 * (4 + 1)


def test_quantized_size_of_an_unknown_tensor_is_refused():
    with pytest.raises(UnknownNameError) as error:
        quantized_bytes({"conv1.weight": torch.zeros(2)}, {"conv1.weigth": 8})
    assert str(error.value) == "quantized size: no tensor 'conv1.weigth'; did you mean 'conv1.weight'?"


@pytest.mark.parametrize("bits", [0, -1, 33])
def test_width_outside_of_the_type_is_refused(bits):
    with pytest.raises(QuantizationError) as error:
        quantized_bytes({"w": torch.zeros(2)}, {"w": bits})
    assert str(error.value) == f"quantized size: bits of 'w' must be 1 to 32, got {bits}"


# ----------------------------------------------------------------------- serialized


def test_serialized_is_the_size_of_the_file(tmp_path):
    state = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()
    torch.save(dict(state), tmp_path / "archive")
    written = (tmp_path / "archive").stat().st_size
    # The archive's folder inside the file is named after the file: the same length here.
    assert serialized_bytes(state) == written
    assert serialized_bytes(state) > dense_bytes(state)
