"""Distiller's own schedules load here unchanged, and come to the sparsity that they promise.

What is promised is read from the YAML alone (`promises`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter

import pytest
import torch

from distiller.config import config_component_from_file_by_class, dict_config, file_config
from distiller.errors import ScheduleError
from distiller.names import named_parameters
from distiller.scheduler import CompressionScheduler
from distiller.thinning.removers import Remover
from tests.compat.distiller_schedules import (
    FOLDER,
    SECTION_OF,
    DistillerSchedule,
    components,
    schedule_files,
)
from tests.compat.promises import Level, Rates, groups_of, promises_of, zero_groups
from tests.compat.schedule_runs import make_optimizer, run

WITH_DUPLICATE_KEYS = "ssl/ssl_channels-removal_training.yaml"
WITHOUT_POLICIES = "quantization/post_train_quant/resnet18_imagenet_post_train.yaml"
REMOVERS = {"FilterRemover", "ChannelRemover", "StructureRemover"}
AS_THIN_AS_DISTILLERS = (
    "agp-pruning/resnet20_filters.schedule_agp_2.yaml",
    "agp-pruning/resnet50.schedule_agp.filters.yaml",
    "network_trimming/resnet56_cifar_activation_apoz.yaml",
    "pruning_filters_for_efficient_convnets/resnet56_cifar_channel_rank.yaml",
    "pruning_filters_for_efficient_convnets/resnet56_cifar_filter_rank.yaml",
)
"""Those whose header has the shapes of the thinned network, which the fractions alone decide."""

THINS_BEFORE_ANYTHING_IS_ZERO = "ssl/vgg16_cifar_ssl_channels_training.yaml"
# Tens of seconds or gigabytes in true size; by default their widest layers are narrow.
BIG = ("alexnet", "alexnet_bn", "word_language_model")

SCHEDULES = [DistillerSchedule(path) for path in schedule_files()]
pytestmark = pytest.mark.skipif(not SCHEDULES, reason=f"Distiller's schedules are not there: {FOLDER}")


def each(*but: str, archs: tuple[str, ...] | None = None):
    """A test for each schedule but some; of some architectures."""
    chosen = [
        pytest.param(schedule, id=str(schedule).removesuffix(".yaml"))
        for schedule in SCHEDULES
        if str(schedule) not in but and (archs is None or schedule.arch in archs)
    ]
    return pytest.mark.parametrize("schedule", chosen)


def the(name: str) -> DistillerSchedule:
    return DistillerSchedule(FOLDER / name)


def optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def load(schedule: DistillerSchedule, model, optimizer) -> CompressionScheduler:
    """The file itself; of the one with duplicate keys what PyYAML makes of it."""
    if str(schedule) == WITH_DUPLICATE_KEYS:
        return dict_config(model, optimizer, schedule.data)
    return file_config(model, optimizer, schedule.path)


@each(WITH_DUPLICATE_KEYS, WITHOUT_POLICIES)
def test_a_schedule_loads_against_its_true_model_and_what_no_policy_uses_is_pointed_out(schedule, caplog):
    """On the meta device: names and shapes of the full-size model, as the command in the header makes it.

    In Distiller network slimming did nothing, and said nothing.
    """
    data = schedule.data
    used = {
        (SECTION_OF[word], policy[word]["instance_name"])
        for policy in data["policies"]
        for word in SECTION_OF.keys() & policy.keys()
    }
    idle = {name for section, name in components(data) if (section, name) not in used}
    model = schedule.true_model()
    with caplog.at_level(logging.WARNING):
        scheduler = file_config(model, optimizer_for(model), schedule.path)
    assert len(scheduler.policies) == len(data["policies"])
    assert {record.getMessage().split("'")[1] for record in caplog.records} == idle


@each(WITHOUT_POLICIES)
def test_the_promised_sparsity_is_that_of_distillers_own_run(schedule):
    """What the table of weights in the header says: by non-zeros, or by what was left after thinning."""
    weights = dict(named_parameters(schedule.true_model()))
    for promise, name, shape, nonzeros in rows_of_distillers_run(schedule):
        promised = promise.promised(weights[name])
        if promise.kind == "Filters":
            assert shape[0] == weights[name].size(0) - promised, name
        elif promise.kind == "Channels":
            assert shape[1] == weights[name].size(1) - promised, name
        else:
            group = groups_of(weights[name], promise.kind, promise.block).size(1)
            assert nonzeros == weights[name].numel() - promised * group, name


def test_many_schedules_have_such_a_table():
    assert sum(bool(rows_of_distillers_run(schedule)) for schedule in SCHEDULES) >= 10


def rows_of_distillers_run(schedule: DistillerSchedule) -> list[tuple[Level, str, tuple[int, ...], int]]:
    """(promise, weight, its shape and non-zeros in Distiller's run) where a level is promised and known."""
    table = schedule.header_table()
    return [
        (promise, name, *table[name])
        for promise in promises_of(schedule.data)
        if isinstance(promise, Level)
        for name in promise.names
        if name in table
    ]


def comes_true(schedule: DistillerSchedule, is_true_size: bool) -> None:
    task = schedule.task(is_true_size)
    optimizer = make_optimizer(task)
    scheduler = load(schedule, task.model, optimizer)
    data = schedule.data
    promises, rates = promises_of(data), Rates(data)
    assert sum("pruner" in policy or "regularizer" in policy for policy in data["policies"]) == len(promises)

    outcome = run(task, optimizer, scheduler, promises, batches=1 if schedule.dataset == "imagenet" else 2)

    assert all(param.isfinite().all() for param in task.model.parameters())
    for name, zero, promised, tolerance in outcome.measured:
        assert zero == pytest.approx(promised, abs=tolerance), name
    for epoch, (added, promised) in outcome.penalties.items():
        assert added == pytest.approx(promised, rel=1e-4), epoch
    for epoch, rate in outcome.rates.items():
        assert rate == pytest.approx(rates.after(epoch)), epoch
    assert scheduler.pruning_is_complete(outcome.epochs[-1] if outcome.epochs else 0)
    if REMOVERS & set(components(schedule.data).values()):
        is_thinned(schedule, task.model, scheduler)


def is_thinned(schedule: DistillerSchedule, model: torch.nn.Module, scheduler: CompressionScheduler) -> None:
    """What the schedule pruned is gone, or the report says what keeps it."""
    weights = {name: param.detach() for name, param in named_parameters(model)}
    [remover] = [entry.policy for entry in scheduler.policies if isinstance(entry.policy, Remover)]
    report = remover.report
    assert report is not None
    if str(schedule) == THINS_BEFORE_ANYTHING_IS_ZERO:
        assert not report.has_removed
        assert report.kept == ()
        return
    assert sum(weight.numel() for weight in weights.values()) == report.parameters[1] < report.parameters[0]
    assert report.macs[1] < report.macs[0]
    kind = {"remove_filters": "Filters", "remove_channels": "Channels"}[report.function]
    told: Counter[str] = Counter()
    for kept in report.kept:
        assert kept.coupled or kept.reason
        told[kept.name] += len(kept.indices)
    for promise in promises_of(schedule.data):
        for name in promise.names if getattr(promise, "kind", kind) == kind else ():
            assert int(zero_groups(weights[name], kind).sum()) == told[name], name
    if str(schedule) in AS_THIN_AS_DISTILLERS:
        assert not report.kept
        shapes = {name: shape for name, (shape, _) in schedule.header_table().items() if name in weights}
        assert len(shapes) > 15
        assert shapes == {name: tuple(weights[name].shape) for name in shapes}


@each(WITHOUT_POLICIES)
def test_a_schedule_runs_to_what_it_promises(schedule):
    """Sparsity, penalties and learning rates, in the epochs in which a policy begins or ends and one after."""
    comes_true(schedule, is_true_size=schedule.arch not in BIG)


@pytest.mark.slow
@each(WITHOUT_POLICIES, archs=BIG)
def test_a_schedule_runs_to_what_it_promises_in_true_size(schedule):
    comes_true(schedule, is_true_size=True)


def test_the_file_with_duplicate_keys_is_refused_with_both_lines_of_each():
    schedule = the(WITH_DUPLICATE_KEYS)
    first: dict[str, int] = {}
    twice = []
    for number, line in enumerate(schedule.text.splitlines(), start=1):
        if match := re.match(r"      (module\.\S+): ", line):
            if match[1] in first:
                twice.append(
                    (number, f"duplicate key '{match[1]}', first given in line {first[match[1]]}; keep one")
                )
            first.setdefault(match[1], number)
    assert twice
    model = schedule.true_model()
    with pytest.raises(ScheduleError) as refusal:
        file_config(model, optimizer_for(model), schedule.path)
    assert [(fault.line, fault.text) for fault in refusal.value.faults] == twice


def test_the_file_without_policies_is_no_schedule_but_configures_a_quantizer():
    schedule = the(WITHOUT_POLICIES)
    model = schedule.task().model.eval()
    with pytest.raises(ScheduleError, match="missing section 'policies'"):
        file_config(model, None, schedule.path)
    stats = FOLDER.parent / "stats/resnet18_quant_stats.yaml"
    quantizer = config_component_from_file_by_class(
        model, schedule.path, "PostTrainLinearQuantizer", model_activation_stats=stats
    )
    images = torch.randn(1, 3, 32, 32)
    quantizer.prepare_model(images)
    assert quantizer.model(images).isfinite().all()
    assert quantizer.settings()["bits_activations"] == quantizer.settings()["bits_parameters"] == 6
