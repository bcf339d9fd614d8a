import numpy as np
import pytest
import torch
from torch import nn

from distiller.functional_modules.lstm_cell import DistillerLSTMCell


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_a_step_by_the_equations():
    cell = DistillerLSTMCell(3, 2).double()
    x, h, c = (torch.randn(4, size, dtype=torch.float64) for size in (3, 2, 2))
    hidden, state = cell(x, (h, c))
    gates = x.numpy() @ cell.fc_gate_x.weight.detach().numpy().T + cell.fc_gate_x.bias.detach().numpy()
    gates += h.numpy() @ cell.fc_gate_h.weight.detach().numpy().T + cell.fc_gate_h.bias.detach().numpy()
    i, f, g, o = np.split(gates, 4, axis=1)
    expected = sigmoid(f) * c.numpy() + sigmoid(i) * np.tanh(g)
    np.testing.assert_allclose(state.detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(hidden.detach().numpy(), sigmoid(o) * np.tanh(expected), rtol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_there_and_back_is_the_cell_of_torch(bias):
    cell = nn.LSTMCell(3, 2, bias=bias).eval()
    own = DistillerLSTMCell.from_pytorch_impl(cell)
    back = own.to_pytorch_impl()
    assert repr(back) == repr(cell)
    assert not own.training
    x = torch.randn(4, 3)
    for expected, got, again in zip(cell(x), own(x), back(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(again, expected)
    own.fc_gate_x.weight.data.zero_()
    assert cell.weight_ih.any()


def test_weights_begin_as_those_of_torch():
    torch.manual_seed(2)
    cell = DistillerLSTMCell(50, 100)
    for parameter in cell.parameters():
        assert 0.095 < parameter.abs().max() <= 0.1


def test_its_hidden_state_is_zeros():
    h, c = DistillerLSTMCell(3, 2).init_hidden(4)
    assert h.shape == c.shape == (4, 2)
    assert not h.any()
    assert h is not c
