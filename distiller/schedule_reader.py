"""The components and policies of one schedule, built in order, and all that is wrong with them.

Knows nothing about files; a document may also be a dict.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distiller.component_kinds import EXTENSION_KIND, KINDS, LR_KIND, Kind
from distiller.errors import DistillerError, Fault, UnknownNameError, did_you_mean
from distiller.interfaces import EpochWindow, Policy
from distiller.layer_replacement import LayerReplacer
from distiller.learning_rate import check_arguments, copy_groups, put_back_groups, rehearse
from distiller.names import is_pattern
from distiller.policy import LRPolicy
from distiller.policy_args import PolicyArgsError
from distiller.pruning.settings import ParameterError, is_listed
from distiller.quantization import PostTrainLinearQuantizer
from distiller.schedule_shape import CYCLIC, WINDOW_KEYS, policy_faults
from distiller.schedule_yaml import Document, Path_, plain
from distiller.scheduler import CompressionScheduler, make_window
from distiller.signatures import check_settings, injected, takes
from distiller.structure_outlook import StructureOutlook


class ScheduleReader:
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
        self._makers: dict[Path_, partial[Any]] = {}
        self._groups = copy_groups(optimizer)
        self._first_rates: dict[Path_, list[dict[str, Any]]] = {}
        self.outlook = StructureOutlook(model if model is not None else nn.Module())

    def components_of(self, kind: Kind) -> dict[str, dict[str, Any]]:
        """The components of one section that are given in the right shape."""
        section = self.document.data.get(kind.section)
        if not isinstance(section, dict):
            return {}
        shaped = {
            name: entry
            for name, entry in section.items()
            if isinstance(entry, dict) and isinstance(entry.get("class"), str)
        }
        self._broken |= {(kind.section, name) for name in section.keys() - shaped.keys()}
        return shaped

    def is_cyclic(self, name: str) -> bool:
        """Whether an LR scheduler is one of `CYCLIC`, which are made last."""
        return self.components_of(LR_KIND).get(name, {}).get("class") in CYCLIC

    def build(self, kind: Kind, name: str) -> None:
        """Instantiate one component, or note why it cannot be."""
        path: Path_ = (kind.section, name)
        if path in self.components or path in self._broken:
            return
        settings = dict(self.document.data[kind.section][name])
        class_name = settings.pop("class")
        before = len(self.faults)
        try:
            factory = kind.registry.look_up(class_name, self._plugins)
        except UnknownNameError as error:
            self._fault((*path, "class"), str(error))
        else:
            faults = check_settings(factory, settings)
            if kind is LR_KIND:
                faults += check_arguments(factory, settings)
            for inner, text in faults:
                self._fault((*path, *inner), text)
            if len(self.faults) == before:
                self._instantiate(path, factory, settings)
        if len(self.faults) > before:
            self._broken.add(path)

    def foresee(self) -> None:
        """Build the extensions that replace layers: all else is of the model as they will make it."""
        replacing = [
            name
            for name, settings in self.components_of(EXTENSION_KIND).items()
            if self._replaces_layers(settings["class"])
        ]
        for name in replacing:
            path: Path_ = (EXTENSION_KIND.section, name)
            self.build(EXTENSION_KIND, name)
            for window in self._windows(path) if path in self.components else ():
                self.outlook.add(self.components[path], window)
        if not self.outlook:
            return
        for name in self.components_of(KINDS[0]):
            path = (KINDS[0].section, name)
            if self._windows(path):
                self._fault(
                    path,
                    f"prepares the model when the schedule is read, and '{replacing[0]}' replaces layers "
                    f"later; do it in two runs: give the checkpoint of '{replacing[0]}' to the quantizer's "
                    "schedule, with --exp-load-weights-from",
                )

    def prepare_quantizers(self) -> None:
        """Let the quantizers that have a policy prepare the model.

        To be done before masks are made for it, and LR schedulers for the optimizer.
        """
        policies = self.document.data.get("policies")
        named = {
            str(policy["quantizer"].get("instance_name"))
            for policy in (policies if isinstance(policies, list) else [])
            if isinstance(policy, dict) and isinstance(policy.get("quantizer"), dict)
        }
        for path, quantizer in self.components.items():
            is_due = path[0] == "quantizers" and str(path[1]) in named
            if is_due and not isinstance(quantizer, PostTrainLinearQuantizer):
                try:
                    quantizer.prepare_model()
                except (ValueError, TypeError) as error:
                    self._fault(self.document.find_mentioned(path, str(error)), str(error))
                    self._broken.add(path)
        self._groups = copy_groups(self._supplied["optimizer"])

    def begin_learning_rates(self, scheduler: CompressionScheduler) -> None:
        """Set the rates of the LR schedulers that are active from epoch 0.

        Torch's schedulers set the optimizer's rates when they are made, even if their policy
        opens later or another scheduler is made after them.
        """
        starting = {id(entry.policy.lr_scheduler) for entry in scheduler.policies
                    if isinstance(entry.policy, LRPolicy) and entry.window.start == 0}  # fmt: skip
        for path, settings in self._first_rates.items():
            if id(self.components[path]) in starting:
                put_back_groups(self._supplied["optimizer"], settings, rates_only=True)

    def restore_optimizer(self) -> None:
        """Undo what LR schedulers left in the optimizer's groups."""
        put_back_groups(self._supplied["optimizer"], self._groups)

    def add_policies(self, scheduler: CompressionScheduler) -> set[Path_]:
        """Add every policy whose component stands; returns the paths of the components used."""
        used: set[Path_] = set()
        policies = self.document.data.get("policies")
        for index, policy in enumerate(policies if isinstance(policies, list) else []):
            path: Path_ = ("policies", index)
            if policy_faults(self.document, path, policy):
                continue
            kind = next(kind for kind in KINDS if kind.word in policy)
            spec = policy[kind.word]
            name = str(spec["instance_name"])
            known = {
                str(path[1]): path for path in (*self.components, *self._broken) if path[0] == kind.section
            }
            if name not in known:
                text = f"no {kind.word} '{name}' in '{kind.section}'{did_you_mean(name, known)}"
                self._fault((*path, kind.word, "instance_name"), text)
                continue
            target = known[name]
            used.add(target)
            if target in self._broken:
                continue
            if isinstance(self.components[target], PostTrainLinearQuantizer):
                text = (
                    f"{type(self.components[target]).__name__} is for quantization after training; "
                    "give its file to --qe-config-file, with --evaluate --quantize-eval"
                )
                self._fault((*path, kind.word), text)
                continue
            self._add_policy(scheduler, kind, path, target, spec.get("args") or {}, policy)
        return used

    def _instantiate(self, path: Path_, factory: Callable[..., Any], settings: dict[str, Any]) -> None:
        for name in injected(factory):
            if name == "name":
                settings[name] = str(path[1])
            elif self._supplied[name] is not None:
                settings[name] = self._model_for(path) if name == "model" else self._supplied[name]
        sets_rates = path[0] == LR_KIND.section
        try:
            self.components[path] = factory(**settings)
            self._makers[path] = partial(factory, **settings)
            if sets_rates:
                self._first_rates[path] = copy_groups(self._supplied["optimizer"])
        except UnknownNameError as error:
            self._unknown_names(path, error)
        except (ValueError, TypeError, ArithmeticError) as error:
            self._fault(self.document.find_mentioned(path, str(error)), str(error))
        finally:
            if sets_rates:
                put_back_groups(self._supplied["optimizer"], self._groups, rates_only=True)

    def _add_policy(
        self,
        scheduler: CompressionScheduler,
        kind: Kind,
        path: Path_,
        target: Path_,
        args: dict[str, Any],
        policy: dict[str, Any],
    ) -> None:
        window = {key: policy[key] for key in WINDOW_KEYS if policy.get(key) is not None}
        epochs = self._window(path, window)
        if epochs is not None and kind is LR_KIND:
            self._rehearse(target, epochs)
        made = self._make_policy(kind, (*path, kind.word, "args"), target, args, epochs)
        if made is None or epochs is None:
            return
        settings = {**self.document.data[target[0]][target[1]], **({"args": args} if args else {})}
        try:
            scheduler.add_policy(made, **window, name=f"{kind.word} {target[1]}", settings=plain(settings))
        except DistillerError as error:
            text, inner = str(error), (*path, kind.word)
            at = self.document.find_mentioned(inner, text) if isinstance(error, PolicyArgsError) else path
            self._fault(at, text)

    def _replaces_layers(self, class_name: str) -> bool:
        try:
            factory = EXTENSION_KIND.registry.look_up(class_name, self._plugins)
        except UnknownNameError:
            return False  # told when it is built
        return inspect.isclass(factory) and issubclass(factory, LayerReplacer)

    def _windows(self, path: Path_) -> list[EpochWindow]:
        """Those of the policies that use a component; what is wrong with one is told when it is added."""
        word = next(kind.word for kind in KINDS if kind.section == path[0])
        policies = self.document.data.get("policies")
        windows = []
        for policy in policies if isinstance(policies, list) else []:
            spec = policy.get(word) if isinstance(policy, dict) else None
            if not isinstance(spec, dict) or str(spec.get("instance_name")) != str(path[1]):
                continue
            try:
                given = {key: policy[key] for key in WINDOW_KEYS if policy.get(key) is not None}
                windows.append(make_window(**given))
            except (DistillerError, TypeError):
                continue
        return windows

    def _model_for(self, path: Path_) -> nn.Module:
        """The model that a component is made for: that of the first epoch it is used in."""
        starts = [window.start for window in self._windows(path)] if self.outlook else []
        return self.outlook.model_at(min(starts)) if starts else self._supplied["model"]

    def _window(self, path: Path_, window: dict[str, Any]) -> EpochWindow | None:
        try:
            return make_window(**window)
        except DistillerError as error:
            first = re.match(r"'(\w+)'", str(error))  # what is wrong with one key begins with it
            self._fault((*path, first[1]) if first else path, str(error))
            return None

    def _rehearse(self, target: Path_, epochs: EpochWindow) -> None:
        try:
            rehearse(self._makers[target], self._groups, self._supplied["optimizer"], epochs)
        except DistillerError as error:
            self._fault(self.document.find_mentioned(target, str(error)), str(error))

    def _make_policy(
        self, kind: Kind, args_path: Path_, target: Path_, args: dict[str, Any], epochs: EpochWindow | None
    ) -> Policy | None:
        """A policy that the model has room for, or None and faults."""
        faults = check_settings(kind.args, args) if kind.args else [((key,), "unknown") for key in args]
        factory = self._makers[target].func
        own = {key: args[key] for key in takes(factory) if args.get(key) is not None}
        # What stands in for a setting of the component must be of its kind; what is missing here, it has.
        faults += [(inner, text) for inner, text in check_settings(factory, own) if inner[0] in own]
        for inner, text in faults:
            self._fault((*args_path, *inner), text)
        if faults:
            return None
        component = self.components[target]
        roots = (args_path, target) if args else (target,)
        try:
            made = kind.make_policy(component, args) if kind.args else kind.make_policy(component)
            self.outlook.check_model(made, epochs or EpochWindow((0,)))
        except UnknownNameError as error:
            self._unknown_names(target, error, args_path if args else None)
        except PolicyArgsError as error:
            self._fault(self.document.find_mentioned(args_path[:-1], str(error)), str(error))
        except ParameterError as error:
            self._fault(self._listing(error.param_name, roots), str(error))
        except (ValueError, TypeError) as error:
            found = (self.document.find_mentioned(root, str(error)) for root in roots)
            self._fault(next((path for path in found if path not in roots), target), str(error))
        else:
            return made
        return None

    def _listing(self, param_name: str, roots: Collection[Path_]) -> Path_:
        """Where a parameter is named, or else matched by a pattern; the last of `roots` if nowhere."""
        found = [(is_pattern(text), path) for root in roots for path, text in self.document.texts(root)
                 if is_listed(param_name, (text,))]  # fmt: skip
        return min(found, key=lambda item: item[0])[1] if found else tuple(roots)[-1]

    def _unknown_names(self, component: Path_, error: UnknownNameError, args: Path_ | None = None) -> None:
        """Note each name at its own line, in the policy's `args` or in the component."""
        for name, text in (error.faults or {"": str(error)}).items():
            path = self.document.find(args, name) if args else component
            if path in (args, component):
                path = self.document.find(component, name)
            self._fault(path, text)

    def _fault(self, path: Path_, text: str) -> None:
        fault = self.document.fault(path, text)
        if fault not in self.faults:
            self.faults.append(fault)
