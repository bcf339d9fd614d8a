"""An LSTM made of cells whose operations are modules, in place of nn.LSTM, which is one operation.

The step is a Python loop, so that it is slower than PyTorch's; what can be computed for all steps at
once, the product with the input, is.
Knows nothing about quantization.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from distiller.errors import UsageError
from distiller.functional_modules.lstm_cell import DistillerLSTMCell, State
from distiller.functional_modules.replacement import replace_modules
from distiller.modules import Concat
from distiller.names import unwrap


def convert_model_to_distiller_lstm(model: nn.Module) -> nn.Module:
    """Replace every nn.LSTM of a model by a DistillerLSTM with the same parameters, in place.

    The keys of the `state_dict` become `<name>.cells.<layer>.fc_gate_x.weight` and so on. Convert before the
    optimizer is made: the parameters are new ones.

    Args:
        model: changed in place; a wrapper around it is looked through.

    Returns:
        The model; what takes its place if it is an nn.LSTM itself.

    Raises:
        UsageError: an LSTM has projections, a forward of its own, or parameters that are parametrized.
    """
    inner = unwrap(model)
    if isinstance(inner, nn.LSTM):
        return DistillerLSTM.from_pytorch_impl(inner)
    replace_modules(inner, nn.LSTM, _converted)
    return model


class DistillerLSTM(nn.Module):
    """An nn.LSTM made of DistillerLSTMCells: `cells`, and `cells_reverse` of a bidirectional one.

    Args:
        input_size: features of the input.
        hidden_size: features of the states.
        num_layers: number of layers, each reading the outputs of the one before.
        bias: whether the linear layers have a bias; default True.
        batch_first: the batch is dimension 0 of input and output, not 1; default False.
        dropout: share of each layer's outputs but the last's that is dropped in training, 0..1; default 0.5.
        bidirectional: run over the sequence from the end, too; default False.
        bidirectional_type: 1: two stacks of layers, whose outputs are joined at the end; 2 (PyTorch's, the
            default): each layer reads the joined outputs of both directions of the one before.

    Raises:
        UsageError: another type than 1 or 2, or no layer.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.5,
        bidirectional: bool = False,
        bidirectional_type: int = 2,
    ) -> None:
        super().__init__()
        if bidirectional_type not in (1, 2):
            raise UsageError(f"DistillerLSTM: bidirectional_type must be 1 or 2, got {bidirectional_type!r}")
        if num_layers < 1:
            raise UsageError(f"DistillerLSTM: num_layers must be at least 1, got {num_layers}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first = bias, batch_first
        self.bidirectional, self.bidirectional_type = bidirectional, bidirectional_type
        is_joined = bidirectional and bidirectional_type == 2
        sizes = [input_size] + [hidden_size * (1 + is_joined)] * (num_layers - 1)
        self.cells = nn.ModuleList(DistillerLSTMCell(size, hidden_size, bias) for size in sizes)
        self.dropout = nn.Dropout(dropout)
        if bidirectional:
            self.cells_reverse = nn.ModuleList(DistillerLSTMCell(size, hidden_size, bias) for size in sizes)
            self.concats = nn.ModuleList(Concat(-1) for _ in range(num_layers if is_joined else 1))

    def init_hidden(self, batch_size: int, device: torch.device | str | None = None) -> State:
        """Zeros for hidden and cell state, each (layers * directions, batch_size, hidden_size)."""
        count = self.num_layers * (1 + self.bidirectional)
        weight: Tensor = self.cells[0].fc_gate_h.weight  # type: ignore[union-attr,assignment]
        zeros = weight.new_zeros(count, batch_size, self.hidden_size, device=device)
        return zeros, zeros.clone()

    def flatten_parameters(self) -> None:
        """Nothing: there is no one block of parameters, as nn.LSTM has on a GPU."""

    def forward(
        self, x: Tensor | PackedSequence, h: State | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Outputs of the last layer, and the state of all layers after the last step.

        Args:
            x: (steps, batch, input_size), with `batch_first` (batch, steps, input_size), without a batch
                (steps, input_size), or packed.
            h: hidden and cell state before the first step, each (layers * directions, batch, hidden_size),
                a layer's directions beside each other; default zeros.

        Returns:
            (outputs in the form of `x`, with directions * hidden_size features; hidden and cell state).
        """
        if isinstance(x, PackedSequence):
            return self._packed(x, h)
        if x.dim() == 2:
            state = None if h is None else (h[0].unsqueeze(1), h[1].unsqueeze(1))
            output, (hidden, cell) = self._run(x, [1] * x.shape[0], state)
            return output, (hidden.squeeze(1), cell.squeeze(1))
        steps = x.transpose(0, 1) if self.batch_first else x
        output, state = self._run(steps.flatten(0, 1), [steps.shape[1]] * steps.shape[0], h)
        output = output.unflatten(0, (-1, steps.shape[1]))
        return output.transpose(0, 1) if self.batch_first else output, state

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        kind = f", bidirectional_type={self.bidirectional_type}" if self.bidirectional else ""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bias={self.bias}, "
            f"batch_first={self.batch_first}, bidirectional={self.bidirectional}{kind}"
        )

    @classmethod
    def from_pytorch_impl(cls, lstm: nn.LSTM) -> DistillerLSTM:
        """An LSTM with copies of the parameters of an nn.LSTM, in its mode.

        Raises:
            UsageError: it has projections, a forward of its own, or parameters that are parametrized.
        """
        return _converted("DistillerLSTM", lstm)

    def to_pytorch_impl(self) -> nn.LSTM:
        """An nn.LSTM with copies of this one's parameters, in its mode.

        Raises:
            UsageError: bidirectional of type 1 with several layers, which PyTorch does not have.
        """
        if self.bidirectional and self.bidirectional_type == 1 and self.num_layers > 1:
            raise UsageError(
                "DistillerLSTM: PyTorch has no bidirectional LSTM of type 1 with several layers; keep it"
            )
        weight: Tensor = self.cells[0].fc_gate_h.weight  # type: ignore[union-attr,assignment]
        lstm = nn.LSTM(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bias,
            self.batch_first,
            self.dropout.p if self.num_layers > 1 else 0.0,  # PyTorch warns of one that is between no layers
            self.bidirectional,
            device=weight.device,
            dtype=weight.dtype,
        )
        for cell, suffix in self.cells_by_suffix():
            cell.write_to(lstm, suffix)
        return lstm.train(self.training)

    def cells_by_suffix(self) -> list[tuple[DistillerLSTMCell, str]]:
        """Each cell with what the names of its parameters end with in an nn.LSTM: `_l0`, `_l0_reverse`."""
        directions = [(self.cells, "")] + ([(self.cells_reverse, "_reverse")] if self.bidirectional else [])
        return [(cell, f"_l{i}{end}") for cells, end in directions for i, cell in enumerate(cells)]  # type: ignore[misc]

    def _packed(self, x: PackedSequence, h: State | None) -> tuple[PackedSequence, State]:
        if h is not None and x.sorted_indices is not None:
            h = h[0].index_select(1, x.sorted_indices), h[1].index_select(1, x.sorted_indices)
        data, (hidden, cell) = self._run(x.data, x.batch_sizes.tolist(), h)
        if x.unsorted_indices is not None:
            hidden = hidden.index_select(1, x.unsorted_indices)
            cell = cell.index_select(1, x.unsorted_indices)
        return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices), (hidden, cell)

    def _run(self, data: Tensor, sizes: Sequence[int], h: State | None) -> tuple[Tensor, State]:
        """All layers.

        Args:
            data: the steps one after the other, (sum of sizes, input_size).
            sizes: how many sequences are in each step, never more than in the one before.
            h: as `forward`.
        """
        h = self.init_hidden(sizes[0], data.device) if h is None else h
        states = list(zip(*h, strict=True))
        if not self.bidirectional:
            data, after = self._stack(self.cells, data, sizes, states)
        elif self.bidirectional_type == 1:
            ahead, after_ahead = self._stack(self.cells, data, sizes, states[::2])
            back, after_back = self._stack(self.cells_reverse, data, sizes, states[1::2], is_reverse=True)
            data = self.concats[0](ahead, back)
            after = [state for pair in zip(after_ahead, after_back, strict=True) for state in pair]
        else:
            after = []
            for i, (cell, cell_reverse) in enumerate(zip(self.cells, self.cells_reverse, strict=True)):
                data = self.dropout(data) if i else data
                ahead, state = _layer(cell, data, sizes, states[2 * i])
                back, state_back = _layer(cell_reverse, data, sizes, states[2 * i + 1], is_reverse=True)
                data = self.concats[i](ahead, back)
                after += [state, state_back]
        hidden, cell = zip(*after, strict=True)
        return data, (torch.stack(hidden), torch.stack(cell))

    def _stack(
        self,
        cells: nn.ModuleList,
        data: Tensor,
        sizes: Sequence[int],
        states: Sequence[State],
        is_reverse: bool = False,
    ) -> tuple[Tensor, list[State]]:
        """Layers of one direction, one after the other."""
        after = []
        for i, (cell, state) in enumerate(zip(cells, states, strict=True)):
            data, state = _layer(cell, self.dropout(data) if i else data, sizes, state, is_reverse)
            after.append(state)
        return data, after


def _layer(
    cell: nn.Module, data: Tensor, sizes: Sequence[int], start: State, is_reverse: bool = False
) -> tuple[Tensor, State]:
    """One direction of one layer: its outputs, as `data` one after the other, and its last state."""
    assert isinstance(cell, DistillerLSTMCell)
    gates = cell.fc_gate_x(data).split(list(sizes))
    outputs: list[Tensor] = []
    if is_reverse:
        state = start[0][:0], start[1][:0]
        for size, step in zip(reversed(sizes), reversed(gates), strict=True):
            state = _joined(state, (start[0][len(state[0]) : size], start[1][len(state[1]) : size]))
            state = cell.step(step, state)
            outputs.append(state[0])
        return torch.cat(outputs[::-1]), state
    state, ended = start, []
    for size, step in zip(sizes, gates, strict=True):
        if size < len(state[0]):
            ended.append((state[0][size:], state[1][size:]))
            state = state[0][:size], state[1][:size]
        state = cell.step(step, state)
        outputs.append(state[0])
    for end in reversed(ended):
        state = _joined(state, end)
    return torch.cat(outputs), state


def _joined(one: State, other: State) -> State:
    """Two states, one after the other along the batch."""
    if not len(one[0]) or not len(other[0]):
        return one if len(one[0]) else other
    return torch.cat((one[0], other[0])), torch.cat((one[1], other[1]))


def _converted(name: str, lstm: nn.LSTM) -> DistillerLSTM:
    if lstm.proj_size:
        raise UsageError(
            f"{name}: an LSTM with projections (proj_size) has no DistillerLSTM; keep it as it is"
        )
    if type(lstm).forward is not nn.LSTM.forward:
        raise UsageError(f"{name}: a {type(lstm).__name__} computes in its own way; keep it as it is")
    if parametrize.is_parametrized(lstm):
        raise UsageError(
            f"{name}: the LSTM's parameters are parametrized and cannot be taken over; "
            "call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    converted = DistillerLSTM(
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        lstm.bias,
        lstm.batch_first,
        lstm.dropout,
        lstm.bidirectional,
    )
    for cell, suffix in converted.cells_by_suffix():
        cell.read_from(lstm, suffix)
    return converted.train(lstm.training)
