"""The compression scheduler: passes the training loop's callbacks on to the policies that are due.

Applies the masks, once a callback. Knows nothing about YAML, data or accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.errors import CheckpointError, DistillerError, PolicyConflictError
from distiller.interfaces import EpochWindow, LossComponent, Policy, PolicyLoss, StepContext
from distiller.masks import MaskStore, ParameterMasker, create_model_masks_dict
from distiller.names import named_modules, named_parameters
from distiller.policy import PruningPolicy

__all__ = ["CompressionScheduler", "ParameterMasker", "ScheduledPolicy", "create_model_masks_dict"]


@dataclass(frozen=True, slots=True)
class ScheduledPolicy:
    """A policy, the epochs it is active in, and the name it goes by in the schedule."""

    policy: Policy
    window: EpochWindow
    name: str


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
        self.model = model
        self.masks = MaskStore(model)
        self.policies: list[ScheduledPolicy] = []
        if zeros_mask_dict:
            tensors = {name: getattr(mask, "mask", mask) for name, mask in zeros_mask_dict.items()}
            self.masks.load_state_dict(
                {"masks": {name: mask for name, mask in tensors.items() if mask is not None}}
            )

    def add_policy(
        self,
        policy: Policy,
        epochs: Sequence[int] | None = None,
        starting_epoch: int | None = None,
        ending_epoch: int | None = None,
        frequency: int = 1,
        name: str | None = None,
    ) -> None:
        """Add a policy, active in `epochs` or from `starting_epoch` to `ending_epoch` (exclusive).

        Raises:
            DistillerError: the epochs are given twice, not at all, or make no window.
            PolicyConflictError: another pruner has one of its parameters in overlapping epochs.
            UnknownNameError: the policy names what the model does not have.
        """
        window = make_window(epochs, starting_epoch, ending_epoch, frequency)
        policy.check(
            [name for name, _ in named_parameters(self.model)],
            [name for name, _ in named_modules(self.model)],
        )
        entry = ScheduledPolicy(policy, window, name or type(policy).__name__)
        self._refuse_overlap(entry)
        self.policies.append(entry)

    @property
    def sched_metadata(self) -> dict[Policy, dict[str, int]]:
        """Distiller's view: first epoch, end (exclusive) and frequency by policy."""
        return {
            entry.policy: {
                "starting_epoch": entry.window.start,
                "ending_epoch": entry.window.last + 1,
                "frequency": entry.window.frequency,
            }
            for entry in self.policies
        }

    def on_epoch_begin(self, epoch: int, optimizer: Optimizer | None = None) -> None:
        """Before the first mini-batch: pruners compute masks."""
        self.masks.refresh()
        for entry in self._active(epoch):
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

        Returns:
            The loss, or with `return_loss_components` a PolicyLoss with every part added.
        """
        components: list[LossComponent] = []
        for entry in self._active(epoch):
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
            metrics: `loss` (validation) and `top1` (percent); needed by ReduceLROnPlateau.
        """
        for entry in self._active(epoch):
            entry.policy.on_epoch_end(self._context(entry, epoch, optimizer), metrics or {})
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
        """Whether every pruning policy has reached its last active epoch, i.e. its final sparsity."""
        return all(
            entry.window.last <= epoch for entry in self.policies if isinstance(entry.policy, PruningPolicy)
        )

    def describe(self, epoch: int, optimizer: Optimizer | None = None) -> list[str]:
        """One line a policy that is active in `epoch`: what it touches, and how."""
        return [
            f"{entry.name}: {entry.policy.describe(self._context(entry, epoch, optimizer))}"
            for entry in self._active(epoch)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Masks and the policies' states, as plain data and tensors."""
        return {
            **self.masks.state_dict(),
            "policies": [{"name": entry.name, "state": entry.policy.state_dict()} for entry in self.policies],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` left off. States without policies (masks only) are accepted.

        Raises:
            CheckpointError: the state is of another schedule, or its masks of another model.
        """
        policies = state.get("policies", [])
        names = [entry["name"] for entry in policies]
        if names and names != [entry.name for entry in self.policies]:
            raise CheckpointError(
                f"the checkpoint was written under a schedule with policies {names}, "
                f"this one has {[entry.name for entry in self.policies]}; resume with the same schedule, "
                "or start anew from its weights with --exp-load-weights-from or --reset-optimizer"
            )
        self.masks.load_state_dict(state)
        for entry, saved in zip(self.policies, policies, strict=False):
            entry.policy.load_state_dict(saved["state"])

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
        return StepContext(
            self.model, self.masks, optimizer, entry.window, epoch, minibatch, minibatches_per_epoch
        )

    def _refuse_overlap(self, new: ScheduledPolicy) -> None:
        if not isinstance(new.policy, PruningPolicy):
            return
        names = set(new.policy.selected(self.model))
        for old in self.policies:
            if not isinstance(old.policy, PruningPolicy):
                continue
            shared = names.intersection(old.policy.selected(self.model))
            if shared and old.window.start <= new.window.last and new.window.start <= old.window.last:
                more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
                raise PolicyConflictError(
                    f"'{old.name}' (epochs {old.window.start}..{old.window.last}) and '{new.name}' "
                    f"(epochs {new.window.start}..{new.window.last}) both prune '{min(shared)}'{more}; "
                    "let one end before the other begins"
                )


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
    if epochs is not None:
        if starting_epoch is not None or ending_epoch is not None:
            raise DistillerError("both 'epochs' and 'starting_epoch'/'ending_epoch' given; give one")
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
