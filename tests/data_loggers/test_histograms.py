"""Histograms of activations against numpy on the activations themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distiller.data_loggers import histograms
from distiller.data_loggers.histograms import ActivationHistogramsCollector, collect_histograms, histogram_of
from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.errors import StatsError, UsageError


class Net(nn.Module):
    """conv - relu (in place) - fc."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).flatten(1))


def runs(*batches, mode=torch.no_grad):
    def test_fn(model):
        with mode():
            for batch in batches:
                model.eval()(batch.clone())

    return test_fn


def by_numpy(x: torch.Tensor, low: float, high: float, nbins: int) -> np.ndarray:
    return np.histogram(x.detach().double().numpy().clip(low, high), nbins, (low, high))[0]


@settings(max_examples=50, deadline=None)
@given(
    integers=st.lists(st.integers(-40, 40), min_size=1, max_size=60),
    nbins=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    low=st.integers(-30, 0),
)
def test_counts_are_numpys_with_what_is_outside_in_the_end_bins(integers, nbins, dtype, low):
    # Given edges at whole numbers and values between them
    x = (torch.tensor(integers) + 0.5).to(dtype)
    high = low + 2 * nbins
    found = histogram_of(x, low, high, nbins)
    assert found.hist.tolist() == by_numpy(x, low, high, nbins).tolist()
    assert found.bin_centroids.tolist() == [low + 2 * index + 1.0 for index in range(nbins)]
    assert (found.hist.dtype, found.bin_centroids.dtype) == (torch.int64, torch.float64)


def test_counts_are_those_of_histc_on_the_clamped_tensor():
    x = torch.randn(5000)
    wanted = torch.histc(x.clamp(-1, 2), 100, -1, 2)
    assert torch.equal(histogram_of(x, -1, 2, 100).hist, wanted.long())


def test_without_a_range_it_is_from_the_smallest_to_the_largest():
    found = histogram_of(torch.tensor([[1.0, 5.0], [3.0, 2.0]]), nbins=2)
    assert (found.hist.tolist(), found.bin_centroids.tolist()) == ([2, 2], [2.0, 4.0])


def test_a_range_of_no_width_is_widened_by_one():
    found = histogram_of(torch.full((3,), 2.0), nbins=4)
    assert (found.hist.tolist(), found.bin_centroids.tolist()) == ([0, 0, 3, 0], [1.25, 1.75, 2.25, 2.75])


def test_a_range_too_narrow_for_single_precision_is_kept():
    found = histogram_of(torch.tensor([1e8, 1e8]), 1e8, 1e8 + 2, nbins=2)
    assert found.hist.tolist() == [2, 0]


def test_counts_beyond_single_precision_are_exact(monkeypatch):
    monkeypatch.setattr(histograms, "_PART", 7)
    assert histogram_of(torch.zeros(100), 0, 1, 2).hist.tolist() == [100, 0]


@pytest.mark.parametrize(
    ("x", "low", "high", "nbins", "error", "text"),
    [
        ([math.nan], 0, 1, 2, StatsError, "histogram_of: the tensor has NaN or infinite values"),
        ([], 0, 1, 2, UsageError, "histogram_of: a tensor of floating point wanted, got torch.float32 of 0 elements"),
        ([1.0], 2, 1, 2, UsageError, "histogram_of: low and high: finite, and low at most high, wanted, got 2 and 1"),
        ([1.0], 0, 1, 0, UsageError, "nbins: a number of bins from 1 wanted, got 0"),
        ([1.0], 0, 1, 2.5, UsageError, "nbins: a number of bins from 1 wanted, got 2.5"),
    ],
)  # fmt: skip
def test_what_has_no_histogram_is_an_error(x, low, high, nbins, error, text):
    with pytest.raises(error) as caught:
        histogram_of(torch.tensor(x), low, high, nbins)
    assert str(caught.value) == text


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_and_outputs_are_counted_over_all_batches_between_min_and_max(mode):
    # Given an in-place relu, whose input is seen before it changes
    model, data = Net().eval(), torch.randn(7, 1, 4, 4)
    stats = collect_quant_stats(model, runs(data))
    found = collect_histograms(model, runs(*data.split(3), mode=mode), activation_stats=stats, nbins=32)
    with torch.no_grad():
        conv = model.conv(data)
    for entry, record, x in [
        (found["conv"]["inputs"][0], stats["conv"]["inputs"][0], data),
        (found["conv"]["output"], stats["conv"]["output"], conv),
        (found["relu"]["inputs"][0], stats["relu"]["inputs"][0], conv),
        (found["relu"]["output"], stats["relu"]["output"], conv.relu()),
    ]:
        wanted = by_numpy(x, record["min"], record["max"], 32)
        # a value at an edge may go to either side of it, by how the edge is rounded
        assert np.abs(entry["hist"].numpy() - wanted).sum() <= 4
        assert entry["hist"].sum() == x.numel()
        width = (record["max"] - record["min"]) / 32
        assert entry["bin_centroids"][0].item() == pytest.approx(record["min"] + width / 2)
    assert list(found) == ["conv", "relu", "fc"]


def test_data_outside_the_statistics_count_in_the_end_bins():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    stats = collect_quant_stats(model, runs(torch.tensor([[0.0, 1.0]])))
    found = collect_histograms(model, runs(torch.tensor([[5.0, 0.6, 0.1]])), activation_stats=stats, nbins=2)
    assert found["1"]["output"]["hist"].tolist() == [1, 2]


def test_a_tensor_is_counted_once_for_all_that_read_it(monkeypatch):
    counted = []
    plain = histograms.histogram_of
    monkeypatch.setattr(
        histograms, "histogram_of", lambda x, *rest: (counted.append(x.shape), plain(x, *rest))[1]
    )
    model, data = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(2, 3)
    stats = collect_quant_stats(model, runs(data))
    with ActivationHistogramsCollector(model, stats):
        model(data)
    assert len(counted) == 4  # the data, and what each of the three layers returns


def test_without_statistics_they_are_collected_before_and_kept(tmp_path):
    model, data = Net(), torch.randn(4, 1, 4, 4)
    found = collect_histograms(model, runs(data), save_dir=tmp_path, nbins=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "acts_histograms.pt",
        "acts_quantization_stats.yaml",
    ]
    assert found["conv"]["output"]["hist"].sum() == 4 * 2 * 16
    again = collect_histograms(
        model, runs(data), activation_stats=tmp_path / "acts_quantization_stats.yaml", nbins=8
    )
    assert torch.equal(found["fc"]["output"]["hist"], again["fc"]["output"]["hist"])


def test_the_file_is_of_plain_tensors(tmp_path):
    found = collect_histograms(Net(), runs(torch.randn(2, 1, 4, 4)), save_dir=tmp_path, nbins=8)
    read = torch.load(tmp_path / "acts_histograms.pt", weights_only=True)
    assert list(read) == list(found)
    assert list(read["conv"]["inputs"]) == [0]
    for key in ("hist", "bin_centroids"):
        assert torch.equal(read["fc"]["output"][key], found["fc"]["output"][key])


@pytest.mark.parametrize("kind", [".svg", ".png"])
def test_pictures_are_one_for_each_input_and_output(tmp_path, kind):
    collect_histograms(
        nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), runs(torch.randn(2, 3)), tmp_path, nbins=8,
        save_hist_imgs=True, hist_imgs_ext=kind,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "histogram_imgs").iterdir()) == [
        f"000-0-input_0{kind}", f"000-0-output{kind}", f"001-1-input_0{kind}", f"001-1-output{kind}",
    ]  # fmt: skip


def test_statistics_of_another_model_are_an_error():
    stats = collect_quant_stats(nn.Sequential(nn.ReLU()), runs(torch.randn(2, 3)))
    with pytest.raises(
        StatsError, match=r"^activation statistics: 1 of 1 layers are not in the model \('0'\)"
    ):
        ActivationHistogramsCollector(Net(), stats)


def test_a_layer_without_statistics_is_an_error_naming_file_and_layer(tmp_path):
    collect_quant_stats(Net(), runs(torch.randn(2, 1, 4, 4)), tmp_path, modules_to_collect=["conv"])
    path = tmp_path / "acts_quantization_stats.yaml"
    with pytest.raises(StatsError) as caught:
        collect_histograms(Net(), runs(torch.randn(2, 1, 4, 4)), activation_stats=path)
    assert str(caught.value) == (
        f"{path}: relu.inputs[0] is not there; collect the statistics from this model again"
    )


def test_values_that_are_not_finite_are_an_error_naming_the_layer():
    model = nn.Sequential(nn.ReLU())
    stats = collect_quant_stats(model, runs(torch.randn(2, 3)))
    with pytest.raises(StatsError) as caught:
        collect_histograms(model, runs(torch.tensor([[math.inf]])), activation_stats=stats)
    assert str(caught.value) == "0.inputs[0]: NaN or infinite values; is the model trained?"


def test_nothing_run_is_an_error(tmp_path):
    stats = collect_quant_stats(nn.Sequential(nn.ReLU()), runs(torch.randn(2, 3)))
    with pytest.raises(StatsError, match="^ActivationHistogramsCollector: no module of the model was run; "):
        collect_histograms(nn.Sequential(nn.ReLU()), lambda model: None, tmp_path, stats)
    assert not list(tmp_path.iterdir())


def test_wrong_settings_are_errors_before_the_data_are_run(tmp_path):
    def test_fn(model):
        pytest.fail("ran")

    with pytest.raises(UsageError, match=r"^hist_imgs_ext: one of \.svg, "):
        collect_histograms(Net(), test_fn, hist_imgs_ext="jpg")
    with pytest.raises(UsageError, match="^nbins: "):
        collect_histograms(Net(), test_fn, nbins=0)
    with pytest.raises(StatsError) as caught:
        collect_histograms(Net(), test_fn, tmp_path / "none")
    assert (
        str(caught.value)
        == f"{tmp_path / 'none'}: no such folder to write acts_histograms.pt into; make it first"
    )
