"""Settings and arguments that training could not use, or would not: refused at their place in the schedule."""

from __future__ import annotations

import re

import pytest

from distiller.config import document_config
from distiller.errors import ScheduleError
from distiller.schedule_yaml import parse_document


@pytest.fixture
def faults(tiny_cnn):
    def loader(text: str) -> list[str]:
        with pytest.raises(ScheduleError) as caught:
            document_config(tiny_cnn, None, parse_document(text, "s.yaml"))
        return [str(fault) for fault in caught.value.faults]

    return loader


NUMBERS = [
    ("pruners", "BaiduRNNPruner, weights: [fc.weight], q: 1, ramp_epoch_offset: 1, ramp_slope_mult: 1.5",
     {"q": ".inf", "ramp_slope_mult": ".inf", "ramp_epoch_offset": "10000000000"}),
    ("pruners", "SplicingPruner, sensitivities: {fc.weight: 1}, low_thresh_mult: 1, hi_thresh_mult: 1, "
     "sensitivity_multiplier: 0", dict.fromkeys(("low_thresh_mult", "hi_thresh_mult", "sensitivity_multiplier"), ".inf")),
    ("extensions", "L0Regularizer, reg_regims: {fc.weight: [0.1, Rows]}, gate_lr: 1",
     {"gate_lr": "1e38"}),
    ("pruners", "L1RankedStructureParameterPruner, weights: [fc.weight], desired_sparsity: 0.5, group_type: Filters, "
     "group_size: 1", {"group_size": "10000000000", "desired_sparsity": ".inf"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "settings", "key", "value"),
    [
        (section, settings, key, value)
        for section, settings, numbers in NUMBERS
        for key, value in numbers.items()
    ],
)
def test_a_number_that_training_could_not_use_is_refused_at_its_key(faults, section, settings, key, value):
    text = f"{section}:\n  p: {{class: {settings}}}\npolicies: []\n"
    assert re.search(rf"{key}: [\d.]+", text)
    at_most = {"gate_lr": "must be at most 1000", "ramp_epoch_offset": "must be at most 1000000000",
               "group_size": "must be at most 1000000000", "desired_sparsity": "must be in [0, 1]"}  # fmt: skip
    got = {"1e38": "1e+38", ".inf": "inf"}.get(value, value)
    assert faults(re.sub(rf"{key}: [\d.]+", f"{key}: {value}", text)) == [
        f":2    {section}.p.{key}: {at_most.get(key, 'must be at most 1e+30')}, got {got}"
    ]


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("pruners", "MagnitudeParameterPruner, thresholds: {fc.weight: .inf}"),
        ("pruners", "SensitivityPruner, sensitivities: {fc.weight: .inf}"),
        ("regularizers", "L1Regularizer, reg_regims: {fc.weight: .inf}"),
    ],
)
def test_an_infinite_number_by_name_is_refused_at_its_name(faults, section, settings):
    (fault,) = faults(f"{section}:\n  p: {{class: {settings}}}\npolicies: []\n")
    assert fault.startswith(f":2    {section}.p.")
    assert fault.endswith(".fc.weight: must be at most 1e+30, got inf")


@pytest.mark.parametrize(
    ("section", "settings", "fault"),
    [
        ("pruners", "{class: NMPruner,\n   weights: [fc.weight],\n   n: 2,\n   m: -1}",
         ":5    pruners.p.m: must be 1 or more, got -1"),
        ("regularizers", "{class: GroupLassoRegularizer, reg_regims: {\n   fc.weight: [0.1,\n    Rows,\n    x]}}",
         ":3    regularizers.p.reg_regims.fc.weight: must be [lambda, group], as [0.001, 2D], got [0.1, 'Rows', 'x']"),
        ("regularizers", "{class: GroupLassoRegularizer, reg_regims: {\n   fc.weight: [true,\n    Rows]}}",
         ":3    regularizers.p.reg_regims.fc.weight: lambda must be a number, got True"),
        ("pruners", "{class: StructureParameterPruner, threshold_criteria: Max, reg_regims: {\n   fc.weight: [true,\n"
         "    Rows]}}", ":3    pruners.p.reg_regims.fc.weight: must be [threshold, group type], got [True, 'Rows']"),
        ("regularizers", "{class: L1Regularizer, reg_regims: {fc.weight: 0.1},\n   threshold_criteria: max}",
         ":3    regularizers.p.threshold_criteria: must be 'Max' or 'Mean_Abs', got 'max'"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_told_at_its_own_place(faults, section, settings, fault):
    assert faults(f"{section}:\n  p: {settings}\npolicies: []\n") == [fault]


# --- args that do nothing, or that are missing


def one_policy(component: str, rest: str, section: str = "pruners") -> str:
    """The component in line 2, its policy from line 4 on."""
    word = section.removesuffix("s")
    return f"{section}:\n  p: {component}\npolicies:\n  - {word}:\n      instance_name: p\n{rest}"


LEVEL = "{class: SparsityLevelParameterPruner, levels: {conv2.weight: 0.5}}"


@pytest.mark.parametrize(
    ("component", "args", "epoch", "fault"),
    [
        ("{class: BernoulliFilterPruner, group_type: Filters, desired_sparsity: 0.5, weights: [conv2.weight]}", "", 0,
         ":4    policies[0].pruner: BernoulliFilterPruner scales up what it keeps, which would grow at every step; it "
         "needs args: {use_double_copies: true, mask_on_forward_only: true}"),
        ("{class: BernoulliFilterPruner, group_type: Filters, desired_sparsity: 0.5, weights: [conv2.weight]}",
         "use_double_copies: true, mask_on_forward_only: true, keep_mask: true", 0,
         ":6    policies[0].pruner.args.keep_mask: 'keep_mask' is not for BernoulliFilterPruner, which scales up what "
         "it keeps: it would grow at every step"),
        (LEVEL, "skip_first_minibatch: true", 1,
         ":6    policies[0].pruner.args.skip_first_minibatch: 'skip_first_minibatch' acts in the second mini-batch of "
         "epoch 0, and the policy begins in epoch 1; leave it out"),
        (LEVEL, "fold_batchnorm: true", 0,
         ":6    policies[0].pruner.args.fold_batchnorm: 'fold_batchnorm' has nothing to fold: no batch norm of its own "
         "is behind conv2.weight"),
        ("{class: RandomRankedFilterPruner, group_type: Filters, desired_sparsity: 0.5, weights: [conv1.weight]}",
         "fold_batchnorm: true", 0,
         ":6    policies[0].pruner.args.fold_batchnorm: 'fold_batchnorm' is for pruners that rank by weight, "
         "RandomRankedFilterPruner does not"),
    ],
)  # fmt: skip
def test_arguments_without_effect_or_missing_are_told_in_the_policy(faults, component, args, epoch, fault):
    given = f"      args: {{{args}}}\n" if args else ""
    assert faults(one_policy(component, f"{given}    epochs: [{epoch}]\n")) == [fault]


@pytest.mark.parametrize(
    "component",
    [
        "{class: L1Regularizer, reg_regims: {fc.weight: 0.1}}",
        "{class: GroupLassoRegularizer, reg_regims: {fc.weight: [0.1, Rows]}}",
        "{class: GroupVarianceRegularizer, reg_regims: {fc.weight: [0.1, Channels]}}",
    ],
)
def test_keep_mask_needs_a_threshold(faults, component):
    text = one_policy(component, "      args: {keep_mask: true}\n    epochs: [0]\n", "regularizers")
    assert faults(text) == [
        ":6    policies[0].regularizer.args.keep_mask: 'keep_mask' keeps what lies under a threshold, and 'p' has "
        "none; give it threshold_criteria where its class takes them, or leave keep_mask out"
    ]


@pytest.mark.parametrize("name", ["GradientRankedFilterPruner_AGP", "TaylorFORankedFilterPruner_AGP"])
def test_a_frozen_weight_cannot_be_ranked_by_its_gradients(faults, tiny_cnn, name):
    tiny_cnn.conv2.weight.requires_grad_(False)
    component = (
        f"{{class: {name}, group_type: Filters, initial_sparsity: 0.1, final_sparsity: 0.5, "
        "weights: [conv2.weight]}"
    )
    assert faults(one_policy(component, "    epochs: [0]\n")) == [
        ":2    pruners.p.weights[0]: pruner 'p', 'conv2.weight': 'conv2.weight' is not trained (requires_grad is "
        "False), and has no gradients to rank by; train it, or take another pruner"
    ]


def test_a_frozen_weight_does_not_move(faults, tiny_cnn):
    tiny_cnn.conv2.weight.requires_grad_(False)
    component = "{class: MovementPruner, initial_sparsity: 0.1, final_sparsity: 0.5, weights: [conv2.weight]}"
    assert faults(one_policy(component, "    epochs: [0]\n")) == [
        ":2    pruners.p.weights[0]: pruner 'p', 'conv2.weight': it is not trained (requires_grad is False), and has "
        "no gradients to rank by; train it, or take another pruner"
    ]
