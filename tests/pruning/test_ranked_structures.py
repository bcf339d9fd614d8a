import math

import pytest
import torch
from torch import nn

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.names import named_parameters
from distiller.norms import l1_norm, l2_norm
from distiller.pruning.ranked_structures import (
    L1RankedStructureParameterPruner,
    L1RankedStructureParameterPruner_AGP,
    L2RankedStructureParameterPruner,
    L2RankedStructureParameterPruner_AGP,
)
from distiller.pruning.ranking import ranked_structure_mask

WINDOW = EpochWindow.spanning(0, 5)


class TwoBranches(nn.Module):
    """a and b have 8 filters each, c has 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(5, 8, 1)
        self.c = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(8, 2)


@pytest.fixture
def model() -> TwoBranches:
    return TwoBranches()


@pytest.fixture
def params(model) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in named_parameters(model)}


def context(model, epoch: int = 0) -> StepContext:
    return StepContext(model, MaskStore(model), None, WINDOW, epoch)


def gone(mask: torch.Tensor, dim: int = 0) -> int:
    return int((mask.movedim(dim, 0).flatten(1).sum(1) == 0).sum())


@pytest.mark.parametrize(
    ("pruner_class", "norm"),
    [(L1RankedStructureParameterPruner, l1_norm), (L2RankedStructureParameterPruner, l2_norm)],
)
@pytest.mark.parametrize(
    ("group_type", "weight"), [("Filters", "a.weight"), ("Channels", "c.weight"), ("Rows", "fc.weight")]
)
def test_each_weight_is_ranked_by_the_classs_norm(model, params, pruner_class, norm, group_type, weight):
    masks = pruner_class("p", group_type, 0.5, [weight]).compute_masks(params, context(model))
    assert list(masks) == [weight]
    assert torch.equal(masks[weight], ranked_structure_mask(params[weight], group_type, 0.5, norm))


@pytest.mark.parametrize(
    "pruner_class", [L1RankedStructureParameterPruner_AGP, L2RankedStructureParameterPruner_AGP]
)
def test_agp_forms_prune_more_from_epoch_to_epoch(model, params, pruner_class):
    pruner = pruner_class("p", 0.0, 0.75, "Filters", "a.weight")
    counts = [gone(pruner.compute_masks(params, context(model, epoch))["a.weight"]) for epoch in range(5)]
    # 8 filters, 0.75 (1 - (1 - e/4)^3): 0, 3.47, 5.25, 5.91, 6
    assert counts == [0, 3, 5, 5, 6]
    assert pruner.target_sparsity(context(model, 4)) == {"a.weight": 0.75}


def test_with_a_leader_the_same_structures_go_in_all_weights(model, params):
    pruner = L1RankedStructureParameterPruner("p", "Filters", 0.5, ["b.weight", "a.weight"], "Leader")
    masks = pruner.compute_masks(params, context(model))
    assert torch.equal(masks["b.weight"], ranked_structure_mask(params["b.weight"], "Filters", 0.5))
    assert torch.equal(masks["a.weight"][:, 0, 0, 0], masks["b.weight"][:, 0, 0, 0])
    assert gone(masks["a.weight"]) == gone(masks["b.weight"]) == 4


def test_the_leader_is_the_first_of_the_weights_whatever_the_models_order(model, params):
    reordered = dict(reversed(params.items()))
    pruner = L1RankedStructureParameterPruner("p", "3D", 0.5, ["module.a.weight", "b.*ght"], "Leader")
    masks = pruner.compute_masks(reordered, context(model))
    assert torch.equal(masks["a.weight"], ranked_structure_mask(params["a.weight"], "Filters", 0.5))
    assert torch.equal(masks["b.weight"][:, 0, 0, 0], masks["a.weight"][:, 0, 0, 0])


def test_the_leaders_map_follows_the_schedule(model, params):
    pruner = L1RankedStructureParameterPruner_AGP(
        "p", 0.0, 0.5, "Filters", ["a.weight", "b.weight"], "Leader"
    )
    assert [gone(pruner.compute_masks(params, context(model, epoch))["b.weight"]) for epoch in (0, 4)] == [
        0,
        4,
    ]


def test_a_leader_with_nothing_to_prune_yet_is_no_error(model, params):
    """DEFECT of Distiller: AssertionError when the target was less than one structure."""
    pruner = L1RankedStructureParameterPruner("p", "Filters", 0.05, ["a.weight", "b.weight"], "Leader")
    assert all(bool((mask == 1).all()) for mask in pruner.compute_masks(params, context(model)).values())


def test_a_leader_with_another_number_of_structures_is_refused(model, params):
    pruner = L1RankedStructureParameterPruner("low", "Filters", 0.5, ["a.weight", "c.weight"], "Leader")
    with pytest.raises(DistillerError) as error:
        pruner.compute_masks(params, context(model))
    assert str(error.value) == (
        "pruner 'low', 'c.weight': with group_dependency 'Leader' all weights must have as many Filters as "
        "the first, 'a.weight' with 8, got 4; give it a pruner of its own"
    )


def test_nan_in_a_follower_is_refused_too(model, params):
    params["b.weight"] = torch.full((8, 5, 1, 1), float("nan"))
    pruner = L1RankedStructureParameterPruner("low", "Filters", 0.5, ["a.weight", "b.weight"], "Leader")
    with pytest.raises(DistillerError, match=r"^pruner 'low', 'b\.weight': cannot be pruned, got 40 NaN"):
        pruner.compute_masks(params, context(model))


def test_defect_group_size_and_rounding_are_forwarded(model, params):
    """DEFECT of Distiller: it stored rounding_fn and group_size, and ranked without them."""
    pruner = L1RankedStructureParameterPruner(
        "p", "Filters", 0.3, ["a.weight", "b.weight"], group_size=4, rounding_fn=math.ceil
    )
    for name, mask in pruner.compute_masks(params, context(model)).items():
        expected = ranked_structure_mask(params[name], "Filters", 0.3, group_size=4, rounding_fn=math.ceil)
        assert torch.equal(mask, expected)
        assert gone(mask) == 4
        assert mask.view(2, 4, -1).unique(dim=1).size(1) == 1


def test_a_shape_that_has_no_such_structures_is_refused_by_name(model, params):
    pruner = L1RankedStructureParameterPruner("low", "Rows", 0.5, ["a.weight"])
    with pytest.raises(DistillerError) as error:
        pruner.compute_masks(params, context(model))
    assert str(error.value) == (
        "pruner 'low', 'a.weight': group_type 'Rows' wants a tensor of 2 dimensions, got shape (8, 3, 3, 3)"
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: L1RankedStructureParameterPruner("p", "Filter", 0.5, "a.weight"),  # type: ignore[arg-type]
            "group_type must be one of 3D, Filters, Channels, Rows, Blocks, got 'Filter'; did you mean 'Filters'?",
        ),
        (
            lambda: L1RankedStructureParameterPruner("p", "Filters", 50, "a.weight"),
            "desired_sparsity must be in [0, 1], got 50",
        ),
        (
            lambda: L1RankedStructureParameterPruner("p", "Filters", 0.5, "a.weight", "leader"),  # type: ignore[arg-type]
            "group_dependency must be 'Leader' or left out, got 'leader'",
        ),
        (
            lambda: L1RankedStructureParameterPruner("p", "Filters", 0.5, "a.weight", group_size=0),
            "group_size must be 1 or more, got 0",
        ),
        (
            lambda: L1RankedStructureParameterPruner_AGP("p", 0.1, 1.0, "Filters", "a.weight"),
            "final_sparsity must be in [0, 1), got 1.0",
        ),
        (
            lambda: L1RankedStructureParameterPruner("p", "Filters", 0.5, []),
            "weights: at least one parameter name or pattern is wanted, got []",
        ),
    ],
)
def test_arguments_are_checked(make, text):
    with pytest.raises(DistillerError) as error:
        make()
    assert str(error.value) == text


# --- Distiller's calls


def test_set_param_mask_of_one_parameter(model, params):
    masks = MaskStore(model)
    pruner = L1RankedStructureParameterPruner("p", "Filters", 0.5, "module.a.weight")
    pruner.set_param_mask(params["a.weight"], "a.weight", masks, context(model))
    assert torch.equal(masks.masked()["a.weight"], ranked_structure_mask(params["a.weight"], "Filters", 0.5))


def test_set_param_mask_of_a_follower_finds_the_leader_in_the_model(model, params):
    masks = MaskStore(model)
    pruner = L1RankedStructureParameterPruner("p", "Filters", 0.5, ["a.weight", "b.weight"], "Leader")
    pruner.set_param_mask(params["b.weight"], "b.weight", masks, context(model))
    leader = ranked_structure_mask(params["a.weight"], "Filters", 0.5)
    assert torch.equal(masks.masked()["b.weight"][:, 0, 0, 0], leader[:, 0, 0, 0])


@pytest.mark.parametrize(
    ("pruner_class", "norm"),
    [(L1RankedStructureParameterPruner, l1_norm), (L2RankedStructureParameterPruner, l2_norm)],
)
def test_rank_and_prune_sets_the_mask_and_returns_the_map(model, params, pruner_class, norm):
    masks = MaskStore(model)
    w = params["a.weight"]
    binary_map = pruner_class.rank_and_prune_channels(0.34, w, "a.weight", masks)
    assert binary_map.shape == (3,)
    assert binary_map.dtype == w.dtype
    assert torch.equal(masks.masked()["a.weight"], ranked_structure_mask(w, "Channels", 0.34, norm))
    binary_map = pruner_class.rank_and_prune_filters(0.5, w, "a.weight", masks)
    assert torch.equal(masks.masked()["a.weight"], ranked_structure_mask(w, "Filters", 0.5, norm))


def test_rank_and_prune_uses_an_earlier_map(model, params):
    masks = MaskStore(model)
    binary_map = L1RankedStructureParameterPruner.rank_and_prune_filters(0.5, params["a.weight"])
    L1RankedStructureParameterPruner.rank_and_prune_filters(
        0.5, params["b.weight"], "b.weight", masks, binary_map=binary_map
    )
    assert torch.equal(masks.masked()["b.weight"][:, 0, 0, 0], binary_map)


# --- Blocks, noise and the order of arguments


def test_arguments_stand_in_distillers_order(model, params):
    """name, group_type, desired_sparsity, weights, group_dependency, kwargs, noise, group_size, rounding_fn"""
    pruner = L1RankedStructureParameterPruner(
        "p", "Filters", 0.3, ["a.weight"], None, None, 0.0, 4, math.ceil
    )
    mask = pruner.compute_masks(params, context(model))["a.weight"]
    expected = ranked_structure_mask(params["a.weight"], "Filters", 0.3, group_size=4, rounding_fn=math.ceil)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    ("pruner_class", "norm"),
    [(L1RankedStructureParameterPruner_AGP, l1_norm), (L2RankedStructureParameterPruner_AGP, l2_norm)],
)
def test_blocks_are_pruned_gradually(model, params, pruner_class, norm):
    pruner = pruner_class("p", 0.0, 0.5, "Blocks", ["c.weight"], kwargs={"block_shape": [1, 4, 1, 1]})
    for epoch, fraction in ((0, 0.0), (4, 0.5)):
        mask = pruner.compute_masks(params, context(model, epoch))["c.weight"]
        assert torch.equal(
            mask, ranked_structure_mask(params["c.weight"], "Blocks", fraction, norm, block_shape=(1, 4))
        )
    assert mask.view(8, 4).unique(dim=1).size(1) == 1  # 8 blocks of 4 input channels
    assert int((mask == 0).sum()) == 16


def test_blocks_follow_a_leader(model, params):
    model.d = nn.Conv2d(4, 8, 1)
    params["d.weight"] = model.d.weight.detach()
    pruner = L1RankedStructureParameterPruner(
        "p", "Blocks", 0.5, ["c.weight", "d.weight"], "Leader", {"block_shape": [1, 4, 1, 1]}
    )
    masks = pruner.compute_masks(params, context(model))
    assert torch.equal(masks["c.weight"].flatten(), masks["d.weight"].flatten())


def test_kwargs_belong_to_blocks(model):
    with pytest.raises(DistillerError, match="^kwargs is for group_type 'Blocks', got it for 'Filters'$"):
        L1RankedStructureParameterPruner("p", "Filters", 0.5, "a.weight", None, {"block_shape": [1, 8, 1, 1]})


def noisy_maps(model, params, noise, seed, calls=40):
    pruner = L1RankedStructureParameterPruner("p", "Filters", 0.5, ["a.weight"], noise=noise)
    torch.manual_seed(seed)
    return [
        pruner.compute_masks(params, context(model))["a.weight"][:, 0, 0, 0].tolist() for _ in range(calls)
    ]


def test_noise_disturbs_so_many_rankings_and_repeats_with_the_seed(model, params):
    plain = noisy_maps(model, params, 0.0, 1)
    noisy = noisy_maps(model, params, 0.5, 1)
    assert all(found == plain[0] for found in plain)
    disturbed = sum(found != plain[0] for found in noisy)
    assert 8 <= disturbed <= 32  # 20 +- 4 standard deviations, of 40
    assert all(sum(found) == 4 for found in noisy)
    assert noisy_maps(model, params, 0.5, 1) == noisy
    assert noisy_maps(model, params, 0.5, 2) != noisy


def test_noise_multiplies_magnitudes_by_draws_from_the_normal_distribution(model, params):
    torch.manual_seed(3)
    torch.rand(())  # whether to disturb
    factors = torch.randn(8)
    magnitudes = params["a.weight"].abs().mean((1, 2, 3)) * factors
    expected = [float(rank >= 4) for rank in magnitudes.argsort().argsort().tolist()]
    assert noisy_maps(model, params, 1.0, 3, calls=1) == [expected]


def test_noise_is_a_probability(model):
    with pytest.raises(DistillerError, match=r"^noise must be in \[0, 1\], got 1\.5$"):
        L1RankedStructureParameterPruner("p", "Filters", 0.5, "a.weight", noise=1.5)


def test_a_noisy_leader_is_never_ranked_twice(model, params):
    pruner = L1RankedStructureParameterPruner(
        "p", "Filters", 0.5, ["a.weight", "b.weight"], "Leader", noise=0.5
    )
    masks = pruner.compute_masks(params, context(model))
    assert torch.equal(masks["a.weight"][:, 0, 0, 0], masks["b.weight"][:, 0, 0, 0])
    with pytest.raises(DistillerError) as error:
        pruner.compute_masks({"b.weight": params["b.weight"]}, context(model))
    assert str(error.value) == (
        "pruner 'p': a leader's random structures are drawn for all weights at once; "
        "compute the masks of 'a.weight' and the others in one call"
    )


def test_defect_conv1d_weights_are_pruned():
    """DEFECT of Distiller: it accepted 3-D weights in one assertion and failed in the next."""
    model = nn.Conv1d(4, 6, 3)
    weight = model.weight.detach()
    for group_type, dim in (("Filters", 0), ("Channels", 1)):
        pruner = L1RankedStructureParameterPruner("p", group_type, 0.5, "weight")  # type: ignore[arg-type]
        mask = pruner.compute_masks({"weight": weight}, context(model))["weight"]
        means = weight.abs().movedim(dim, 0).flatten(1).mean(1)
        expected = means > means.sort().values[len(means) // 2 - 1]
        assert torch.equal(mask.movedim(dim, 0)[:, 0, 0] != 0, expected)
