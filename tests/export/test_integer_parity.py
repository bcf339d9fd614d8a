"""Comparison of a file of integers with a model, on files written down by hand."""

from __future__ import annotations

import onnx.parser
import pytest
import torch
from torch import nn

from distiller.errors import DistillerError, UsageError
from distiller.export.integer_parity import compare_integer, output_scale

QDQ = """<ir_version: 10, opset_import: ["" : 18]>
g (float[n, 3] input) => (float[n, 3] output) <float s = {0.5}, uint8 z = {128}> {
   q = QuantizeLinear (input, s, z)
   output = DequantizeLinear (q, s, z)
}"""
CONTENT = onnx.parser.parse_model(QDQ).SerializeToString()
ROWS = torch.tensor([[1.0, 2.0, 0.0], [5.0, 2.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.5]])


class Shifted(nn.Module):
    """The identity, but the last element of the last row is a step less."""

    def forward(self, x):
        y = x.clone()
        y[-1, -1] -= 0.5
        return y


def test_decisions_accuracies_and_steps_are_counted_over_batches():
    labels = torch.tensor([1, 0, 1, 2])
    parity = compare_integer(Shifted(), CONTENT, [(ROWS[:2], labels[:2]), (ROWS[2:], labels[2:])], threads=1)
    # batches end with rows 1 and 3; in row 3 the model finds 1 and 1 where the file has 1 and 1.5
    assert (parity.samples, parity.agreeing, parity.labelled) == (4, 3, 4)
    assert (parity.simulation_correct, parity.integer_correct) == (3, 4)
    assert (parity.agreement, parity.simulation_accuracy, parity.integer_accuracy) == (0.75, 0.75, 1.0)
    assert (parity.max_difference, parity.output_scale, parity.max_steps) == (0.5, 0.5, 1.0)


def test_without_labels_there_is_no_accuracy(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(CONTENT)
    parity = compare_integer(nn.Identity(), path, iter(ROWS.split(3)))
    assert (parity.samples, parity.agreeing, parity.labelled) == (4, 4, 0)
    assert parity.simulation_accuracy is None
    assert parity.integer_accuracy is None
    assert parity.max_steps == 0


def test_of_equal_elements_the_first_decides_in_both():
    parity = compare_integer(nn.Identity(), CONTENT, [torch.zeros(5, 3)])
    assert parity.agreeing == 5


def test_modes_are_as_before():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    model[0].eval()
    assert compare_integer(model, CONTENT, [ROWS]).agreement == 1  # dropout would be seen
    assert [module.training for module in model.modules()] == [True, False, True]


def test_a_result_that_is_no_number_differs_without_end():
    class Broken(nn.Module):
        def forward(self, x):
            return x * float("nan")

    assert compare_integer(Broken(), CONTENT, [ROWS]).max_difference == float("inf")


@pytest.mark.parametrize(
    "model,batches,message",
    [
        (nn.Identity(), [], "compare_integer: there are no samples to compare on; give at least one batch"),
        (
            nn.Identity(),
            [(ROWS, torch.tensor([1, 2]))],
            "compare_integer: there must be a label for each row of the output, got 2 for 4 rows",
        ),
        (
            nn.Linear(3, 2),
            [ROWS],
            "ONNX model: onnxruntime gives an output of shape (4, 3), the model (4, 2); is it of this model?",
        ),
        (nn.Bilinear(3, 3, 3), [(ROWS, ROWS)], "ONNX model: takes 1 inputs, got 2; is it of this model?"),
    ],
)
def test_what_cannot_be_compared_is_told(model, batches, message):
    with pytest.raises(DistillerError) as caught:
        compare_integer(model, CONTENT, batches)
    assert str(caught.value) == message
    assert isinstance(caught.value, UsageError) == message.startswith("compare_integer")


def test_an_input_of_another_shape_is_told():
    with pytest.raises(DistillerError, match=r"^ONNX model: onnxruntime cannot run it: "):
        compare_integer(nn.Identity(), CONTENT, [torch.zeros(2, 4)])


def test_an_output_that_is_on_no_grid_has_no_steps():
    text = QDQ.replace("output = Deq", "d = Deq").replace("(q, s, z)\n}", "(q, s, z)\n output = Relu (d)\n}")
    content = onnx.parser.parse_model(text).SerializeToString()
    assert output_scale(content) is None
    assert output_scale(CONTENT) == 0.5
    assert compare_integer(nn.ReLU(), content, [ROWS]).max_steps is None
