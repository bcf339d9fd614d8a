"""Policies: when a pruner, regularizer, quantizer or learning-rate scheduler acts.

Each wraps one component and calls it from the scheduler's callbacks.
Knows nothing about YAML, the training loop or other policies.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distiller.errors import DistillerError
from distiller.graph import batch_norm_behind, model_graph
from distiller.interfaces import (
    DataDrivenPruner,
    EpochWindow,
    ForwardActs,
    LossComponent,
    Policy,
    PolicyLoss,
    Pruner,
    Quantizer,
    Regularizer,
    StepContext,
)
from distiller.learning_rate import advance_to
from distiller.masks import PRUNER_SLOT, MaskRules
from distiller.names import named_modules, named_parameters, owner
from distiller.policy_args import PolicyArgsError, PruningArgs, RegularizationArgs
from distiller.pruning.transposed import refuse_transposed
from distiller.regularization.refusals import refuse_nan
from distiller.tensor_cuts import TensorCuts

__all__ = [
    "LRPolicy",
    "LossComponent",
    "Policy",
    "PolicyArgsError",
    "PolicyLoss",
    "PruningArgs",
    "PruningPolicy",
    "QuantizationPolicy",
    "RegularizationArgs",
    "RegularizationPolicy",
    "ScheduledTrainingPolicy",
]

FIRST_MASKS_AFTER = 10
"""Mini-batches that a data-driven pruner sees before its first masks, where an epoch has so many."""

ScheduledTrainingPolicy = Policy
"""Distiller's name of the base class."""


_LOG = logging.getLogger(__name__)


class PruningPolicy(Policy):
    """Computes masks with a pruner at the beginning of each active epoch, or more often."""

    def __init__(self, pruner: Pruner, pruner_args: PruningArgs | Mapping[str, Any] | None = None) -> None:
        """Wrap `pruner`; `pruner_args` may be a mapping, as in a schedule."""
        self.pruner = pruner
        self.args = (
            pruner_args if isinstance(pruner_args, PruningArgs) else PruningArgs(**(pruner_args or {}))
        )
        if self.args.levels is not None and not hasattr(pruner, "levels"):
            raise DistillerError(
                f"'levels' is for pruners that have levels; {type(pruner).__name__} has none"
            )
        self._batch_norms: dict[str, str] | None = None
        self._has_ranked = False

    def selected(self, model: nn.Module) -> tuple[str, ...]:
        """Canonical names of the parameters that the pruner masks."""
        return self._select([name for name, _ in named_parameters(model)])

    def check(self, model: nn.Module) -> None:  # noqa: D102
        pruner = type(self.pruner).__name__
        if self.pruner.rescales and not (self.args.use_double_copies and self.args.mask_on_forward_only):
            raise PolicyArgsError(
                f"{pruner} scales up what it keeps, which would grow at every step; "
                "it needs args: {use_double_copies: true, mask_on_forward_only: true}"
            )
        if self.pruner.rescales and self.args.keep_mask:
            raise PolicyArgsError(
                f"'keep_mask' is not for {pruner}, which scales up what it keeps: it would grow at every step"
            )
        if self.args.fold_batchnorm and not self.pruner.ranks_by_weight:
            raise PolicyArgsError(f"'fold_batchnorm' is for pruners that rank by weight, {pruner} does not")
        params = dict(named_parameters(model))
        selected: dict[str, Tensor] = {name: params[name] for name in self.selected(model)}
        self.pruner.check(selected)
        if self.pruner.reads_dimensions:
            refuse_transposed(model, selected)
        if self.args.fold_batchnorm:
            folded = self._folded(dict(selected), model)
            if all(folded[name] is param for name, param in selected.items()):
                raise PolicyArgsError(
                    "'fold_batchnorm' has nothing to fold: no batch norm of its own is behind "
                    + ", ".join(selected)
                )

    def check_epochs(self, window: EpochWindow) -> None:  # noqa: D102
        if self.args.skip_first_minibatch and window.start > 0:
            raise PolicyArgsError(
                "'skip_first_minibatch' acts in the second mini-batch of epoch 0, and the policy begins in "
                f"epoch {window.start}; leave it out"
            )

    def forward_acts(self, model: nn.Module) -> ForwardActs:  # noqa: D102
        if not self.args.mask_on_forward_only:
            return ForwardActs()
        ends = self.args.keep_mask or self.args.discard_masks_at_minibatch_end
        end_by = "discard_masks_at_minibatch_end" if self.pruner.rescales else "keep_mask"
        return ForwardActs(masks=frozenset(self.selected(model)), ended_by="" if ends else end_by)

    def on_epoch_begin(self, ctx: StepContext) -> None:  # noqa: D102
        self._has_ranked = False
        if isinstance(self.pruner, DataDrivenPruner):
            self.pruner.attach(ctx.model)
        self._compute(ctx)

    def on_minibatch_begin(self, ctx: StepContext) -> None:  # noqa: D102
        frequency = self.args.mini_batch_pruning_frequency
        if (
            frequency
            and ctx.minibatch == 0
            and ctx.epoch == ctx.window.start
            and not _is_ever_due(frequency, ctx)
        ):
            _LOG.warning(
                "%s: mini_batch_pruning_frequency %d: never comes in epochs %d..%d, of %d mini-batches each; "
                "masks are computed once an epoch",
                type(self.pruner).__name__, frequency, ctx.window.start, ctx.window.last,
                ctx.minibatches_per_epoch,
            )  # fmt: skip
        is_due = bool(ctx.minibatch) and frequency > 0 and ctx.global_step % frequency == 0
        is_due = is_due or (self.args.skip_first_minibatch and ctx.global_step == 1)
        if is_due or self._first_is_due(FIRST_MASKS_AFTER):
            self._compute(ctx)

    def before_parameter_optimization(self, ctx: StepContext) -> None:  # noqa: D102
        if isinstance(self.pruner, DataDrivenPruner):
            params = ctx.masks.params
            self.pruner.after_backward({name: params[name] for name in self._select(list(params))}, ctx)

    def on_minibatch_end(self, ctx: StepContext) -> None:  # noqa: D102
        is_last = ctx.minibatch == (ctx.minibatches_per_epoch or 0) - 1
        if is_last and self._first_is_due(1):
            self._compute(ctx)
        if self.args.discard_masks_at_minibatch_end:
            self._release(ctx)

    def on_epoch_end(self, ctx: StepContext, metrics: Mapping[str, float]) -> None:  # noqa: D102
        if isinstance(self.pruner, DataDrivenPruner):
            self.pruner.detach()
        if ctx.epoch == ctx.window.last and self.args.keep_mask:
            for name in self.selected(ctx.model):
                ctx.masks.put(name, ctx.masks[name].slots.get(PRUNER_SLOT), rules=MaskRules())

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        names = self.selected(ctx.model)
        targets = sorted(set(self.target_sparsity(ctx).values()))
        aim = ", ".join(f"{target:.1%}" for target in targets)
        return f"{type(self.pruner).__name__}: {', '.join(names)}" + (f" -> sparsity {aim}" if aim else "")

    def target_sparsity(self, ctx: StepContext) -> Mapping[str, float]:
        """The pruner's, with the levels of this policy."""
        with self._own_levels():
            return self.pruner.target_sparsity(ctx)

    def never_pruned(self, ctx: StepContext) -> tuple[str, ...]:
        """The selected parameters that are too small for the sparsity of any epoch: nothing of them goes."""
        params = dict(named_parameters(ctx.model))
        selected = {name: params[name] for name in self.selected(ctx.model)}
        with self._own_levels():  # sparsity rises or falls all the way: its ends tell
            at_ends = [
                set(self.pruner.too_small(selected, replace(ctx, epoch=epoch)))
                for epoch in (ctx.window.start, ctx.window.last)
            ]
        return tuple(name for name in selected if all(name in small for small in at_ends))

    def has_final_sparsity(self, ctx: StepContext) -> bool:
        """Whether the sparsity aimed at in `ctx.epoch` is that of the last active epoch.

        Where masks last one mini-batch nothing is pruned for good, and there is no sparsity to come to.
        """
        if self.args.discard_masks_at_minibatch_end or ctx.epoch >= ctx.window.last:
            return True
        latest = ctx.window.latest(ctx.epoch)
        if latest is None:
            return False
        final = self.target_sparsity(replace(ctx, epoch=ctx.window.last))
        return bool(final) and final == self.target_sparsity(replace(ctx, epoch=latest))

    def follow_thinning(self, cuts: TensorCuts) -> None:  # noqa: D102
        self._batch_norms = None
        self.pruner.follow_thinning(cuts)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return self.pruner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.pruner.load_state_dict(state)

    def _select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        with self._own_levels():
            return self.pruner.select(param_names)

    @contextmanager
    def _own_levels(self) -> Iterator[None]:
        """Within the block the pruner, which may serve several policies, has the levels of this one."""
        if self.args.levels is None:
            yield
            return
        pruner: Any = self.pruner
        before, pruner.levels = pruner.levels, self.args.levels
        try:
            yield
        finally:
            pruner.levels = before

    def _first_is_due(self, seen: int) -> bool:
        """Whether a data-driven pruner without masks in this epoch has seen so many mini-batches."""
        return isinstance(self.pruner, DataDrivenPruner) and not self._has_ranked and self.pruner.seen >= seen

    def _compute(self, ctx: StepContext) -> None:
        if isinstance(self.pruner, DataDrivenPruner) and self.pruner.seen == 0:
            return
        params = ctx.masks.params
        selected = {name: params[name].detach() for name in self._select(list(params))}
        ranked = self._folded(dict(selected), ctx.model) if self.args.fold_batchnorm else selected
        rules = MaskRules(
            self.args.mask_on_forward_only,
            self.args.use_double_copies,
            self.args.mask_gradients,
            self.args.discard_masks_at_minibatch_end,
        )
        with self._own_levels():
            masks = self.pruner.compute_masks(ranked, ctx)
        for name, mask in masks.items():
            ctx.masks.put(name, mask, rules=rules)
        self._has_ranked = True
        if isinstance(self.pruner, DataDrivenPruner):
            for name, weight in self.pruner.refitted(selected, masks).items():
                params[name].data.copy_(weight)
            self.pruner.reset()

    def _folded(self, params: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        if self._batch_norms is None:
            self._batch_norms = _following_batch_norms(model)
        modules = dict(named_modules(model))
        for name, weight in params.items():
            norm = self._batch_norms.get(owner(name))
            if norm is not None and name.endswith(".weight"):
                gain = _batch_norm_gain(modules[norm], norm)
                params[name] = weight * gain.view(-1, *[1] * (weight.dim() - 1))
        return params

    def _release(self, ctx: StepContext) -> None:
        for name in self.selected(ctx.model):
            ctx.masks.put(name, None)


class RegularizationPolicy(Policy):
    """Adds a regularizer's penalty to the loss, and masks what lies under its threshold."""

    def __init__(self, regularizer: Regularizer, keep_mask: bool = False) -> None:
        self.regularizer = regularizer
        self.args = RegularizationArgs(keep_mask)

    def check(self, model: nn.Module) -> None:  # noqa: D102
        params = dict(named_parameters(model))
        selected = self.regularizer.select(list(params))
        if self.args.keep_mask and not self.regularizer.threshold_masks(
            {name: torch.zeros_like(params[name], device="cpu", requires_grad=False) for name in selected}
        ):
            raise PolicyArgsError(
                f"'keep_mask' keeps what lies under a threshold, and '{self.regularizer.name}' has none; "
                "give it threshold_criteria where its class takes them, or leave keep_mask out"
            )

    def on_epoch_begin(self, ctx: StepContext) -> None:
        """Refuse parameters that hold NaN."""
        refuse_nan(self.regularizer.name, self._params(ctx))

    def before_backward_pass(self, ctx: StepContext, loss: Tensor) -> PolicyLoss:  # noqa: D102
        penalty = self.regularizer.penalty(self._params(ctx))
        component = LossComponent(f"{type(self.regularizer).__name__}_loss", penalty.detach())
        return PolicyLoss(loss + penalty, (component,))

    def has_final_sparsity(self, ctx: StepContext) -> bool:
        """Whether the mask that is kept has been found."""
        return not self.args.keep_mask or ctx.epoch >= ctx.window.last

    def on_minibatch_end(self, ctx: StepContext) -> None:  # noqa: D102
        params = self._params(ctx)
        masks = self.regularizer.threshold_masks({name: param.detach() for name, param in params.items()})
        is_last = ctx.epoch == ctx.window.last and ctx.minibatch == (ctx.minibatches_per_epoch or 0) - 1
        for name, mask in masks.items():
            params[name].data.mul_(mask)
            if is_last and self.args.keep_mask:
                ctx.masks.put(name, mask, slot=f"regularizer {self.regularizer.name}")

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        return f"{type(self.regularizer).__name__}: {', '.join(self._params(ctx))}"

    def _params(self, ctx: StepContext) -> dict[str, nn.Parameter]:
        params = ctx.masks.params
        return {name: params[name] for name in self.regularizer.select(list(params))}


class QuantizationPolicy(Policy):
    """Prepares the model for quantization, unless that is done, and quantizes the weights after each step."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        if not getattr(quantizer, "is_prepared", False):  # a schedule's is: masks are of the prepared model
            quantizer.prepare_model()
        quantizer.quantize_params()

    def on_minibatch_end(self, ctx: StepContext) -> None:  # noqa: D102
        self.quantizer.quantize_params()

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        return type(self.quantizer).__name__


class LRPolicy(Policy):
    """Steps a learning-rate scheduler at the end of each active epoch.

    As in Distiller, the rate is a function of the absolute epoch: a StepLR of 45 epochs
    decays at epochs 45 and 90 even if its policy opens at 30.
    """

    def __init__(self, lr_scheduler: LRScheduler | ReduceLROnPlateau) -> None:
        self.lr_scheduler = lr_scheduler

    def on_epoch_end(self, ctx: StepContext, metrics: Mapping[str, float]) -> None:  # noqa: D102
        if isinstance(self.lr_scheduler, ReduceLROnPlateau):
            self.lr_scheduler.step(metrics["loss" if self.lr_scheduler.mode == "min" else "top1"])
        else:
            advance_to(self.lr_scheduler, ctx.epoch + 1)

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        return type(self.lr_scheduler).__name__

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        state = self.lr_scheduler.state_dict()
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        counted = {key for key, value in vars(self.lr_scheduler).items() if isinstance(value, Counter)}
        self.lr_scheduler.load_state_dict(
            {key: Counter(value) if key in counted else value for key, value in state.items()}
        )


def _is_ever_due(frequency: int, ctx: StepContext) -> bool:
    """Whether new masks come in a mini-batch other than the first, or there is none but the first."""
    length, window = ctx.minibatches_per_epoch or 1, ctx.window
    if frequency < length or length == 1:
        return True
    if frequency % length == 0:
        return False
    steps = range(frequency, (window.last + 1) * length, frequency)
    return any(step % length and step // length in window.epochs for step in steps)


def _following_batch_norms(model: nn.Module) -> dict[str, str]:
    """Module name of a convolution or linear -> name of the batch norm that alone consumes it."""
    graph = model_graph(model, "fold_batchnorm")
    found: dict[str, str] = {}
    for name, op in graph.ops.items():
        norm = batch_norm_behind(graph, op)
        if norm is not None and not norm.is_functional and op.module_name == name:
            found[name] = norm.module_name
    return found


def _batch_norm_gain(norm: nn.Module, name: str) -> Tensor:
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if norm.running_var is None:
        raise DistillerError(
            f"fold_batchnorm: '{name}' keeps no running statistics to fold; "
            "make it with track_running_stats=True, or leave fold_batchnorm out"
        )
    with torch.no_grad():
        gain = torch.rsqrt(norm.running_var + norm.eps)
        return gain * norm.weight if norm.weight is not None else gain
