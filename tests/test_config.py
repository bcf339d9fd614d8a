from __future__ import annotations

import sys
import textwrap
import types

import pytest
import torch

from distiller.config import config_component_from_file_by_class, dict_config, file_config
from distiller.errors import ScheduleError
from distiller.policy import LRPolicy, PruningPolicy
from distiller.scheduler import CompressionScheduler
from tests.doubles import HalfPruner

GOOD = """\
version: 1
pruners:
  agp:
    class: AutomatedGradualPruner
    initial_sparsity: 0.05
    final_sparsity: 0.8
    weights: [module.conv2.weight,
              fc.weight]
lr_schedulers:
  lr:
    class: StepLR
    step_size: 10
    gamma: 0.1
policies:
  - pruner:
      instance_name: agp
      args:
        mini_batch_pruning_frequency: 5
    starting_epoch: 0
    ending_epoch: 10
    frequency: 2
  - lr_scheduler:
      instance_name: lr
    starting_epoch: 0
    ending_epoch: 40
    frequency: 1
"""


@pytest.fixture
def load(tmp_path, tiny_cnn):
    def loader(text: str, **options):
        path = tmp_path / "s.yaml"
        path.write_text(textwrap.dedent(text))
        optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.1)
        return file_config(tiny_cnn, optimizer, path, **options)

    loader.model = tiny_cnn
    return loader


def faults(load, text: str, **options) -> list[str]:
    with pytest.raises(ScheduleError) as caught:
        load(text, **options)
    return [str(fault) for fault in caught.value.faults]


def test_a_schedule_becomes_policies_in_the_order_of_the_file(load):
    scheduler = load(GOOD)
    pruning, lr = scheduler.policies
    assert isinstance(pruning.policy, PruningPolicy)
    assert pruning.policy.args.mini_batch_pruning_frequency == 5
    assert pruning.policy.pruner.name == "agp"
    assert tuple(pruning.window.epochs) == (0, 2, 4, 6, 8)
    assert pruning.name == "pruner agp"
    assert pruning.policy.selected(scheduler.model) == ("conv2.weight", "fc.weight")
    assert isinstance(lr.policy, LRPolicy)
    assert lr.policy.lr_scheduler.step_size == 10


def test_policies_may_join_a_scheduler_that_is_there(load, tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    assert load(GOOD, scheduler=scheduler) is scheduler
    assert len(scheduler.policies) == 2


def test_a_dict_is_a_schedule_too(tiny_cnn):
    scheduler = dict_config(
        tiny_cnn,
        None,
        {
            "pruners": {"p": {"class": "SparsityLevelParameterPruner", "levels": {"fc.weight": 0.5}}},
            "policies": [{"pruner": {"instance_name": "p"}, "epochs": [0, 3]}],
        },
    )
    assert scheduler.policies[0].window.epochs == (0, 3)


def test_one_instance_may_serve_several_policies(load):
    text = GOOD + "  - pruner: {instance_name: agp}\n    epochs: [20, 21]\n"
    first, _, third = load(text).policies
    assert first.policy.pruner is third.policy.pruner


def test_all_faults_are_told_at_once_with_line_and_nearest_name(load):
    assert faults(
        load,
        """\
        pruners:
          low_pruner:
            class: AutomatedGradualPrunner
            initial_sparsity: 0.05
          high:
            class: AutomatedGradualPruner
            initial_sparsity: 0.05
            final_sparsity: many
            weights: [conv2.weight]
            frequency: 2
          wrong:
            class: AutomatedGradualPruner
            initial_sparsity: 0.05
            final_sparsity: 0.5
            weights: [conv2.weight,
                      module.conv1.weigth]
        policies:
          - pruner: {instance_name: wrong}
            epochs: [1]
            starting_epoch: 2
          - pruner: {instance_name: wrong}
            epochs: [1]
        """,
    ) == [
        ":3    pruners.low_pruner.class: unknown class 'AutomatedGradualPrunner'; did you mean 'AutomatedGradualPruner'?",
        ":8    pruners.high.final_sparsity: must be a number, got 'many'",
        ":10   pruners.high.frequency: unknown to AutomatedGradualPruner; it takes initial_sparsity, final_sparsity, "
        "weights",
        ":16   pruners.wrong.weights[1]: no parameter 'module.conv1.weigth' in the model; did you mean 'conv1.weight'?",
        ":18   policies[0]: both 'epochs' and 'starting_epoch'/'ending_epoch' given; give one",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("- a\n", ":1    a schedule is a mapping of sections, got list"),
        ("version: 1\n", ":1    missing section 'policies': nothing says when anything happens"),
        ("prunners: {}\npolicies: []\n", ":1    prunners: unknown section; did you mean 'pruners'?"),
        ("policies: x\n", ":1    policies: must be a list (lines that begin with '-'), got 'x'"),
        (
            "pruners: [a]\npolicies: []\n",
            ":1    pruners: must be a mapping of names to components, got ['a']",
        ),
        (
            "pruners:\n  p: 3\npolicies: []\n",
            ":2    pruners.p: must be a mapping with 'class' and settings, got 3",
        ),
        (
            "pruners:\n  p: {levels: {}}\npolicies: []\n",
            ":2    pruners.p: missing key 'class': the name of what it is",
        ),
        (
            "lr_schedulers:\n  a: {class: OneCycleLR, max_lr: 1, total_steps: 9}\n"
            "  b: {class: CyclicLR, base_lr: 1, max_lr: 2}\npolicies: []\n",
            ":3    lr_schedulers.b: only one of OneCycleLR and CyclicLR can set the rates of an optimizer",
        ),
        (
            "policies:\n  - {epochs: [1]}\n",
            ":2    policies[0]: needs exactly one of quantizer, pruner, regularizer, lr_scheduler, extension, got none",
        ),
        (
            "policies:\n  - pruner: {instance_name: p, epochs: [1]}\n",
            ":2    policies[0].pruner.epochs: belongs beside 'pruner', not inside it",
        ),
        (
            "policies:\n  - pruner: {instance: p}\n    epochs: [0]\n",
            ":2    policies[0].pruner: missing key 'instance_name': the name of a pruner",
        ),
        (
            "policies:\n  - pruner: {instance_name: p}\n    epoch: [0]\n",
            ":3    policies[0].epoch: unknown; did you mean 'epochs'?",
        ),
        (
            "policies:\n  - pruner: {instance_name: p}\n    epochs: 3\n",
            ":3    policies[0].epochs: must be a list of whole numbers, got 3",
        ),
        (
            "policies:\n  - pruner: {instance_name: p}\n    starting_epoch: 0.5\n",
            ":3    policies[0].starting_epoch: must be a whole number, got 0.5",
        ),
        (
            GOOD.replace("instance_name: agp", "instance_name: apg"),
            ":16   policies[0].pruner.instance_name: no pruner 'apg' in 'pruners'; did you mean 'agp'?",
        ),
        (
            GOOD.replace("mini_batch_pruning_frequency: 5", "mini_batch_pruning_frequncy: 5"),
            ":18   policies[0].pruner.args.mini_batch_pruning_frequncy: unknown to PruningArgs; "
            "did you mean 'mini_batch_pruning_frequency'?",
        ),
        (
            GOOD.replace("mini_batch_pruning_frequency: 5", "mask_gradients: true"),
            ":18   policies[0].pruner.args.mask_gradients: 'mask_gradients' needs 'mask_on_forward_only: true'",
        ),
        (
            GOOD.replace("ending_epoch: 10", "ending_epoch: 0"),
            ":15   policies[0]: needs 0 <= starting_epoch < ending_epoch, got starting_epoch 0 and ending_epoch 0",
        ),
        (
            GOOD.replace("    step_size: 10\n", ""),
            ":10   lr_schedulers.lr.step_size: missing; StepLR needs it",
        ),
        (
            GOOD.replace("AutomatedGradualPruner", "evil.Pruner"),
            ":4    pruners.agp.class: pruner class 'evil.Pruner' lies in package 'evil', which may not run; "
            "allow it with --plugin evil",
        ),
    ],
)
def test_each_fault_has_one_clear_line(load, text, fault):
    assert faults(load, text) == [fault]


LEVELS = """\
pruners:
  p: {class: SparsityLevelParameterPruner, levels: {conv2.weight: 0.5}}
policies:
  - pruner:
      instance_name: p
      args:
        levels: {fc.weigth: 0.5}
    epochs: [0]
"""


def test_levels_of_a_policy_are_checked_before_training(load):
    assert faults(load, LEVELS) == [
        ":7    policies[0].pruner.args.levels.fc.weigth: no parameter 'fc.weigth' in the model; "
        "did you mean 'fc.weight'?"
    ]
    assert faults(load, LEVELS.replace("fc.weigth: 0.5", "fc.weight: 1.5")) == [
        ":7    policies[0].pruner.args.levels.fc.weight: must be in [0, 1), got 1.5"
    ]
    assert faults(load, LEVELS.replace("{fc.weigth: 0.5}", "much")) == [
        ":7    policies[0].pruner.args.levels: must be a mapping (name: value), got 'much'"
    ]
    assert load(LEVELS.replace("weigth", "weight")).policies[0].policy.selected(load.model) == ("fc.weight",)


def test_only_one_quantizer_is_taken(load):
    text = "quantizers:\n  a: {class: X}\n  b: {class: Y}\npolicies: []\n"
    assert faults(load, text)[0] == ":1    quantizers: only one quantizer can act on a model, got 2"


def test_faults_of_shape_and_of_content_are_told_together(load):
    text = GOOD.replace("AutomatedGradualPruner", "AutomatedGradualPrunner").replace(
        "frequency: 1", "frequncy: 1"
    )
    assert faults(load, text) == [
        ":4    pruners.agp.class: unknown class 'AutomatedGradualPrunner'; did you mean 'AutomatedGradualPruner'?",
        ":26   policies[1].frequncy: unknown; did you mean 'frequency'?",
    ]


def test_a_schedule_without_policies_is_told_so(load):
    """DEFECT of Distiller: a NameError of a variable of its own."""
    assert faults(load, "pruners:\n  p: {class: MagnitudeParameterPruner, thresholds: {'*': 0.1}}\n") == [
        ":1    missing section 'policies': nothing says when anything happens"
    ]


def test_a_refused_schedule_leaves_the_scheduler_it_was_to_join_as_it_was(load, tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    faults(load, GOOD + "  - pruner: {instance_name: none}\n    epochs: [1]\n", scheduler=scheduler)
    assert scheduler.policies == []


@pytest.mark.parametrize(("start", "first"), [(0, 0.04), (3, 0.1)])
def test_rates_set_at_construction_act_only_from_epoch_0_on(load, start, first):
    """OneCycleLR begins at max_lr / 25, but not before its policy is open."""
    text = f"""\
        lr_schedulers:
          step: {{class: StepLR, step_size: 2, gamma: 0.5}}
          cycle: {{class: OneCycleLR, max_lr: 1.0, total_steps: 20}}
        policies:
          - lr_scheduler: {{instance_name: cycle}}
            starting_epoch: {start}
            ending_epoch: 20
        """
    scheduler = load(text)
    optimizer = scheduler.policies[0].policy.lr_scheduler.optimizer
    assert optimizer.param_groups[0]["lr"] == pytest.approx(first)


def test_overlapping_pruners_are_refused(load):
    text = GOOD.replace(
        "lr_schedulers:",
        "  two:\n    class: MagnitudeParameterPruner\n    thresholds: {'*': 0.1}\nlr_schedulers:",
    )
    text += "  - pruner: {instance_name: two}\n    epochs: [9]\n"
    assert faults(load, text.replace("ending_epoch: 10", "ending_epoch: 11")) == [
        ":30   policies[2]: 'pruner agp' (epochs 0..10) and 'pruner two' (epochs 9..9) both prune 'conv2.weight' "
        "and 1 more; let one end before the other begins"
    ]


def test_a_constructors_own_refusal_is_told_at_the_key_that_it_names(load):
    assert faults(load, GOOD.replace("final_sparsity: 0.8", "final_sparsity: 1.5")) == [
        ":6    pruners.agp.final_sparsity: must be in [0, 1), got 1.5"
    ]


def test_a_component_without_a_policy_is_told_and_does_nothing(load, caplog):
    """DEFECT of Distiller: its network_slimming schedule has a regularizer that no policy uses."""
    text = GOOD.replace(
        "lr_schedulers:",
        "  idle:\n    class: MagnitudeParameterPruner\n    thresholds: {'*': 0.1}\nlr_schedulers:",
    )
    load(text)
    assert [record.getMessage().partition("  ")[2] for record in caplog.records] == [
        "'idle' has no policy and will do nothing"
    ]


def test_a_plugins_class_is_loaded_when_its_package_is_allowed(load, monkeypatch):
    package = types.ModuleType("plugged")
    package.HalfPruner = HalfPruner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plugged", package)
    text = """\
        pruners:
          p: {class: plugged.HalfPruner, weights: []}
        policies:
          - pruner: {instance_name: p}
            epochs: [0]
        """
    assert "'plugged', which may not run" in faults(load, text)[0]
    assert faults(load, text.replace("Half", "Hlaf"), plugins=["plugged"])[0].startswith(
        ":2    pruners.p.class: "
    )


def test_the_first_component_of_a_class_is_found_in_any_section(tmp_path, tiny_cnn):
    path = tmp_path / "s.yaml"
    path.write_text(GOOD.partition("policies:")[0])
    pruner = config_component_from_file_by_class(tiny_cnn, path, "AutomatedGradualPruner", final_sparsity=0.6)
    assert pruner.name == "agp"
    with pytest.raises(ScheduleError, match="has no component of class 'Other'"):
        config_component_from_file_by_class(tiny_cnn, path, "Other")


@pytest.mark.parametrize(
    "name",
    [
        "agp-pruning/mobilenet.imagenet.schedule_agp.yaml",
        "agp-pruning/alexnet.schedule_agp.yaml",
        "sensitivity-pruning/alexnet.schedule_sensitivity.yaml",
        "agp-pruning/resnet18.schedule_agp.yaml",
        "baseline_networks/cifar/resnet20_cifar_baseline_training.yaml",
        "hybrid/alexnet.schedule_sensitivity_2D-reg.yaml",
        "network_slimming/resnet20_slimming.yaml",
        "ssl/ssl_4D-removal_training.yaml",
    ],
)
def test_distillers_schedules_are_read(compat, name):
    """Against a model that has every name they ask for."""
    import yaml

    path = compat / "schedules" / name
    data = yaml.safe_load(path.read_text())
    model = torch.nn.Module()
    for section in ("pruners", "regularizers"):
        for component in (data.get(section) or {}).values():
            for key in ("weights", "sensitivities", "thresholds", "levels", "reg_regims"):
                names = component.get(key, ())
                for parameter in [names] if isinstance(names, str) else names:
                    put_parameter(model, parameter)
    put_parameter(model, "last.weight")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = file_config(model, optimizer, path)
    assert len(scheduler.policies) == len(data["policies"])


def put_parameter(model, name):
    *parents, last = name.replace("module.", "").split(".")
    for part in parents:
        if part not in dict(model.named_children()):
            model.add_module(part, torch.nn.Module())
        model = getattr(model, part)
    model.register_parameter(last, torch.nn.Parameter(torch.ones(2, 2, 1, 1)))


def test_a_wrong_window_does_not_hide_a_misspelt_name(load):
    text = GOOD.replace("fc.weight]", "fc.weigth]").replace("ending_epoch: 10", "ending_epoch: 0")
    assert faults(load, text) == [
        ":8    pruners.agp.weights[1]: no parameter 'fc.weigth' in the model; did you mean 'fc.weight'?",
        ":15   policies[0]: needs 0 <= starting_epoch < ending_epoch, got starting_epoch 0 and ending_epoch 0",
    ]
