import pytest
import torch
from torch import nn

from distiller.export.latency import measure_latencies, measure_latency


class Spy(nn.Module):
    """Remembers how it was called."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(4, 2, dtype=dtype)
        self.dropout = nn.Dropout()
        self.calls = []

    def forward(self, x):
        self.calls.append((tuple(x.shape), x.dtype, self.training, torch.is_inference_mode_enabled()))
        return self.dropout(self.linear(x))


def test_result_says_what_was_measured():
    latency = measure_latency(Spy(), (4,), 3, min_time=0.0)
    assert 0 < latency.p10_s <= latency.median_s <= latency.p90_s
    assert (latency.batch_size, latency.device) == (3, "cpu")
    assert latency.threads == torch.get_num_threads()


def test_passes_are_in_evaluation_and_inference_mode():
    model = Spy().train()
    measure_latency(model, (4,), 3, min_time=0.0)
    assert set(model.calls) == {((3, 4), torch.float32, False, True)}


def test_warm_up_is_not_counted():
    model = Spy()
    latency = measure_latency(model, (4,), 1, warmup=7, min_time=10.0, max_repeats=5)
    assert latency.repeats == 5
    assert len(model.calls) == 12


def test_slow_model_is_measured_once_after_one_pass_of_warm_up():
    model = Spy()
    latency = measure_latency(model, (4,), 1, warmup=7, min_time=0.0)
    assert latency.repeats == 1
    assert len(model.calls) == 2
    assert latency.p10_s == latency.median_s == latency.p90_s


def test_each_modules_mode_is_restored():
    model = Spy().train()
    model.linear.eval()
    measure_latency(model, (4,), 1, min_time=0.0)
    assert [module.training for module in model.modules()] == [True, False, True]


def test_modes_are_restored_when_the_model_fails():
    model = Spy().train()
    with pytest.raises(RuntimeError, match="shapes"):
        measure_latency(model, (5,), 1)
    assert model.training


def test_random_numbers_of_the_run_are_left_as_they_were():
    model = Spy()
    state = torch.get_rng_state()
    measure_latency(model, (4,), 1, min_time=0.0)
    assert torch.get_rng_state().equal(state)


def test_input_has_the_type_of_the_parameters():
    model = Spy(torch.float64)
    measure_latency(model, (4,), 1, min_time=0.0)
    assert model.calls[0][1] is torch.float64


def test_model_can_be_trained_afterwards():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_latency(model, (4,), 2, min_time=0.0)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    model(torch.randn(3, 4)).sum().backward()


def test_models_of_one_type_share_their_input():
    inputs = []

    class Keeping(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

        def forward(self, x):
            inputs.append(x)
            return x

    models = [Keeping(torch.float32), Keeping(torch.float64), Keeping(torch.float32)]
    measure_latencies(models, (4,), 2, min_time=0.0)
    assert inputs[0] is inputs[2]
    assert [x.dtype for x in inputs[:3]] == [torch.float32, torch.float64, torch.float32]


def test_models_that_are_compared_take_turns():
    turns = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x):
            turns.append(self.name)
            return x

    first, second = measure_latencies(
        [Named("a"), Named("b")], (4,), 2, warmup=1, min_time=10.0, max_repeats=3
    )
    assert turns == ["a", "b"] * 4
    assert first.repeats == second.repeats == 3
