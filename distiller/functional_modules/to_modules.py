"""Functional operations in the forwards of a model become calls of modules, in place.

Quantizers, statistics and summaries see leaf modules. What a forward writes as `x + shortcut`, `F.relu(x)`
or `torch.cat(...)` they do not see; after `to_modules` it is `self.add(x, shortcut)`, and so on.

Three ways were looked at, on 23 classification networks of torchvision (all of its 21 families), on this
project's own and on its word model:

1. `torch.fx` on the whole model. It traced every one of them, but what came out is a GraphModule: the
   model's class, its containers and its methods are gone, GoogLeNet and Inception stay in the mode that
   they were traced in, Swin's attention is one opaque function, and `x += y` became `x + y` whether or not
   `x` is read again.
2. The forward as it was written, under a mode (`TorchFunctionMode`) that hands the n-th operation to the
   n-th module. It takes any forward, but counts go wrong where a branch is taken in training only, and
   the bare mode cost 5 % of an evaluation of ResNet-20 at batch 64, 14 to 20 % at batch 1.
3. The forward of each module that computes something, traced by itself with its children left as they
   are, on stand-ins that have values (`forward_trace`), written back as the forward of a subclass
   (`rewritten_class`). What cannot be traced is one module's affair; it costs nothing at run time; and
   every class, name, hook and key of a state dict is what it was.

The third is what is done here. On the 23 networks 961 operations became modules, outputs, losses and
gradients equal bit for bit; left were the normalized products of Swin V2's attention. Every rewritten
forward is run beside the old one on what the module was given on the dummy input, and is taken back where
a value differs, or where it holds for one number of samples only. What cannot be traced (courses that
depend on values of tensors or on the mode, attributes that are set, gradients switched on or off) is left
as it is, and reported. The conversion costs some twenty evaluations of the dummy input.

What a forward reads off its module as a plain number, as `self.drop_rate`, is that of the time of the
conversion; parameters, buffers and the mode are those of the time of the call. A leaf module, one without
submodules, is left alone whatever it computes: it has a name already. A converted module cannot be
pickled whole, as its class is in no file; its `state_dict` can.
Knows nothing about quantization.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.dummy_input import forward_arguments
from distiller.errors import users_code
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.functional_modules.attention import (
    DecomposedAttention,
    ScaledDotProductAttention,
    why_not_decomposed,
)
from distiller.functional_modules.convert_forward import Conversion, convert_forward
from distiller.functional_modules.form_check import OtherForm
from distiller.functional_modules.forward_trace import Untraceable
from distiller.functional_modules.lstm import DistillerLSTM
from distiller.functional_modules.recorded_calls import ComputingModule, computing_modules
from distiller.functional_modules.replacement import replace_modules
from distiller.names import named_modules, unwrap
from distiller.observation import unobserved

_MADE_OF_MODULES = (DecomposedAttention, ScaledDotProductAttention, DistillerLSTM)


@dataclass(frozen=True, slots=True)
class LeftOperations:
    """Functional operations that are still such.

    Attributes:
        module_name: canonical name of the module in whose forward they are.
        operations: the names of the functions.
        reason: why.
    """

    module_name: str
    operations: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class ModulesReport:
    """What `to_modules` did.

    Attributes:
        modules: canonical name of the module that is called now, by the operation's name in the
            SummaryGraph of the model before (its attentions decomposed): `layer1.0.Add` -> `layer1.0.add`.
        attentions: canonical names of the attentions that are a DecomposedAttention now; the keys of their
            part of the `state_dict` changed.
        left: what was left, module by module.
    """

    modules: dict[str, str] = field(default_factory=dict)
    attentions: tuple[str, ...] = ()
    left: tuple[LeftOperations, ...] = ()


def to_modules(model: nn.Module, dummy_input: Any) -> ModulesReport:
    """Make functional operations on data calls of modules, wherever that can be done.

    Additions, subtractions, multiplications and divisions, concatenations and stacks, matrix products,
    activations, softmax, pooling and means become modules of `distiller.modules` and `torch.nn`, children
    of the module in whose forward they stand, named `add`, `add_1`, `cat`, ... in the order of the forward:
    equal models get equal names. Scaled dot-product attention becomes modules too, and an
    nn.MultiheadAttention a DecomposedAttention. What moves values (views, slices, splits, padding,
    dropout) stays as it is, and so does what depends on parameters alone. A second call changes nothing.

    Outputs stay equal bit for bit, those of attention within 1e-6; parameters, their names, the keys of
    the `state_dict` (but attention's), modes and hooks stay what they are. Convert before the optimizer
    is made where there is attention. The model is run several times, in evaluation mode.

    Args:
        model: changed in place; a wrapper (DataParallel, DDP, torch.compile) is looked through.
        dummy_input: a tensor, or a tuple of the model's positional arguments, on any device. Modules that
            it does not reach are left alone. A forward that asks for sizes, as `if h % 2:`, is converted
            for what it was answered; any other answer later is a UsageError.

    Returns:
        What became a module, and what was left and why.

    Raises:
        UsageError: the model does not run on `dummy_input`.
    """
    inner = unwrap(model)
    left: list[LeftOperations] = []
    arguments = forward_arguments(inner, dummy_input)
    with _tried_out(inner), users_code(f"to_modules: running {type(inner).__name__} on dummy_input"):
        inner(*arguments)
    attentions = _decompose_attentions(inner, left)
    with _tried_out(inner):
        twice = _twice_as_many(arguments)
        if twice is not None and not _runs(inner, twice):
            twice = None
        conversions = _convert(computing_modules(inner, arguments), left)
        if twice is not None:
            conversions = _only_general(inner, twice, conversions, left)
    for conversion in conversions:
        for child in conversion.modules.values():
            child.train(conversion.module.training)
    order = {name: number for number, (name, _) in enumerate(named_modules(inner))}
    conversions.sort(key=lambda conversion: order[conversion.name])
    sites = [
        (_joined(conversion.name, site), _joined(conversion.name, child))
        for conversion in conversions
        for site, child in conversion.sites.items()
    ]
    return ModulesReport(
        dict(sites), attentions, tuple(sorted(left, key=lambda item: order[item.module_name]))
    )


@contextmanager
def _tried_out(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and nothing that a run changes or that others see of it."""
    devices = list(range(torch.cuda.device_count()))
    with unobserved(model), buffers_kept(model), torch.random.fork_rng(devices):  # noqa: SIM117
        with evaluating(model, is_decomposed=True):
            yield


def _convert(found_modules: list[ComputingModule], left: list[LeftOperations]) -> list[Conversion]:
    """Rewrite the modules one by one; what stays goes to `left`."""
    conversions = []
    for found in found_modules:
        if isinstance(found.module, _MADE_OF_MODULES):
            continue
        try:
            conversion = convert_forward(found)
        except Untraceable as reason:
            left.append(LeftOperations(found.name, found.operations, f"its forward {reason}"))
            continue
        conversions.append(conversion)
        left += [LeftOperations(found.name, (name,), why) for name, why in conversion.left.items()]
    return conversions


def _only_general(
    model: nn.Module,
    arguments: tuple[Any, ...],
    conversions: list[Conversion],
    left: list[LeftOperations],
) -> list[Conversion]:
    """Take back what holds for one number of samples only: a loop over samples, say."""
    by_name = {conversion.name: conversion for conversion in conversions}
    while True:
        try:
            model(*arguments)
            return list(by_name.values())
        except OtherForm as error:
            conversion = by_name.pop(error.module_name)
            conversion.undo()
            left[:] = [item for item in left if item.module_name != conversion.name]
            reason = "its forward depends on the number of samples (or of what is along dimension 0)"
            left.append(LeftOperations(conversion.name, conversion.operations, reason))


def _twice_as_many(arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments with every sample twice; None if they have no dimension in common that counts samples."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[:1] for tensor in tensors}
    if len(sizes) != 1 or sizes == {torch.Size()}:
        return None
    return pytree.tree_map_only(Tensor, lambda tensor: torch.cat((tensor, tensor)), arguments)


def _runs(model: nn.Module, arguments: tuple[Any, ...]) -> bool:
    try:
        model(*arguments)
    except Exception:  # a model for one number of samples: whatever it raises, it is that
        return False
    return True


def _joined(module_name: str, name: str) -> str:
    return f"{module_name}.{name}" if module_name else name


def _decompose_attentions(model: nn.Module, left: list[LeftOperations]) -> tuple[str, ...]:
    """Replace the attentions at all their names; returns these."""

    def decomposed(name: str, attention: nn.MultiheadAttention) -> DecomposedAttention | None:
        reason = why_not_decomposed(attention)
        if reason is not None:
            left.append(LeftOperations(name, ("multi_head_attention_forward",), f"the attention {reason}"))
            return None
        return DecomposedAttention(attention)

    names = replace_modules(model, nn.MultiheadAttention, decomposed)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(part, DecomposedAttention) for part in module.modules()
        ):
            module.use_nested_tensor = False  # its layers have no fused kernel that takes such tensors
    return tuple(names)
