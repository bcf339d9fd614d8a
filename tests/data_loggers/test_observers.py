"""Streams against numpy in float64 over all the data at once, however they are cut."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.data_loggers import observers
from distiller.data_loggers.observers import (
    DeviationObserver,
    OnePassObserver,
    RangeObserver,
    deviation_sums,
    range_sums,
)


def of_stream(batches) -> dict[str, float]:
    ranges = RangeObserver()
    for batch in batches:
        ranges.update(batch)
    deviations = DeviationObserver(ranges.mean)
    for batch in batches:
        deviations.update(batch)
    return {**ranges.result(), **deviations.result()}


def by_numpy(x: torch.Tensor) -> dict[str, float]:
    values = x.detach().double().numpy()
    samples = values.reshape(len(values), -1)
    return {
        "min": values.min(),
        "max": values.max(),
        "avg_min": samples.min(1).mean(),
        "avg_max": samples.max(1).mean(),
        "mean": values.mean(),
        "std": values.std(),
        "b": np.abs(values - values.mean()).mean(),
    }


def assert_same(found: dict[str, float], expected: dict[str, float], scale: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert math.isclose(found[key], value, rel_tol=1e-5, abs_tol=1e-6 * scale), key


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    features=st.sampled_from([(2,), (3, 4), (2, 3, 3)]),
    offset=st.sampled_from([0.0, 10.0, -1000.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_values_do_not_depend_on_how_the_data_are_split_into_batches(sizes, features, offset, dtype, seed):
    torch.manual_seed(seed)
    data = (torch.randn(sum(sizes), *features) * 3 + offset).to(dtype)
    scale = abs(offset) + 10
    expected = by_numpy(data)
    assert_same(of_stream(data.split(sizes)), expected, scale)
    assert_same(of_stream([data]), expected, scale)


def test_avg_min_and_avg_max_weigh_every_sample_alike():
    # Distiller's DEFECT: they were in effect those of the first batch.
    # Samples of batch 1: (0, 1), (0, 3); of batch 2: (-9, 20). Means of minima: -9/3, of maxima: 24/3.
    batches = [torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.tensor([[-9.0, 20.0]])]
    found = of_stream(batches)
    assert found["avg_min"] == pytest.approx(-3.0)
    assert found["avg_max"] == pytest.approx(8.0)


def test_std_is_that_of_the_population_and_b_the_mean_deviation():
    # mean 2; deviations -1, -1, 2
    found = of_stream([torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0]])])
    assert found["std"] == pytest.approx(math.sqrt(6 / 3))
    assert found["b"] == pytest.approx(4 / 3)


def test_samples_of_a_single_value_average_to_the_range():
    found = of_stream([torch.tensor([[1.0], [5.0]]), torch.tensor([-3.0])])
    assert (found["avg_min"], found["avg_max"]) == (-3.0, 5.0)


def test_a_scalar_is_one_sample():
    found = of_stream([torch.tensor(2.0), torch.tensor(4.0)])
    assert (found["min"], found["max"], found["mean"], found["std"], found["b"]) == (2, 4, 3, 1, 1)


def test_tensors_larger_than_a_part_and_of_any_memory_layout_are_reduced_whole():
    data = torch.randn(3, 4, 256, 256)
    expected = by_numpy(data)
    for x in (data, data.to(memory_format=torch.channels_last), data.transpose(2, 3)):
        assert_same(of_stream([x]), expected, 10)


def test_a_small_spread_far_from_zero_keeps_its_precision():
    data = (torch.arange(1000, dtype=torch.float64) / 1000 + 4000).float().reshape(10, 100)
    assert of_stream(data.split(3))["std"] == pytest.approx(float(data.double().std(correction=0)), rel=1e-4)


def test_reductions_are_float64_and_without_gradient():
    x = torch.randn(2, 3, requires_grad=True)
    for sums, shape in [(range_sums(x), (5,)), (deviation_sums(x, 0.0), (2,))]:
        assert (sums.dtype, sums.shape, sums.requires_grad) == (torch.float64, shape, False)


def test_the_shape_is_that_of_the_first_batch():
    ranges = RangeObserver()
    for size in (4, 1):
        ranges.update(torch.zeros(size, 3))
    assert (ranges.shape, ranges.samples, ranges.numel) == ((4, 3), 5, 15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_noticed(bad):
    ranges = RangeObserver()
    assert ranges.is_finite
    ranges.update(torch.tensor([[1.0, bad]]))
    ranges.update(torch.tensor([[1.0, 2.0]]))
    assert not ranges.is_finite


def of_one_pass(batches) -> dict[str, float]:
    observer = OnePassObserver()
    for batch in batches:
        observer.update(batch)
    return observer.result()


def outliers(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 0] *= 1000
    return x


STREAMS = {
    "alike": lambda x, place: x,
    "ordered by brightness": lambda x, place: x + 10 * place,
    "first batch constant zero": lambda x, place: x + 3 if place else torch.zeros_like(x),
    "zero, then sparse": lambda x, place: x * (x > 2.3) if place else torch.zeros_like(x),
    "sparse": lambda x, place: x * (x > 2.3),
    "heavy tails": lambda x, place: torch.tan(x.sigmoid() * math.pi - math.pi / 2).nan_to_num(0),
    "heavier tails": lambda x, place: (4 * x).exp(),
    "tiny variance around a large mean": lambda x, place: 1000 + 1e-3 * x,
    "outlier channels": lambda x, place: outliers(x),
    "two values": lambda x, place: (x > 0).float(),
    "batches far apart": lambda x, place: x + 100 * (round(place * 100) % 2),
    "narrow, with a wide last batch": lambda x, place: x if place == 1 else x * 1e-3,
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(STREAMS)),
    count=st.integers(2, 12),
    size=st.sampled_from([1, 3, 8]),
    shape=st.sampled_from([(4, 3, 3), (16, 16, 16), (3, 40, 50), (5,)]),
    channels_last=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_one_pass_is_within_one_percent_of_two_whatever_the_stream(
    kind, count, size, shape, channels_last, seed
):
    generator = torch.Generator().manual_seed(seed)
    batches = [
        STREAMS[kind](torch.randn(size, *shape, generator=generator), place / (count - 1))
        for place in range(count)
    ]
    if channels_last and len(shape) == 3:
        batches = [batch.to(memory_format=torch.channels_last) for batch in batches]
    found, exact = of_one_pass(batches), of_stream([batch.double() for batch in batches])
    assert found["b"] == pytest.approx(exact["b"], rel=0.01)
    assert found["std"] == pytest.approx(exact["std"], rel=1e-3)
    for key in ("min", "max"):
        assert found[key] == exact[key]
    scale = max(abs(exact["min"]), abs(exact["max"]))
    for key in ("avg_min", "avg_max", "mean"):
        assert found[key] == pytest.approx(exact[key], rel=1e-5, abs=1e-6 * scale), key


@pytest.mark.parametrize("kind", ["ordered by brightness", "heavy tails", "batches far apart"])
def test_one_pass_stays_within_one_percent_where_tensors_are_sampled(kind):
    # 300,000 elements a batch: the sums of deviations come from samples too
    torch.manual_seed(0)
    batches = [STREAMS[kind](torch.randn(3, 10, 100, 100), place / 5) for place in range(6)]
    found, exact = of_one_pass(batches), of_stream([batch.double() for batch in batches])
    assert found["b"] == pytest.approx(exact["b"], rel=0.01)
    assert found["std"] == pytest.approx(exact["std"], rel=1e-3)


def test_a_spike_that_no_sample_sees_is_in_b():
    batches = [torch.zeros(1, 200_000) for _ in range(5)]
    batches[3][0, 12_345] = 1e6
    found = of_one_pass(batches)
    assert found["b"] == pytest.approx(2e6 / 1e6 * (1 - 1e-6), rel=1e-4)
    assert found["std"] == pytest.approx(1e6 * math.sqrt(1e-6), rel=1e-4)


def test_b_is_exact_where_all_elements_are_kept():
    torch.manual_seed(0)
    batches = [torch.randn(2, 100) * size for size in range(1, 20)]
    found, exact = of_one_pass(batches), of_stream([batch.double() for batch in batches])
    assert found["b"] == pytest.approx(exact["b"], rel=1e-6)


def test_a_long_stream_of_single_samples_takes_bounded_memory():
    torch.manual_seed(0)
    observer = OnePassObserver()
    batches = [torch.randn(1, 300) + index / 100 for index in range(300)]
    for batch in batches:
        observer.update(batch)
        assert sum(len(points.values) for points in observer._points) <= observers._KEPT
    assert observer.result()["b"] == pytest.approx(of_stream(batches)["b"], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_one_pass_adds_up_other_precisions_exactly(dtype):
    torch.manual_seed(0)
    batches = [(torch.randn(4, 500) * 50 + 60).to(dtype) for _ in range(4)]
    found, exact = of_one_pass(batches), of_stream([batch.double() for batch in batches])
    for key, value in exact.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key


def test_one_pass_of_nothing_but_one_value_has_no_spread():
    found = of_one_pass([torch.full((2, 7), 0.1), torch.full((1, 7), 0.1)])
    assert (found["std"], found["b"]) == (0, 0)
