import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

from distiller.errors import UsageError
from distiller.functional_modules.lstm import DistillerLSTM, convert_model_to_distiller_lstm
from distiller.graph import leaf_modules
from distiller.models.word_language_model import RNNModel

T, N, IN, H = 4, 5, 3, 6


def close(expected, got):
    assert expected.shape == got.shape
    assert (expected - got).abs().max() <= 1e-6 * expected.abs().max()


def assert_same(lstm, x, h=None):
    (expected, state), (got, own_state) = lstm(x, h), DistillerLSTM.from_pytorch_impl(lstm)(x, h)
    if isinstance(x, torch.Tensor):
        close(expected, got)
    else:
        close(expected.data, got.data)
        for one, other in zip(expected[1:], got[1:], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    for one, other in zip(state, own_state, strict=True):
        close(one, other)


def state(layers, batch=N):
    return torch.randn(layers, batch, H), torch.randn(layers, batch, H)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_states_are_those_of_torch(layers, bidirectional, batch_first, bias):
    lstm = nn.LSTM(IN, H, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
    x = torch.randn(N, T, IN) if batch_first else torch.randn(T, N, IN)
    assert_same(lstm, x)
    assert_same(lstm, x, state(layers * (1 + bidirectional)))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_sequence_without_a_batch_is_that_of_torch(bidirectional):
    lstm, x = nn.LSTM(IN, H, 2, bidirectional=bidirectional, batch_first=True), torch.randn(T, IN)
    assert_same(lstm, x)
    assert_same(lstm, x, tuple(s[:, 0] for s in state(2 * (1 + bidirectional))))


@pytest.mark.parametrize("lengths", [[4, 4, 3, 1, 1], [1, 4, 2, 4, 3], [2, 2, 2, 2, 2]])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("is_sorted", [False, True])
def test_packed_sequences_are_those_of_torch(lengths, bidirectional, is_sorted):
    lengths = sorted(lengths, reverse=True) if is_sorted else lengths
    lstm = nn.LSTM(IN, H, 2, bidirectional=bidirectional)
    x = pack_padded_sequence(torch.randn(T, N, IN), torch.tensor(lengths), enforce_sorted=is_sorted)
    assert_same(lstm, x)
    assert_same(lstm, x, state(2 * (1 + bidirectional)))


def test_dropout_drops_what_torch_drops():
    lstm = nn.LSTM(IN, H, 3, dropout=0.5)
    own, x = DistillerLSTM.from_pytorch_impl(lstm), torch.randn(T, N, IN)
    torch.manual_seed(1)
    expected = lstm(x)[0]
    torch.manual_seed(1)
    close(expected, own(x)[0])
    close(lstm.eval()(x)[0], own.eval()(x)[0])


def test_gradients_are_those_of_torch():
    lstm = nn.LSTM(IN, H, 2, bidirectional=True)
    own, x = DistillerLSTM.from_pytorch_impl(lstm), torch.randn(T, N, IN)
    lstm(x)[0].square().sum().backward()
    own(x)[0].square().sum().backward()
    torch.testing.assert_close(own.cells_reverse[0].fc_gate_h.weight.grad, lstm.weight_hh_l0_reverse.grad)
    torch.testing.assert_close(own.cells[1].fc_gate_x.bias.grad, lstm.bias_ih_l1.grad)


def test_type_1_runs_two_stacks_and_joins_them_at_the_end():
    own = DistillerLSTM(IN, H, 2, bidirectional=True, bidirectional_type=1, dropout=0.0)
    ahead, back = nn.LSTM(IN, H, 2), nn.LSTM(IN, H, 2)
    for layer in range(2):
        own.cells[layer].write_to(ahead, f"_l{layer}")
        own.cells_reverse[layer].write_to(back, f"_l{layer}")
    x, (h, c) = torch.randn(T, N, IN), state(4)
    output, (hidden, cell) = own(x, (h, c))
    forth, (forth_hidden, _) = ahead(x, (h[::2].contiguous(), c[::2].contiguous()))
    reverse, (_, reverse_cell) = back(x.flip(0), (h[1::2].contiguous(), c[1::2].contiguous()))
    close(torch.cat([forth, reverse.flip(0)], -1), output)
    close(forth_hidden, hidden[::2])
    close(reverse_cell, cell[1::2])


def test_type_1_with_one_layer_is_that_of_torch():
    own = DistillerLSTM(IN, H, 1, bidirectional=True, bidirectional_type=1)
    x = torch.randn(T, N, IN)
    close(own.to_pytorch_impl()(x)[0], own(x)[0])


def test_type_1_with_several_layers_is_not_in_torch():
    own = DistillerLSTM(IN, H, 2, bidirectional=True, bidirectional_type=1)
    with pytest.raises(UsageError) as error:
        own.to_pytorch_impl()
    assert str(error.value) == (
        "DistillerLSTM: PyTorch has no bidirectional LSTM of type 1 with several layers; keep it"
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_there_and_back_keeps_parameters_settings_and_mode(bidirectional, bias):
    lstm = (
        nn.LSTM(IN, H, 2, bias=bias, dropout=0.3, batch_first=True, bidirectional=bidirectional)
        .double()
        .eval()
    )
    lstm.weight_hh_l1.requires_grad_(False)
    back = DistillerLSTM.from_pytorch_impl(lstm).to_pytorch_impl()
    assert repr(back) == repr(lstm)
    assert not back.training
    for (name, one), (other_name, other) in zip(
        lstm.named_parameters(), back.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)
        assert one is not other
        assert one.requires_grad == other.requires_grad


def test_each_cell_has_modules_of_its_own():
    own = DistillerLSTM(IN, H, 2)
    leaves = leaf_modules(own)
    assert len({id(module) for module in leaves.values()}) == 25
    assert [name for name in leaves if name.startswith("cells.1.")] == [
        f"cells.1.{name}"
        for name in (
            "fc_gate_x fc_gate_h eltwiseadd_gate act_i act_f act_g act_o eltwisemult_cell_forget "
            "eltwisemult_cell_input eltwiseadd_cell act_h eltwisemult_hidden"
        ).split()
    ]


def test_defaults_are_distillers():
    own = DistillerLSTM(IN, H, 1)
    assert (own.bias, own.batch_first, own.dropout.p, own.bidirectional, own.bidirectional_type) == (
        True, False, 0.5, False, 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bidirectional_type": 3}, "DistillerLSTM: bidirectional_type must be 1 or 2, got 3"),
        ({"num_layers": 0}, "DistillerLSTM: num_layers must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError) as error:
        DistillerLSTM(IN, H, **{"num_layers": 1, **settings})
    assert str(error.value) == message


def test_the_word_model_gives_the_same_and_keeps_its_interface():
    model = RNNModel(20, H, H, 2, tied=True).eval()
    words, hidden = torch.randint(20, (T, N)), model.init_hidden(N)
    expected, (h, c) = model(words, hidden)
    assert convert_model_to_distiller_lstm(model) is model
    got, (own_h, own_c) = model(words, model.init_hidden(N))
    for one, other in ((expected, got), (h, own_h), (c, own_c)):
        close(one, other)
    model.rnn.flatten_parameters()
    assert "rnn.cells.1.fc_gate_h.weight" in model.state_dict()
    assert not any("weight_hh" in key for key in model.state_dict())


def test_a_shared_lstm_stays_shared_and_keeps_its_hooks():
    lstm, seen = nn.LSTM(H, H), []
    lstm.register_forward_hook(lambda *args: seen.append(args))
    model = nn.ModuleDict({"a": lstm, "b": lstm, "c": nn.LSTM(H, H)})
    convert_model_to_distiller_lstm(model)
    assert isinstance(model["a"], DistillerLSTM)
    assert model["a"] is model["b"]
    assert model["c"] is not model["a"]
    model["b"](torch.randn(T, N, H))
    assert len(seen) == 1


def test_a_model_that_is_an_lstm_is_returned_converted():
    assert isinstance(convert_model_to_distiller_lstm(nn.LSTM(IN, H)), DistillerLSTM)


def test_what_has_no_counterpart_is_refused():
    with pytest.raises(UsageError) as error:
        convert_model_to_distiller_lstm(nn.Sequential(nn.LSTM(IN, H, proj_size=2)))
    assert str(error.value) == (
        "0: an LSTM with projections (proj_size) has no DistillerLSTM; keep it as it is"
    )
    with pytest.raises(
        UsageError, match="^0: the LSTM's parameters are parametrized and cannot be taken over; "
    ):
        convert_model_to_distiller_lstm(
            nn.Sequential(parametrizations.weight_norm(nn.LSTM(IN, H), "weight_hh_l0"))
        )


def test_an_lstm_with_a_forward_of_its_own_is_refused():
    class Odd(nn.LSTM):
        def forward(self, *args):
            return super().forward(*args)

    with pytest.raises(UsageError, match="^DistillerLSTM: a Odd computes in its own way; keep it as it is$"):
        DistillerLSTM.from_pytorch_impl(Odd(IN, H))


def test_its_hidden_state_is_zeros_for_every_layer_and_direction():
    h, c = DistillerLSTM(IN, H, 2, bidirectional=True).double().init_hidden(N)
    assert h.shape == c.shape == (4, N, H)
    assert h.dtype == torch.float64
    assert not h.any()
    assert h is not c
