"""Thinning by zeros: a model loses the filters and channels that are zero, with all that goes with them.

What comes out is tried on a copy first: a model is made smaller only when the smaller one runs, and how far
its outputs are from before is measured. Distiller's calls keep their names and positions.
Knows nothing about schedules.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from distiller.dataset_facts import infer_dataset
from distiller.dummy_input import get_dummy_input, resolve_input_shape
from distiller.errors import DistillerError, UsageError, users_code
from distiller.interfaces import Policy
from distiller.masks import MaskStore, ParameterMasker
from distiller.names import canonical_state_dict, named_parameters, unwrap
from distiller.thinning.recipe import ThinningRecipe
from distiller.thinning.removal import apply_recipe, thinning_recipe
from distiller.thinning.trial import SAME_ANSWER, copied, measured_change, model_groups, removable_groups
from distiller.thinning.zero_structures import KeptZeros, ZeroKind, computed_zeros, find_zero_units

_LOG = logging.getLogger(__name__)
Masks = MaskStore | Mapping[str, ParameterMasker] | None


@dataclass(frozen=True, slots=True)
class ThinningReport:
    """What a thinning did.

    Attributes:
        function: its name.
        groups: by channel group that lost units, how many it had and has.
        layers: by weight that became smaller, the shapes before and after.
        kept: what is zero and stays, and why.
        parameters: before and after.
        macs: multiply-accumulates for the input that was tried, before and after.
        leftovers: what of the removed units was not zero though their weights were (as in `ZeroUnits`).
        passing: by parameter, zeros of masks that last one mini-batch only: they do not count.
        change: the largest difference between outputs of the masked and the thinned model on a random
            input, as a fraction of the largest output; 0 when nothing was removed.
    """

    function: str
    groups: Mapping[str, tuple[int, int]]
    layers: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    kept: tuple[KeptZeros, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    leftovers: tuple[str, ...]
    passing: Mapping[str, int]
    change: float

    @property
    def has_removed(self) -> bool:
        """Whether anything was removed."""
        return bool(self.groups)

    @property
    def has_same_outputs(self) -> bool:
        """Whether the thinned model answers as the masked one did, up to rounding."""
        return self.change < SAME_ANSWER


def remove_filters(
    model: nn.Module,
    zeros_mask_dict: Masks,
    arch: str | None,
    dataset: str | None,
    optimizer: Optimizer | None,
    *,
    policies: Iterable[Policy] = (),
) -> ThinningReport:
    """Remove from a model, in place, the filters that are zero in all layers that make a channel.

    What is coupled goes with them: the layers that read the channels, norms, depthwise convolutions,
    the optimizer's state, masks, and what policies keep. What is zero and cannot go is in the report.

    Args:
        model: the model, or a wrapper around it.
        zeros_mask_dict: its masks, a MaskStore or maskers by name; masked weights count as zero.
        arch: name of the architecture; looked at only when neither `model.input_shape` nor `dataset` is
            there.
        dataset: name of the data set; looked at only when the model has no `input_shape`.
        optimizer: of the model, or None.
        policies: told what became smaller.

    Raises:
        UsageError: nothing says what input the model takes.
        GraphTraceError: the model cannot be traced.
        DistillerError: the thinned model does not run, or the optimizer's state cannot be cut. The model
            is as it was.
    """
    return _thin("remove_filters", ("filters",), model, zeros_mask_dict, arch, dataset, optimizer, policies)


def remove_channels(
    model: nn.Module,
    zeros_mask_dict: Masks,
    arch: str | None,
    dataset: str | None,
    optimizer: Optimizer | None,
    *,
    policies: Iterable[Policy] = (),
) -> ThinningReport:
    """Remove from a model, in place, the channels that are zero in all layers that read them.

    Takes, returns and raises as `remove_filters`.
    """
    return _thin("remove_channels", ("channels",), model, zeros_mask_dict, arch, dataset, optimizer, policies)


def contract_model(
    model: nn.Module,
    zeros_mask_dict: Masks,
    arch: str | None,
    dataset: str | None,
    optimizer: Optimizer | None,
    *,
    policies: Iterable[Policy] = (),
) -> ThinningReport:
    """Remove from a model, in place, zero filters first and zero channels of what is left then.

    Takes, returns and raises as `remove_filters`.
    """
    kinds: tuple[ZeroKind, ...] = ("filters", "channels")
    return _thin("contract_model", kinds, model, zeros_mask_dict, arch, dataset, optimizer, policies)


def random_inputs(model: nn.Module, arch: str | None, dataset: str | None, where: str) -> Any:
    """An input that a model is traced and tried with, always the same; no generator is changed by it.

    Args:
        model: its `input_shape` counts first.
        arch: see `remove_filters`.
        dataset: see `remove_filters`.
        where: named in errors.

    Raises:
        UsageError: nothing says what input the model takes.
        UnknownNameError: no such data set.
    """
    shape = getattr(unwrap(model), "input_shape", None) or getattr(model, "input_shape", None)
    if shape is None and dataset is None and arch is None:
        raise UsageError(
            f"{where}: the model has no 'input_shape'; set it, batch included, or give 'dataset' or 'arch'"
        )
    state = next(model.parameters(), torch.empty(0))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        inputs = get_dummy_input(
            input_shape=shape or resolve_input_shape(dataset or infer_dataset(str(arch)), None)
        )
    return pytree.tree_map(lambda tensor: tensor.to(state.device, state.dtype), inputs)


def _thin(
    function: str,
    kinds: tuple[ZeroKind, ...],
    model: nn.Module,
    masks: Masks,
    arch: str | None,
    dataset: str | None,
    optimizer: Optimizer | None,
    policies: Iterable[Policy],
) -> ThinningReport:
    inputs = random_inputs(model, arch, dataset, function)
    has_shape = getattr(unwrap(model), "input_shape", None) is not None
    groups = model_groups(model, function) if has_shape else removable_groups(model, inputs, function)
    masked = _masked_copy(model, masks)
    thinned = copy.deepcopy(masked)
    recipe = ThinningRecipe({})
    sizes: dict[str, tuple[int, int]] = {}
    kept: dict[ZeroKind, tuple[KeptZeros, ...]] = {}
    macs: list[int] = []
    leftovers: dict[str, None] = {}
    for kind in kinds:
        found = find_zero_units(canonical_state_dict(thinned), groups, kind)
        kept[kind] = (*found.kept, *computed_zeros(thinned, kind))
        leftovers.update(dict.fromkeys(found.leftovers))
        macs += [groups.macs(), groups.macs(found.removed)]
        if not found.removed:
            continue
        for name, units in found.removed.items():
            size = groups[name].size
            sizes[name] = (sizes.get(name, (size, size))[0], size - len(units))
        step = thinning_recipe(thinned, groups, found.removed)
        apply_recipe(thinned, step)
        recipe = _joined(recipe, step)
        if kind != kinds[-1]:
            groups = removable_groups(thinned, inputs, function)
    report = ThinningReport(
        function,
        sizes,
        _changed_shapes(masked, thinned),
        tuple(told for zeros in kept.values() for told in zeros),
        (_count(masked), _count(thinned)),
        (macs[0], macs[-1]),
        tuple(leftovers),
        _passing_zeros(masks),
        _change(masked, thinned, inputs, function) if sizes else 0.0,
    )
    if sizes:
        apply_recipe(model, recipe, optimizer, masks if isinstance(masks, MaskStore) else None, policies)
        if masks is not None and not isinstance(masks, MaskStore):
            for name, kept_indices in recipe.tensors.items():
                if name in masks:
                    masks[name].follow_thinning(kept_indices)
    _tell(report)
    return report


def _change(masked: nn.Module, thinned: nn.Module, inputs: Any, function: str) -> float:
    with users_code(f"{function}: the thinned model", "; the model stays as it was", DistillerError):
        return measured_change(masked, thinned, inputs)


def _masked_copy(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of the bare model whose masked weights are masked."""
    masked = copied(unwrap(model), "thinning")
    with torch.no_grad():
        for name, param in named_parameters(masked):
            mask = masks[name].pruning_mask if masks is not None and name in masks else None
            if mask is not None:
                param.mul_(mask)
    return masked


def _passing_zeros(masks: Masks) -> dict[str, int]:
    """By parameter, how many elements only masks of one mini-batch put to zero."""
    zeros: dict[str, int] = {}
    for name, masker in (masks or {}).items():
        if masker.mask is not None and any(rules.passing for rules in masker.rules_of.values()):
            for_good = 0 if masker.pruning_mask is None else int((masker.pruning_mask == 0).sum())
            zeros[name] = int((masker.mask == 0).sum()) - for_good
    return {name: count for name, count in zeros.items() if count}


def _joined(first: ThinningRecipe, second: ThinningRecipe) -> ThinningRecipe:
    """One recipe that does what two do one after the other."""
    tensors = {name: dict(kept) for name, kept in first.tensors.items()}
    for name, kept in second.tensors.items():
        dims = tensors.setdefault(name, {})
        for dim, indices in kept.items():
            dims[dim] = tuple(dims[dim][i] for i in indices) if dim in dims else indices
    modules = {
        name: {**first.modules.get(name, {}), **second.modules.get(name, {})}
        for name in (*first.modules, *second.modules)
    }
    return ThinningRecipe(tensors, modules, {**first.classes, **second.classes})


def _changed_shapes(
    before: nn.Module, after: nn.Module
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    now = dict(named_parameters(after))
    return {
        name: (tuple(param.shape), tuple(now[name].shape))
        for name, param in named_parameters(before)
        if param.dim() >= 2 and param.shape != now[name].shape
    }


def _count(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def _tell(report: ThinningReport) -> None:
    function = report.function
    for kept in report.kept:
        _LOG.info("%s: %s", function, kept)
    for name, count in report.passing.items():
        _LOG.info(
            "%s: %s: %d elements are masked for one mini-batch only, and do not count as zero",
            function, name, count,
        )  # fmt: skip
    if not report.has_removed:
        kinds = {"remove_filters": "filter", "remove_channels": "channel"}.get(function, "filter or channel")
        why = (
            f"the zero ones cannot go: {'; '.join(map(str, report.kept))}"
            if report.kept
            else f"no {kinds} of the weights is zero"
        )
        _LOG.warning("%s: nothing was removed: %s", function, why)
        return
    units = ", ".join(f"{name} {was} -> {now}" for name, (was, now) in report.groups.items())
    _LOG.info("%s: %s", function, units)
    for what, (was, now) in (("parameters", report.parameters), ("MACs", report.macs)):
        _LOG.info(
            "%s: %s %s -> %s (%.1f %% of before)", function, what, f"{was:,}", f"{now:,}", 100 * now / was
        )
    if report.has_same_outputs:
        _LOG.info("%s: outputs are those of the masked model to %.1e of their scale", function, report.change)
        return
    culprits = ", ".join(report.leftovers) or "an operation that makes something else than zero of zero"
    _LOG.warning(
        "%s: outputs differ from those of the masked model by %.2g of their scale: of what was removed "
        "not zero: %s; fine-tune, or mask whole channel groups before thinning",
        function, report.change, culprits,
    )  # fmt: skip
