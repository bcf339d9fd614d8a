import pytest
import torch
from torch import nn

from distiller.errors import StatsError
from distiller.sensitivity.axes import input_ranges


class Twice(nn.Module):
    """A layer that is called twice, one that is never, one that batch norm and dropout come before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)
        self.never = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.first(x))
        return self.last(self.drop(self.norm(x)))


def test_ranges_are_those_of_all_batches_and_all_calls_in_evaluation_mode():
    model = Twice()
    model.norm.running_mean.fill_(0.5)
    batches = [torch.randn(3, 4), 2 * torch.randn(5, 4)]

    ranges = input_ranges(model, batches)

    x = torch.cat(batches)
    with torch.no_grad():
        once = model.first(x)
        read = {"first": torch.cat([x, once]), "last": model.norm.eval()(model.first(once))}
    assert list(ranges) == ["first", "last"]
    for name, values in read.items():
        assert ranges[name] == pytest.approx((float(values.min()), float(values.max())), abs=1e-6)


def test_the_model_stays_as_it_was():
    model = Twice().train()
    model.last.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    input_ranges(nn.DataParallel(model), [torch.randn(3, 4)])

    assert [module.training for module in model.children()] == [True, True, True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_go_also_after_an_error():
    model = Twice()

    with pytest.raises(RuntimeError):
        input_ranges(model, [torch.randn(3, 5)])

    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_several_arguments_are_a_tuple():
    bilinear = nn.Bilinear(2, 3, 1)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear, self.fc = bilinear, nn.Linear(1, 1)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.fc(self.bilinear(a, b))

    assert list(input_ranges(Sum(), [(torch.ones(1, 2), torch.ones(1, 3))])) == ["fc"]


def test_no_batches_are_refused():
    with pytest.raises(StatsError) as error:
        input_ranges(Twice(), [])

    assert str(error.value) == (
        "ranges of the layers' inputs: there is nothing to measure on, got no batches"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_reads_no_numbers_is_named(value):
    with pytest.raises(StatsError) as error:
        input_ranges(Twice(), [torch.randn(2, 4), torch.tensor([[1.0, value, 1.0, 1.0]])])

    assert str(error.value) == (
        "ranges of the layers' inputs: 'first' reads NaN or infinite values; is the model trained?"
    )
