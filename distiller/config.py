"""A schedule file -> a scheduler with its policies, or all of the file's faults at once.

Schedule: sections of named components (`pruners`, `regularizers`, `quantizers`,
`lr_schedulers`, `extensions`), each `{class: Name, <constructor keywords>}`, and a list of
`policies` that say in which epochs which component acts.
Knows nothing about the training loop; classes come from the registries alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

import distiller.learning_rate
import distiller.pruning
import distiller.quantization  # noqa: F401 - importing a package fills its registry
from distiller.errors import DistillerError, Fault, ScheduleError, UnknownNameError, did_you_mean
from distiller.interfaces import Policy
from distiller.policy import (
    LRPolicy,
    PruningArgs,
    PruningPolicy,
    QuantizationPolicy,
    RegularizationArgs,
    RegularizationPolicy,
)
from distiller.registry import EXTENSIONS, LR_SCHEDULERS, PRUNERS, QUANTIZERS, REGULARIZERS, Registry
from distiller.schedule_yaml import SECTIONS, Document, Path_, read_document
from distiller.scheduler import CompressionScheduler
from distiller.signatures import check_settings, injected

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of component: its section, its word in a policy, its registry, and how it becomes a policy.

    Attributes:
        args: factory whose keywords are the policy's `args:`; None when it takes none.
    """

    section: str
    word: str
    registry: Registry
    make_policy: Callable[..., Policy]
    args: Callable[..., Any] | None = None


# In the order of instantiation: a quantizer may change the optimizer that an LR scheduler is given.
KINDS = (
    Kind("quantizers", "quantizer", QUANTIZERS, QuantizationPolicy),
    Kind("pruners", "pruner", PRUNERS, lambda pruner, args: PruningPolicy(pruner, args), PruningArgs),
    Kind(
        "regularizers",
        "regularizer",
        REGULARIZERS,
        lambda regularizer, args: RegularizationPolicy(regularizer, **args),
        RegularizationArgs,
    ),
    Kind("lr_schedulers", "lr_scheduler", LR_SCHEDULERS, LRPolicy),
    Kind("extensions", "extension", EXTENSIONS, lambda extension: extension),
)
_CYCLIC = ("OneCycleLR", "CyclicLR")
_WINDOW_KEYS = {"epochs": list, "starting_epoch": int, "ending_epoch": int, "frequency": int}
assert {kind.section for kind in KINDS} == set(SECTIONS)


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
    """
    return document_config(model, optimizer, read_document(filename), scheduler, plugins)


def dict_config(
    model: nn.Module,
    optimizer: Optimizer | None,
    schedule: Mapping[str, Any],
    scheduler: CompressionScheduler | None = None,
    plugins: Collection[str] = (),
) -> CompressionScheduler:
    """`file_config` for a schedule that is a dict already."""
    return document_config(model, optimizer, Document("<dict>", dict(schedule), {}), scheduler, plugins)


def document_config(
    model: nn.Module,
    optimizer: Optimizer | None,
    document: Document,
    scheduler: CompressionScheduler | None = None,
    plugins: Collection[str] = (),
) -> CompressionScheduler:
    """`file_config` for a document that is read already."""
    faults = _structure_faults(document)
    if faults:
        raise ScheduleError(document.file, faults)
    reader = _Reader(document, model, optimizer, plugins)
    for kind in KINDS:
        for name in sorted(document.data.get(kind.section) or {}, key=reader.is_cyclic):
            reader.build(kind, name)
    result = scheduler if scheduler is not None else CompressionScheduler(model)
    used = reader.add_policies(result)
    reader.begin_learning_rates(result)
    if reader.faults:
        raise ScheduleError(document.file, reader.faults)
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
    faults = _structure_faults(document, needs_policies=False)
    if faults:
        raise ScheduleError(document.file, faults)
    for kind in KINDS:
        for name, component in (document.data.get(kind.section) or {}).items():
            if component["class"] == class_name:
                component.update(extra_args)
                reader = _Reader(document, model, None, plugins)
                reader.build(kind, name)
                if reader.faults:
                    raise ScheduleError(document.file, reader.faults)
                return reader.components[(kind.section, name)]
    raise ScheduleError(document.file, [Fault(1, "", f"has no component of class '{class_name}'")])


class _Reader:
    """Builds components and policies of one document, and gathers what is wrong with them."""

    def __init__(
        self,
        document: Document,
        model: nn.Module | None,
        optimizer: Optimizer | None,
        plugins: Collection[str],
    ) -> None:
        self.document = document
        self.components: dict[Path_, Any] = {}
        self.faults: list[Fault] = []
        self._supplied: dict[str, Any] = {"model": model, "optimizer": optimizer, "last_epoch": -1}
        self._plugins = plugins
        self._broken: set[Path_] = set()
        self._base_rates = _group_settings(optimizer)
        self._first_rates: dict[Path_, list[dict[str, Any]]] = {}

    def is_cyclic(self, name: str) -> bool:
        """Whether an LR scheduler keeps its rates in the optimizer, over the base rates of those made later."""
        component = (self.document.data.get("lr_schedulers") or {}).get(name, {})
        return component.get("class") in _CYCLIC

    def build(self, kind: Kind, name: str) -> None:
        """Instantiate one component, or note why it cannot be."""
        path: Path_ = (kind.section, name)
        settings = dict(self.document.data[kind.section][name])
        class_name = settings.pop("class")
        before = len(self.faults)
        try:
            factory = kind.registry.look_up(class_name, self._plugins)
        except UnknownNameError as error:
            self._fault((*path, "class"), str(error))
        else:
            for inner, text in check_settings(factory, settings):
                self._fault((*path, *inner), text)
            if len(self.faults) == before:
                self._instantiate(path, factory, settings)
        if len(self.faults) > before:
            self._broken.add(path)

    def begin_learning_rates(self, scheduler: CompressionScheduler) -> None:
        """Set the rates of the LR schedulers that are active from epoch 0.

        Torch's schedulers set the optimizer's rates when they are made, even if their policy
        opens later or another scheduler is made after them.
        """
        starting = {id(entry.policy.lr_scheduler) for entry in scheduler.policies
                    if isinstance(entry.policy, LRPolicy) and entry.window.start == 0}  # fmt: skip
        for path, settings in self._first_rates.items():
            if id(self.components[path]) in starting:
                _set_group_settings(self._supplied["optimizer"], settings)

    def add_policies(self, scheduler: CompressionScheduler) -> set[Path_]:
        """Add every policy whose component stands; returns the paths of the components used."""
        used: set[Path_] = set()
        for index, policy in enumerate(self.document.data["policies"]):
            kind = next(kind for kind in KINDS if kind.word in policy)
            spec = policy[kind.word]
            path: Path_ = ("policies", index)
            target: Path_ = (kind.section, str(spec["instance_name"]))
            used.add(target)
            if target in self._broken:
                continue
            if target not in self.components:
                names = [str(name) for section, name in self.components if section == kind.section]
                text = (
                    f"no {kind.word} '{target[1]}' in '{kind.section}'{did_you_mean(str(target[1]), names)}"
                )
                self._fault((*path, kind.word, "instance_name"), text)
                continue
            self._add_policy(scheduler, kind, path, target, spec.get("args") or {}, policy)
        return used

    def _instantiate(self, path: Path_, factory: Callable[..., Any], settings: dict[str, Any]) -> None:
        for name in injected(factory):
            if name == "name":
                settings[name] = path[1]
            elif self._supplied[name] is not None:
                settings[name] = self._supplied[name]
        try:
            self.components[path] = factory(**settings)
            if path[0] == "lr_schedulers":
                self._first_rates[path] = _group_settings(self._supplied["optimizer"])
                _set_group_settings(self._supplied["optimizer"], self._base_rates)
        except UnknownNameError as error:
            self._unknown_names(path, error)
        except (ValueError, TypeError, ArithmeticError) as error:
            self._fault(path, str(error))

    def _add_policy(
        self,
        scheduler: CompressionScheduler,
        kind: Kind,
        path: Path_,
        target: Path_,
        args: dict[str, Any],
        policy: dict[str, Any],
    ) -> None:
        args_path = (*path, kind.word, "args")
        faults = check_settings(kind.args, args) if kind.args else [((key,), "unknown") for key in args]
        for inner, text in faults:
            self._fault((*args_path, *inner), text)
        if faults:
            return
        window = {key: policy[key] for key in _WINDOW_KEYS if policy.get(key) is not None}
        component = self.components[target]
        try:
            made = kind.make_policy(component, args) if kind.args else kind.make_policy(component)
        except (ValueError, TypeError) as error:
            self._fault(args_path, str(error))
            return
        try:
            scheduler.add_policy(made, **window, name=f"{kind.word} {target[1]}")
        except UnknownNameError as error:
            self._unknown_names(target, error)
        except DistillerError as error:
            self._fault(path, str(error))

    def _unknown_names(self, component: Path_, error: UnknownNameError) -> None:
        for name, text in (error.faults or {"": str(error)}).items():
            fault = self.document.fault(self.document.find(component, name), text)
            if fault not in self.faults:
                self.faults.append(fault)

    def _fault(self, path: Path_, text: str) -> None:
        self.faults.append(self.document.fault(path, text))


def _group_settings(optimizer: Optimizer | None) -> list[dict[str, Any]]:
    """What an LR scheduler may set in each parameter group of an optimizer."""
    keys = ("lr", "momentum", "betas")
    groups = optimizer.param_groups if optimizer is not None else []
    return [{key: group[key] for key in keys if key in group} for group in groups]


def _set_group_settings(optimizer: Optimizer | None, settings: list[dict[str, Any]]) -> None:
    for group, values in zip(optimizer.param_groups if optimizer is not None else [], settings, strict=True):
        group.update(values)


def _structure_faults(document: Document, needs_policies: bool = True) -> list[Fault]:
    """What is wrong with the shape of a schedule, before any class is looked at."""
    data = document.data
    if not isinstance(data, dict):
        return [document.fault((), f"a schedule is a mapping of sections, got {type(data).__name__}")]
    faults: list[Fault] = []
    known = ("version", "policies", *SECTIONS)
    for key, section in data.items():
        if key not in known:
            hint = did_you_mean(str(key), known) or f"; a schedule has {', '.join(known)}"
            faults.append(document.fault((key,), f"unknown section{hint}"))
        elif key in SECTIONS and section is not None:
            faults += _section_faults(document, key, section)
    policies = data.get("policies")
    if policies is None and needs_policies:
        faults.append(document.fault((), "missing section 'policies': nothing says when anything happens"))
    elif policies is not None and not isinstance(policies, list):
        faults.append(
            document.fault(("policies",), f"must be a list (lines that begin with '-'), got {policies!r}")
        )
    else:
        for index, policy in enumerate(policies or []):
            faults += _policy_faults(document, ("policies", index), policy)
    return faults


def _section_faults(document: Document, name: str, section: Any) -> list[Fault]:
    if not isinstance(section, dict):
        return [document.fault((name,), f"must be a mapping of names to components, got {section!r}")]
    faults = []
    for instance, component in section.items():
        path: Path_ = (name, instance)
        if not isinstance(component, dict):
            faults.append(
                document.fault(path, f"must be a mapping with 'class' and settings, got {component!r}")
            )
        elif not isinstance(component.get("class"), str):
            faults.append(document.fault(path, "missing key 'class': the name of what it is"))
    cyclic = [instance for instance, component in section.items()
              if isinstance(component, dict) and component.get("class") in _CYCLIC]  # fmt: skip
    if len(cyclic) > 1:
        faults.append(
            document.fault(
                (name, cyclic[1]), f"only one of {' and '.join(_CYCLIC)} can set the rates of an optimizer"
            )
        )
    if name == "quantizers" and len(section) > 1:
        faults.append(document.fault((name,), f"only one quantizer can act on a model, got {len(section)}"))
    return faults


def _policy_faults(document: Document, path: Path_, policy: Any) -> list[Fault]:
    words = [kind.word for kind in KINDS]
    if not isinstance(policy, dict):
        return [document.fault(path, f"must be a mapping with one of {', '.join(words)}, got {policy!r}")]
    faults = []
    for key, value in policy.items():
        if key not in words and key not in _WINDOW_KEYS:
            faults.append(
                document.fault((*path, key), f"unknown{did_you_mean(str(key), [*words, *_WINDOW_KEYS])}")
            )
        elif key in _WINDOW_KEYS and value is not None and not _is_window_value(key, value):
            wanted = "a list of whole numbers" if key == "epochs" else "a whole number"
            faults.append(document.fault((*path, key), f"must be {wanted}, got {value!r}"))
    given = [word for word in words if word in policy]
    if len(given) != 1:
        faults.append(document.fault(path, f"needs exactly one of {', '.join(words)}, got {given or 'none'}"))
        return faults
    spec = policy[given[0]]
    spec_path = (*path, given[0])
    if not isinstance(spec, dict) or spec.get("instance_name") is None:
        faults.append(document.fault(spec_path, f"missing key 'instance_name': the name of a {given[0]}"))
        return faults
    for key in spec:
        if key in _WINDOW_KEYS:
            faults.append(document.fault((*spec_path, key), f"belongs beside '{given[0]}', not inside it"))
        elif key not in ("instance_name", "args"):
            hint = did_you_mean(str(key), ["instance_name", "args"])
            faults.append(document.fault((*spec_path, key), f"unknown{hint}"))
    if not isinstance(spec.get("args") or {}, dict):
        faults.append(document.fault((*spec_path, "args"), f"must be a mapping, got {spec['args']!r}"))
    return faults


def _is_window_value(key: str, value: Any) -> bool:
    if key == "epochs":
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) is int
