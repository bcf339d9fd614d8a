"""Differences made by hand: a file is compared with another model than its own."""

from __future__ import annotations

import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from distiller.errors import DistillerError
from distiller.export.example_batches import batch_of
from distiller.export.onnx_parity import check_onnx, open_session


def file(scale: float, shape=("batch", 3)) -> bytes:
    """The ONNX model y = scale * x, written by hand."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    factor = helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])
    node = helper.make_node("Mul", ["x", "scale"], ["y"])
    graph = helper.make_graph([node], "scaled", [x], [y], [factor])
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


class Scaled(nn.Module):
    """y = scale * x"""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return self.scale * x


def test_the_difference_is_measured_relative_to_the_largest_output():
    data, x = file(1.0), torch.tensor([[1.0, 4.0, -8.0]])
    parity = check_onnx(data, Scaled(1.0 + 2**-15), x, batch_sizes=(1, 2))
    assert parity.max_difference == 8 * 2**-15
    assert parity.relative_difference == pytest.approx(2**-15, rel=1e-3)
    assert (parity.batch_sizes, parity.argmax_agreement) == ((1, 2), 1)


def test_another_models_file_is_refused_with_the_measured_difference():
    data = file(1.0)
    with pytest.raises(DistillerError) as error:
        check_onnx(data, Scaled(2.0), torch.tensor([[1.0, 4.0, -8.0]]))
    assert str(error.value) == (
        "ONNX model: onnxruntime differs from the model by 8, 0.5 of the largest output (allowed: 0.0001), "
        "on batches of 1 and 3"
    )


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0])
def test_what_is_no_number_or_all_zero_never_agrees_with_numbers(scale):
    data = file(1.0)
    with pytest.raises(DistillerError, match="differs from the model by"):
        check_onnx(data, Scaled(scale), torch.ones(1, 3))


@pytest.mark.parametrize("scale", [float("inf"), 0.0])
def test_the_same_infinities_and_zeros_agree(scale):
    data = file(scale)
    assert check_onnx(data, Scaled(scale), torch.ones(1, 3)).relative_difference == 0


def test_a_file_for_one_batch_size_is_found_out(tmp_path):
    (tmp_path / "m.onnx").write_bytes(file(1.0, (2, 3)))
    with pytest.raises(DistillerError, match=r"m\.onnx: onnxruntime cannot run it: .*invalid dimensions"):
        check_onnx(tmp_path / "m.onnx", Scaled(1.0), torch.ones(2, 3))


def test_a_file_of_other_inputs_or_outputs_is_told():
    x = torch.ones(2, 3)
    data = file(1.0)
    with pytest.raises(DistillerError, match="ONNX model: takes 1 inputs, got 2; is it of this model"):
        check_onnx(data, nn.Bilinear(3, 3, 3), (x, x))
    with pytest.raises(DistillerError, match=r"gives outputs of shapes \[\(1, 3\)\], the model \[\(1, 5\)\]"):
        check_onnx(data, nn.Linear(3, 5), x)


def test_what_is_no_onnx_file_is_told(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    for name in ("m.onnx", "none.onnx"):
        with pytest.raises(DistillerError, match=f"{name}: onnxruntime cannot read it: "):
            open_session(tmp_path / name)


def test_a_session_may_be_of_one_thread():
    session = open_session(file(1.0), threads=1)
    assert session.get_session_options().intra_op_num_threads == 1


def test_samples_are_taken_in_turn_and_shifted_when_they_are_taken_again():
    x = torch.arange(8).reshape(2, 4)
    (batch,) = batch_of((x,), 5, 0)
    assert batch.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [2, 3, 0, 1], [6, 7, 4, 5], [0, 1, 2, 3]]
    (columns,) = batch_of((x,), 2, 1)
    assert columns.tolist() == [[0, 1], [4, 5]]
    assert batch_of((x, "kept", torch.tensor(3)), 2, 0)[1:] == ("kept", torch.tensor(3))
