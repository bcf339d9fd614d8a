"""One step of an LSTM, each of its operations a module.

    i, f, g, o = W_x x + b_x + W_h h + b_h              (i, f, o through a sigmoid, g through tanh)
    c' = f c + i g;   h' = o tanh(c')

Knows nothing about sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distiller.modules import EltwiseAdd, EltwiseMult

State = tuple[Tensor, Tensor]


class DistillerLSTMCell(nn.Module):
    """An nn.LSTMCell whose operations are modules.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden and of the cell state.
        bias: whether both linear layers have a bias; default True.

    Source: Hochreiter & Schmidhuber, "Long Short-Term Memory", 1997; with a forget gate: Gers et al., 2000.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.fc_gate_x = nn.Linear(input_size, 4 * hidden_size, bias)
        self.fc_gate_h = nn.Linear(hidden_size, 4 * hidden_size, bias)
        self.eltwiseadd_gate = EltwiseAdd()
        self.act_i = nn.Sigmoid()
        self.act_f = nn.Sigmoid()
        self.act_g = nn.Tanh()
        self.act_o = nn.Sigmoid()
        self.eltwisemult_cell_forget = EltwiseMult()
        self.eltwisemult_cell_input = EltwiseMult()
        self.eltwiseadd_cell = EltwiseAdd()
        self.act_h = nn.Tanh()
        self.eltwisemult_hidden = EltwiseMult()
        self.init_weights()

    def init_weights(self) -> None:
        """Uniform within 1 / sqrt(hidden_size), as PyTorch's."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def init_hidden(self, batch_size: int, device: torch.device | str | None = None) -> State:
        """Zeros for hidden and cell state, each (batch_size, hidden_size); default device the weights'."""
        zeros = self.fc_gate_h.weight.new_zeros(batch_size, self.hidden_size, device=device)
        return zeros, zeros.clone()

    def forward(self, x: Tensor, h: State | None = None) -> State:
        """The state after a step.

        Args:
            x: (batch, input_size).
            h: hidden and cell state before, each (batch, hidden_size); default zeros.

        Returns:
            Hidden and cell state.
        """
        return self.step(self.fc_gate_x(x), self.init_hidden(x.shape[0], x.device) if h is None else h)

    def step(self, gates_x: Tensor, h: State) -> State:
        """As `forward`, for an input that went through `fc_gate_x` already: (batch, 4 * hidden_size)."""
        hidden, cell = h
        gates = self.eltwiseadd_gate(gates_x, self.fc_gate_h(hidden))
        i, f, g, o = torch.chunk(gates, 4, dim=1)
        i, f, g, o = self.act_i(i), self.act_f(f), self.act_g(g), self.act_o(o)
        cell = self.eltwiseadd_cell(self.eltwisemult_cell_forget(f, cell), self.eltwisemult_cell_input(i, g))
        return self.eltwisemult_hidden(o, self.act_h(cell)), cell

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias}"

    @classmethod
    def from_pytorch_impl(cls, lstmcell: nn.LSTMCell) -> DistillerLSTMCell:
        """A cell with copies of the parameters of an nn.LSTMCell."""
        cell = cls(lstmcell.input_size, lstmcell.hidden_size, lstmcell.bias)
        cell.read_from(lstmcell, "")
        return cell.train(lstmcell.training)

    def to_pytorch_impl(self) -> nn.LSTMCell:
        """An nn.LSTMCell with copies of this one's parameters."""
        weight = self.fc_gate_x.weight
        cell = nn.LSTMCell(
            self.input_size, self.hidden_size, self.bias, device=weight.device, dtype=weight.dtype
        )
        self.write_to(cell, "")
        return cell.train(self.training)

    def read_from(self, source: nn.Module, suffix: str) -> None:
        """Copy the parameters `weight_ih<suffix>`, ... of a module of PyTorch."""
        for layer, kind in ((self.fc_gate_x, "ih"), (self.fc_gate_h, "hh")):
            for name in ("weight", "bias") if self.bias else ("weight",):
                given: Tensor = getattr(source, f"{name}_{kind}{suffix}")
                setattr(layer, name, nn.Parameter(given.detach().clone(), given.requires_grad))

    def write_to(self, target: nn.Module, suffix: str) -> None:
        """Copy the parameters into `weight_ih<suffix>`, ... of a module of PyTorch."""
        for layer, kind in ((self.fc_gate_x, "ih"), (self.fc_gate_h, "hh")):
            for name in ("weight", "bias") if self.bias else ("weight",):
                given = getattr(layer, name)
                with torch.no_grad():
                    getattr(target, f"{name}_{kind}{suffix}").copy_(given).requires_grad_(given.requires_grad)
