"""Which policies cannot go together: seen when one is added, not when training has come to it.

    two pruners     | one parameter, in overlapping epochs: each would put its masks over the other's
    one that gates  | and one that masks a parameter in the forward pass only (`ForwardActs`)
    one extension   | twice, in overlapping epochs: it would be called twice at every step
    two that weigh  | the loss of the training loop, in overlapping epochs: one would weigh the other's
    two that share  | the values of one parameter, in overlapping epochs: each would overwrite or draw away
                    | what the other does; but mixtures and what quantizes to them belong together, in
                    | this order

Knows nothing about YAML, or how masks and gates act.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from torch import nn

from distiller.errors import PolicyConflictError
from distiller.interfaces import Policy
from distiller.policy import PruningPolicy
from distiller.weight_sharing import KMeansWeightSharing, QuantizeToMixture, SoftWeightSharing

if TYPE_CHECKING:
    from distiller.scheduler import ScheduledPolicy

__all__ = ["refuse_conflicts"]


def refuse_conflicts(
    new: ScheduledPolicy,
    others: Sequence[ScheduledPolicy],
    model_of: Callable[[ScheduledPolicy], nn.Module],
) -> None:
    """See to it that a policy can go together with others.

    Args:
        new: the policy.
        others: those that are there already.
        model_of: the model that a policy acts on.

    Raises:
        PolicyConflictError: it cannot; names both, with their epochs.
    """
    for old in others:
        if _overlap(old, new):
            if old.policy is new.policy:
                raise PolicyConflictError(
                    f"{_shown(new)} is in another policy of overlapping epochs {_epochs(old)} already, and "
                    "would be called twice at every step; keep one, or make a second instance of it"
                )
            if old.policy.weighs_objective and new.policy.weighs_objective:
                raise PolicyConflictError(
                    f"{_shown(old)} and {_shown(new)} both weigh the loss of the labels; let one end before "
                    "the other begins, or make one of them (a distillation may have several teachers)"
                )
            _refuse_two_pruners(old, new, model_of)
            _refuse_two_sharing(old, new, model_of, [entry.policy for entry in (*others, new)])
        _refuse_quantizing_unlearned(old, new, model_of, [entry.policy for entry in (*others, new)])
        _refuse_gating(old, new, model_of)
        _refuse_gating(new, old, model_of)


def _refuse_two_pruners(
    old: ScheduledPolicy, new: ScheduledPolicy, model_of: Callable[[ScheduledPolicy], nn.Module]
) -> None:
    if not isinstance(old.policy, PruningPolicy) or not isinstance(new.policy, PruningPolicy):
        return
    shared = set(new.policy.selected(model_of(new))).intersection(old.policy.selected(model_of(old)))
    if shared:
        raise PolicyConflictError(
            f"{_shown(old)} and {_shown(new)} both prune {_some(shared)}; let one end before the other begins"
        )


def _refuse_two_sharing(
    old: ScheduledPolicy,
    new: ScheduledPolicy,
    model_of: Callable[[ScheduledPolicy], nn.Module],
    policies: Sequence[Policy],
) -> None:
    if {type(old.policy), type(new.policy)} == {SoftWeightSharing, QuantizeToMixture}:
        return
    ours, theirs = (_sharing(entry.policy, model_of(entry), policies) for entry in (new, old))
    if shared := ours & theirs:
        raise PolicyConflictError(
            f"{_shown(old)} and {_shown(new)} both share the values of {_some(shared)}; let one end before "
            "the other begins, or name other weights"
        )


def _refuse_quantizing_unlearned(
    old: ScheduledPolicy,
    new: ScheduledPolicy,
    model_of: Callable[[ScheduledPolicy], nn.Module],
    policies: Sequence[Policy],
) -> None:
    """A mixture has to be learned before weights are quantized to it."""
    for learner, quantizer in ((old, new), (new, old)):
        if not isinstance(learner.policy, SoftWeightSharing):
            continue
        if not isinstance(quantizer.policy, QuantizeToMixture):
            continue
        learned, quantized = (
            _sharing(entry.policy, model_of(entry), policies) for entry in (learner, quantizer)
        )
        if learner.window.start >= quantizer.window.start and learned & quantized:
            raise PolicyConflictError(
                f"{_shown(quantizer)} quantizes {_some(learned & quantized)} to the mixture that "
                f"{_shown(learner)} has not begun to learn; let the mixture begin in an earlier epoch"
            )


def _sharing(policy: Policy, model: nn.Module, policies: Sequence[Policy]) -> set[str]:
    """The parameters whose elements a policy gives, or draws to, values in common."""
    if isinstance(policy, QuantizeToMixture):
        return set(policy.chosen(model, policies))
    is_sharing = isinstance(policy, KMeansWeightSharing | SoftWeightSharing)
    return set(policy.acts_on(model)) if is_sharing else set()


def _refuse_gating(
    gating: ScheduledPolicy, masking: ScheduledPolicy, model_of: Callable[[ScheduledPolicy], nn.Module]
) -> None:
    acts = masking.policy.forward_acts(model_of(masking))
    shared = gating.policy.forward_acts(model_of(gating)).gates & acts.masks
    if not shared:
        return
    if _overlap(gating, masking):
        raise PolicyConflictError(
            f"{_shown(gating)} gates {_some(shared)}, which {_shown(masking)} masks in the forward pass "
            "only; let one end before the other begins"
        )
    if acts.ended_by and masking.window.last < gating.window.start:
        raise PolicyConflictError(
            f"{_shown(gating)} gates {_some(shared)}, which {_shown(masking)} goes on masking in the forward "
            f"pass only; let it end that with args: {{{acts.ended_by}: true}}"
        )


def _overlap(one: ScheduledPolicy, other: ScheduledPolicy) -> bool:
    return one.window.start <= other.window.last and other.window.start <= one.window.last


def _shown(entry: ScheduledPolicy) -> str:
    return f"'{entry.name}' {_epochs(entry)}"


def _epochs(entry: ScheduledPolicy) -> str:
    return f"(epochs {entry.window.start}..{entry.window.last})"


def _some(names: Collection[str]) -> str:
    return f"'{min(names)}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
