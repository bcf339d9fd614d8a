"""Every schedule that is shipped loads against the model of its command, runs, and keeps what it promises."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import compress_classifier
from distiller.apputils import classifier_jobs
from distiller.branch_points import final_output
from distiller.config import file_config
from distiller.dataset_facts import DATASET_FACTS, infer_dataset
from distiller.distillation import KnowledgeDistillationPolicy
from distiller.layer_replacement import LayerReplacer
from distiller.model_summaries import total_macs
from distiller.models import create_model, input_shape_for
from distiller.names import resolve_all
from distiller.registry import EXTENSIONS, PRUNERS, REGULARIZERS
from docs.schedule_headers import INDEX, MADE_BY, ROOT, Shipped, classes_of, index, shipped, with_block
from tests.compat.promises import groups_of, window_of, zero_groups

SHIPPED = shipped()
PENDING = "Not measured yet ("
MEASURED = [s for s in SHIPPED if s.results is not None and PENDING not in s.header]
USED = {name for schedule in SHIPPED for name in classes_of(schedule.data)}
NOT_MEASURED = "Not measured here."
EXACT = {
    "AutomatedGradualPruner": "elements",
    "MovementPruner": "elements",
    "SparsityLevelParameterPruner": "elements",
    "NMPruner": "elements",
} | dict.fromkeys(
    (
        name
        for name in PRUNERS
        if ("Structure" in name or "Ranked" in name or "Reconstruction" in name)
        and not name.startswith("StructuredGroup")
    ),
    "groups",
)
"""Pruners that come to a sparsity that can be read off the schedule, and of what it is the sparsity."""
DROPPING = ("BernoulliFilterPruner", "BernoulliFilterPruner_AGP", "RandomLevelStructureParameterPruner")


def named(schedule: Shipped) -> str:
    return str(schedule.path.relative_to(ROOT / "schedules"))


def each(schedules: list[Shipped]):
    return pytest.mark.parametrize("schedule", schedules, ids=named)


def results_of(schedule: Shipped) -> Path:
    assert schedule.results is not None
    return schedule.results


def flags(schedule: Shipped):
    """The command in a schedule's header, as the program understands it."""
    return compress_classifier.make_parser().parse_args(schedule.flags)


def model_of(schedule: Shipped, arch: str | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """The model of a schedule's command, or another for its data, and the shape of two of its images."""
    args = flags(schedule)
    args.arch = arch or args.arch
    dataset = args.dataset or infer_dataset(args.arch)
    facts = DATASET_FACTS[dataset]
    shape = input_shape_for(args.arch, facts.channels, facts.size)
    return create_model(False, dataset, args.arch, parallel=False, input_shape=(1, *shape)), (2, *shape)


def test_there_are_schedules():
    assert len(SHIPPED) > 30


@pytest.mark.parametrize("name", [*PRUNERS, *REGULARIZERS, *EXTENSIONS])
def test_every_method_has_a_schedule_in_which_a_policy_uses_it(name):
    assert name in USED


@each(SHIPPED)
def test_a_schedule_opens_with_purpose_command_and_measured_result(schedule):
    assert (ROOT / flags(schedule).compress).resolve() == schedule.path
    assert len(schedule.header.splitlines()[0]) > 20
    told = (
        "\nMeasured (" in schedule.header,
        PENDING in schedule.header,
        NOT_MEASURED in schedule.header.splitlines(),
    )
    assert sum(told) == 1


@each(SHIPPED)
def test_what_is_on_fashion_mnist_is_measured_with_a_seed(schedule):
    args = flags(schedule)
    if args.dataset == "fashion-mnist":
        assert schedule.results is not None
        assert args.seed is not None
        if args.resumed_checkpoint_path:
            baselines = {args.arch, args.arch.removesuffix("_cifar")}
            named = re.search(r"schedules/baseline_networks/(\w+)_fashion_mnist\.yaml", schedule.header)
            assert named is not None
            assert named[1] in baselines


@each(MEASURED)
def test_the_measured_results_in_a_header_are_those_that_are_committed(schedule):
    assert results_of(schedule).exists(), f"run `{MADE_BY}`"
    assert with_block(schedule) == schedule.text, "run `python -m docs.measure_schedules --headers`"


@each(MEASURED)
def test_results_are_in_a_file_named_as_model_data_and_run(schedule):
    args = flags(schedule)
    folder = f"{args.arch}_{args.dataset.replace('-', '_')}"
    assert schedule.results == ROOT / "docs/results" / folder / f"{args.name}.json"


def test_no_two_schedules_have_the_same_results():
    assert len({schedule.results for schedule in MEASURED}) == len(MEASURED)


def test_the_index_is_current():
    assert INDEX.read_text(encoding="utf-8") == index(), "run `python -m docs.measure_schedules --headers`"


@each(SHIPPED)
def test_a_dry_run_of_its_command_tells_what_it_does(schedule):
    args = flags(schedule)
    args.resumed_checkpoint_path = args.reset_optimizer = args.kd_teacher = args.kd_resume = None
    text = classifier_jobs.dry_run(args)
    assert "note:" not in text
    for name in classes_of(schedule.data):
        assert f": {name}" in text


@each(SHIPPED)
def test_a_schedule_runs_to_the_sparsity_it_promises(schedule):
    """One mini-batch an epoch, of random images: learning is not the point, masks are.

    Only the epochs in which a policy begins or ends, and the one after it, are trained.
    """
    model, shape = model_of(schedule)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    dense_macs = total_macs(model, (1, *shape[1:]))
    scheduler = file_config(model, optimizer, schedule.path)
    for entry in scheduler.policies:
        if isinstance(entry.policy, KnowledgeDistillationPolicy) and entry.policy.teachers is None:
            entry.policy.learn_from(model_of(schedule, flags(schedule).kd_teacher)[0])
    last = flags(schedule).epochs - 1
    torch.manual_seed(0)
    images, labels = torch.randn(shape), torch.zeros(2, dtype=torch.int64)
    windows = [entry.window for entry in scheduler.policies]
    for epoch in sorted({min(e, last) for w in windows for e in (w.start, w.last, w.last + 1)}):
        scheduler.on_epoch_begin(epoch, optimizer)
        scheduler.on_minibatch_begin(epoch, 0, 1, optimizer)
        loss = nn.functional.cross_entropy(final_output(model(images)), labels)
        loss = scheduler.before_backward_pass(epoch, 0, 1, loss, optimizer)
        assert isinstance(loss, torch.Tensor)
        optimizer.zero_grad()
        loss.backward()
        scheduler.before_parameter_optimization(epoch, 0, 1, optimizer)
        optimizer.step()
        scheduler.on_minibatch_end(epoch, 0, 1, optimizer)
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 10.0})
    with scheduler.masked():
        weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    check_promises(schedule.data, weights)
    for share in promised_macs(schedule.data):
        assert 0.95 * share < total_macs(model, (1, *shape[1:])) / dense_macs <= share
    assert scheduler.pruning_is_complete(last)


@each(MEASURED)
def test_the_measured_structures_are_those_that_were_promised(schedule):
    """Of the true run: half of the filters is half of the filters."""
    card = yaml.safe_load(results_of(schedule).read_text(encoding="utf-8"))
    entries = {(e["weight"], e["kind"]): e for e in card.get("structures", [])}
    model, _ = model_of(schedule)
    for entry in file_config(model, torch.optim.SGD(model.parameters(), 0.1), schedule.path).policies:
        if isinstance(entry.policy, LayerReplacer):
            model = entry.policy.foreseen(model)
    shapes = {name: param.detach() for name, param in model.named_parameters()}
    for names, kind, block, fraction in promises(schedule.data, shapes):
        for name in names if kind != "elements" else ():
            label = {"Filters": "filters", "Channels": "channels", "Rows": "inputs", "Blocks": "blocks"}[kind]
            entry = entries[name, f"zero {label}"]
            assert entry["of"] == len(groups_of(shapes[name], kind, block))
            assert entry["count"] == math.floor(fraction * entry["of"])
    for (_, kind), entry in entries.items():
        if kind.startswith("groups with"):
            assert entry["count"] == entry["of"]


def test_network_slimming_zeroes_its_share_of_the_scales():
    """Distiller's schedule of that name had a regularizer without a policy: it did nothing."""
    (schedule,) = [s for s in MEASURED if s.path.parent.name == "network_slimming"]
    entries = yaml.safe_load(results_of(schedule).read_text(encoding="utf-8"))["structures"]
    share = schedule.data["pruners"]["narrow"]["final_sparsity"]
    zero, scales = (sum(entry[key] for entry in entries) for key in ("count", "of"))
    assert {entry["kind"] for entry in entries} == {"zero scales"}
    assert zero == int(share * scales)


def check_promises(data: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    for names, kind, block, fraction in promises(data, weights):
        for name in names:
            groups = len(groups_of(weights[name], kind, block))
            zero = int(zero_groups(weights[name], kind, block).sum())
            assert zero == pytest.approx(math.floor(fraction * groups), abs=1 if kind == "elements" else 0), (
                name
            )
    for pruner in (data.get("pruners") or {}).values():
        chosen = {name: weights[name] for name in resolve_all(pruner.get("weights", []), list(weights))}
        if pruner["class"] == "GlobalMagnitudePruner":
            zero = sum(int((weight == 0).sum()) for weight in chosen.values())
            total = sum(weight.numel() for weight in chosen.values())
            assert zero == pytest.approx(pruner["final_sparsity"] * total, abs=1)
        elif pruner["class"] in DROPPING:
            assert not any(zero_groups(weight, "Filters").any() for weight in chosen.values())


def promises(data: Mapping[str, Any], weights: Mapping[str, torch.Tensor]):
    """(weights, kind of group, block, fraction that is zero at the end) of each pruner with an exact share.

    Not of pruners that let weights come back. Of several policies on the same weights the last one counts.
    """
    found: dict[tuple[str, ...], tuple[int, tuple | None]] = {}
    for policy in data["policies"]:
        if "pruner" not in policy:
            continue
        pruner = data["pruners"][policy["pruner"]["instance_name"]]
        if pruner["class"] not in EXACT or pruner["class"] in (*DROPPING, "StructureParameterPruner"):
            continue
        levels = policy["pruner"].get("args", {}).get("levels") or pruner.get("levels")
        shares = levels or dict.fromkeys(pruner["weights"], share_of(pruner))
        repetitions, depth, *_ = pruner.get("kwargs", {}).get("block_shape", (1, 1))
        kind = "elements" if EXACT[pruner["class"]] == "elements" else pruner["group_type"]
        for pattern, share in shares.items():
            names = resolve_all([pattern], list(weights))
            begin = window_of({"frequency": 1, **policy}).epochs[0]
            promise = (names, kind, repetitions * depth, Fraction(str(share)))
            # What comes back begins at zero, and stays there while no gradient reaches it.
            comes_back = share == 0 or pruner["class"] == "RandomRankedFilterPruner_AGP"
            if begin >= found.get(names, (-1, None))[0]:
                found[names] = (begin, None if comes_back else promise)
    return [promise for _, promise in found.values() if promise is not None]


def promised_macs(data: Mapping[str, Any]) -> list[float]:
    """The shares of the dense MACs that are left where the schedule removes what it prunes."""
    return [
        pruner["final_macs"] for pruner in (data.get("pruners") or {}).values()
        if "final_macs" in pruner and data.get("extensions")
    ]  # fmt: skip


def share_of(pruner: Mapping[str, Any]) -> float:
    if pruner["class"] == "NMPruner":
        return 1 - pruner["n"] / pruner["m"]
    return pruner["final_sparsity"] if "final_sparsity" in pruner else pruner["desired_sparsity"]
