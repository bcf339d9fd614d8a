from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from distiller.models import create_model
from distiller.pruning.settings import ParameterError
from distiller.pruning.structured_groups import StructuredGroupPruner
from distiller.thinning.removal import apply_recipe, thinning_recipe
from distiller.thinning.trial import model_groups
from tests.channel_groups.cutting import randomize, relative_difference
from tests.pruning.structured_nets import (
    INNER,
    OF_INNER,
    OF_STREAM,
    STREAM,
    Branches,
    Residual,
    apply,
    at,
    images_for,
    macs_of,
    masks_of,
    params_of,
    removed_by,
    set_filters,
)


def test_a_unit_is_masked_in_every_parameter_that_has_a_share_of_it():
    model = Residual()
    set_filters(model.stem.weight, [4.0, 1.0, 3.0, 2.0])
    set_filters(model.conv2.weight, [0.5, 9.0, 3.0, 1.0])  # sums: 4.5, 10, 6, 3
    pruner = StructuredGroupPruner("p", model, final_sparsity=0.25, weights="stem.weight")
    masks = masks_of(pruner, model)
    assert set(masks) == OF_STREAM
    expected = {name: torch.ones_like(param) for name, param in params_of(model).items() if name in masks}
    for name in OF_STREAM - {"conv1.weight", "fc.weight"}:
        expected[name][3] = 0
    expected["conv1.weight"][:, 3] = 0
    expected["fc.weight"][:, 3] = 0
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name]), name


def test_criteria_rank_by_norms_of_filters_or_scales_of_batch_norms():
    model = Residual()
    with torch.no_grad():
        model.stem.weight.zero_()[:, 0, 0, 0] = torch.tensor([0.0, 0.0, 3.0, 3.5])
        model.stem.weight[:, 0, 1, 1] = torch.tensor([4.0, 5.0, 3.0, 0.0])
        model.conv2.weight.zero_()
        model.bn0.weight.copy_(torch.tensor([1.0, -0.1, 1.0, 1.0]))
        model.bn2.weight.copy_(torch.tensor([1.0, 0.2, 1.0, -1.0]))
    units = {}
    for criterion in ("l1", "l2", "batch_norm"):
        pruner = StructuredGroupPruner("p", model, criterion, final_sparsity=0.5, weights=STREAM)
        units[criterion] = removed_by(masks_of(pruner, model), model)[STREAM]
    # l1: 4, 5, 6, 3.5; l2: 4, 5, 4.24, 3.5; batch norms: 2, 0.3, 2, 2
    assert units == {"l1": [0, 3], "l2": [0, 3], "batch_norm": [0, 1]}
    with torch.no_grad():
        model.stem.weight[2] *= 0.9  # l1: 5.4, l2: 3.82
    l2 = StructuredGroupPruner("p", model, "l2", final_sparsity=0.5, weights=STREAM)
    assert removed_by(masks_of(l2, model), model)[STREAM] == [2, 3]


def test_local_ranking_prunes_the_share_of_each_group():
    model = Residual()
    pruner = StructuredGroupPruner("p", model, final_sparsity=0.5)
    removed = removed_by(masks_of(pruner, model), model)
    assert {name: len(units) for name, units in removed.items()} == {STREAM: 2, INNER: 3}
    assert pruner.target_sparsity(at(model)) == {"*": 0.5}


def test_each_group_may_have_a_level_of_its_own():
    model = Residual()
    pruner = StructuredGroupPruner("p", model, levels={"stem.weight": 0.25, "bn1.bias": 0.67})
    masks = masks_of(pruner, model)
    assert set(masks) == OF_STREAM | OF_INNER
    assert {name: len(units) for name, units in removed_by(masks, model).items()} == {STREAM: 1, INNER: 4}
    assert pruner.target_sparsity(at(model)) == {"stem.weight": 0.25, "bn1.bias": 0.67}
    alone = StructuredGroupPruner("p", model, final_sparsity=0.25, weights="stem.weight")
    expected = removed_by(masks_of(alone, model), model)
    assert removed_by(masks, model)[STREAM] == expected[STREAM]
    assert set(masks_of(StructuredGroupPruner("p", model, levels={"conv1.weight": 0.5}), model)) == OF_INNER


def test_a_name_wins_over_a_pattern_and_a_pattern_over_the_default():
    model = Residual()

    def removed(levels):
        masks = masks_of(StructuredGroupPruner("p", model, levels=levels), model)
        return {name: len(units) for name, units in removed_by(masks, model).items()}

    assert removed({"*": 0.5}) == {STREAM: 2, INNER: 3}
    assert removed({"conv1.weight": 0.34, "*": 0.5}) == {STREAM: 2, INNER: 2}
    assert removed({"conv1*": 0.34, "*": 0.5, "bn1.weight": 0.17}) == {STREAM: 2, INNER: 1}


def test_two_levels_for_the_same_units_are_refused():
    model = Residual()
    pruner = StructuredGroupPruner("p", model, levels={"stem.weight": 0.25, "conv2.weight": 0.5})
    with pytest.raises(ParameterError) as error:
        masks_of(pruner, model)
    assert str(error.value) == (
        "pruner 'p': 'stem.weight' and 'conv2.weight' have the same units (those of stem.weight), and so must "
        "have one level, got 0.25 and 0.5"
    )


def test_each_level_is_come_to_gradually():
    model = Residual()
    pruner = StructuredGroupPruner(
        "p", model, initial_sparsity=0.0, levels={"stem.weight": 0.5, "conv1.weight": 0.84}
    )
    counts = []
    for epoch in range(4):
        ctx = at(model, epoch, (0, 4))
        shares = pruner.target_sparsity(ctx)
        left = (1 - ctx.window.progress(epoch)) ** 3
        assert shares == pytest.approx({"stem.weight": 0.5 * (1 - left), "conv1.weight": 0.84 * (1 - left)})
        removed = removed_by(masks_of(pruner, model, ctx), model)
        counts.append({name: len(units) for name, units in removed.items() if units})
    assert counts[0] == {}
    assert counts[1] == {STREAM: 1, INNER: 3}  # of 4 and 6: floors of 1.41 and 3.55
    assert counts[-1] == {STREAM: 2, INNER: 5}


def test_levels_go_on_being_shares_of_the_dense_model_after_a_thinning():
    model = Residual()
    pruner = StructuredGroupPruner("p", model, levels={"stem.weight": 0.5, "conv1.weight": 0.67})
    masks_of(pruner, model)
    recipe = thinning_recipe(model, model_groups(model, "test"), {STREAM: [0], INNER: [1, 2]})
    apply_recipe(model, recipe)
    pruner.follow_thinning(recipe.tensors)
    removed = removed_by(masks_of(pruner, model), model)
    assert {name: len(units) for name, units in removed.items()} == {STREAM: 1, INNER: 2}  # 2 and 4 in all


def test_global_ranking_prunes_the_share_of_all_groups_together():
    model = Residual()
    set_filters(model.stem.weight, [100.0, 200.0, 300.0, 400.0])
    with torch.no_grad():
        model.conv2.weight.zero_()  # relative to 250: 0.4, 0.8, 1.2, 1.6
    set_filters(model.conv1.weight, [0.1, 0.3, 0.5, 1.1, 1.5, 2.5])  # relative to 1: as they are
    pruner = StructuredGroupPruner("p", model, final_sparsity=0.4, ranking="global")
    removed = removed_by(masks_of(pruner, model), model)
    assert removed == {STREAM: [0], INNER: [0, 1, 2]}


def test_a_concatenation_has_a_group_for_each_branch_with_depthwise_filters():
    model = Branches()
    set_filters(model.a.weight, [5.0, 1.0, 4.0, 3.0, 2.0])
    with torch.no_grad():
        model.depthwise.weight.fill_(1e-3)
    pruner = StructuredGroupPruner("p", model, final_sparsity=0.4, weights=["a.weight"])
    masks = masks_of(pruner, model)
    assert removed_by(masks, model) == {"a.weight": [1, 4]}
    assert masks["a.bias"].tolist() == masks["bn.bias"].tolist()[:5] == [1, 0, 1, 1, 0]
    assert masks["depthwise.weight"].flatten(1).mean(1).tolist() == [1, 0, 1, 1, 0, 1, 1, 1]
    assert masks["pointwise.weight"].mean((0, 2, 3)).tolist() == [1, 0, 1, 1, 0, 1, 1, 1]


def test_behind_a_flatten_all_columns_of_the_channel_are_masked():
    model = Branches()
    pruner = StructuredGroupPruner("p", model, final_sparsity=0.2, weights="pointwise.weight")
    masks = masks_of(pruner, model)
    (unit,) = removed_by(masks, model)["pointwise.weight"]
    columns = masks["fc.weight"].view(3, 6, 16)
    assert (columns[:, unit] == 0).all()
    assert columns.sum() == 3 * 5 * 16


def test_what_is_rounded_keeps_a_multiple_of_units_and_small_groups_stay_whole():
    model = Residual()
    pruner = StructuredGroupPruner("p", model, final_sparsity=0.5, round_to=4)
    removed = removed_by(masks_of(pruner, model), model)
    assert {name: len(units) for name, units in removed.items()} == {INNER: 2}  # 6 -> 4; the 4 stay
    assert set(pruner.too_small(params_of(model), at(model))) == set(params_of(model)) - OF_INNER


def test_no_more_of_a_group_goes_than_is_allowed():
    model = Residual()
    set_filters(model.conv1.weight, [1e-3] * 5 + [1.0])
    pruner = StructuredGroupPruner("p", model, final_sparsity=0.5, ranking="global", max_sparsity=0.5)
    removed = removed_by(masks_of(pruner, model), model)
    assert {name: len(units) for name, units in removed.items()} == {STREAM: 2, INNER: 3}


@pytest.mark.parametrize("kind", [Residual, Branches])
def test_macs_end_at_or_below_the_target_by_less_than_one_unit(kind):
    model = kind()
    groups, dense = model_groups(model, "test"), macs_of(model)
    for ranking in ("local", "global"):
        for share in (0.2, 0.35, 0.5, 0.77, 0.9):
            pruner = StructuredGroupPruner("p", model, final_macs=share, ranking=ranking, max_sparsity=1.0)
            removed = removed_by(masks_of(pruner, model), model)
            assert groups.macs(removed) <= share * dense
            spared = [
                {**removed, name: [other for other in units if other != unit]}
                for name, units in removed.items()
                for unit in units
            ]
            assert any(groups.macs(less) > share * dense for less in spared)
            assert pruner.target_sparsity(at(model)) == {}


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_masks_nest_while_the_target_rises_and_come_back_when_it_falls(ranking):
    model = Residual()
    window = (0, 8)
    growing = StructuredGroupPruner("p", model, final_macs=0.15, initial_macs=0.9, ranking=ranking)
    before: dict[str, Tensor] = {}
    for epoch in range(8):
        masks = masks_of(growing, model, at(model, epoch, window))
        assert all((masks[name] <= mask).all() for name, mask in before.items())
        before = masks
        apply(model, masks)
        with torch.no_grad():  # training goes on
            for name, param in model.named_parameters():
                param.add_(torch.randn_like(param) * masks.get(name, torch.ones(())))
    falling = StructuredGroupPruner("p", model, final_macs=0.6, ranking=ranking)
    count = sum(len(units) for units in removed_by(masks_of(falling, model), model).values())
    assert 0 < count < sum(len(units) for units in removed_by(before, model).values())


def test_the_target_is_gradual_within_epochs_too():
    model = Residual()
    pruner = StructuredGroupPruner("p", model, final_sparsity=0.8, initial_sparsity=0.0)
    shares = [
        pruner.target.at(at(model, epoch, (1, 3), minibatch=step, minibatches_per_epoch=4), 0.8)
        for epoch in (1, 2)
        for step in (0, 1, 2, 3)
    ]
    expected = [0.8 * (1 - (1 - progress) ** 3) for progress in (0, 0.25, 0.5, 0.75, 1, 1, 1, 1)]
    assert shares == pytest.approx(expected)
    assert pruner.target.at(at(model, 2, (1, 3)), 0.8) == 0.8


@pytest.mark.parametrize("kind", [Residual, Branches])
@pytest.mark.parametrize(
    "settings",
    [
        {"final_sparsity": 0.4},
        {"final_macs": 0.4, "ranking": "global", "criterion": "l2"},
        {"final_macs": 0.4, "round_to": 2},
    ],
    ids=str,
)
def test_what_is_masked_can_be_removed_with_outputs_unchanged(kind, settings):
    model = randomize(kind())
    masks = masks_of(StructuredGroupPruner("p", model, **settings), model)
    apply(model, masks)
    thinned = copy.deepcopy(model)
    recipe = thinning_recipe(thinned, model_groups(model, "test"), removed_by(masks, model))
    apply_recipe(thinned, recipe)
    zeros = sum(int((param == 0).sum()) for param in model.parameters())
    assert zeros == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in thinned.parameters())
    assert relative_difference(model, thinned, images_for(model, 4)) < 1e-5


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_resnet20_at_half_of_its_macs(ranking):
    model = randomize(create_model(False, "fashion-mnist", "resnet20_cifar", parallel=False))
    dense = macs_of(model)
    masks = masks_of(StructuredGroupPruner("p", model, final_macs=0.5, ranking=ranking), model)
    apply(model, masks)
    thinned = copy.deepcopy(model)
    recipe = thinning_recipe(thinned, model_groups(model, "test"), removed_by(masks, model))
    apply_recipe(thinned, recipe)
    assert 0.47 < macs_of(thinned) / dense <= 0.5
    assert relative_difference(model, thinned, torch.randn(2, 1, 28, 28)) < 1e-5


def test_targets_go_on_being_shares_of_the_dense_model_after_a_thinning():
    model = Residual()
    dense = macs_of(model)
    of_units = StructuredGroupPruner("u", model, final_sparsity=0.5)
    of_macs = StructuredGroupPruner("m", model, final_macs=0.5)
    for pruner in (of_units, of_macs):
        masks_of(pruner, model)  # it has seen the dense model
    first = {STREAM: [0], INNER: [1, 2]}
    recipe = thinning_recipe(model, model_groups(model, "test"), first)
    apply_recipe(model, recipe)
    for pruner in (of_units, of_macs):
        pruner.follow_thinning(recipe.tensors)
        resumed = StructuredGroupPruner("r", Residual(), final_sparsity=0.5)
        resumed.load_state_dict(pruner.state_dict())
        assert resumed.state_dict() == pruner.state_dict()
    removed = removed_by(masks_of(of_units, model), model)
    assert {name: len(units) for name, units in removed.items()} == {STREAM: 1, INNER: 1}  # 2 and 3 in all
    removed = removed_by(masks_of(of_macs, model), model)
    assert 0.3 * dense < model_groups(model, "test").macs(removed) <= 0.5 * dense
