import copy

import pytest
import torch
from torch import nn

from distiller.factorization import factorize
from distiller.factorization.layers import composed
from distiller.sensitivity.axes import AXES, AxisContext

LAYERS = {
    "linear": lambda: nn.Linear(12, 8),
    "convolution": lambda: nn.Conv2d(4, 10, 3),
    "convolution of lines": lambda: nn.Conv1d(3, 8, 2),
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=list(LAYERS))
@pytest.mark.parametrize("level", [0.25, 0.5, 0.9, 1.0])
def test_a_level_is_the_truncation_of_the_singular_value_decomposition(build, level):
    layer = build()
    (unit,) = AXES["rank"].units(layer, ["weight"], [level], AxisContext())
    matrix = layer.weight.detach().flatten(1).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = max(1, len(values) - int(level * len(values)))
    values[rank:] = 0

    value = unit.make(level).tensors["weight"]

    torch.testing.assert_close(value.flatten(1).double(), (left * values) @ right, rtol=1e-5, atol=1e-6)
    assert int(torch.linalg.matrix_rank(value.flatten(1).double(), tol=1e-5)) == rank


@pytest.mark.parametrize("build, form", [(LAYERS["linear"], "svd"), (LAYERS["convolution"], "channel")])
def test_a_level_is_what_factorization_makes_of_the_layer(build, form):
    model = nn.Sequential(build())
    size = (1, 12) if form == "svd" else (1, 4, 5, 5)
    (unit,) = AXES["rank"].units(model, ["0.weight"], [0.75], AxisContext())
    factored = copy.deepcopy(model)
    factorize(factored, {"0": {"rank": 2 if form == "svd" else 3}}, torch.zeros(size))

    expected = composed(factored[0], form).weight

    torch.testing.assert_close(unit.make(0.75).tensors["0.weight"], expected, rtol=1e-5, atol=1e-6)


def test_the_note_says_what_the_factors_cost_and_where_they_stop_to_pay():
    (unit,) = AXES["rank"].units(nn.Linear(12, 8), ["weight"], [], AxisContext())

    assert unit.note(0.5) == "rank 4 of 8: 80 instead of 96 parameters"
    assert unit.note(0.25) == (
        "rank 6 of 8: 120 instead of 96 parameters, no smaller than whole (break-even rank 4)"
    )
    assert unit.note(1.0) == "rank 1 of 8: 20 instead of 96 parameters"


def test_the_note_says_where_no_rank_pays():
    (unit,) = AXES["rank"].units(nn.Linear(2, 2), ["weight"], [], AxisContext())

    assert unit.note(1.0) == (
        "rank 1 of 2: 4 instead of 4 parameters, no smaller than whole (break-even rank none)"
    )


def test_the_notes_parameters_are_those_of_the_factored_layer():
    model = nn.Sequential(nn.Conv2d(4, 10, 3, bias=False))
    (unit,) = AXES["rank"].units(model, ["0.weight"], [0.5], AxisContext())
    report = factorize(model, {"0": {"rank": 5}}, torch.zeros(1, 4, 5, 5))

    assert unit.note(0.5) == f"rank 5 of 10: {report.parameters[1]} instead of 360 parameters"


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv3d(2, 2, 2),
        nn.ConvTranspose2d(2, 2, 2),
        nn.Linear(5, 1),
        nn.Embedding(5, 4),
    ],
)
def test_layers_that_cannot_be_factored_are_left_out(model):
    whole = nn.Sequential(model, nn.Linear(3, 2))

    units = AXES["rank"].units(whole, ["*"], [0.5], AxisContext())

    assert [unit.parameter for unit in units] == ["1.weight"]


def test_a_weight_that_layers_share_is_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight

    units = AXES["rank"].units(model, ["*"], [0.5], AxisContext())

    assert [unit.parameter for unit in units] == ["1.weight"]
