"""What layers the model has in which epoch of a schedule, where a policy replaces some of them.

A policy is checked against the model of its epochs: the model itself, or a copy as it will be, or as it was
when a run is resumed. Of parameters that are replaced no policy acts on both sides.
Knows nothing about what layers are replaced by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from distiller.epoch_window import EpochWindow
from distiller.errors import PolicyConflictError, UnknownNameError
from distiller.interfaces import Policy
from distiller.layer_replacement import LayerReplacer
from distiller.names import named_parameters, unwrap
from distiller.policy import PruningPolicy, RegularizationPolicy

if TYPE_CHECKING:
    from distiller.scheduler import ScheduledPolicy

__all__ = ["StructureOutlook"]


class StructureOutlook:
    """The model in each epoch.

    Args:
        model: as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changes: list[tuple[int, LayerReplacer]] = []
        self._copies: dict[tuple[int, int], nn.Module] = {}

    def __bool__(self) -> bool:
        """Whether any layers are replaced."""
        return bool(self._changes)

    def add(self, policy: LayerReplacer, window: EpochWindow) -> None:
        """Take a policy into account; one that is known already is left as it is."""
        if all(known is not policy for _, known in self._changes):
            self._changes.append((policy.epoch_of_replacement(window), policy))
            self._changes.sort(key=lambda change: change[0])
            self._copies = {}

    def joined(self, other: StructureOutlook) -> StructureOutlook:
        """The policies of both, of the model of this one."""
        both = StructureOutlook(self._model)
        both._changes = sorted((*other._changes, *self._changes), key=lambda change: change[0])
        return both

    def model_at(self, epoch: int) -> nn.Module:
        """The model in an epoch, once the policies that replace layers have acted in it."""
        return self._after(sum(at <= epoch for at, _ in self._changes))

    def model_before(self, policy: LayerReplacer) -> nn.Module:
        """The model that a policy replaces layers of."""
        return self._after(next(i for i, (_, known) in enumerate(self._changes) if known is policy))

    def check(self, entry: ScheduledPolicy, others: Sequence[ScheduledPolicy] = ()) -> None:
        """See to it that a policy can act on the model of its epochs.

        Args:
            entry: the policy and its window.
            others: those that are scheduled already.

        Raises:
            DistillerError: what the policy finds wrong with the model.
            PolicyConflictError: one that does not replace layers acts on what another replaces.
        """
        policy, window = entry.policy, entry.window
        if isinstance(policy, LayerReplacer):
            self.add(policy, window)
        for own in (entry, *others) if isinstance(policy, LayerReplacer) else (entry,):
            self._refuse_spanning(own)
        self.check_model(policy, window)

    def check_model(self, policy: Policy, window: EpochWindow) -> None:
        """Let a policy check the model of its epochs.

        Raises:
            DistillerError: what the policy finds wrong with it.
        """
        if isinstance(policy, LayerReplacer):
            self.add(policy, window)
            if not policy.is_done(self._model):
                policy.check(self.model_before(policy))
            return
        for epoch in dict.fromkeys((window.start, *(at for at, _ in self._changes if at in _span(window)))):
            done = [(at, own) for at, own in self._changes if at <= epoch]
            try:
                policy.check(self.model_at(epoch))
            except UnknownNameError as error:
                if not done:
                    raise
                told = f" (of epoch {epoch}: '{_name(done[-1][1])}' replaces layers in epoch {done[-1][0]})"
                raise UnknownNameError(
                    f"{error}{told}", faults={name: text + told for name, text in error.faults.items()}
                ) from error

    def _refuse_spanning(self, entry: ScheduledPolicy) -> None:
        """See to it that a policy acts on the same parameters before and after layers are replaced.

        Raises:
            PolicyConflictError: it does not; names what is replaced, and by what.
        """
        if isinstance(entry.policy, LayerReplacer):
            return
        for at, replacer in self._changes:
            if not entry.window.start < at <= entry.window.last:
                continue
            before, after = (
                _shapes(entry.policy, model) for model in (self.model_at(at - 1), self.model_at(at))
            )
            gone = [name for name in before if before[name] != after.get(name)]
            if gone or before != after:
                first = (gone or [name for name in after if name not in before])[0]
                raise PolicyConflictError(
                    f"'{entry.name}' (epochs {entry.window.start}..{entry.window.last}) acts on '{first}', "
                    f"and '{_name(replacer)}' replaces layers in epoch {at}; let it end before epoch {at}, "
                    "and give what comes after a policy of its own, which names the new parameters"
                )

    def _after(self, count: int) -> nn.Module:
        """The model after so many of the changes."""
        done = 0
        while done < len(self._changes) and self._changes[done][1].is_done(self._model):
            done += 1
        if count == done:
            return self._model
        if (done, count) not in self._copies:
            self._copies[done, count] = self._copy(done, count)
        return self._copies[done, count]

    def _copy(self, done: int, count: int) -> nn.Module:
        model = self._model
        for _, policy in self._changes[done:count]:
            model = policy.foreseen(model)
            model.is_foreseen = True  # type: ignore[assignment]
        for _, policy in reversed(self._changes[count:done]):
            model = policy.recalled(model)
        return model


def selected(policy: Policy, model: nn.Module) -> tuple[str, ...]:
    """Canonical names of the parameters that a policy acts on, or keeps something of.

    Raises:
        UnknownNameError: it names what the model does not have.
    """
    if isinstance(policy, RegularizationPolicy):
        return policy.regularizer.select([name for name, _ in named_parameters(model)])
    if isinstance(policy, PruningPolicy):
        return policy.selected(model)
    return policy.acts_on(model)


def _name(policy: LayerReplacer) -> str:
    return getattr(policy, "name", type(policy).__name__)


def _span(window: EpochWindow) -> range:
    return range(window.start + 1, window.last + 1)


def _shapes(policy: Policy, model: nn.Module) -> dict[str, tuple[int, ...]]:
    params = dict(named_parameters(unwrap(model)))
    try:
        names = selected(policy, model)
    except UnknownNameError:
        names = ()
    return {name: tuple(params[name].shape) for name in names}
