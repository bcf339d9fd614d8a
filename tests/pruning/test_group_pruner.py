from __future__ import annotations

import pytest

from distiller.config import dict_config
from distiller.errors import DistillerError, PolicyConflictError, ScheduleError, UnknownNameError
from distiller.pruning.structured_groups import StructuredGroupPruner
from tests.pruning.structured_nets import (
    OF_INNER,
    OF_STREAM,
    Branches,
    Residual,
    params_of,
)


def test_patterns_choose_groups_and_protect_them():
    model = Residual()
    names = [name for name, _ in model.named_parameters()]
    assert set(StructuredGroupPruner("p", model, final_sparsity=0.5).select(names)) == OF_STREAM | OF_INNER
    by_pattern = StructuredGroupPruner(
        "p", model, final_sparsity=0.5, weights=["bn*.weight"], protected="stem*"
    )
    assert set(by_pattern.select(names)) == OF_INNER
    by_norm = StructuredGroupPruner("p", model, final_sparsity=0.5, weights="bn1.bias")
    assert set(by_norm.select(names)) == OF_INNER


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, "needs one of final_sparsity, final_macs and levels, got none of them"),
        (
            {"final_sparsity": 0.5, "final_macs": 0.5},
            "needs one of final_sparsity, final_macs and levels, got final_sparsity and final_macs",
        ),
        (
            {"final_macs": 0.5, "levels": {"stem.weight": 0.5}},
            "needs one of final_sparsity, final_macs and levels, got final_macs and levels",
        ),
        (
            {"levels": {"stem.weight": 0.95}},
            "levels['stem.weight'] must be at most max_sparsity, 0.9, got 0.95",
        ),
        ({"levels": {}}, "levels: at least one parameter name, pattern or '*' is wanted, got {}"),
        ({"levels": {"stem.weight": -0.1}}, "levels['stem.weight'] must be in [0, 1), got -0.1"),
        (
            {"levels": {"stem.weight": 0.5}, "initial_macs": 0.9},
            "initial_macs goes with final_macs, got it with levels",
        ),
        (
            {"levels": {"stem.weight": 0.5}, "weights": "conv1.weight"},
            "levels name the groups and the share of each, which ranks by itself; got weights as well",
        ),
        (
            {"levels": {"stem.weight": 0.5}, "ranking": "global"},
            "levels name the groups and the share of each, which ranks by itself; got ranking 'global' as well",
        ),
        ({"final_sparsity": 1.0}, "final_sparsity must be in [0, 1), got 1.0"),
        ({"final_sparsity": 0.95}, "final_sparsity must be at most max_sparsity, 0.9, got 0.95"),
        ({"final_macs": 0.0}, "final_macs must be more than 0, got 0.0"),
        ({"final_macs": 0.5, "initial_macs": 1.5}, "initial_macs must be at most 1, got 1.5"),
        (
            {"final_macs": 0.5, "initial_sparsity": 0.1},
            "initial_sparsity goes with final_sparsity, got it with final_macs",
        ),
        (
            {"final_sparsity": 0.5, "initial_macs": 0.9},
            "initial_macs goes with final_macs, got it with final_sparsity",
        ),
        (
            {"final_sparsity": 0.5, "initial_sparsity": 0.5},
            "final_sparsity must differ from initial_sparsity, got 0.5 for both; "
            "leave initial_sparsity out to prune at one level",
        ),
        ({"final_sparsity": 0.5, "round_to": 0}, "round_to must be 1 or more, got 0"),
        ({"final_sparsity": 0.5, "max_sparsity": 0.0}, "max_sparsity must be more than 0, got 0.0"),
        ({"final_sparsity": 0.5, "ranking": "all"}, "ranking must be 'local' or 'global', got 'all'"),
        (
            {"final_sparsity": 0.5, "criterion": "l3"},
            "criterion must be 'l1', 'l2' or 'batch_norm', got 'l3'",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, error):
    with pytest.raises(DistillerError) as caught:
        StructuredGroupPruner("p", Residual(), **settings)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"weights": ["fc.weight"]},
            "pruner 'p', 'fc.weight': there is no unit that can be removed; fc.weight: the network returns it",
        ),
        (
            {"weights": ["conv1.weight"], "protected": ["conv1.*"]},
            "pruner 'p', 'conv1.weight': there is no unit that can be removed; conv1.weight: it is protected",
        ),
        (
            {"protected": ["*"]},
            "pruner 'p': there is no unit that can be removed; stem.weight: it is protected; "
            "conv1.weight: it is protected; fc.weight: the network returns it",
        ),
        (
            {"round_to": 8},
            "pruner 'p': no group can be made smaller with round_to 8 and max_sparsity 0.9: stem.weight has 4, "
            "conv1.weight has 6; lower the one or raise the other",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(settings, error):
    model = Residual()
    pruner = StructuredGroupPruner("p", model, final_sparsity=0.5, **settings)
    with pytest.raises(DistillerError) as caught:
        pruner.check({name: params_of(model)[name] for name in pruner.select(list(params_of(model)))})
    assert str(caught.value) == error


def test_a_target_out_of_reach_is_refused_with_what_can_be_reached():
    pruner = StructuredGroupPruner("p", Residual(), final_macs=0.1, max_sparsity=0.5)
    with pytest.raises(DistillerError) as caught:
        pruner.check({})
    # stem 4 -> 2, conv1 4 x 6 -> 2 x 3, conv2 likewise, fc 4 -> 2: of 36 * 9 * 52 + 12 MACs 36 * 9 * 14 + 6
    assert str(caught.value) == (
        "pruner 'p': final_macs 0.1 cannot be reached: with at most max_sparsity 0.5 of each group pruned, "
        "0.269 of the dense model's MACs are left; raise final_macs or max_sparsity, or prune more groups"
    )


def test_batch_norm_scales_are_for_groups_with_batch_norms():
    pruner = StructuredGroupPruner("p", Branches(), "batch_norm", final_sparsity=0.5)
    with pytest.raises(DistillerError) as caught:
        pruner.select([name for name, _ in Branches().named_parameters()])
    assert str(caught.value) == (
        "pruner 'p', 'pointwise.weight': criterion 'batch_norm' needs a batch norm with scales on these channels, "
        "got none; make the group protected, or take another criterion"
    )


def test_a_model_without_input_shape_is_refused():
    model = Residual()
    del model.input_shape
    with pytest.raises(DistillerError, match="'StructuredGroupPruner' needs the shape of the model's input"):
        StructuredGroupPruner("p", model, final_sparsity=0.5).select(["stem.weight"])


def schedule(**settings) -> dict:
    return {
        "version": 1,
        "pruners": {"whole": {"class": "StructuredGroupPruner", **settings}},
        "policies": [{"pruner": {"instance_name": "whole"}, "epochs": [0, 1]}],
    }


def test_a_schedule_runs_with_the_model_it_is_for():
    model = Residual()
    scheduler = dict_config(model, None, schedule(final_sparsity=0.5))
    scheduler.on_epoch_begin(0)
    assert set(scheduler.masks.masked()) == OF_STREAM | OF_INNER


def test_a_schedule_with_a_name_of_nothing_or_of_what_must_stay_is_refused():
    with pytest.raises(ScheduleError, match=r"no parameter 'conv9\.weight' in the model"):
        dict_config(Residual(), None, schedule(final_sparsity=0.5, weights=["conv9.weight"]))
    with pytest.raises(ScheduleError, match="pattern 'nothing.*' matches no parameter"):
        dict_config(Residual(), None, schedule(final_sparsity=0.5, protected=["nothing.*"]))
    with pytest.raises(ScheduleError, match="the network returns it"):
        dict_config(Residual(), None, schedule(final_sparsity=0.5, weights=["fc.weight"]))


def test_another_pruner_of_a_parameter_of_the_group_is_a_conflict():
    both = schedule(final_sparsity=0.5, weights=["stem.weight"])
    both["pruners"]["scales"] = {"class": "SparsityLevelParameterPruner", "levels": {"bn2.weight": 0.5}}
    both["policies"].append({"pruner": {"instance_name": "scales"}, "epochs": [0]})
    with pytest.raises((PolicyConflictError, ScheduleError), match=r"both prune 'bn2\.weight'"):
        dict_config(Residual(), None, both)


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match=r"no parameter 'stem\.wieght' in the model; did you mean"):
        StructuredGroupPruner("p", Residual(), final_sparsity=0.5, weights="stem.wieght").select(
            [name for name, _ in Residual().named_parameters()]
        )
