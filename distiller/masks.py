"""Masks by parameter: who set them, when they are applied, and the dense copies behind them.

One entry per canonical parameter name. An entry's mask is the product of the masks in
its slots: one slot for the pruner that owns the parameter, one for each regularizer.
Masks are applied with `torch._foreach_*` over the masked parameters only.
Knows nothing about epochs, policies or how a mask is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import CheckpointError
from distiller.names import named_parameters
from distiller.tensor_cuts import TensorCuts, cut

PRUNER_SLOT = "pruner"


@dataclass(frozen=True, slots=True)
class MaskRules:
    """How the mask of one parameter acts on a training step (Distiller's policy arguments).

    Attributes:
        forward_only: the mask acts on the forward and backward pass, not after the optimizer's step;
            pruned weights go on being trained, and are zero at every evaluation all the same.
        double_copies: the dense weights are kept aside and updated by the optimizer.
        mask_gradients: gradients are masked too.
    """

    forward_only: bool = False
    double_copies: bool = False
    mask_gradients: bool = False


PLAIN_RULES = MaskRules()


class ParameterMasker:
    """The masks of one parameter; 1 keeps an element, 0 prunes it."""

    def __init__(self, param_name: str) -> None:
        self.param_name = param_name
        self.slots: dict[str, Tensor] = {}
        self.rules = PLAIN_RULES
        self.dense: Tensor | None = None
        self.is_dirty = False
        self._product: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """The product of all slots, shape of the parameter; None when nothing is masked."""
        if self._product is None and self.slots:
            product, *others = self.slots.values()
            for other in others:
                product = product * other
            self._product = product
        return self._product

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self.put(PRUNER_SLOT, mask)

    def put(self, slot: str, mask: Tensor | None) -> None:
        """Replace the mask of one slot; None empties it."""
        if mask is None:
            self.slots.pop(slot, None)
        else:
            self.slots[slot] = mask
        self._product = None
        self.is_dirty = True

    def apply_mask(self, param: Tensor) -> Tensor:
        """Multiply `param` by the mask in place and return it."""
        if self.mask is not None:
            with torch.no_grad():
                param.mul_(self.mask)
        return param


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
        entry = self._maskers[name]
        entry.put(slot, mask)
        if rules is not None:
            entry.rules = rules

    def apply_before_forward(self) -> None:
        """Mask what the optimizer or a new mask left unmasked; keep dense copies where asked."""
        due = [
            (param, entry)
            for param, entry in self._entries_with_mask()
            if entry.is_dirty or entry.rules.forward_only or entry.rules.double_copies
        ]
        for param, entry in due:
            if entry.rules.double_copies:
                entry.dense = param.detach().clone()
        _multiply([(param.data, entry) for param, entry in due])

    def before_optimizer_step(self) -> None:
        """Put dense copies back, and mask the gradients where asked."""
        entries = self._entries_with_mask()
        _multiply(
            [
                (param.grad, entry)
                for param, entry in entries
                if entry.rules.mask_gradients and param.grad is not None
            ]
        )
        for param, entry in entries:
            if entry.dense is not None:
                param.data.copy_(entry.dense)
                entry.dense = None

    def apply_after_step(self) -> None:
        """Mask what the optimizer changed, except where the mask acts on the forward pass only."""
        _multiply(
            [
                (param.data, entry)
                for param, entry in self._entries_with_mask()
                if not entry.rules.forward_only
            ]
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block every masked weight is exactly zero; dense weights return afterwards."""
        entries = self._entries_with_mask()
        outermost = [
            (param, entry) for param, entry in entries if entry.rules.forward_only and entry.dense is None
        ]
        for param, entry in outermost:
            entry.dense = param.detach().clone()
        _multiply([(param.data, entry) for param, entry in entries])
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
            entry = self._maskers.get(name)
            if entry is not None:
                for slot, mask in entry.slots.items():
                    entry.put(slot, cut(mask, kept))
                if entry.dense is not None:
                    entry.dense = cut(entry.dense, kept)

    def state_dict(self) -> dict[str, Any]:
        """Masks by parameter and slot (bool where they are 0/1), rules, and dense copies kept aside."""
        entries = {name: entry for name, entry in self._maskers.items() if entry.slots}
        return {
            "masks": {
                name: {slot: _compact(mask) for slot, mask in entry.slots.items()}
                for name, entry in entries.items()
            },
            "rules": {
                name: {
                    "forward_only": entry.rules.forward_only,
                    "double_copies": entry.rules.double_copies,
                    "mask_gradients": entry.rules.mask_gradients,
                }
                for name, entry in entries.items()
            },
            "dense": {name: entry.dense.cpu() for name, entry in entries.items() if entry.dense is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take masks over, and put dense copies back into the model: all of them, or nothing.

        Args:
            state: as `state_dict` returns; a mask may also stand without its slot (the pruner's).

        Raises:
            CheckpointError: as `check_state`.
        """
        self.check_state(state)
        params, rules = dict(named_parameters(self._model)), state.get("rules", {})
        for name, slots in state.get("masks", {}).items():
            for slot, mask in _by_slot(slots).items():
                self.put(name, mask.to(params[name]), slot, MaskRules(**rules.get(name, {})))
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
            if not isinstance(rules, Mapping) or any(
                key not in known or not isinstance(rule, bool) for key, rule in rules.items()
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


def _multiply(pairs: list[tuple[Tensor, ParameterMasker]]) -> None:
    """Each tensor times its masker's mask, in place and in one sweep."""
    tensors = [tensor for tensor, _ in pairs]
    masks = [entry.mask for _, entry in pairs if entry.mask is not None]
    assert len(masks) == len(tensors)
    if tensors:
        with torch.no_grad():
            torch._foreach_mul_(tensors, masks)
    for _, entry in pairs:
        entry.is_dirty = False


def _part(state: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = state.get(key, {}) if isinstance(state, Mapping) else None
    if not isinstance(part, Mapping):
        raise CheckpointError(f"{key}: must be by parameter name, got {type(part).__name__}")
    return part


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
