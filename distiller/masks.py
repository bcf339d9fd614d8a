"""Masks by parameter: who set them, when they are applied, and the dense copies behind them.

One entry per canonical parameter name. An entry's mask is the product of the masks in
its slots: one slot for the pruner that owns the parameter, one for each regularizer. Each
slot has rules of its own, how its mask acts on a step.
Masks are applied with `torch._foreach_*` over the masked parameters only.
Knows nothing about epochs, policies or how a mask is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import CheckpointError
from distiller.names import named_parameters
from distiller.tensor_cuts import Kept, TensorCuts, cut

PRUNER_SLOT = "pruner"


@dataclass(frozen=True, slots=True)
class MaskRules:
    """How the mask in one slot of a parameter acts on a training step (Distiller's policy arguments).

    Attributes:
        forward_only: the mask acts on the forward and backward pass, not after the optimizer's step;
            pruned weights go on being trained, and are zero at every evaluation all the same.
        double_copies: the dense weights are kept aside and updated by the optimizer.
        mask_gradients: gradients are masked too.
        passing: the mask lasts one mini-batch, and another comes then; nothing is pruned for good by it.
    """

    forward_only: bool = False
    double_copies: bool = False
    mask_gradients: bool = False
    passing: bool = False


PLAIN_RULES = MaskRules()


class ParameterMasker:
    """The masks of one parameter; 1 keeps an element, 0 prunes it."""

    def __init__(self, param_name: str) -> None:
        self.param_name = param_name
        self.slots: dict[str, Tensor] = {}
        self.rules_of: dict[str, MaskRules] = {}
        self.dense: Tensor | None = None
        self.is_dirty = False
        self._products: dict[str, Tensor | None] = {}
        self._rules: MaskRules | None = None

    @property
    def mask(self) -> Tensor | None:
        """The product of all slots, shape of the parameter; None when nothing is masked."""
        return self._product("all", lambda rules: True)

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self.put(PRUNER_SLOT, mask)

    @property
    def lasting_mask(self) -> Tensor | None:
        """The product of the slots that act after the optimizer's step too."""
        return self._product("lasting", lambda rules: not rules.forward_only)

    @property
    def pruning_mask(self) -> Tensor | None:
        """The product of the slots that last longer than one mini-batch."""
        return self._product("pruning", lambda rules: not rules.passing)

    @property
    def gradient_mask(self) -> Tensor | None:
        """The product of the slots that mask gradients."""
        return self._product("gradient", lambda rules: rules.mask_gradients)

    @property
    def rules(self) -> MaskRules:
        """What any of the slots asks for."""
        if self._rules is None:
            each = [astuple(rules) for rules in self.rules_of.values()]
            self._rules = MaskRules(*map(any, zip(*each, strict=True)))
        return self._rules

    def put(self, slot: str, mask: Tensor | None, rules: MaskRules | None = None) -> None:
        """Replace the mask of one slot, and with `rules` how it acts; None empties the slot."""
        if mask is None:
            self.slots.pop(slot, None)
            self.rules_of.pop(slot, None)
        else:
            self.slots[slot] = mask
            self.rules_of[slot] = rules or self.rules_of.get(slot, PLAIN_RULES)
        self._products, self._rules = {}, None
        self.is_dirty = True

    def apply_mask(self, param: Tensor) -> Tensor:
        """Multiply `param` by the mask in place and return it."""
        if self.mask is not None:
            with torch.no_grad():
                param.mul_(self.mask)
        return param

    def follow_thinning(self, kept: Kept) -> None:
        """The parameter became smaller: its masks and dense copy become so, too."""
        for slot, mask in self.slots.items():
            self.put(slot, cut(mask, kept))
        if self.dense is not None:
            self.dense = cut(self.dense, kept)

    def _product(self, key: str, is_in: Callable[[MaskRules], bool]) -> Tensor | None:
        if key not in self._products:
            masks = [mask for slot, mask in self.slots.items() if is_in(self.rules_of[slot])]
            self._products[key] = math.prod(masks[1:], start=masks[0]) if masks else None
        return self._products[key]


class MaskStore(Mapping[str, ParameterMasker]):
    """The masks of a model by canonical parameter name."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._params: dict[str, nn.Parameter] | None = None
        self._maskers = {name: ParameterMasker(name) for name, _ in named_parameters(model)}

    def __getitem__(self, name: str) -> ParameterMasker:
        return self._maskers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._maskers)

    def __len__(self) -> int:
        return len(self._maskers)

    def refresh(self) -> None:
        """Forget which tensors the parameters were; to be called when the model may have changed."""
        self._params = None

    @property
    def params(self) -> Mapping[str, nn.Parameter]:
        """The model's parameters by canonical name; walking the model once, not in each step."""
        if self._params is None:
            self._params = dict(named_parameters(self._model))
        return self._params

    def masked(self) -> dict[str, Tensor]:
        """The masks in force, by parameter name."""
        return {name: entry.mask for name, entry in self._maskers.items() if entry.mask is not None}

    def put(
        self, name: str, mask: Tensor | None, slot: str = PRUNER_SLOT, rules: MaskRules | None = None
    ) -> None:
        """Set the mask of one slot of one parameter, and with `rules` how it acts."""
        self._maskers[name].put(slot, mask, rules)

    def apply_before_forward(self) -> None:
        """Mask what the optimizer or a new mask left unmasked; keep dense copies where asked."""
        due = []
        for param, entry in self._entries_with_mask():
            rules = entry.rules
            if rules.double_copies:
                entry.dense = param.detach().clone()
            if entry.is_dirty or rules.forward_only or rules.double_copies:
                due.append((param.data, entry))
        _multiply([(data, entry.mask) for data, entry in due])
        for _, entry in due:
            entry.is_dirty = False

    def before_optimizer_step(self) -> None:
        """Put dense copies back, and mask the gradients where asked."""
        entries = self._entries_with_mask()
        _multiply([(param.grad, entry.gradient_mask) for param, entry in entries if param.grad is not None])
        for param, entry in entries:
            if entry.dense is not None:
                param.data.copy_(entry.dense)
                entry.dense = None

    def apply_after_step(self) -> None:
        """Mask what the optimizer changed, except by masks that act on the forward pass only."""
        entries = self._entries_with_mask()
        _multiply([(param.data, entry.lasting_mask) for param, entry in entries])
        for _, entry in entries:
            entry.is_dirty = entry.is_dirty and entry.rules.forward_only

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block every masked weight is exactly zero; dense weights return afterwards."""
        entries = self._entries_with_mask()
        outermost = [
            (param, entry) for param, entry in entries if entry.rules.forward_only and entry.dense is None
        ]
        for param, entry in outermost:
            entry.dense = param.detach().clone()
        _multiply([(param.data, entry.mask) for param, entry in entries])
        try:
            yield
        finally:
            for param, entry in outermost:
                if entry.dense is not None:
                    param.data.copy_(entry.dense)
                    entry.dense = None

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Parameters became smaller: masks and dense copies become so, too."""
        for name, kept in cuts.items():
            if name in self._maskers:
                self._maskers[name].follow_thinning(kept)

    def follow_replacement(self, before: Mapping[str, nn.Parameter]) -> None:
        """Layers were replaced: masks of parameters that are gone end; those that stay may have other names.

        Args:
            before: the model's parameters by canonical name, as they were.
        """
        entries = {id(before[name]): entry for name, entry in self._maskers.items()}
        self._maskers = {}
        for name, param in named_parameters(self._model):
            self._maskers[name] = entries.get(id(param)) or ParameterMasker(name)
            self._maskers[name].param_name = name
        self.refresh()

    def state_dict(self) -> dict[str, Any]:
        """Masks (bool where they are 0/1) and rules by parameter and slot, and dense copies kept aside."""
        entries = {name: entry for name, entry in self._maskers.items() if entry.slots}
        return {
            "masks": {
                name: {slot: _compact(mask) for slot, mask in entry.slots.items()}
                for name, entry in entries.items()
            },
            "rules": {
                name: {slot: asdict(rules) for slot, rules in entry.rules_of.items()}
                for name, entry in entries.items()
            },
            "dense": {name: entry.dense.cpu() for name, entry in entries.items() if entry.dense is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take masks over, and put dense copies back into the model: all of them, or nothing.

        Args:
            state: as `state_dict` returns; a mask may also stand without its slot (the pruner's), and
                rules without theirs (then they are those of every slot).

        Raises:
            CheckpointError: as `check_state`.
        """
        self.check_state(state)
        params, rules = dict(named_parameters(self._model)), state.get("rules", {})
        for name, slots in state.get("masks", {}).items():
            for slot, mask in _by_slot(slots).items():
                rule = rules.get(name, {})
                rule = rule if _is_one_rule(rule) else rule.get(slot, {})
                self.put(name, mask.to(params[name]), slot, MaskRules(**rule))
        for name, dense in state.get("dense", {}).items():
            params[name].data.copy_(dense)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """See to it that a state can be loaded; changes nothing.

        Raises:
            CheckpointError: naming the place in the state where it is not of this model, or malformed.
        """
        params = dict(named_parameters(self._model))
        for name, slots in _part(state, "masks").items():
            for slot, mask in _by_slot(slots).items():
                _check_like(mask, params.get(name), f"masks['{name}']['{slot}']")
                if not bool(((mask >= 0) & mask.isfinite()).all()):
                    raise CheckpointError(f"masks['{name}']['{slot}']: must not be negative, NaN or infinite")
        for name, dense in _part(state, "dense").items():
            _check_like(dense, params.get(name), f"dense['{name}']")
        known = [field.name for field in fields(MaskRules)]
        for name, rules in _part(state, "rules").items():
            if name not in params:
                raise CheckpointError(f"rules['{name}']: the model has no such parameter")
            for rule in [rules] if _is_one_rule(rules) else rules.values():
                if not isinstance(rule, Mapping) or any(
                    key not in known or not isinstance(value, bool) for key, value in rule.items()
                ):
                    raise CheckpointError(
                        f"rules['{name}']: must have true or false for {', '.join(known)}, got {rules!r}"
                    )

    def _entries_with_mask(self) -> list[tuple[nn.Parameter, ParameterMasker]]:
        params = self.params
        return [(params[name], entry) for name, entry in self._maskers.items() if entry.slots]


def create_model_masks_dict(model: nn.Module) -> dict[str, ParameterMasker]:
    """An empty `ParameterMasker` for each parameter of the model, by canonical name."""
    return {name: ParameterMasker(name) for name, _ in named_parameters(model)}


def _multiply(pairs: list[tuple[Tensor, Tensor | None]]) -> None:
    """Each tensor times its mask, where there is one, in place and in one sweep."""
    masked = [(tensor, mask) for tensor, mask in pairs if mask is not None]
    if masked:
        with torch.no_grad():
            torch._foreach_mul_([tensor for tensor, _ in masked], [mask for _, mask in masked])


def _part(state: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = state.get(key, {}) if isinstance(state, Mapping) else None
    if not isinstance(part, Mapping):
        raise CheckpointError(f"{key}: must be by parameter name, got {type(part).__name__}")
    return part


def _is_one_rule(rules: Any) -> bool:
    """Whether rules stand without a slot."""
    return not isinstance(rules, Mapping) or not all(isinstance(rule, Mapping) for rule in rules.values())


def _by_slot(slots: Any) -> Mapping[str, Any]:
    return slots if isinstance(slots, Mapping) else {PRUNER_SLOT: slots}


def _check_like(tensor: Any, param: Tensor | None, where: str) -> None:
    if param is None:
        raise CheckpointError(f"{where}: the model has no such parameter")
    if not isinstance(tensor, Tensor) or tensor.is_complex() or tensor.shape != param.shape:
        got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CheckpointError(
            f"{where}: must be a real tensor of the parameter's shape {tuple(param.shape)}, got {got}"
        )


def _compact(mask: Tensor) -> Tensor:
    kept = mask != 0
    return (kept if torch.equal(mask, kept.to(mask.dtype)) else mask).cpu()
