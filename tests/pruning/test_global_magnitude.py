import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.names import named_parameters
from distiller.pruning.global_magnitude import GlobalMagnitudePruner, global_magnitude_masks


class Uneven(nn.Module):
    """Weights of 12, 40 and 9 elements, the second ten times smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(8, 5)
        self.c = nn.Conv2d(1, 1, 3)
        self.b.weight.data *= 0.1


WEIGHTS = ["a.weight", "b.weight", "c.weight"]


def context(model, epoch: int = 0) -> StepContext:
    return StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 5), epoch)


def params_of(model) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in named_parameters(model)}


@given(st.floats(0, 1), st.integers(0, 99), st.booleans())
def test_exactly_the_smallest_of_all_go(sparsity, seed, is_tied):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (2, 2, 2))]
    tensors = [tensor.round() for tensor in tensors] if is_tied else tensors
    masks = global_magnitude_masks(tensors, sparsity)
    magnitudes = np.abs(np.concatenate([tensor.numpy().ravel() for tensor in tensors]))
    count = int(np.floor(sparsity * 25 + 1e-9))
    expected = np.ones(25)
    expected[np.argsort(magnitudes, kind="stable")[:count]] = 0
    assert np.array_equal(np.concatenate([mask.numpy().ravel() for mask in masks]), expected)


def test_layers_share_the_sparsity_unevenly():
    model = Uneven()
    masks = GlobalMagnitudePruner("g", 0.6, WEIGHTS).compute_masks(params_of(model), context(model))
    assert sum(int((mask == 0).sum()) for mask in masks.values()) == int(0.6 * 61)
    gone = {name: float((mask == 0).float().mean()) for name, mask in masks.items()}
    assert gone["b.weight"] > 0.7 > 0.5 > gone["a.weight"]


def test_the_schedule_runs_from_the_initial_to_the_final_sparsity():
    model = Uneven()
    pruner = GlobalMagnitudePruner("g", 0.8, WEIGHTS, initial_sparsity=0.2)
    for epoch in range(5):
        target = 0.8 - 0.6 * (1 - epoch / 4) ** 3
        assert pruner.target_sparsity(context(model, epoch)) == pytest.approx(dict.fromkeys(WEIGHTS, target))
        masks = pruner.compute_masks(params_of(model), context(model, epoch))
        zeros = sum(int((mask == 0).sum()) for mask in masks.values())
        assert target * 61 - 1 < zeros <= target * 61 + 1e-9


def test_one_parameter_alone_gets_the_mask_it_has_among_all():
    """So that Distiller's set_param_mask, which is called for each parameter, has one threshold too."""
    model = Uneven()
    pruner = GlobalMagnitudePruner("g", 0.6, ["*.weight"])
    together = pruner.compute_masks(params_of(model), context(model))
    ctx = context(model)
    for name, param in params_of(model).items():
        pruner.set_param_mask(param, name, ctx.masks, ctx)
    found = ctx.masks.masked()
    assert list(found) == WEIGHTS
    assert all(torch.equal(found[name], together[name]) for name in WEIGHTS)


def test_the_order_of_the_parameters_does_not_matter():
    model = Uneven()
    for param in model.parameters():
        param.data.fill_(1.0)
    pruner = GlobalMagnitudePruner("g", 0.5, WEIGHTS)
    masks = pruner.compute_masks(params_of(model), context(model))
    other = pruner.compute_masks(dict(reversed(params_of(model).items())), context(model))
    assert all(torch.equal(masks[name], other[name]) for name in WEIGHTS)


def test_weights_of_several_types_are_ranked_together():
    masks = global_magnitude_masks([torch.tensor([1.0, 4.0]).half(), torch.tensor([2.0, 3.0]).double()], 0.5)
    assert [mask.tolist() for mask in masks] == [[0, 1], [0, 1]]
    assert [mask.dtype for mask in masks] == [torch.float16, torch.float64]


def test_nan_is_refused_naming_the_parameter_that_has_it():
    model = Uneven()
    model.c.weight.data[0, 0, 1, 1] = float("nan")
    with pytest.raises(DistillerError, match=r"^pruner 'g', 'c\.weight': .*NaN"):
        GlobalMagnitudePruner("g", 0.5, WEIGHTS).compute_masks(params_of(model), context(model))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"final_sparsity": 1.0}, "final_sparsity must be in [0, 1), got 1.0"),
        ({"initial_sparsity": -0.1}, "initial_sparsity must be in [0, 1), got -0.1"),
        (
            {"initial_sparsity": 0.5},
            "final_sparsity must differ from initial_sparsity, got 0.5 for both; "
            "a pruner without a schedule prunes at one level",
        ),
    ],
)
def test_arguments_are_checked(settings, text):
    with pytest.raises(DistillerError) as error:
        GlobalMagnitudePruner("g", **{"final_sparsity": 0.5, "weights": WEIGHTS, **settings})
    assert str(error.value) == text
