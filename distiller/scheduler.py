"""The compression scheduler: passes the training loop's callbacks on to the policies that are due.

Applies the masks, once a callback. Knows nothing about YAML, data or accuracy.
"""

from __future__ import annotations

import logging
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.errors import CheckpointError, DistillerError, UsageError, require
from distiller.interfaces import EpochWindow, LossComponent, Policy, PolicyLoss, StepContext
from distiller.layer_replacement import LayerReplacer
from distiller.masks import MaskStore, ParameterMasker, create_model_masks_dict
from distiller.names import named_parameters, strip_wrappers
from distiller.policy import PruningPolicy
from distiller.policy_conflicts import refuse_conflicts
from distiller.structure_outlook import StructureOutlook

_LOG = logging.getLogger(__name__)

__all__ = ["CompressionScheduler", "ParameterMasker", "ScheduledPolicy", "create_model_masks_dict"]

_LAST_EPOCH = 10**9
_DISTILLERS_METRICS = {"min": "loss", "max": "top1"}


@dataclass(frozen=True, slots=True)
class ScheduledPolicy:
    """A policy and when it acts.

    Attributes:
        policy: what acts.
        window: the epochs it is active in.
        name: what it goes by in the schedule.
        settings: class, settings and arguments as the schedule has them, plain data; {} if unknown.
    """

    policy: Policy
    window: EpochWindow
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


class CompressionScheduler:
    """Drives policies epoch by epoch over one model.

    Args:
        model: the model in training.
        zeros_mask_dict: masks to start from, by parameter name (tensors, or objects with `.mask`).
        device: accepted as Distiller does; masks live where their parameters do.
    """

    def __init__(
        self,
        model: nn.Module,
        zeros_mask_dict: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        require(model, nn.Module, "CompressionScheduler: model", "a torch.nn.Module")
        require(
            zeros_mask_dict, (Mapping, NoneType), "CompressionScheduler: zeros_mask_dict", "a dict or None"
        )
        self.model = model
        self.masks = MaskStore(model)
        self.outlook = StructureOutlook(model)
        self.policies: list[ScheduledPolicy] = []
        if zeros_mask_dict:
            tensors = {name: getattr(mask, "mask", mask) for name, mask in zeros_mask_dict.items()}
            masks = {
                name if name in self.masks else strip_wrappers(name): mask
                for name, mask in tensors.items()
                if mask is not None
            }
            self.masks.load_state_dict({"masks": masks})

    def add_policy(
        self,
        policy: Policy,
        epochs: Sequence[int] | None = None,
        starting_epoch: int | None = None,
        ending_epoch: int | None = None,
        frequency: int = 1,
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a policy, active in `epochs` or from `starting_epoch` to `ending_epoch` (exclusive).

        With `settings`, plain data, `load_state_dict` refuses a state of other settings.

        Raises:
            DistillerError: the epochs are given twice, not at all, or make no window.
            PolicyConflictError: another policy, in overlapping epochs, does what this one cannot go with
                (`policy_conflicts`).
            UnknownNameError: the policy names what the model does not have.
        """
        require(policy, Policy, "add_policy: policy", "a Policy")
        window = make_window(epochs, starting_epoch, ending_epoch, frequency)
        entry = ScheduledPolicy(policy, window, name or type(policy).__name__, dict(settings or {}))
        self.outlook.check(entry, self.policies)
        policy.check_epochs(window)
        refuse_conflicts(entry, self.policies, lambda own: self.outlook.model_at(own.window.start))
        self.policies.append(entry)

    @property
    def sched_metadata(self) -> dict[Policy, dict[str, int]]:
        """Distiller's view: first epoch, end (exclusive) and frequency by policy."""
        return {
            entry.policy: {
                "starting_epoch": entry.window.start,
                "ending_epoch": entry.window.end,
                "frequency": entry.window.frequency,
            }
            for entry in self.policies
        }

    def on_epoch_begin(self, epoch: int, optimizer: Optimizer | None = None) -> None:
        """Before the first mini-batch: pruners compute masks.

        Raises:
            UsageError: the epoch is no whole number from 0.
        """
        require(epoch, numbers.Integral, "on_epoch_begin: epoch", "a whole number")
        if epoch < 0:
            raise UsageError(f"on_epoch_begin: epoch: must be 0 or more, got {epoch}")
        self.masks.refresh()
        # Those that replace layers come first: all others act on the model of this epoch.
        for entry in sorted(self._active(epoch), key=lambda own: not isinstance(own.policy, LayerReplacer)):
            entry.policy.on_epoch_begin(self._context(entry, epoch, optimizer))

    def on_minibatch_begin(
        self, epoch: int, minibatch_id: int, minibatches_per_epoch: int, optimizer: Optimizer | None = None
    ) -> None:
        """Before the forward pass: masks are applied."""
        for entry in self._active(epoch):
            entry.policy.on_minibatch_begin(
                self._context(entry, epoch, optimizer, minibatch_id, minibatches_per_epoch)
            )
        self.masks.apply_before_forward()

    def before_backward_pass(
        self,
        epoch: int,
        minibatch_id: int,
        minibatches_per_epoch: int,
        loss: Tensor,
        optimizer: Optimizer | None = None,
        return_loss_components: bool = False,
    ) -> Tensor | PolicyLoss:
        """After the forward pass: the loss to differentiate, each policy adding to the one before.

        A policy that weighs the loop's own loss comes first, wherever it stands in the schedule.

        Returns:
            The loss, or with `return_loss_components` a PolicyLoss with every part added.
        """
        components: list[LossComponent] = []
        for entry in sorted(self._active(epoch), key=lambda entry: not entry.policy.weighs_objective):
            ctx = self._context(entry, epoch, optimizer, minibatch_id, minibatches_per_epoch)
            policy_loss = entry.policy.before_backward_pass(ctx, loss)
            if policy_loss is not None:
                loss = policy_loss.overall_loss
                components.extend(policy_loss.loss_components)
        return PolicyLoss(loss, tuple(components)) if return_loss_components else loss

    def before_parameter_optimization(
        self, epoch: int, minibatch_id: int, minibatches_per_epoch: int, optimizer: Optimizer | None = None
    ) -> None:
        """After the backward pass: dense copies return, gradients are masked where asked."""
        for entry in self._active(epoch):
            entry.policy.before_parameter_optimization(
                self._context(entry, epoch, optimizer, minibatch_id, minibatches_per_epoch)
            )
        self.masks.before_optimizer_step()

    def on_minibatch_end(
        self, epoch: int, minibatch_id: int, minibatches_per_epoch: int, optimizer: Optimizer | None = None
    ) -> None:
        """After the optimizer's step: masks are applied, in epochs without policies too."""
        self.masks.apply_after_step()
        for entry in self._active(epoch):
            entry.policy.on_minibatch_end(
                self._context(entry, epoch, optimizer, minibatch_id, minibatches_per_epoch)
            )

    def on_epoch_end(
        self, epoch: int, optimizer: Optimizer | None = None, metrics: Mapping[str, float] | None = None
    ) -> None:
        """After validation: learning rates step, masks are kept or released.

        Args:
            metrics: `loss` (validation) and `top1` (percent), or `min` and `max` as in Distiller; needed
                by ReduceLROnPlateau.
        """
        metrics = {_DISTILLERS_METRICS.get(key, key): value for key, value in (metrics or {}).items()}
        for entry in self._active(epoch):
            entry.policy.on_epoch_end(self._context(entry, epoch, optimizer), metrics)
        self.masks.apply_after_step()

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Within the block masked weights are exactly zero: for evaluations and checkpoints."""
        with self.masks.applied():
            yield

    def mask_all_weights(self) -> None:
        """Apply every mask for good (Distiller's name)."""
        for name, param in named_parameters(self.model):
            self.masks[name].apply_mask(param)

    def pruning_is_complete(self, epoch: int) -> bool:
        """Whether every policy that prunes has reached the sparsity that it ends with."""
        return all(
            entry.policy.has_final_sparsity(self._context(entry, epoch, None)) for entry in self.policies
        )

    def idle_notes(self, start: int, end: int) -> list[str]:
        """What the policies will not do when epochs `start` to `end` (exclusive) are trained, a line each."""
        notes = []
        for entry in self.policies:
            window, epochs = entry.window, f"trained are epochs {start}..{end - 1}"
            if not window.acts_between(start, end):
                notes.append(
                    f"{entry.name}: does nothing, it acts in epochs {window.start}..{window.last} "
                    f"and {epochs}"
                )
            elif not entry.policy.has_final_sparsity(self._context(entry, end - 1, None)):
                notes.append(
                    f"{entry.name}: does not come to its final sparsity, which it has in epoch "
                    f"{window.last}; {epochs}"
                )
            if window.acts_between(start, end) and isinstance(entry.policy, PruningPolicy):
                at = max(start, window.start)
                ctx = replace(self._context(entry, start, None), model=self.outlook.model_at(at))
                small = entry.policy.never_pruned(ctx)
                if small:
                    notes.append(
                        f"{entry.name}: prunes nothing of {', '.join(small)}: too small for the sparsity "
                        "aimed at, not a single element or group of elements of it would go"
                    )
        return notes

    def describe(self, epoch: int, optimizer: Optimizer | None = None) -> list[str]:
        """One line a policy that is active in `epoch`: what it touches, and how."""
        active = self._active(epoch)
        model = self.outlook.model_at(epoch)
        contexts = [replace(self._context(entry, epoch, optimizer), model=model) for entry in active]
        return [
            f"{entry.name}: {entry.policy.describe(ctx)}" for entry, ctx in zip(active, contexts, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Masks and the policies' states, as plain data and tensors."""
        return {
            **self.masks.state_dict(),
            "policies": [
                {
                    "name": entry.name,
                    "settings": dict(entry.settings),
                    "epochs": [entry.window.start, entry.window.last, entry.window.frequency],
                    "state": entry.policy.state_dict(),
                }
                for entry in self.policies
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` left off. States without policies (masks only) are accepted.

        Raises:
            CheckpointError: the state is of another schedule (only its epochs may be others, which is
                logged as a warning), or its masks of another model.
        """
        require(state, Mapping, "load_state_dict: state", "a dict")
        if "masks" not in state:
            got = ", ".join(f"'{key}'" for key in state) or "an empty dict"
            raise CheckpointError(f"load_state_dict: needs 'masks', as state_dict() gives it, got {got}")
        policies = state.get("policies", [])
        require(policies, (list, tuple), "load_state_dict: policies", "a list")
        for index, entry in enumerate(policies):
            if not isinstance(entry, Mapping) or not {"name", "state"} <= entry.keys():
                raise CheckpointError(
                    f"load_state_dict: policies[{index}]: must be a dict with 'name' and 'state', "
                    f"got {type(entry).__name__}"
                )
        names = [entry["name"] for entry in policies]
        if names and names != [entry.name for entry in self.policies]:
            raise CheckpointError(
                f"the checkpoint was written under a schedule with policies {names}, "
                f"this one has {[entry.name for entry in self.policies]}; resume with the same schedule, "
                "or start anew from its weights with --exp-load-weights-from or --reset-optimizer"
            )
        for entry, saved in zip(self.policies, policies, strict=False):
            self._compare(entry, saved)
        self.masks.load_state_dict(state)
        for entry, saved in zip(self.policies, policies, strict=False):
            entry.policy.load_state_dict(saved["state"])

    def _compare(self, entry: ScheduledPolicy, saved: Mapping[str, Any]) -> None:
        """Refuse the state of a policy with other settings; warn where only the epochs are others."""
        before = saved.get("settings") or entry.settings
        for key in [*before, *(key for key in entry.settings if key not in before)]:
            was, now = (_shown(settings, key) for settings in (before, entry.settings))
            if entry.settings and was != now:
                raise CheckpointError(
                    f"'{entry.name}': the checkpoint was written with {key} {was}, the schedule has {now}; "
                    "resume with the same schedule, or start anew from its weights with "
                    "--exp-load-weights-from or --reset-optimizer"
                )
        epochs = [entry.window.start, entry.window.last, entry.window.frequency]
        if saved.get("epochs", epochs) != epochs:
            _LOG.warning(
                "'%s': the checkpoint was written with epochs %s..%s (every %s), the schedule has "
                "%s..%s (every %s); it goes on with the schedule's",
                entry.name, *saved["epochs"], *epochs,
            )  # fmt: skip

    def _active(self, epoch: int) -> list[ScheduledPolicy]:
        return [entry for entry in self.policies if epoch in entry.window.epochs]

    def _context(
        self,
        entry: ScheduledPolicy,
        epoch: int,
        optimizer: Optimizer | None,
        minibatch: int | None = None,
        minibatches_per_epoch: int | None = None,
    ) -> StepContext:
        policies = tuple(other.policy for other in self.policies)
        return StepContext(
            self.model, self.masks, optimizer, entry.window, epoch, minibatch, minibatches_per_epoch, policies
        )


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "no such setting"


def make_window(
    epochs: Sequence[int] | None = None,
    starting_epoch: int | None = None,
    ending_epoch: int | None = None,
    frequency: int = 1,
) -> EpochWindow:
    """The window of a list of epochs, or of a range and a frequency.

    Raises:
        DistillerError: both or neither given, or they make no window.
    """
    numbers = {"epochs": max(epochs or (0,)), "starting_epoch": starting_epoch, "ending_epoch": ending_epoch}
    for key, number in numbers.items():
        if number is not None and number > _LAST_EPOCH:
            raise DistillerError(f"'{key}' must be at most {_LAST_EPOCH:,}, got {number:,}")
    if epochs is not None:
        if starting_epoch is not None or ending_epoch is not None:
            raise DistillerError("both 'epochs' and 'starting_epoch'/'ending_epoch' given; give one")
        if frequency != 1:
            raise DistillerError(
                "'frequency' is for 'starting_epoch' and 'ending_epoch', got it with 'epochs'"
            )
        if not epochs or list(epochs) != sorted(set(epochs)) or epochs[0] < 0:
            raise DistillerError(f"'epochs' must be ascending epoch numbers from 0, got {list(epochs)}")
        return EpochWindow(tuple(epochs))
    if starting_epoch is None or ending_epoch is None:
        raise DistillerError("needs 'epochs', or 'starting_epoch' and 'ending_epoch'")
    if not 0 <= starting_epoch < ending_epoch:
        raise DistillerError(
            f"needs 0 <= starting_epoch < ending_epoch, got starting_epoch {starting_epoch} "
            f"and ending_epoch {ending_epoch}"
        )
    if not 0 < frequency <= ending_epoch - starting_epoch:
        raise DistillerError(
            f"'frequency' must be from 1 to ending_epoch - starting_epoch = {ending_epoch - starting_epoch}, "
            f"got {frequency}"
        )
    return EpochWindow.spanning(starting_epoch, ending_epoch, frequency)
