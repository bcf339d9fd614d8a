"""Trying thinning on a copy of a model: which channel groups can really be removed from, and what changes.

What a graph does not tell: a layer that cannot be made smaller, and code of the model's own that has a number
of channels in it. Both show when a copy that has lost one unit of every group is run.
Knows nothing about which units are worth removing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.channel_groups import ChannelGroup, ChannelGroups, find_channel_groups
from distiller.dummy_input import forward_arguments, get_dummy_input
from distiller.errors import DistillerError, UsageError, first_line, users_code
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.graph import input_shape_of
from distiller.names import named_parameters, unwrap
from distiller.observation import unobserved
from distiller.thinning.removal import apply_recipe, thinning_recipe

SAME_ANSWER = 1e-4
"""Outputs that differ by less, relative to their scale, are the same but for rounding."""


def removable_groups(model: nn.Module, dummy_input: Any, purpose: str) -> ChannelGroups:
    """The channel groups of a model, of which those that thinning would fail on have a `reason`.

    A copy of the model loses one unit of every group, runs, and is compared with a copy in which that unit is
    at zero; where it fails, the groups that it fails on are found by halving. Where the model as it is can
    be run in training mode, the smaller one has to run in that mode too: auxiliary classifiers, say.

    Args:
        model: the model, or a wrapper around it; stays as it is.
        dummy_input: a tensor, or a tuple of the model's positional arguments, on any device.
        purpose: what the groups are for, named in errors.

    Raises:
        GraphTraceError: `torch.export` cannot trace the model.
        UsageError: the model cannot be copied, or does not run.
    """
    bare = unwrap(model)
    with unobserved(bare):
        return _removable_groups(bare, dummy_input, purpose)


def _removable_groups(bare: nn.Module, dummy_input: Any, purpose: str) -> ChannelGroups:
    groups = find_channel_groups(bare, dummy_input, purpose)
    trial = _Trial(bare, groups, forward_arguments(bare, dummy_input), purpose)
    several = [group for group in groups.removable() if group.size > 1]
    reasons: dict[str, str] = {}
    _fit(trial, [group.name for group in several], [], reasons)
    for group in groups.removable():
        if group.size == 1:  # with another of the kind it may be all that a tensor has
            _fit(trial, [group.name], [], reasons)
    return replace(
        groups,
        groups=tuple(replace(group, reason=reasons.get(group.name, group.reason)) for group in groups),
    )


def model_groups(model: nn.Module, purpose: str) -> ChannelGroups:
    """The `removable_groups` of a model that says what its input is like: `input_shape`, as (1, 3, 32, 32).

    The groups are kept with the model, and found anew when the model's modules or shapes have changed.

    Args:
        model: the model, or a wrapper around it; the attribute may be on either.
        purpose: what the groups are for, named in the errors.

    Raises:
        DistillerError: there is no `input_shape`, or as `removable_groups`.
    """
    bare = unwrap(model)
    shape = input_shape_of(model, purpose)
    tensors = (*bare.named_parameters(), *bare.named_buffers())
    made_of = (
        repr(shape),
        {name: tuple(tensor.shape) for name, tensor in tensors},
        {name: type(module) for name, module in bare.named_modules()},
    )
    kept = _GROUPS.get(bare)
    if kept is None or kept[0] != made_of:
        dtype = next((param.dtype for param in bare.parameters()), None)
        with _own_random_numbers(bare):
            inputs = pytree.tree_map(lambda x: x.to(dtype), get_dummy_input(input_shape=shape))
        kept = _GROUPS[bare] = (made_of, removable_groups(bare, inputs, purpose))
    return kept[1]


def copied(model: nn.Module, purpose: str) -> nn.Module:
    """A copy of a model, which nobody watches.

    Args:
        model: the model.
        purpose: what the copy is for, named in the error.

    Raises:
        UsageError: it cannot be copied.
    """
    with unobserved(model), users_code(f"{purpose}: the model cannot be copied", _UNCOPYABLE):
        return copy.deepcopy(model)


def measured_change(masked_model: nn.Module, thinned_model: nn.Module, inputs: Any) -> float:
    """How far the outputs of a thinned model are from those of the masked one.

        max |thinned - masked| / max |masked|, the largest of all tensors that the model returns

    Both run in evaluation mode and stay as they are.

    Args:
        masked_model: the model, or a wrapper around it.
        thinned_model: likewise.
        inputs: a tensor, or a tuple of the positional arguments of both.

    Returns:
        At least 0; infinite when the outputs are of different number or shape, or when one is not a number
        where the other is.

    Raises:
        UsageError: a model returns no tensor.
    """
    outputs = [_outputs(model, forward_arguments(model, inputs)) for model in (masked_model, thinned_model)]
    return _relative_change(*outputs)


_UNCOPYABLE = (
    "; thinning is tried on a copy first: take off what computes weights, as torch.nn.utils.weight_norm does "
    "(remove_weight_norm)"
)
_GROUPS: WeakKeyDictionary[nn.Module, tuple[Any, ChannelGroups]] = WeakKeyDictionary()


@dataclass(slots=True)
class _Trial:
    """Removes a unit of some groups from a copy."""

    model: nn.Module
    groups: ChannelGroups
    arguments: tuple[Any, ...]
    purpose: str
    _trains: bool | None = None

    def failure(self, names: Sequence[str]) -> str | None:
        """Why the first unit of each of these groups cannot be removed; None when it can."""
        removed = dict.fromkeys(names, (0,))
        try:
            recipe = thinning_recipe(self.model, self.groups, removed)
        except DistillerError as error:
            return first_line(error)
        smaller = copied(self.model, self.purpose)
        with users_code(f"{self.purpose}: the model"):
            _make_constants_tell(smaller)
            _mask(smaller, [self.groups[name] for name in names])
            expected = _outputs(smaller, self.arguments)
        apply_recipe(smaller, recipe)
        try:
            change = _relative_change(expected, _outputs(smaller, self.arguments))
            if self._can_train():
                _train_forward(smaller, self.arguments)
        except Exception as error:  # of the model's own code: whatever it is, it is the reason
            kind = "" if isinstance(error, DistillerError) else f"{type(error).__name__}: "
            return f"the model does not run without it: {kind}{first_line(error)}"
        if change > max(
            SAME_ANSWER, *(32 * torch.finfo(x.dtype).eps for x in expected if x.is_floating_point())
        ):
            return (
                "the model's code has the number of its channels in it: without one of them outputs are "
                f"{change:.2g} of their scale from those with it at zero"
            )
        return None

    def _can_train(self) -> bool:
        """Whether the model as it is runs in training mode on these inputs."""
        if self._trains is None:
            try:
                _train_forward(copy.deepcopy(self.model), self.arguments)
                self._trains = True
            except Exception:  # inputs too small for a part that only training has, say: not for us to judge
                self._trains = False
        return self._trains


def _fit(trial: _Trial, names: Sequence[str], fitting: Sequence[str], reasons: dict[str, str]) -> list[str]:
    """`fitting` and those of `names` that can be removed with them; the reasons of the others are added."""
    failure = trial.failure([*fitting, *names]) if names else None
    if failure is None:
        return [*fitting, *names]
    if len(names) == 1:
        reasons[names[0]] = failure
        return [*fitting]
    half = len(names) // 2
    return _fit(trial, names[half:], _fit(trial, names[:half], fitting, reasons), reasons)


def _mask(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Put the first unit of each group at zero, in all parameters."""
    params = dict(named_parameters(model))
    with torch.no_grad():
        for member in (member for group in groups for member in group.members):
            param = params.get(member.name)
            if param is not None:
                param.index_fill_(member.dim, torch.tensor(member.of((0,)), device=param.device), 0)


def _make_constants_tell(model: nn.Module) -> None:
    """Weights that are all the same, as the zeros of an untrained classifier, hide what lies before them."""
    with torch.no_grad(), _own_random_numbers(model):
        for param in model.parameters():
            if param.dim() > 1 and param.numel() > 1 and param.is_floating_point():
                first = param.flatten()[0]
                if bool((param == first).all()):
                    param.copy_(first + torch.rand(param.shape).sub_(0.5))


def _outputs(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a model returns in evaluation mode."""
    with unobserved(model), evaluating(model), buffers_kept(model):
        leaves = pytree.tree_leaves(model(*arguments))
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise UsageError(f"{type(unwrap(model)).__name__}: returns no tensor, so nothing can be compared")
    return tensors


def _train_forward(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Run a model, which may change, in training mode, on two samples for each: batch norms want several."""
    model.train()
    twice = pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.dim() else x, arguments)
    with torch.no_grad(), _own_random_numbers(model):
        model(*twice)


def _relative_change(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return float("inf")
    changes = [0.0]
    for a, b in zip(expected, found, strict=True):
        a, b = a.to("cpu", torch.float64), b.to("cpu", torch.float64)
        is_same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(is_same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
        scale = float(a[a.isfinite()].abs().amax()) if bool(a.isfinite().any()) else 0.0
        largest = float(difference.amax()) if difference.numel() else 0.0
        changes.append(largest / scale if scale > 0 else float("inf") if largest > 0 else 0.0)
    return max(changes)


@contextmanager
def _own_random_numbers(model: nn.Module) -> Iterator[None]:
    """Random numbers are the same each time within, and stay as they were outside."""
    with torch.random.fork_rng(devices={p.device for p in model.parameters() if p.device.type == "cuda"}):
        torch.default_generator.manual_seed(0)
        yield
