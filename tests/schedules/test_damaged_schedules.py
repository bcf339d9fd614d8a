"""Every key and value of a shipped schedule left out, renamed, doubled or replaced: it works or is refused.

Whatever a file holds, nothing but a ScheduleError comes out of reading it.
"""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml

from distiller.config import dict_config, document_config
from distiller.errors import ScheduleError
from distiller.models import create_model
from distiller.schedule_shape import SECTION_OF
from distiller.schedule_yaml import parse_document
from tests.schedules.test_shipped_schedules import SHIPPED, flags, named

JUNK = (None, True, -1, 0.5, math.nan, 10**17, "x", "", [], [-1], ["x"], {}, {"x": 1}, {1: 2},
        datetime.date(2024, 1, 2))  # fmt: skip
NAMES = ("x", 1, None, True)

MORE = """
pruners:
  level: {class: SparsityLevelParameterPruner, levels: {fc1.weight: 0.5, 'conv*.weight': 0.1}}
  filters: {class: L1RankedStructureParameterPruner, group_type: Filters, desired_sparsity: 0.5, weights: [conv2.weight], noise: 0.1,
    group_size: 2}
  blocks: {class: L2RankedStructureParameterPruner_AGP, group_type: Blocks, initial_sparsity: 0.1, final_sparsity: 0.5,
    weights: [conv2.weight], kwargs: {block_shape: [2, 4, 1, 1]}}
regularizers:
  lasso: {class: GroupLassoRegularizer, reg_regims: {conv2.weight: [0.1, 3D]}, threshold_criteria: Max}
extensions:
  gates: {class: L0Regularizer, reg_regims: {conv2.weight: [0.1, Filters]}, keep_probability: 0.9}
lr_schedulers:
  steps: {class: MultiStepLR, milestones: [1, 3], gamma: 0.1}
  plateau: {class: ReduceLROnPlateau, patience: 1, min_lr: [0.0]}
  cycle: {class: OneCycleLR, max_lr: 0.5, total_steps: 20, div_factor: 10.0}
policies:
  - {pruner: {instance_name: level, args: {levels: {fc1.weight: 0.25}, mask_on_forward_only: true, mask_gradients: true,
      mini_batch_pruning_frequency: 2}}, epochs: [0, 2]}
  - {pruner: {instance_name: filters}, starting_epoch: 3, ending_epoch: 5, frequency: 1}
  - {pruner: {instance_name: blocks}, epochs: [6]}
  - {regularizer: {instance_name: lasso, args: {keep_mask: true}}, epochs: [0]}
  - {extension: {instance_name: gates}, epochs: [0]}
  - {lr_scheduler: {instance_name: steps}, epochs: [0]}
  - {lr_scheduler: {instance_name: plateau}, epochs: [0]}
  - {lr_scheduler: {instance_name: cycle}, epochs: [0]}
"""


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*path, key))


def at(data: Any, path: tuple) -> Any:
    for key in path:
        data = data[key]
    return data


def damaged(schedule: dict) -> Iterator[Any]:
    """Copies of a schedule with one thing wrong in each."""
    yield from JUNK
    for *parents, last in filter(None, paths(schedule)):
        value = at(schedule, (*parents, last))
        for junk in (*JUNK, [value, value], {"x": value}):
            yield changed(schedule, parents, lambda parent, key=last, new=junk: parent.__setitem__(key, new))
        yield changed(schedule, parents, lambda parent, key=last: parent.__delitem__(key))
        for name in NAMES if isinstance(last, str) else ():
            yield changed(
                schedule, parents, lambda parent, key=last, new=name: parent.update({new: parent.pop(key)})
            )


def changed(schedule: dict, parents: list, change: Any) -> dict:
    """A copy in which only what leads to the change is new."""
    result: Any = copy.copy(schedule)
    parent = result
    for key in parents:
        parent[key] = copy.copy(parent[key])
        parent = parent[key]
    change(parent)
    return result


def alone(schedule: dict) -> list[dict]:
    """For each class a schedule of its last policy, so that no other fault hides what is wrong there."""
    found = {}
    for policy in schedule["policies"]:
        word = next(word for word in SECTION_OF if word in policy)
        name = policy[word]["instance_name"]
        component = schedule[SECTION_OF[word]][name]
        found[component["class"]] = {
            "version": 1,
            SECTION_OF[word]: {name: component},
            "policies": [policy],
        }
    return list(found.values())


def refusals(schedule: dict) -> list[ScheduleError]:
    model, found = create_model(False, "digits", "lenet5", parallel=False), []
    dict_config(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), schedule)
    for data in damaged(schedule):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        try:
            document_config(model, optimizer, parse_document(yaml.dump(data, Dumper=yaml.CSafeDumper)))
        except ScheduleError as error:
            found.append(error)
    return found


@pytest.mark.parametrize("shipped", [s for s in SHIPPED if flags(s).arch == "lenet5"], ids=named)
def test_a_damaged_schedule_works_or_is_refused(shipped):
    for schedule in alone(shipped.data):
        assert refusals(schedule)


@pytest.mark.parametrize(
    "schedule",
    alone(yaml.safe_load(MORE)),
    ids=lambda schedule: list(schedule)[1] + "-" + next(iter(list(schedule.values())[1])),
)
def test_a_damaged_schedule_of_another_class_works_or_is_refused(schedule):
    assert refusals(schedule)
