import pytest
import torch
from torch import nn

from distiller.errors import UsageError
from distiller.models import RNNModel
from distiller.names import named_parameters


def test_parameters_have_the_names_of_the_pruning_schedules():
    assert [name for name, _ in named_parameters(RNNModel(11, 4, 5))] == [
        "encoder.weight",
        *(f"rnn.{kind}_{source}_l0" for kind in ("weight", "bias") for source in ("ih", "hh")),
        *(f"rnn.{kind}_{source}_l1" for kind in ("weight", "bias") for source in ("ih", "hh")),
        "decoder.weight",
        "decoder.bias",
    ]


def test_the_large_tied_model_has_the_weights_of_distillers_results():
    with torch.device("meta"):
        model = RNNModel(33_278, 1500, 1500, dropout=0.65, tied=True)
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == 85_917_000


def test_the_defaults_are_those_of_the_example():
    with torch.device("meta"):
        model = RNNModel(10)
    assert (model.encoder.embedding_dim, model.rnn.hidden_size, model.rnn.num_layers) == (200, 200, 2)
    assert model.drop.p == model.rnn.dropout == 0.2
    assert model.decoder.weight is not model.encoder.weight


def test_scores_are_given_for_each_step_and_the_state_goes_on():
    model = RNNModel(11, 4, 5, nlayers=3).eval()
    words = torch.randint(11, (7, 2))
    scores, (h, c) = model(words, model.init_hidden(2))
    assert scores.shape == (7, 2, 11)
    assert h.shape == c.shape == (3, 2, 5)

    first, state = model(words[:3], model.init_hidden(2))
    rest, _ = model(words[3:], state)
    torch.testing.assert_close(torch.cat((first, rest)), scores)


def test_scores_are_those_of_the_equations_of_an_lstm():
    model = RNNModel(5, 3, 4, nlayers=1).eval()
    words = torch.tensor([[1], [4]])
    scores, _ = model(words, model.init_hidden(1))
    p = dict(model.named_parameters())
    h = c = torch.zeros(1, 4)
    for step in range(2):
        gates = p["encoder.weight"][words[step]] @ p["rnn.weight_ih_l0"].T + h @ p["rnn.weight_hh_l0"].T
        i, f, g, o = (gates + p["rnn.bias_ih_l0"] + p["rnn.bias_hh_l0"]).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        torch.testing.assert_close(scores[step], h @ p["decoder.weight"].T + p["decoder.bias"])


def test_embedding_and_decoder_start_uniform_in_a_tenth():
    model = RNNModel(2000, 20, 20)
    for weight in (model.encoder.weight, model.decoder.weight):
        assert 0.099 < weight.abs().max() <= 0.1
        # The standard deviation of U(-a, a) is a / sqrt(3).
        assert abs(weight.std().item() - 0.1 / 3**0.5) < 1e-3
    assert not model.decoder.bias.any()


def test_tied_weights_are_one_tensor_and_stay_so():
    first, second = (RNNModel(11, 4, 4, tied=True).eval() for _ in range(2))
    assert first.decoder.weight is first.encoder.weight
    assert "decoder.weight" not in dict(named_parameters(first))
    second.load_state_dict(first.state_dict())
    assert second.decoder.weight is second.encoder.weight
    words = torch.randint(11, (3, 2))
    assert torch.equal(first(words, first.init_hidden(2))[0], second(words, second.init_hidden(2))[0])


def test_tied_weights_of_two_sizes_are_refused():
    with pytest.raises(UsageError) as caught:
        RNNModel(11, 4, 5, tied=True)
    assert str(caught.value) == (
        "RNNModel: tied weights need emsize equal to nhid, got 4 and 5; make them equal or leave tied out"
    )


def test_dropout_acts_in_training_only():
    model = RNNModel(11, 8, 8, dropout=0.5)
    words = torch.randint(11, (3, 2))
    dropped = model.train()(words, model.init_hidden(2))[0]
    model.eval()
    full = model(words, model.init_hidden(2))[0]
    assert torch.equal(full, model(words, model.init_hidden(2))[0])
    assert not torch.equal(full, dropped)


def test_hidden_state_is_of_the_type_of_the_weights():
    model = RNNModel(11, 4, 5).double()
    assert {state.dtype for state in model.init_hidden(2)} == {torch.float64}


def test_the_model_learns():
    torch.manual_seed(0)
    model = RNNModel(6, 8, 8, nlayers=1, dropout=0.0)
    words = torch.arange(24).remainder(6).unsqueeze(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        scores, _ = model(words[:-1], model.init_hidden(1))
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), words[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
