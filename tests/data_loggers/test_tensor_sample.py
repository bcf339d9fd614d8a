"""Samples that are spread evenly over a tensor."""

import pytest
import torch

from distiller.data_loggers.tensor_sample import sample_of


@pytest.mark.parametrize("shift", [0.0, 0.37, 1.0])
def test_each_stretch_gives_one_element(shift):
    flat = torch.arange(100_003.0)
    found = sample_of(flat, 1000, shift)
    spare = 100_003 // 1000 - 1
    first = round(shift * spare)
    stretch = (100_003 - spare) / 1000
    assert len(found) == 1000
    edges = first + torch.arange(1001) * stretch
    assert ((found > edges[:-1] - 1) & (found < edges[1:])).all()


def test_elements_at_a_fixed_distance_are_not_all_that_is_looked_at():
    # channels-last: every 64th element is of the channel with the outliers
    flat = torch.zeros(64 * 4096)
    flat[::64] = 1.0
    shares = [float(sample_of(flat, 4096, shift).mean()) for shift in (0.0, 0.25, 0.5)]
    assert all(share == pytest.approx(1 / 64, rel=0.4) for share in shares)


def test_no_more_elements_than_wanted_are_all_taken():
    flat = torch.randn(10)
    assert sample_of(flat, 10, 0.5) is flat


def test_a_sample_is_the_same_each_time_and_moves_with_the_shift():
    flat = torch.arange(5000.0)
    assert torch.equal(sample_of(flat, 50, 0.3), sample_of(flat, 50, 0.3))
    assert not torch.equal(sample_of(flat, 50, 0.3), sample_of(flat, 50, 0.6))
