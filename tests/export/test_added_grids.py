"""Grids over ranges that batches show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distiller.errors import UsageError
from distiller.export.added_grids import add_missing_grids, asymmetric_grid, finer_grid
from distiller.export.integer_view import integer_view, is_tensor_quantizer
from distiller.quantization.training import BinaryQuantizer, GridQuantizer, LSQQuantizer, PACTQuantizer
from tests.export.trained_nets import Residual, images, trained

BITS = {"bits_activations": 4, "bits_weights": 4}
sizes = st.floats(0.015625, 100, width=32)


def t(value: float) -> Tensor:
    return torch.tensor(value)


@given(lo=sizes, hi=sizes)
def test_an_asymmetric_grid_has_the_range_and_zero(lo, hi):
    grid = asymmetric_grid(t(-lo), t(hi))
    scale, zero_point = float(grid.scale), int(grid.zero_point)
    assert (grid.qmin, grid.qmax) == (0, 255)
    np.testing.assert_allclose(scale, (lo + hi) / 255, rtol=1e-5)
    assert abs(zero_point - lo / scale) <= 0.501
    assert float(asymmetric_grid(t(lo), t(lo + hi)).scale) == pytest.approx((lo + hi) / 255, rel=1e-5)


@given(scale=sizes, lo=sizes, hi=sizes)
def test_a_finer_grid_divides_the_steps_of_the_coarser_by_an_odd_number(scale, lo, hi):
    grid = finer_grid(t(scale), t(-lo), t(hi))
    if grid is None:
        assert (lo + hi) / scale > 254.9
        return
    ratio = scale / float(grid.scale)
    assert round(ratio) % 2 == 1
    assert ratio == pytest.approx(round(ratio), rel=1e-5)
    assert (255 + 1) * float(grid.scale) >= (lo + hi) * 0.9999  # the zero point is rounded
    if ratio < 252:
        assert (ratio + 2) * (lo + hi) > 255 * scale * 0.9999  # no larger odd number has room


@pytest.mark.parametrize(
    "top,lo,step", [(15, 0.0, 0.137), (15, -3.0, 0.137), (7, -4.0, 0.3), (200, 0.0, 0.0237)]
)
def test_rounding_to_the_finer_grid_first_changes_nothing(top, lo, step):
    scale = t(step)
    x = torch.linspace(lo, 4.0, 20011)
    grid = finer_grid(scale, x.min(), x.max())
    assert grid is not None
    first = GridQuantizer(grid)(x)
    coarse, twice = torch.round(x / scale).clamp(-top, top), torch.round(first / scale).clamp(-top, top)
    assert (coarse != twice).float().mean() < 1e-3  # but at the very middle between two steps
    middle = (x / scale - torch.floor(x / scale) - 0.5).abs() < 1e-3
    assert torch.equal(coarse[~middle], twice[~middle])


def test_an_empty_range_is_a_grid_nevertheless():
    for grid in (asymmetric_grid(t(0.0), t(0.0)), finer_grid(t(0.5), t(0.0), t(0.0))):
        assert grid is not None
        assert float(grid.scale) > 0
        assert torch.equal(GridQuantizer(grid)(torch.zeros(3)), torch.zeros(3))


def test_the_views_model_rounds_what_was_missing():
    model = trained(Residual(), PACTQuantizer, **BITS)
    x = images(model)
    view = integer_view(model, x[:1])
    with torch.no_grad():
        convolved = view.model.second.side(view.model.first(view.model.relu(view.model.conv(x))))
    names = add_missing_grids(view, x.split(16), x[:1])
    assert names == ("conv.input", "first.conv2", "second.conv2", "second.side", "average")
    grid = view.model.second.side.output_quantizer
    assert isinstance(grid, GridQuantizer)
    width = float(convolved.max().clamp(min=0) - convolved.min().clamp(max=0))
    assert float(grid.scale) == pytest.approx(width / 255, rel=1e-5)
    with torch.no_grad():
        assert float((view.model(x) - model(x)).abs().mean()) < 0.05 * float(model(x).std())
        assert not torch.equal(view.model(x), model(x))
    assert add_missing_grids(view, [x], x[:1]) == ()  # a second time nothing is missing


def test_what_a_layer_rounds_again_gets_a_grid_that_this_does_not_notice():
    model = trained(Residual(), LSQQuantizer, **BITS)
    x = images(model)
    view = integer_view(model, x[:1])
    add_missing_grids(view, lambda: [x], x[:1])
    finer, coarse = view.model.relu.output_quantizer.scale, view.model.first.conv1.input_quantizer.scale
    assert float(coarse / finer) == pytest.approx(round(float(coarse / finer)), rel=1e-5)
    assert round(float(coarse / finer)) % 2 == 1


def test_weights_alone_get_grids_if_that_is_asked_for():
    model = trained(Residual(), BinaryQuantizer)
    x = images(model)
    view = integer_view(model, x[:1])
    assert add_missing_grids(view, [x], x[:1]) == ()
    assert not any(map(is_tensor_quantizer, view.model.modules()))
    names = add_missing_grids(view, [x], x[:1], quantize_activations=True)
    assert sum(map(is_tensor_quantizer, view.model.modules())) == len(names) == 10


def test_there_must_be_batches():
    model = trained(Residual(), PACTQuantizer, **BITS)
    view = integer_view(model, images(model, 1))
    with pytest.raises(UsageError) as caught:
        add_missing_grids(view, [], images(model, 1))
    assert str(caught.value) == "batches: there are none; give at least one batch of inputs"
