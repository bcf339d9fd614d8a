"""Collected statistics against numpy on the activations themselves."""

import math

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distiller.data_loggers.collector import collector_context
from distiller.data_loggers.quant_stats import (
    QuantCalibrationStatsCollector,
    check_stats,
    collect_quant_stats,
    load_stats,
)
from distiller.errors import StatsError, UnknownNameError, UsageError


class Net(nn.Module):
    """conv1 - bn1 - relu (in place) - conv2 - the same relu - fc."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(2 * 16, 3)  # registered first, run last
        self.conv1 = nn.Conv2d(1, 2, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2, 2, 3, padding=1)
        self.drop = nn.Identity()

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(self.drop(x)))
        return self.fc(x.flatten(1))

    @torch.no_grad()
    def activations(self, x) -> dict[str, list]:
        """What each layer returns, each call apart, computed without hooks."""
        conv1 = self.conv1(x)
        bn1 = self.bn1(conv1)
        conv2 = self.conv2(bn1.relu())
        fc = self.fc(conv2.relu().flatten(1))
        return {
            "conv1": [conv1],
            "bn1": [bn1],
            "relu": [bn1.relu(), conv2.relu()],
            "conv2": [conv2],
            "fc": [fc],
        }


class Calls(nn.Module):
    """A model whose forward is a function of (model, input)."""

    def __init__(self, call, **submodules: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, module in submodules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.call(self, x)


def runs(*batches, mode=torch.no_grad):
    def test_fn(model):
        with mode():
            for batch in batches:
                model.eval()(batch.clone())

    return test_fn


def expected(calls: list[torch.Tensor]) -> dict[str, float]:
    values = np.concatenate([call.double().numpy().ravel() for call in calls])
    samples = [call.double().flatten(1).numpy() for call in calls]
    return {
        "min": values.min(),
        "max": values.max(),
        "avg_min": np.concatenate([s.min(1) for s in samples]).mean(),
        "avg_max": np.concatenate([s.max(1) for s in samples]).mean(),
        "mean": values.mean(),
        "std": values.std(),
        "b": np.abs(values - values.mean()).mean(),
    }


def assert_close(found: dict, wanted: dict, tolerance=1e-5) -> None:
    for key, value in wanted.items():
        assert math.isclose(found[key], value, rel_tol=tolerance, abs_tol=tolerance), (key, found[key], value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_statistics_are_those_of_the_activations(mode):
    # Given an in-place relu that is used twice, and a last batch that is smaller
    model, data = Net().eval(), torch.randn(7, 1, 4, 4)
    with torch.inference_mode(mode is torch.inference_mode):
        stats = collect_quant_stats(model, runs(*data.split(3), mode=mode))
    for name, calls in model.activations(data).items():
        assert_close(stats[name]["output"], expected(calls))
    activations = model.activations(data)
    assert_close(stats["conv1"]["inputs"][0], expected([data]))
    assert_close(stats["relu"]["inputs"][0], expected([*activations["bn1"], *activations["conv2"]]))
    assert_close(stats["conv2"]["inputs"][0], expected(activations["relu"][:1]))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_statistics_do_not_depend_on_the_batches(sizes, seed):
    model = Net()
    data = torch.randn(sum(sizes), 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    whole = collect_quant_stats(model, runs(data))
    split = collect_quant_stats(model, runs(*data.split(sizes)))
    assert list(whole) == list(split)
    for name, entry in whole.items():
        for found, wanted in (
            (split[name]["output"], entry["output"]),
            (split[name]["inputs"][0], entry["inputs"][0]),
        ):
            assert_close(found, {key: value for key, value in wanted.items() if key != "shape"})


def test_averages_weigh_later_batches_as_the_first():
    # Distiller's DEFECT: avg_min and avg_max were in effect those of the first batch
    model = nn.Sequential(nn.ReLU())
    stats = collect_quant_stats(model, runs(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 5.0]])))
    assert stats["0"]["output"]["avg_max"] == pytest.approx(3.0)


def test_what_one_module_returns_and_the_next_reads_has_the_same_statistics():
    stats = collect_quant_stats(Net(), runs(torch.randn(4, 1, 4, 4)))
    assert stats["bn1"]["inputs"][0] == stats["conv1"]["output"]


def test_a_tensor_is_reduced_once_for_all_that_read_it(monkeypatch):
    from distiller.data_loggers import quant_stats

    counted = []
    plain = quant_stats.range_sums
    monkeypatch.setattr(quant_stats, "range_sums", lambda x: (counted.append(x.shape), plain(x))[1])
    model = Net().eval()
    with QuantCalibrationStatsCollector(model):
        model(torch.randn(2, 1, 4, 4))
    # the image; what conv1, bn1, relu, conv2, relu and fc return; and the flattened input of fc
    assert len(counted) == 8


def test_layers_are_in_the_order_of_the_forward_pass():
    stats = collect_quant_stats(Net(), runs(torch.randn(2, 1, 4, 4)))
    assert list(stats) == ["conv1", "bn1", "relu", "conv2", "fc"]


def test_shape_is_that_of_the_first_batch_and_total_numel_counts_all():
    stats = collect_quant_stats(Net(), runs(*torch.randn(5, 1, 4, 4).split(3)))
    assert stats["conv1"]["output"]["shape"] == "(3, 2, 4, 4)"
    assert stats["conv1"]["output"]["total_numel"] == 5 * 2 * 4 * 4


def test_integers_and_arguments_that_are_no_tensors_are_not_counted():
    class Scaled(nn.Module):
        def forward(self, x, factor, index, y):
            return x * factor + y

    class Pick(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    def call(m, x):
        return m.pick(m.scaled(m.embed(torch.tensor([0, 1])), 2.0, torch.tensor(1), x))

    model = Calls(call, embed=nn.Embedding(2, 3), scaled=Scaled(), pick=Pick())
    stats = collect_quant_stats(model, runs(torch.ones(2, 3)))
    assert {name: list(entry["inputs"]) for name, entry in stats.items()} == {"embed": [], "scaled": [0, 3]}


def test_the_same_tensor_given_twice_counts_for_both_arguments():
    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    stats = collect_quant_stats(Calls(lambda m, x: m.add(x, x), add=Add()), runs(torch.randn(2, 3)))
    assert stats["add"]["inputs"][0] == stats["add"]["inputs"][1]
    assert stats["add"]["inputs"][0]["total_numel"] == 6


def test_tensors_returned_together_count_together():
    class Halves(nn.Module):
        def forward(self, x):
            return x.chunk(2, dim=1)

    data = torch.randn(3, 4)
    stats = collect_quant_stats(Calls(lambda m, x: m.halves(x), halves=Halves()), runs(data))
    assert_close(stats["halves"]["output"], expected(list(data.chunk(2, dim=1))))


def test_classes_and_names_narrow_the_choice():
    data = torch.randn(2, 1, 4, 4)
    assert list(collect_quant_stats(Net(), runs(data), classes=[nn.Conv2d])) == ["conv1", "conv2"]
    assert list(collect_quant_stats(Net(), runs(data), modules_to_collect=["conv*", "fc"])) == [
        "conv1",
        "conv2",
        "fc",
    ]
    with pytest.raises(UnknownNameError, match=r"^no module 'conv3' in the model; did you mean 'conv"):
        collect_quant_stats(Net(), runs(data), modules_to_collect=["conv3"])


def test_the_model_is_left_as_it_was():
    model = Net()
    with QuantCalibrationStatsCollector(model, disable_inplace_attrs=True):
        assert not model.relu.inplace
    assert model.relu.inplace
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_in_place_attributes_to_disable_must_be_named():
    with pytest.raises(UsageError, match="^inplace_attr_names: empty, although disable_inplace_attrs is set"):
        QuantCalibrationStatsCollector(Net(), disable_inplace_attrs=True, inplace_attr_names=())


def test_the_check_names_the_module_that_works_in_place():
    test_fn = runs(torch.randn(2, 1, 4, 4))
    with pytest.raises(UsageError) as caught:
        collect_quant_stats(Net(), test_fn, inplace_runtime_check=True)
    assert str(caught.value) == (
        "relu: changes its input in place, which inplace_runtime_check refuses; "
        "set disable_inplace_attrs or leave the check out"
    )
    collect_quant_stats(Net(), test_fn, inplace_runtime_check=True, disable_inplace_attrs=True)


def test_values_before_the_second_pass_lack_std_and_b():
    model = Net().eval()
    collector = QuantCalibrationStatsCollector(model)
    with collector_context(collector):
        model(torch.randn(2, 1, 4, 4))
    assert list(collector.value()["fc"]["output"]) == [
        *("min", "max", "avg_min", "avg_max", "mean", "shape", "total_numel")
    ]
    collector.reset()
    assert collector.value() == {}


def test_a_second_pass_over_other_data_is_an_error():
    batches = [torch.randn(2, 1, 4, 4), torch.randn(3, 1, 4, 4)]
    with pytest.raises(StatsError) as caught:
        collect_quant_stats(Net(), lambda model: model(batches.pop()))
    assert str(caught.value) == (
        "conv1.inputs[0]: 32 values in the second pass, 48 in the first; feed the same data in both"
    )


def test_a_first_pass_that_runs_nothing_is_an_error():
    with pytest.raises(StatsError) as caught:
        collect_quant_stats(Net(), lambda model: None)
    assert str(caught.value) == (
        "QuantCalibrationStatsCollector: no module of the model was run in the first pass; "
        "the model must be called while the collector is attached"
    )


def test_values_that_are_not_finite_are_an_error_naming_the_first_layer():
    data = torch.ones(1, 1, 4, 4)
    model = Net()
    nn.init.constant_(model.conv1.weight, math.nan)
    with pytest.raises(StatsError) as caught:
        collect_quant_stats(model, runs(data))
    assert (
        str(caught.value) == "conv1.output: NaN or infinite values in the first pass; is the model trained?"
    )


def test_the_file_is_distillers_and_reads_back(tmp_path):
    stats = collect_quant_stats(Net(), runs(torch.randn(2, 1, 4, 4)), save_dir=tmp_path)
    path = tmp_path / "acts_quantization_stats.yaml"
    text = path.read_text()
    keys = [line.strip().partition(":")[0] for line in text.splitlines()]
    record = ["min", "max", "avg_min", "avg_max", "mean", "std", "b", "shape", "total_numel"]
    assert keys[: 3 + 2 * 9 + 1] == ["conv1", "inputs", "0", *record, "output", *record]
    assert "\n      shape: (2, 1, 4, 4)\n" in text
    assert yaml.safe_load(text) == stats
    assert load_stats(path) == stats
    check_stats(load_stats(path), dict(Net().named_modules()))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_without_a_second_pass_is_not_written(tmp_path):
    model = Net().eval()
    collector = QuantCalibrationStatsCollector(model)
    with collector:
        model(torch.randn(2, 1, 4, 4))
        collector.start_second_pass()
    with pytest.raises(StatsError, match=r"stats\.yaml: std and b need a second pass over the data"):
        collector.save(tmp_path / "stats")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "stats.yaml" / "in the way").mkdir(parents=True)
    model = Net().eval()
    collector = QuantCalibrationStatsCollector(model)
    with collector:
        model(torch.zeros(1, 1, 4, 4))
        collector.start_second_pass()
        model(torch.zeros(1, 1, 4, 4))
        collector.stop_second_pass()
    with pytest.raises(StatsError, match=r"stats\.yaml: cannot be written, "):
        collector.save(tmp_path / "stats.yaml")


def test_a_missing_folder_is_an_error_before_the_data_are_run(tmp_path):
    with pytest.raises(StatsError) as caught:
        collect_quant_stats(Net(), lambda model: pytest.fail("ran"), save_dir=tmp_path / "none")
    assert str(caught.value) == (
        f"{tmp_path / 'none'}: no such folder to write acts_quantization_stats.yaml into; make it first"
    )


@pytest.mark.parametrize("passes", [0, 3, "1", None])
def test_there_are_one_or_two_passes(passes):
    with pytest.raises(UsageError) as caught:
        collect_quant_stats(Net(), lambda model: pytest.fail("ran"), passes=passes)
    assert str(caught.value) == f"collect_quant_stats: passes: must be 1 or 2, got {passes!r}"


@pytest.mark.parametrize("passes", [1, 2])
def test_the_data_are_run_as_often_as_there_are_passes(passes):
    data, ran = torch.randn(2, 1, 4, 4), []
    collect_quant_stats(Net(), lambda model: ran.append(model(data)), passes=passes)
    assert len(ran) == passes
