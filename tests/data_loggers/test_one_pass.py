"""One pass over a model's data against the two exact ones."""

import math
from itertools import pairwise

import pytest
import torch
import yaml
from torch import nn

from distiller.data_loggers import one_pass
from distiller.data_loggers.one_pass import OnePassQuantStatsCollector
from distiller.data_loggers.quant_stats import collect_quant_stats, load_stats
from distiller.errors import StatsError, UsageError


class Net(nn.Module):
    """conv1 - bn1 - relu (in place or not) - pool - dropout - the same relu - fc."""

    def __init__(self, inplace=True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.relu(self.drop(x) - 0.1).flatten(1))


def runs(*batches, mode=torch.no_grad):
    def test_fn(model):
        with mode():
            for batch in batches:
                model.eval()(batch.clone())

    return test_fn


def assert_alike(found: dict, exact: dict) -> None:
    assert list(found) == list(exact)
    for name, entry in exact.items():
        assert list(found[name]["inputs"]) == list(entry["inputs"])
        for one, two in [
            (found[name]["output"], entry["output"]),
            *((found[name]["inputs"][index], entry["inputs"][index]) for index in entry["inputs"]),
        ]:
            assert list(one) == list(two)
            assert (one["min"], one["max"], one["shape"], one["total_numel"]) == (
                two["min"], two["max"], two["shape"], two["total_numel"],
            )  # fmt: skip
            for key in ("avg_min", "avg_max", "mean", "std"):
                assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-6), (name, key)
            assert one["b"] == pytest.approx(two["b"], rel=0.01, abs=1e-6), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_pass_finds_what_two_find(mode, inplace, channels_last):
    data = torch.randn(7, 1, 4, 4)
    model = Net(inplace)
    if channels_last:
        model, data = model.to(memory_format=torch.channels_last), data.expand(-1, -1, 4, 4)
    test_fn = runs(*data.split(3), mode=mode)
    with torch.inference_mode(mode is torch.inference_mode):
        found = collect_quant_stats(model, test_fn, passes=1)
    assert_alike(found, collect_quant_stats(model, runs(*data.split(3)), passes=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precisions_are_added_up_in_single_or_double(dtype):
    model, data = Net().to(dtype), (torch.randn(6, 1, 4, 4) * 3).to(dtype)
    test_fn = runs(*data.split(2))
    assert_alike(collect_quant_stats(model, test_fn, passes=1), collect_quant_stats(model, test_fn))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_is_summed_up_once_for_all_that_read_it(monkeypatch, mode):
    counted = []
    plain = one_pass.summary_of
    monkeypatch.setattr(
        one_pass, "summary_of", lambda x, *rest: (counted.append(x.shape), plain(x, *rest))[1]
    )
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    ).eval()
    data = torch.randn(2, 1, 4, 4)
    with OnePassQuantStatsCollector(model), mode():
        model(data)
    # the images, and what each layer returns; without inference mode a view is known for what it is
    assert len(counted) == (5 if mode is torch.no_grad else 6)


def test_a_view_of_other_elements_is_another_tensor():
    class Half(nn.Module):
        def forward(self, x):
            return x[:, 2:]

    model, data = nn.Sequential(nn.ReLU(), Half(), nn.Hardtanh()), torch.tensor([[1.0, 2.0, 3.0, 0.5]])
    found = collect_quant_stats(model, runs(data), passes=1)
    assert [found[name]["output"]["max"] for name in "012"] == [3, 3, 1]
    assert [found[name]["output"]["min"] for name in "012"] == [1 / 2, 1 / 2, 1 / 2]
    assert found["1"]["output"]["mean"] == 1.75


def test_a_view_that_divides_samples_otherwise_is_another_tensor():
    class Rows(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 2)

    data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    found = collect_quant_stats(nn.Sequential(nn.ReLU(), Rows()), runs(data), passes=1)
    assert (found["0"]["output"]["avg_max"], found["1"]["output"]["avg_max"]) == (4, 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_changed_in_place_between_two_modules_is_looked_at_again(mode):
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Hardtanh(), nn.Hardtanh()

        def forward(self, x):
            x = self.first(x)
            x[:, 0] = 7.0
            return self.second(x)

    found = collect_quant_stats(Changes(), runs(torch.randn(3, 4), mode=mode), passes=1)
    assert found["first"]["output"]["max"] <= 1
    assert found["second"]["inputs"][0]["max"] == 7


def test_a_relu_whose_output_a_hook_changes_is_looked_at_itself():
    model, data = nn.Sequential(nn.ReLU()), torch.tensor([[1.0, 2.0]])
    model[0].register_forward_hook(lambda module, inputs, output: output * 3)
    assert collect_quant_stats(model, runs(data), passes=1)["0"]["output"]["max"] == 6


def test_a_relu_whose_input_a_hook_changes_is_looked_at_itself():
    model, data = nn.Sequential(nn.ReLU()), torch.tensor([[1.0, 2.0]])
    with OnePassQuantStatsCollector(model) as collector:
        model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
        model(data)
    assert collector.value()["0"]["output"]["max"] == 6


def test_a_relu_keeps_extremes_and_sums_of_each_sample():
    data = torch.tensor([[-1.0, 4.0], [-3.0, -2.0]])
    found = collect_quant_stats(nn.Sequential(nn.ReLU()), runs(data), passes=1)["0"]["output"]
    assert [found[key] for key in ("min", "max", "avg_min", "avg_max", "mean")] == [0, 4, 0, 2, 1]


def test_values_that_are_not_finite_are_an_error_at_once_naming_the_first_layer():
    model, ran = Net(), []
    nn.init.constant_(model.bn1.weight, math.nan)

    def test_fn(model):
        for _ in range(2):
            ran.append(1)
            model.eval()(torch.ones(1, 1, 4, 4))

    with pytest.raises(StatsError) as caught:
        collect_quant_stats(model, test_fn, passes=1)
    assert str(caught.value) == "bn1.output: NaN or infinite values; is the model trained?"
    assert len(ran) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_file_is_that_of_two_passes(tmp_path):
    stats = collect_quant_stats(Net(), runs(torch.randn(4, 1, 4, 4)), tmp_path, passes=1)
    path = tmp_path / "acts_quantization_stats.yaml"
    assert yaml.safe_load(path.read_text()) == stats
    assert load_stats(path) == stats
    record = ["min", "max", "avg_min", "avg_max", "mean", "std", "b", "shape", "total_numel"]
    assert list(stats["conv1"]["output"]) == record
    assert {type(value) for value in stats["fc"]["output"].values()} == {float, int, str}


def test_nothing_run_is_an_error(tmp_path):
    with pytest.raises(StatsError) as caught:
        collect_quant_stats(Net(), lambda model: None, passes=1)
    assert str(caught.value) == (
        "OnePassQuantStatsCollector: no module of the model was run; "
        "the model must be called while the collector is attached"
    )
    with pytest.raises(StatsError) as caught:
        OnePassQuantStatsCollector(Net()).save(tmp_path / "stats")
    assert str(caught.value) == (
        f"{tmp_path / 'stats.yaml'}: nothing was collected; run the model while the collector is attached"
    )
    assert not list(tmp_path.iterdir())


def test_the_check_for_modules_that_work_in_place_is_there_too():
    with pytest.raises(
        UsageError, match="^relu: changes its input in place, which inplace_runtime_check refuses"
    ):
        collect_quant_stats(Net(), runs(torch.randn(2, 1, 4, 4)), passes=1, inplace_runtime_check=True)


def test_reset_forgets_and_values_may_be_read_in_between():
    model = Net().eval()
    with OnePassQuantStatsCollector(model) as collector, torch.no_grad():
        seen = []
        for _ in range(2):
            model(torch.randn(2, 1, 4, 4))
            seen.append(collector.value()["fc"]["output"]["total_numel"])
        collector.reset()
        assert collector.value() == {}
    assert seen == [6, 12]


def test_batches_in_any_order_give_the_same():
    data = torch.randn(6, 1, 4, 4)
    found = [
        collect_quant_stats(Net(), runs(*order), passes=1)
        for order in (data.split(2), data.split(2)[::-1], data.flip(0).split(1))
    ]
    for one, other in pairwise(found):
        for key in ("min", "max", "avg_min", "avg_max", "mean", "std", "b"):
            assert one["fc"]["output"][key] == pytest.approx(other["fc"]["output"][key], rel=1e-4, abs=1e-6)
