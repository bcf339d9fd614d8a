"""What a schedule may get wrong, and the line and key that it is told at."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from distiller.config import dict_config, document_config, file_config
from distiller.errors import DistillerError, ScheduleError
from distiller.schedule_yaml import parse_document


@pytest.fixture
def optimizer(tiny_cnn):
    return torch.optim.SGD(tiny_cnn.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def load(tiny_cnn, optimizer):
    return lambda text: document_config(tiny_cnn, optimizer, parse_document(text, "s.yaml"))


@pytest.fixture
def faults(load):
    def loader(text: str) -> list[str]:
        with pytest.raises(ScheduleError) as caught:
            load(text)
        return [str(fault) for fault in caught.value.faults]

    return loader


def rates(window: str, **arguments: str) -> str:
    """A schedule of one LR scheduler, whose first argument stands in line 4."""
    lines = "".join(f"    {key}: {value}\n" for key, value in arguments.items())
    return f"lr_schedulers:\n  lr:\n{lines}policies:\n  - {{lr_scheduler: {{instance_name: lr}}, {window}}}\n"


def structures(weights: str, **settings: str) -> str:
    """A schedule of one pruner of half the filters, whose weights stand in line 5."""
    more = "".join(f"    {key}: {value}\n" for key, value in settings.items())
    return (
        "pruners:\n  p:\n    class: L1RankedStructureParameterPruner\n    desired_sparsity: 0.5\n"
        f"    weights: {weights}\n    group_type: Filters\n{more}"
        "policies:\n  - {pruner: {instance_name: p}, epochs: [1]}\n"
    )


# --- learning rates


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"class": "StepLR", "step_size": "0"}, ":4    lr_schedulers.lr.step_size: must be 1 or more, got 0"),
        (
            {"class": "StepLR", "step_size": "-1"},
            ":4    lr_schedulers.lr.step_size: must be 1 or more, got -1",
        ),
        (
            {"class": "CosineAnnealingLR", "T_max": "-3"},
            ":4    lr_schedulers.lr.T_max: must be 1 or more, got -3",
        ),
        (
            {"class": "ExponentialLR", "gamma": "-1"},
            ":4    lr_schedulers.lr.gamma: must be 0 or more, got -1",
        ),
        (
            {"class": "ExponentialLR", "gamma": ".nan"},
            ":4    lr_schedulers.lr.gamma: must be a finite number, got nan",
        ),
        (
            {"class": "ReduceLROnPlateau", "patience": "-1"},
            ":4    lr_schedulers.lr.patience: must be 0 or more, got -1",
        ),
        (
            {"class": "ReduceLROnPlateau", "factor": "1.0"},
            ":4    lr_schedulers.lr.factor: Factor should be < 1.0.",
        ),
        (
            {"class": "MultiStepLR", "milestones": "[5, 2]"},
            ":4    lr_schedulers.lr.milestones: must be in increasing order, got [5, 2]",
        ),
        (
            {"class": "MultiStepLR", "milestones": "[-5, 2]"},
            ":4    lr_schedulers.lr.milestones[0]: must be 0 or more, got -5",
        ),
        (
            {"class": "OneCycleLR", "total_steps": "5", "max_lr": "1.0"},
            ":4    lr_schedulers.lr.total_steps: OneCycleLR: total_steps (or epochs * steps_per_epoch) must reach "
            "to the end of its policy, epoch 9, got 5; it is stepped once an epoch",
        ),
        (
            {"class": "ExponentialLR", "gamma": "1.0e+30"},
            ":2    lr_schedulers.lr: ExponentialLR has a learning rate of 1e+59 at epoch 2; "
            "rates must be from 0 to 3.4e+38",
        ),
    ],
)
def test_rates_that_training_could_not_follow_are_refused_before_it(faults, arguments, fault):
    assert faults(rates("starting_epoch: 0, ending_epoch: 9", **arguments)) == [fault]


def test_all_wrong_arguments_of_a_scheduler_are_told_at_once(faults):
    text = rates("epochs: [0]", **{"class": "MultiStepLR", "milestones": "[1, x]", "gamma": "-1.0"})
    assert faults(text) == [
        ":4    lr_schedulers.lr.milestones[1]: must be a whole number, got 'x'",
        ":5    lr_schedulers.lr.gamma: must be 0 or more, got -1.0",
    ]


def test_a_scheduler_of_two_policies_has_its_fault_told_once(faults):
    text = rates("epochs: [1, 2]", **{"class": "ExponentialLR", "gamma": "1.0e+30"})
    text += "  - {lr_scheduler: {instance_name: lr}, epochs: [3]}\n"
    assert len(faults(text)) == 2  # at epoch 2, and at epoch 4


def test_a_refused_schedule_leaves_the_optimizer_and_the_random_numbers_as_they_were(faults, optimizer):
    before = copy.deepcopy(optimizer.state_dict())
    state = torch.get_rng_state()
    faults(
        "lr_schedulers:\n"
        "  step: {class: StepLR, step_size: 2}\n"
        "  cycle: {class: CyclicLR, base_lr: 0.5, max_lr: 1.0}\n"
        "policies:\n"
        "  - {lr_scheduler: {instance_name: step}, epochs: [0, 1]}\n"
        "  - {lr_scheduler: {instance_name: cycle}, epochs: [5, 4]}\n"
    )
    assert optimizer.state_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


# --- epochs


@pytest.mark.parametrize("end", [10**12, 10**17])
def test_an_epoch_that_nobody_reaches_is_refused_at_its_key(faults, end):
    text = rates(f"starting_epoch: 0,\n     ending_epoch: {end}", **{"class": "StepLR", "step_size": "2"})
    assert faults(text) == [
        f":7    policies[0].ending_epoch: 'ending_epoch' must be at most 1,000,000,000, got {end:,}"
    ]


def test_an_end_far_away_costs_nothing(load):
    text = rates("starting_epoch: 0, ending_epoch: 1000000000", **{"class": "StepLR", "step_size": "2"})
    scheduler = load(text)
    assert scheduler.describe(10**9 - 1) == ["lr_scheduler lr: StepLR"]
    assert scheduler.state_dict()["policies"][0]["epochs"] == [0, 10**9 - 1, 1]


def test_a_list_of_epochs_with_a_frequency_is_refused(faults):
    text = rates("epochs: [0, 2],\n     frequency: 1", **{"class": "StepLR", "step_size": "2"})
    assert faults(text) == [
        ":7    policies[0].frequency: is for 'starting_epoch' and 'ending_epoch'; the list of 'epochs' says it all"
    ]


def test_wrong_epochs_and_wrong_arguments_of_one_policy_are_both_told(faults):
    text = (
        structures("[fc.weight]")
        .replace("epochs: [1]", "epochs: [2, 1]")
        .replace("instance_name: p", "instance_name: p, args: {keep_mask: 1}")
    )
    assert faults(text) == [
        ":8    policies[0].epochs: 'epochs' must be ascending epoch numbers from 0, got [2, 1]",
        ":8    policies[0].pruner.args.keep_mask: must be true or false, got 1",
    ]


# --- shapes of parameters


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ("[fc.weight,\n  conv2.bias]", ":6    pruners.p.weights[1]: "),
        ("[fc.weight,\n  module.conv2.bias]", ":6    pruners.p.weights[1]: "),
        ("['fc.*',\n  conv2.bias]", ":5    pruners.p.weights[0]: "),
        ("conv2.bias", ":5    pruners.p.weights: "),
    ],
)
def test_a_parameter_of_the_wrong_shape_is_told_where_it_is_named(faults, weights, fault):
    (found,) = faults(structures(weights))
    assert found.startswith(fault + "pruner 'p', '")
    assert "group_type 'Filters' wants a tensor of 2 dimensions or more, got shape " in found


def test_a_parameter_that_does_not_follow_its_leader_is_told_at_its_pattern(faults):
    (found,) = faults(structures("[fc.weight,\n  'conv2.w*']", group_dependency="Leader"))
    assert found.startswith(
        ":6    pruners.p.weights[1]: pruner 'p', 'conv2.weight': with group_dependency 'Leader' "
    )


# --- ranges


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            "{class: SparsityLevelParameterPruner,\n  levels: {\n  fc.bias: 0.1,\n  fc.weight: 1.5}}",
            ":5    pruners.p.levels.fc.weight: must be in [0, 1), got 1.5",
        ),
        (
            "{class: NMPruner,\n  weights: [fc.weight],\n  n: 5,\n  m: 4}",
            ":4    pruners.p.n: n must be from 1 to m, which is 4, got 5",
        ),
        (
            "{class: AutomatedGradualPruner, weights: [fc.weight],\n  initial_sparsity: 0.5,\n  final_sparsity: 0.5}",
            ":4    pruners.p.final_sparsity: final_sparsity must differ from initial_sparsity, got 0.5 for both; "
            "a pruner without a schedule prunes at one level",
        ),
        (
            "{class: StructureParameterPruner, threshold_criteria: Max,\n  reg_regims: {\n   fc.weight: [-1, Rows]}}",
            ":4    pruners.p.reg_regims.fc.weight: the threshold must be 0 or more, got -1",
        ),
    ],
)
def test_a_value_out_of_range_is_told_at_its_key(faults, settings, fault):
    assert faults(f"pruners:\n  p: {settings}\npolicies: []\n") == [fault]


# --- names


@pytest.mark.parametrize(("name", "asked"), [("1", "1"), ("1", "'1'"), ("'1'", "1"), ("07x", "07x")])
def test_a_number_may_be_a_name(load, name, asked):
    scheduler = load(
        f"pruners: {{{name}: {{class: SparsityLevelParameterPruner, levels: {{fc.weight: 0.5}}}}}}\n"
        f"policies: [{{pruner: {{instance_name: {asked}}}, epochs: [0]}}]\n"
    )
    assert scheduler.policies[0].name == f"pruner {name.strip(chr(39))}"
    assert scheduler.policies[0].policy.pruner.name == name.strip("'")


@pytest.mark.parametrize(
    ("name", "shown", "hint"),
    [
        ("on", "True", " (YAML reads on, off, yes and no as true and false)"),
        ("1.5", "1.5", ""),
        ("2024-01-02", None, ""),
        ("~", "None", ""),
    ],
)
def test_another_key_that_is_no_text_is_no_name(faults, name, shown, hint):
    text = (
        f"pruners:\n  {name}: {{class: SparsityLevelParameterPruner, levels: {{fc.weight: 0.5}}}}\n"
        f"policies:\n  - pruner:\n      instance_name: {name}\n    epochs: [0]\n"
    )
    if shown is None:
        assert faults(text) == [
            ":2    pruners: a key must be a name or a number, got datetime.date(2024, 1, 2)"
        ]
        return
    refusal = f"a name must be text, got {shown}; put it in quotes{hint}"
    in_policy = (
        ":4    policies[0].pruner: missing key 'instance_name': the name of a pruner"
        if shown == "None"
        else f":5    policies[0].pruner.instance_name: {refusal}"
    )
    assert faults(text) == [f":2    pruners.{shown}: {refusal}", in_policy]


def test_a_name_as_text_and_as_a_number_is_given_twice(faults):
    settings = "{class: SparsityLevelParameterPruner, levels: {fc.weight: 0.5}}"
    assert faults(f"pruners:\n  1: {settings}\n  '1': {settings}\npolicies: []\n") == [
        ":3    pruners.1: '1' is given as text and as a number; keep one"
    ]


# --- what a component is for, and what it is kept as


def test_a_quantizer_for_after_training_has_no_policy(faults, tiny_cnn):
    before = repr(tiny_cnn)
    assert faults(
        "quantizers:\n  q: {class: PostTrainLinearQuantizer, bits_activations: 8}\n"
        "policies:\n  - quantizer: {instance_name: q}\n    epochs: [0]\n"
    ) == [
        ":4    policies[0].quantizer: PostTrainLinearQuantizer is for quantization after training; "
        "give its file to --qe-config-file, with --evaluate --quantize-eval"
    ]
    assert repr(tiny_cnn) == before


def test_settings_are_kept_as_plain_data(tiny_cnn):
    scheduler = dict_config(
        tiny_cnn,
        None,
        {
            "pruners": {
                "p": {
                    "class": "L1RankedStructureParameterPruner",
                    "group_type": "Filters",
                    "desired_sparsity": 0.5,
                    "weights": ["fc.weight"],
                    "rounding_fn": math.ceil,
                },
            },
            "policies": [{"pruner": {"instance_name": "p", "args": {"keep_mask": True}}, "epochs": [0]}],
        },
    )
    assert scheduler.policies[0].settings == {
        "class": "L1RankedStructureParameterPruner",
        "group_type": "Filters",
        "desired_sparsity": 0.5,
        "weights": ["fc.weight"],
        "rounding_fn": "<built-in function ceil>",
        "args": {"keep_mask": True},
    }


# --- the version, and arguments of another type


@pytest.mark.parametrize("version", ["1", "1.0"])
def test_version_1_is_the_one_there_is(load, version):
    load(f"version: {version}\npolicies: []\n")


@pytest.mark.parametrize(
    ("version", "shown"), [("2", "2"), ("'1'", "'1'"), ("true", "True"), ("", "None"), ("[1]", "[1]")]
)
def test_another_version_is_refused_at_its_line(faults, version, shown):
    assert faults(f"policies: []\nversion: {version}\n") == [
        f":2    version: must be 1 or left out, got {shown}"
    ]


MODULE_WANTED = "schedule: model: must be a torch.nn.Module, got"
PATH_WANTED = "file_config: filename: must be the path of a YAML file, got"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, o: dict_config(m, o, None), "dict_config: schedule: must be a dict, got NoneType"),
        (lambda m, o: dict_config(m, o, 5), "dict_config: schedule: must be a dict, got int"),
        (lambda m, o: dict_config(m, o, [1]), "dict_config: schedule: must be a dict, got list"),
        (lambda m, o: dict_config(m, o, "x"), "dict_config: schedule: must be a dict, got str"),
        (lambda m, o: dict_config(None, o, {"policies": []}), f"{MODULE_WANTED} NoneType"),
        (
            lambda m, o: dict_config(m, 5, {"policies": []}),
            "schedule: optimizer: must be a torch.optim.Optimizer or None, got int",
        ),
        (
            lambda m, o: dict_config(m, o, {"policies": []}, scheduler=5),
            "schedule: scheduler: must be a CompressionScheduler or None, got int",
        ),
        (lambda m, o: file_config(m, o, None), f"{PATH_WANTED} NoneType"),
        (lambda m, o: file_config(m, o, 5), f"{PATH_WANTED} int"),
        (lambda m, o: file_config(m, o, b".."), f"{PATH_WANTED} bytes"),
        (
            lambda m, o: file_config(m, o, "a\0b"),
            "a\0b has 1 error\n  :1    cannot be read: embedded null byte",
        ),
    ],
)
def test_arguments_of_another_type_are_refused(tiny_cnn, optimizer, call, text):
    with pytest.raises(DistillerError) as caught:
        call(tiny_cnn, optimizer)
    assert str(caught.value) == text
