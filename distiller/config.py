"""A schedule file -> a scheduler with its policies, or all of the file's faults at once.

Schedule: sections of named components (`pruners`, `regularizers`, `quantizers`,
`lr_schedulers`, `extensions`), each `{class: Name, <constructor keywords>}`, and a list of
`policies` that say in which epochs which component acts.
Knows nothing about the training loop; classes come from the registries alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distiller.component_kinds import KINDS
from distiller.errors import Fault, QuantizationError, ScheduleError, require
from distiller.quantization.data_steps import BUDGETS, DataSteps
from distiller.quantization.with_data import check_steps
from distiller.schedule_reader import ScheduleReader
from distiller.schedule_shape import STEPS, shape_faults
from distiller.schedule_yaml import Document, read_document
from distiller.scheduler import CompressionScheduler

_LOG = logging.getLogger(__name__)


def file_config(
    model: nn.Module,
    optimizer: Optimizer | None,
    filename: str | Path,
    scheduler: CompressionScheduler | None = None,
    plugins: Collection[str] = (),
) -> CompressionScheduler:
    """The scheduler that a YAML file describes.

    Args:
        model: the model that the schedule is for; names are checked against it.
        optimizer: given to LR schedulers and quantizers; None where the schedule has neither.
        filename: the YAML file.
        scheduler: add the policies to this one instead of a new one.
        plugins: packages from which a `class:` may be a dotted path.

    Raises:
        ScheduleError: with every fault of the file, each with its line.
        UsageError: an argument is of another type.
    """
    require(filename, (str, os.PathLike), "file_config: filename", "the path of a YAML file")
    return document_config(model, optimizer, read_document(filename), scheduler, plugins)


def dict_config(
    model: nn.Module,
    optimizer: Optimizer | None,
    schedule: Mapping[str, Any],
    scheduler: CompressionScheduler | None = None,
    plugins: Collection[str] = (),
) -> CompressionScheduler:
    """`file_config` for a schedule that is a dict already."""
    require(schedule, Mapping, "dict_config: schedule", "a dict")
    return document_config(model, optimizer, Document("<dict>", dict(schedule), {}), scheduler, plugins)


def document_config(
    model: nn.Module,
    optimizer: Optimizer | None,
    document: Document,
    scheduler: CompressionScheduler | None = None,
    plugins: Collection[str] = (),
) -> CompressionScheduler:
    """`file_config` for a document that is read already."""
    require(model, nn.Module, "schedule: model", "a torch.nn.Module")
    require(optimizer, (Optimizer, NoneType), "schedule: optimizer", "a torch.optim.Optimizer or None")
    require(
        scheduler, (CompressionScheduler, NoneType), "schedule: scheduler", "a CompressionScheduler or None"
    )
    faults = shape_faults(document)
    if not isinstance(document.data, dict):
        raise ScheduleError(document.file, faults)
    reader = ScheduleReader(document, model, optimizer, plugins)
    reader.foresee()
    for kind in KINDS:
        for name in sorted(reader.components_of(kind), key=reader.is_cyclic):
            reader.build(kind, name)
        if kind.section == "quantizers" and not faults and not reader.faults:
            reader.prepare_quantizers()
    result = scheduler if scheduler is not None else CompressionScheduler(model)
    outlook, result.outlook = result.outlook, reader.outlook.joined(result.outlook)
    already = len(result.policies)
    used = reader.add_policies(result)
    if faults or reader.faults:
        del result.policies[already:]
        result.outlook = outlook
        reader.restore_optimizer()
        raise ScheduleError(document.file, [*faults, *reader.faults])
    reader.begin_learning_rates(result)
    for path in reader.components.keys() - used:
        _LOG.warning(
            "%s:%d  '%s' has no policy and will do nothing", document.file, document.line(path), path[1]
        )
    return result


def config_component_from_file_by_class(
    model: nn.Module | None,
    filename: str | Path,
    class_name: str,
    plugins: Collection[str] = (),
    **extra_args: Any,
) -> Any:
    """The first component of class `class_name` in any section of a file.

    Args:
        model: given to the component's constructor where it takes one.
        filename: the YAML file; needs no policies.
        class_name: as in `class:`.
        plugins: packages from which the class may be a dotted path.
        extra_args: keywords that win over those of the file.

    Raises:
        ScheduleError: no component of that class, or faults in it.
    """
    document = read_document(filename)
    faults = shape_faults(document, needs_policies=False)
    if faults:
        raise ScheduleError(document.file, faults)
    for kind in KINDS:
        for name, component in (document.data.get(kind.section) or {}).items():
            if component["class"] == class_name:
                component.update(extra_args)
                reader = ScheduleReader(document, model, None, plugins)
                reader.build(kind, name)
                if reader.faults:
                    raise ScheduleError(document.file, reader.faults)
                return reader.components[(kind.section, name)]
    raise ScheduleError(document.file, [Fault(1, "", f"has no component of class '{class_name}'")])


def post_training_steps(filename: str | Path) -> DataSteps:
    """The steps beside a quantizer's settings that a file asks for, in its section `post_training_steps`.

    Args:
        filename: the YAML file, as `config_component_from_file_by_class` takes it; needs no such section.

    Raises:
        ScheduleError: the file cannot be read; or with every fault of the section, each with its line.
    """
    document = read_document(filename)
    faults = [*shape_faults(document, needs_policies=False), *step_faults(document)]
    if faults:
        raise ScheduleError(document.file, faults)
    if STEPS in document.data and not document.data[STEPS]:
        _LOG.warning("%s:%d  '%s' is empty: no step is done", document.file, document.line((STEPS,)), STEPS)
    return DataSteps.from_plain(document.data.get(STEPS))


def step_faults(document: Document) -> list[Fault]:
    """What is wrong with the steps of quantization after training in a file: a fault for each setting."""
    if not isinstance(document.data, dict) or STEPS not in document.data:
        return []
    section = document.data[STEPS]
    if section is None or section == {}:
        return []
    if not isinstance(section, Mapping):
        return _faults_of(document, None, section)
    faults = [fault for step, settings in section.items() for fault in _step_faults(document, step, settings)]
    return faults or _faults_of(document, None, section)


def _step_faults(document: Document, step: Any, settings: Any) -> list[Fault]:
    """What is wrong with each setting of a step by itself, and with all of them together."""
    faults: list[Fault] = []
    if isinstance(settings, Mapping):
        # A setting beside a budget is looked at with the budget that goes with every other.
        whole = {"bit_operations": 1} if step == "mixed_precision" else {}
        for key, value in settings.items():
            given = {**({} if key in BUDGETS else whole), key: value}
            faults += _faults_of(document, step, given, (key,))
    known = {fault.text for fault in faults}
    return [*faults, *(fault for fault in _faults_of(document, step, settings) if fault.text not in known)]


def _faults_of(document: Document, step: Any, settings: Any, within: tuple[Any, ...] = ()) -> list[Fault]:
    """The first thing that is wrong with a step's settings, or, where no step is given, with all steps."""
    root = (STEPS,) if step is None else (STEPS, step)
    try:
        check_steps(DataSteps.from_plain(settings if step is None else {step: settings}, STEPS))
    except QuantizationError as error:
        text = str(error)
        for prefix in (f"{STEPS}.{step}: ", f"{STEPS}: ", f"{step}: "):
            text = text.removeprefix(prefix)
        text = re.sub(r"^(?:AdaRoundSettings|\w+_search): ", "", text)  # whose setting it is, the path says
        path = document.find_mentioned(root, text)
        return [document.fault((*root, *within) if path == root else path, text)]
    return []
