import numpy as np
import pytest
import torch
from torch import nn

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.names import named_parameters
from distiller.policy import PruningPolicy
from distiller.pruning.random_structures import (
    BernoulliFilterPruner,
    BernoulliFilterPruner_AGP,
    RandomLevelStructureParameterPruner,
    RandomRankedFilterPruner,
    RandomRankedFilterPruner_AGP,
    bernoulli_structures,
    random_structures,
)
from distiller.pruning.ranking import ranked_structures
from distiller.scheduler import CompressionScheduler


class TwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 20, 3)
        self.b = nn.Conv2d(5, 20, 1)


@pytest.fixture
def model() -> TwoConvs:
    return TwoConvs()


@pytest.fixture
def params(model) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in named_parameters(model)}


def context(model, epoch: int = 0) -> StepContext:
    return StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 5), epoch)


def filters(mask: torch.Tensor) -> list[float]:
    assert all(bool((one == one.flatten()[0]).all()) for one in mask)
    return mask.flatten(1)[:, 0].tolist()


def test_every_structure_is_as_likely_to_go():
    kept = torch.stack([random_structures(10, 0.3) for _ in range(2000)])
    assert bool((kept.sum(1) == 7).all())
    assert kept.double().mean(0).tolist() == pytest.approx([0.7] * 10, abs=0.05)  # 5 standard deviations


def test_random_structures_leave_one_unless_all_are_asked_for():
    assert int(random_structures(3, 0.99).sum()) == 1
    assert int(random_structures(1, 0.99).sum()) == 1
    assert int(random_structures(3, 1).sum()) == 0


def test_bernoulli_values_have_mean_1_and_the_right_rate():
    rates = []
    for _ in range(1000):
        values = bernoulli_structures(20, 0.4).numpy()
        kept = np.count_nonzero(values)
        assert values.mean() == pytest.approx(1)
        assert set(np.round(values, 9)) <= {0.0, round(20 / kept, 9)}
        rates.append(kept / 20)
    assert np.mean(rates) == pytest.approx(0.6, abs=0.02)
    assert np.var(rates) == pytest.approx(0.6 * 0.4 / 20, rel=0.3)  # binomial: each by itself


def test_bernoulli_is_finite_when_no_structure_would_stay():
    """DEFECT of Distiller: it divided by zero when every filter was dropped."""
    for _ in range(50):
        values = bernoulli_structures(2, 0.95)
        assert bool(values.isfinite().all())
        assert float(values.mean()) == pytest.approx(1)
    assert bernoulli_structures(3, 1).tolist() == [0, 0, 0]


def test_random_filters_go_and_agp_forms_follow_the_schedule(model, params):
    pruner = RandomRankedFilterPruner("p", "Filters", 0.35, ["a.weight", "b.weight"])
    first, second = (pruner.compute_masks(params, context(model)) for _ in range(2))
    for name in ("a.weight", "b.weight"):
        assert filters(first[name]).count(0) == 7
        assert filters(first[name]) != filters(second[name])
    gradual = RandomRankedFilterPruner_AGP("p", 0.1, 0.5, "3D", "a.weight")
    counts = [filters(gradual.compute_masks(params, context(model, e))["a.weight"]).count(0) for e in (0, 4)]
    assert counts == [2, 10]


@pytest.mark.parametrize("pruner_class", [RandomRankedFilterPruner, BernoulliFilterPruner])
def test_with_a_leader_the_same_filters_go_everywhere(model, params, pruner_class):
    pruner = pruner_class("p", "Filters", 0.5, ["a.weight", "b.weight"], "Leader")
    masks = pruner.compute_masks(params, context(model))
    assert filters(masks["a.weight"]) == filters(masks["b.weight"])


def test_bernoulli_agp_drops_more_from_epoch_to_epoch(model, params):
    pruner = BernoulliFilterPruner_AGP("p", 0.05, 0.6, "Filters", ["a.weight"])

    def rate(epoch):
        masks = [pruner.compute_masks(params, context(model, epoch))["a.weight"] for _ in range(200)]
        return np.mean([filters(mask).count(0) / 20 for mask in masks])

    assert rate(0) == pytest.approx(0.05, abs=0.02)
    assert rate(4) == pytest.approx(0.6, abs=0.04)


def test_random_levels_are_drawn_for_each_weight_and_ranked_by_l1(model, params):
    pruner = RandomLevelStructureParameterPruner("p", "Filters", [0.2, 0.7], ["a.weight", "b.weight"])
    seen = set()
    for _ in range(100):
        masks = pruner.compute_masks(params, context(model))
        for name, mask in masks.items():
            gone = filters(mask).count(0)
            ranked = ranked_structures(params[name], "Filters", gone / 20)
            assert [bool(kept) for kept in filters(mask)] == ranked.tolist()
            seen.add(gone)
        counts = [filters(mask).count(0) for mask in masks.values()]
        seen.add(tuple(counts) if counts[0] != counts[1] else None)
    assert {gone for gone in seen if isinstance(gone, int)} == set(range(4, 14))
    assert any(isinstance(counts, tuple) for counts in seen)
    assert pruner.target_sparsity(context(model)) == {}


def test_looking_at_the_target_draws_nothing(model):
    before = torch.get_rng_state()
    RandomLevelStructureParameterPruner("p", "Filters", [0.2, 0.7], "a.weight").target_sparsity(
        context(model)
    )
    BernoulliFilterPruner("p", "Filters", 0.5, "a.weight").target_sparsity(context(model))
    assert torch.equal(torch.get_rng_state(), before)


def test_drop_filter_scales_weights_for_one_mini_batch(tiny_cnn):
    """With the policy arguments of Distiller's DropFilter schedule."""
    scheduler = CompressionScheduler(tiny_cnn)
    args = {
        "mini_batch_pruning_frequency": 2,
        "discard_masks_at_minibatch_end": True,
        "use_double_copies": True,
        "mask_on_forward_only": True,
        "mask_gradients": True,
    }
    pruner = BernoulliFilterPruner("drop", "Filters", 0.5, "conv2.weight")
    scheduler.add_policy(PruningPolicy(pruner, args), starting_epoch=0, ending_epoch=1)
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.1)
    dense = tiny_cnn.conv2.weight.detach().clone()
    scheduler.on_epoch_begin(0, optimizer)
    for minibatch in range(4):
        scheduler.on_minibatch_begin(0, minibatch, 4, optimizer)
        mask = scheduler.masks["conv2.weight"].mask
        if minibatch % 2 == 0:
            assert mask is not None
            assert float(mask.mean()) == pytest.approx(1)
            assert torch.equal(tiny_cnn.conv2.weight, dense * mask)
            assert 0 < filters(mask).count(0) < 6
        else:
            assert mask is None
        tiny_cnn(torch.randn(2, 1, 8, 8)).square().sum().backward()
        scheduler.before_parameter_optimization(0, minibatch, 4, optimizer)
        assert torch.equal(tiny_cnn.conv2.weight, dense)
        scheduler.on_minibatch_end(0, minibatch, 4, optimizer)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: RandomLevelStructureParameterPruner("p", "Filters", [0.5, 0.2], "a.weight"),
            "sparsity_range must be [low, high] with 0 <= low <= high <= 1, got [0.5, 0.2]",
        ),
        (
            lambda: RandomLevelStructureParameterPruner("p", "Filters", [0.5], "a.weight"),
            "sparsity_range must be [low, high] with 0 <= low <= high <= 1, got [0.5]",
        ),
        (
            lambda: RandomRankedFilterPruner("p", "Channels", 0.5, "a.weight"),  # type: ignore[arg-type]
            "group_type must be '3D' or 'Filters', got 'Channels'",
        ),
        (
            lambda: BernoulliFilterPruner_AGP("p", 0.1, 1.0, "3D", "a.weight"),
            "final_sparsity must be in [0, 1), got 1.0",
        ),
    ],
)
def test_arguments_are_checked(make, text):
    with pytest.raises(DistillerError) as error:
        make()
    assert str(error.value) == text
