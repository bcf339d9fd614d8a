"""What is collected of activations, and the tables it is saved as; the contract is in tests/contract."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from distiller.data_loggers.activation_stats import (
    CollectorDirection,
    RecordsActivationStatsCollector,
    SummaryActivationStatsCollector,
    activation_stats_collectors,
    columns,
    percent_of_zeros,
)
from distiller.data_loggers.collector import collector_context
from distiller.errors import StatsError, UsageError


class SharedRelu(nn.Module):
    """One ReLU behind convolutions of 2 and 3 channels and a linear layer, as in torchvision's bottlenecks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1)
        self.fc = nn.Linear(3, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.conv2(self.relu(self.conv1(x))))
        return self.relu(self.fc(x.mean((2, 3))))


def means(activation: torch.Tensor) -> torch.Tensor:
    return activation.mean((0, 2, 3)) if activation.dim() == 4 else activation.mean()


def outputs_of(model: nn.Module, images: torch.Tensor, name: str) -> list[np.ndarray]:
    seen: list[np.ndarray] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, i, out: seen.append(out.numpy().copy()))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen


def collected(collector, model, *batches):
    with torch.no_grad(), collector:
        for batch in batches:
            model(batch)
    return collector


# ------------------------------------------------------------------------ summaries


def test_the_five_collectors_are_those_of_distiller(tiny_cnn):
    collectors = activation_stats_collectors(tiny_cnn)
    assert list(collectors) == ["sparsity_ofm", "l1_channels", "apoz_channels", "mean_channels", "records"]
    for name, collector in collectors.items():
        assert list(collector.modules) == (["conv1", "conv2"] if name == "records" else ["relu1", "relu2"])


def test_a_statistic_is_the_mean_over_all_images_also_of_batches_of_other_sizes(tiny_cnn):
    images = torch.randn(7, 1, 8, 8)
    tiny_cnn.eval()
    collectors = activation_stats_collectors(tiny_cnn)
    for collector in collectors.values():
        collected(collector, tiny_cnn, images[:5], images[5:])
    (seen,) = outputs_of(tiny_cnn, images, "relu1")
    found = {name: collector.value()["relu1"] for name, collector in collectors.items() if name != "records"}
    assert found["sparsity_ofm"] == pytest.approx(100 * (seen == 0).mean())
    assert found["l1_channels"] == pytest.approx(np.abs(seen).sum((0, 2, 3)) / 7, rel=1e-5)
    assert found["apoz_channels"] == pytest.approx(100 * (seen == 0).mean((0, 2, 3)), rel=1e-5)
    assert found["mean_channels"] == pytest.approx(seen.mean((0, 2, 3)), rel=1e-5)


def test_calls_of_one_module_with_other_numbers_of_channels_are_kept_apart():
    model, images = SharedRelu(), torch.randn(5, 1, 2, 2)
    collector = collected(SummaryActivationStatsCollector(model, "means", means), model, images)
    first, second, last = outputs_of(model, images, "relu")
    value = collector.value()
    assert list(value) == ["relu"]
    assert list(value["relu"]) == ["2", "3", "all"]
    assert value["relu"]["2"] == pytest.approx(first.mean((0, 2, 3)), rel=1e-5)
    assert value["relu"]["3"] == pytest.approx(second.mean((0, 2, 3)), rel=1e-5)
    assert value["relu"]["all"] == pytest.approx(last.mean(), rel=1e-5)
    assert list(columns(value)) == ["relu/2", "relu/3", "relu/all"]


def test_calls_of_one_module_with_one_number_each_count_together():
    model, images = SharedRelu(), torch.randn(5, 1, 2, 2)
    collector = collected(SummaryActivationStatsCollector(model, "zeros", percent_of_zeros), model, images)
    seen = np.concatenate([output.ravel() for output in outputs_of(model, images, "relu")])
    assert collector.value() == {"relu": pytest.approx(100 * (seen == 0).mean())}


def test_inputs_may_be_looked_at_and_several_are_made_one():
    class Sum(nn.Module):
        def forward(self, x, y, scale):
            return scale * (x + y)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum, self.relu = Sum(), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.sum(x, 2 * x, 3))

    model, x = Net(), torch.tensor([[-1.0, 3.0]])
    collector = SummaryActivationStatsCollector(
        model, "mean", torch.mean, (Sum, nn.ReLU), CollectorDirection.IN, torch.cat
    )
    assert collected(collector, model, x).value() == {"sum": 1.5, "relu": 9.0}


def test_what_is_given_is_detached_and_computed_without_gradients(tiny_cnn):
    seen = []

    def summary(activation):
        seen.append((activation.requires_grad, (2 * activation).requires_grad, torch.is_grad_enabled()))
        return 1.0

    with SummaryActivationStatsCollector(tiny_cnn, "one", summary):
        tiny_cnn(torch.randn(2, 1, 8, 8)).sum().backward()
    assert set(seen) == {(False, False, False)}


def test_a_function_of_the_users_own_that_fails_is_told_with_the_layer(tiny_cnn):
    collector = SummaryActivationStatsCollector(tiny_cnn, "broken", lambda x: x.no_such_thing)
    with pytest.raises(UsageError, match="^broken: of 'relu1': failed with AttributeError: "), collector:
        tiny_cnn(torch.randn(2, 1, 8, 8))


def test_inputs_that_cannot_be_made_one_are_told_with_the_layer():
    bilinear = nn.Sequential(nn.Bilinear(2, 3, 1))
    collector = SummaryActivationStatsCollector(bilinear, "s", torch.mean, None, CollectorDirection.IN)
    with (
        pytest.raises(UsageError, match="^s: inputs of '0' cannot be made one: failed with RuntimeError"),
        collector,
    ):
        bilinear[0](torch.ones(1, 2), torch.ones(1, 3))


def test_a_summary_that_is_a_matrix_is_refused(tiny_cnn):
    collector = SummaryActivationStatsCollector(tiny_cnn, "raw", lambda x: x.mean((2, 3)))
    with pytest.raises(UsageError) as caught, collector:
        tiny_cnn(torch.randn(2, 1, 8, 8))
    assert str(caught.value) == "raw: of 'relu1': must be a number or one for each channel, got shape (2, 4)"


def test_outputs_that_are_no_floating_point_tensors_are_passed_over():
    class Pair(nn.Module):
        def forward(self, x):
            return x, torch.zeros(2, dtype=torch.int64), None, x[:0]

    model = nn.Sequential(Pair())
    collector = SummaryActivationStatsCollector(model, "mean", torch.mean, None)
    assert collected(collector, model, torch.full((1, 1), 4.0)).value() == {"0": 4.0}


def test_it_works_in_inference_mode_and_only_on_modules_asked_for(tiny_cnn):
    collector = SummaryActivationStatsCollector(tiny_cnn, "zeros", percent_of_zeros)
    assert collector.is_empty
    with torch.inference_mode(), collector_context(collector, ["relu2"]):
        tiny_cnn(torch.randn(2, 1, 8, 8))
    tiny_cnn(torch.randn(2, 1, 8, 8))
    assert not collector.is_empty
    assert list(collector.value()) == ["relu2"]


def test_a_summary_is_saved_with_a_column_for_each_layer(tiny_cnn, tmp_path):
    collector = activation_stats_collectors(tiny_cnn)["mean_channels"]
    path = collected(collector, tiny_cnn, torch.randn(2, 1, 8, 8)).save(tmp_path / "mean_channels")
    assert path == tmp_path / "mean_channels.csv"
    table = pd.read_csv(path)
    assert list(table.columns) == ["relu1", "relu2"]
    for layer, channels in collector.value().items():
        assert table[layer].dropna().tolist() == channels  # every digit
    assert len(table) == 6


# -------------------------------------------------------------------------- records


def test_a_record_is_of_one_sample():
    model = nn.Sequential(nn.Conv2d(1, 2, 1))
    images = torch.randn(3, 1, 2, 2)
    collector = collected(RecordsActivationStatsCollector(model, (nn.Conv2d,)), model, images[:2], images[2:])
    (seen,) = outputs_of(model, images, "0")
    flat = seen.reshape(3, -1)
    value = collector.value()["0"]
    assert value.pop("shape") == ["(2, 2, 2)"] * 3
    expected = {
        "min": flat.min(1), "max": flat.max(1), "mean": flat.mean(1), "std": flat.std(1, ddof=1),
        "l2": np.linalg.norm(flat, axis=1),
    }  # fmt: skip
    assert value == {name: pytest.approx(numbers, rel=1e-5) for name, numbers in expected.items()}


def test_a_sample_of_one_value_has_no_deviation():
    model = nn.Sequential(nn.Linear(2, 1))
    value = collected(RecordsActivationStatsCollector(model, None), model, torch.ones(3, 2)).value()["0"]
    assert value["std"] == [0.0, 0.0, 0.0]
    assert value["min"] == value["max"] == value["mean"]


def test_records_are_saved_with_a_row_for_each_sample_of_each_layer(tiny_cnn, tmp_path):
    collector = activation_stats_collectors(tiny_cnn)["records"]
    path = collected(collector, tiny_cnn, torch.randn(3, 1, 8, 8)).save(tmp_path / "records.csv")
    table = pd.read_csv(path)
    assert list(table.columns) == ["layer", "shape", "min", "max", "mean", "std", "l2"]
    assert table["layer"].tolist() == ["conv1"] * 3 + ["conv2"] * 3
    assert table["shape"].tolist() == ["(4, 8, 8)"] * 3 + ["(6, 8, 8)"] * 3
    for name, value in collector.value().items():
        assert table[table["layer"] == name]["l2"].tolist() == value["l2"]


@pytest.mark.parametrize("name", ["sparsity_ofm", "records"])
def test_nothing_collected_is_nothing_to_save(tiny_cnn, tmp_path, name):
    collector = activation_stats_collectors(tiny_cnn)[name]
    assert collector.is_empty
    with pytest.raises(StatsError) as caught:
        collector.save(tmp_path / name)
    assert str(caught.value) == (
        f"{tmp_path / name}.csv: nothing was collected; run the model, with modules of the classes looked at, "
        "while the collector is attached"
    )
    assert list(tmp_path.iterdir()) == []
