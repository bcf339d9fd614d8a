import pytest
import torch
from torch import nn

from distiller.errors import UsageError
from distiller.evaluation_mode import answer, buffers_kept, evaluating


class Stubborn(nn.Module):
    """A model whose own `train` does more than to set modes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout()

    def train(self, mode=True):
        raise AssertionError("called")

    def forward(self, x):
        return self.dropout(self.norm(x))


def modes(model):
    return [module.training for module in model.modules()]


def test_modes_of_all_modules_come_back_also_after_an_error():
    model = Stubborn()
    model.norm.training = False  # frozen
    with pytest.raises(KeyError), evaluating(model):
        assert modes(model) == [False, False, False]
        raise KeyError
    assert modes(model) == [True, False, True]


def test_modules_asked_for_are_in_training_mode():
    model = Stubborn()
    with evaluating(model, training=[model.norm]):
        assert modes(model) == [False, True, False]


def test_no_gradients_are_kept():
    with evaluating(nn.Linear(2, 2)):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_fused_attention_is_off_only_where_asked_and_only_within():
    with evaluating(nn.Linear(2, 2)):
        assert torch.backends.mha.get_fastpath_enabled()
    with evaluating(nn.Linear(2, 2), is_decomposed=True):
        assert not torch.backends.mha.get_fastpath_enabled()
        with evaluating(nn.Linear(2, 2)):
            assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_buffers_come_back_also_after_an_error():
    norm = nn.BatchNorm1d(3)
    with pytest.raises(KeyError), buffers_kept(norm):
        norm(torch.randn(4, 3))
        assert norm.num_batches_tracked == 1
        raise KeyError
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_an_answer_that_is_no_tensor_is_told():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(UsageError) as error:
        answer(Two(), torch.zeros(1, 3))
    assert str(error.value) == (
        "Two must answer with logits, a tensor (batch, classes), in evaluation mode, got tuple; wrap it in a module "
        "that returns these alone"
    )
