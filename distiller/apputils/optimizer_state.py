"""An optimizer, put back to where a checkpoint found it.

Everything is checked first: torch's own loading takes any value, and fails at the first step, or never.
Knows nothing about files or schedules.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.apputils.checkpoint_format import Checkpoint, optimizer_param_names
from distiller.apputils.checkpoint_schema import is_number, key_path, shown, unlike
from distiller.errors import CheckpointError
from distiller.names import named_parameters

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_KEPT = {"SGD": ("momentum_buffer",), "Adam": ("step", *_MOMENTS), "AdamW": ("step", *_MOMENTS)}
_SWITCHES = ("foreach", "fused")
"""Hyper-parameters that are true, false, or None for PyTorch to choose."""
_LEFT_BY_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
_FRESH = "start with a fresh optimizer"


def restore_optimizer(
    model: nn.Module, checkpoint: Checkpoint, optimizer: Optimizer | None = None
) -> Optimizer | None:
    """Give an optimizer the state it had, or rebuild the one that was saved.

    Args:
        model: the model whose parameters are optimized, where it is to stay.
        optimizer: of the class and with the parameters of the saved one; None rebuilds it, which
            is possible for SGD, Adam and AdamW.

    Returns:
        The optimizer; as it was given when the checkpoint has no state for one.

    Raises:
        CheckpointError: the saved optimizer is another one, cannot be rebuilt, or its state does not fit.
    """
    saved = checkpoint.optimizer
    if saved is None:
        return optimizer
    kind, groups, state = saved["class"], saved["param_names"], saved["state_dict"]
    if optimizer is None:
        optimizer = _rebuilt_optimizer(model, checkpoint, kind, groups)
    given = type(optimizer).__name__
    if given != kind:
        raise CheckpointError(f"{checkpoint.path}: its optimizer is {kind}, got {given}; use {kind}")
    if optimizer_param_names(model, optimizer) != groups:
        raise CheckpointError(
            f"{checkpoint.path}: its optimizer has other parameters, or in other groups; "
            "build the optimizer as in the run that was saved, or start with a fresh one"
        )
    state, fresh = copy.deepcopy(state), optimizer.state_dict()["param_groups"]
    fault = _group_fault(state["param_groups"], fresh, optimizer) or _state_fault(state, optimizer)
    if fault is not None:
        raise CheckpointError(f"{checkpoint.path}: {fault}; {_FRESH}")
    for group, like in zip(state["param_groups"], fresh, strict=True):
        for key in optimizer.defaults:
            group.setdefault(key, like[key])  # a switch that came with a later version of PyTorch
    optimizer.load_state_dict(state)
    return optimizer


def _rebuilt_optimizer(model: nn.Module, checkpoint: Checkpoint, kind: str, groups: list[Any]) -> Optimizer:
    params = dict(named_parameters(model))
    strangers = [name for group in groups for name in group if name not in params]
    if kind not in _OPTIMIZERS or strangers or not groups:
        known = ", ".join(_OPTIMIZERS)
        why = f"it is not one of {known}" if kind not in _OPTIMIZERS else "it trains no parameters"
        why = "it trains parameters that are not the model's" if strangers else why
        raise CheckpointError(
            f"{checkpoint.path}: its optimizer {kind} cannot be rebuilt: {why}; create it and pass it"
        )
    # The hyper-parameters come with the state.
    return _OPTIMIZERS[kind]([{"params": [params[name] for name in group]} for group in groups], lr=0.1)


def _group_fault(groups: list[Any], fresh_groups: list[Any], optimizer: Optimizer) -> str | None:
    """What is wrong with the saved hyper-parameters, beside those that the optimizer has."""
    place = ("optimizer", "state_dict", "param_groups")
    if len(groups) != len(fresh_groups):
        return f"'{key_path(*place)}' must have {len(fresh_groups)} groups, got {len(groups)}"
    for index, (group, fresh) in enumerate(zip(groups, fresh_groups, strict=True)):
        if group["params"] != fresh["params"]:
            return f"'{key_path(*place, index, 'params')}' must be {fresh['params']}, got {group['params']}"
        expected: dict[str, Any] = dict.fromkeys(_LEFT_BY_SCHEDULERS, 0.0) | fresh
        for key, like in (expected | dict.fromkeys(_SWITCHES, False)).items():
            is_switch = like is None or isinstance(like, bool)
            if key not in group and key in optimizer.defaults and not is_switch:
                return f"'{key_path(*place, index, key)}' is missing"
            fault = unlike(group[key], like, *place, index, key) if key in group else None
            if fault is not None:
                return fault
        params = optimizer.param_groups[index]["params"]
        if group.get("capturable") and any(param.device.type == "cpu" for param in params):
            return f"'{key_path(*place, index, 'capturable')}' must be false for parameters on the CPU"
        fault = _refused_by_torch(group, type(optimizer).__name__)
        if fault is not None:
            return f"'{key_path(*place, index)}' is refused by PyTorch: {fault}"
    return None


def _refused_by_torch(group: Mapping[str, Any], kind: str) -> str | None:
    """What the optimizer's constructor has against the hyper-parameters of a group."""
    if kind not in _OPTIMIZERS:
        return None
    accepted = set(inspect.signature(_OPTIMIZERS[kind]).parameters) - {"params"}
    try:
        _OPTIMIZERS[kind]([torch.zeros(1)], **{key: group[key] for key in group if key in accepted})
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def _state_fault(state: Mapping[str, Any], optimizer: Optimizer) -> str | None:
    """What is wrong with what was kept of each parameter, such as its momentum."""
    kind = type(optimizer).__name__
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [group for group in state["param_groups"] for _ in group["params"]]
    for index, entry in state["state"].items():
        place = ("optimizer", "state_dict", "state", index)
        if not 0 <= index < len(params):
            return f"'{key_path(*place)}' is of no parameter, the optimizer has {len(params)}"
        needed = _KEPT.get(kind, ()) if kind != "SGD" else ()
        needed = needed if groups[index].get("amsgrad") else needed[:-1]
        lacking = [key for key in needed if key not in entry]
        if lacking:
            return f"'{key_path(*place, lacking[0])}' is missing"
        for key, value in entry.items():
            fits, wanted = _fits(key, value, params[index], kind)
            if not fits:
                return f"'{key_path(*place, key)}' must be {wanted}, got {shown(value)}"
    return None


def _fits(key: str, value: Any, param: Tensor, kind: str) -> tuple[bool, str]:
    if key not in _KEPT.get(kind, (key,)):
        return False, f"left out: {kind} keeps no such thing"
    if key in ("momentum_buffer", *_MOMENTS):
        is_none = value is None and key == "momentum_buffer"
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.shape == param.shape
        return is_none or fits, f"a tensor of real numbers, of the parameter's shape {tuple(param.shape)}"
    return key != "step" or (is_number(value) and 0 <= value < math.inf), "a number from 0"
