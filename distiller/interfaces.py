"""Read this first: the training loop as code, and what it calls.

    scheduler = file_config(model, optimizer, "schedule.yaml")
    for epoch in range(start, end):
        scheduler.on_epoch_begin(epoch, optimizer)                    # pruners compute masks
        for minibatch, (images, labels) in enumerate(loader):
            scheduler.on_minibatch_begin(epoch, minibatch, count, optimizer)       # masks applied
            loss = criterion(model(images), labels)
            loss = scheduler.before_backward_pass(epoch, minibatch, count, loss, optimizer)  # penalties added
            optimizer.zero_grad()
            loss.backward()
            scheduler.before_parameter_optimization(epoch, minibatch, count, optimizer)  # dense copies back
            optimizer.step()
            scheduler.on_minibatch_end(epoch, minibatch, count, optimizer)         # masks applied
        with scheduler.masked():                                      # masked weights are exactly zero
            validate(model)
        scheduler.on_epoch_end(epoch, optimizer, metrics)             # learning rates step
        with scheduler.masked():
            save_checkpoint(model, optimizer, scheduler)

The scheduler passes each call on to the policies whose epoch window is open. A policy
says *when*; a pruner, regularizer or quantizer says *what*; a mask store says *to what*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.epoch_window import EpochWindow
from distiller.errors import DistillerError
from distiller.tensor_cuts import TensorCuts

if TYPE_CHECKING:
    from distiller.masks import MaskStore


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where training stands when a policy, pruner or extension is called.

    Attributes:
        model: the model in training (read it; only masks and quantizers change it).
        masks: the masks in force, by canonical parameter name.
        optimizer: the optimizer, or None outside of training.
        window: the epochs of the policy that is called.
        epoch: the current epoch, from 0.
        minibatch: the current mini-batch, from 0; None outside of the mini-batch loop.
        minibatches_per_epoch: how many there are; None outside of the mini-batch loop.
        policies: all policies of the schedule, for one that changes the shapes of the model: it tells them.
    """

    model: nn.Module
    masks: MaskStore
    optimizer: Optimizer | None
    window: EpochWindow
    epoch: int
    minibatch: int | None = None
    minibatches_per_epoch: int | None = None
    policies: tuple[Policy, ...] = ()

    @property
    def global_step(self) -> int:
        """Mini-batches since epoch 0 (0 outside of the mini-batch loop)."""
        if self.minibatch is None or self.minibatches_per_epoch is None:
            return 0
        return self.epoch * self.minibatches_per_epoch + self.minibatch


@dataclass(frozen=True, slots=True)
class LossComponent:
    """A named, detached part of the loss, for the logs."""

    name: str
    value: Tensor


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The loss to differentiate from here on, and the parts that were added to it."""

    overall_loss: Tensor
    loss_components: tuple[LossComponent, ...] = ()


@dataclass(frozen=True, slots=True)
class ForwardActs:
    """On the forward pass of which parameters a policy acts otherwise than by plain masks.

    Attributes:
        masks: those that it masks there only: they are other after the optimizer's step.
        ended_by: the argument with which these masks do not outlast the policy; empty if they do not anyhow.
        gates: those whose gates it learns there; no other policy may mask them there only.
    """

    masks: frozenset[str] = frozenset()
    ended_by: str = ""
    gates: frozenset[str] = frozenset()


class Policy:
    """WHEN something is done. Called only in the epochs of its window; every method may be left out.

    Attributes:
        weighs_objective: it weighs the loss that the training loop computes; `before_backward_pass` calls it
            before the others, so that what they add is not weighed.
    """

    weighs_objective: bool = False

    def on_epoch_begin(self, ctx: StepContext) -> None:
        """Before the first mini-batch of an active epoch."""

    def on_minibatch_begin(self, ctx: StepContext) -> None:
        """Before the forward pass."""

    def before_backward_pass(self, ctx: StepContext, loss: Tensor) -> PolicyLoss | None:
        """After the forward pass; returns the loss to go on with, or None to keep `loss`."""

    def before_parameter_optimization(self, ctx: StepContext) -> None:
        """After the backward pass, before the optimizer's step."""

    def on_minibatch_end(self, ctx: StepContext) -> None:
        """After the optimizer's step."""

    def on_epoch_end(self, ctx: StepContext, metrics: Mapping[str, float]) -> None:
        """After validation; `metrics` has `loss` (validation loss) and `top1` (percent)."""

    def check(self, model: nn.Module) -> None:
        """Raise a DistillerError if the policy names what the model does not have, or cannot act on it."""

    def check_epochs(self, window: EpochWindow) -> None:
        """Raise a DistillerError if the policy cannot do in these epochs what it is asked to."""

    def forward_acts(self, model: nn.Module) -> ForwardActs:
        """What it does to the forward pass, by which the scheduler tells policies that cannot go together."""
        return ForwardActs()

    def has_final_sparsity(self, ctx: StepContext) -> bool:
        """Whether, after epoch `ctx.epoch`, the policy has brought the model to the sparsity it ends with."""
        return True

    def acts_on(self, model: nn.Module) -> tuple[str, ...]:
        """Canonical names of parameters that it keeps something of by name, beside pruner and regularizer."""
        return ()

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Parameters became smaller: what the policy keeps of their shape must, too.

        Args:
            cuts: by canonical name of a parameter or buffer, the indices that stayed, by dimension; {} when
                layers were replaced, of which the policy names none: what it knows of the structure is old.
        """

    def describe(self, ctx: StepContext) -> str:
        """One line for `--dry-run`: what the policy touches, and how, in epoch `ctx.epoch`."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` left off."""


class Pruner(ABC):
    """WHICH elements go. Computes masks and changes neither parameters nor model.

    Attributes:
        name: the instance's name in the schedule.
        rescales: its masks hold other values than 0 and 1, and must not act on the weights for good.
        ranks_by_weight: what goes is told by the values of the weights.
        reads_dimensions: takes dimension 0 of a weight for what it makes, dimension 1 for what it reads.
    """

    name: str
    rescales: bool = False
    ranks_by_weight: bool = True
    reads_dimensions: bool = False

    @abstractmethod
    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """The canonical names, among all of the model's, of the parameters this pruner masks.

        Raises:
            UnknownNameError: one of its names or patterns matches nothing.
        """

    def check(self, params: Mapping[str, Tensor]) -> None:  # noqa: B027 - most pruners take any shape
        """Raise a DistillerError if one of the selected `params` has a shape that cannot be masked."""

    @abstractmethod
    def compute_masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Masks for the selected parameters in `params`.

        Args:
            params: parameters by canonical name; they may be masked (partly zero) already.
            ctx: where training stands.

        Returns:
            For each parameter that is to be masked now a tensor of its shape, dtype and
            device: 1 keep, 0 prune. A parameter left out keeps the mask it has.
        """

    def target_sparsity(self, ctx: StepContext) -> Mapping[str, float]:
        """The sparsity aimed at in `ctx.epoch`, by the names as the user gave them.

        {} where it depends on data or chance. Changes nothing, and draws no random numbers.
        """
        return {}

    def too_small(self, params: Mapping[str, Tensor], ctx: StepContext) -> tuple[str, ...]:
        """Those of the selected `params` of which not one element goes at the sparsity of `ctx.epoch`."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most pruners have no state
        """Take up where `state_dict` left off."""

    def follow_thinning(self, cuts: TensorCuts) -> None:  # noqa: B027 - most pruners keep nothing of a shape
        """Parameters became smaller: what the pruner keeps of their shape must, too."""

    def set_param_mask(
        self,
        param: Tensor,
        param_name: str,
        zeros_mask_dict: Mapping[str, Any],
        meta: StepContext | Mapping[str, Any] | None = None,
    ) -> None:
        """Distiller's call: put the mask of one parameter into `zeros_mask_dict[param_name].mask`.

        Args:
            param: the parameter.
            param_name: its canonical name.
            zeros_mask_dict: a MaskStore, or maskers by name as from `create_model_masks_dict`.
            meta: where training stands, as a StepContext or as Distiller's dict; pruners whose masks do
                not depend on the epoch need none.

        Raises:
            DistillerError: the pruner needs what `meta` does not say.
        """
        if param_name in self.select(list(zeros_mask_dict)):
            ctx = meta if isinstance(meta, StepContext) else _Meta(meta or {}, zeros_mask_dict)
            mask = self.compute_masks({param_name: param.detach()}, ctx).get(param_name)  # type: ignore[arg-type]
            if mask is not None:
                zeros_mask_dict[param_name].mask = mask


class DataDrivenPruner(Pruner):
    """A pruner that ranks by what it has seen of training.

    Its policy attaches it for each active epoch, and asks it for masks at the beginning of the epoch if it
    has seen mini-batches by then, else after its first few. With new masks it begins to collect anew.
    What was collected is part of `state_dict`.

    Attributes:
        seen: mini-batches of training seen since the last `reset`.
    """

    seen: int = 0

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Begin to collect, in training mode only; what was collected before stays."""

    @abstractmethod
    def detach(self) -> None:
        """End collecting, and leave nothing on the model."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what was collected."""

    def after_backward(self, params: Mapping[str, nn.Parameter], ctx: StepContext) -> None:
        """Take in the gradients of the selected parameters, before the optimizer's step."""

    def refitted(self, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights to go on with under new masks, by name; {} leaves them as they are."""
        return {}


class _Meta:
    """Distiller's dict of where training stands, read as a StepContext."""

    def __init__(self, meta: Mapping[str, Any], masks: Mapping[str, Any]) -> None:
        self._meta = meta
        self.masks = masks
        self.optimizer = meta.get("optimizer")
        self.minibatch = None
        self.minibatches_per_epoch = None
        self.global_step = 0

    @property
    def model(self) -> nn.Module:
        return self._needed("model")

    @property
    def epoch(self) -> int:
        return self._needed("current_epoch")

    @property
    def window(self) -> EpochWindow:
        start, end = self._needed("starting_epoch"), self._needed("ending_epoch")
        return EpochWindow.spanning(start, end, self._meta.get("frequency", 1))

    def _needed(self, key: str) -> Any:
        if key not in self._meta:
            raise DistillerError(
                f"set_param_mask: this pruner's masks depend on '{key}', which 'meta' does not say; "
                "give a StepContext, or a dict with starting_epoch, ending_epoch, current_epoch and model"
            )
        return self._meta[key]


class Regularizer(Protocol):
    """A penalty on parameters that is added to the loss."""

    name: str

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """The canonical names of the parameters penalised."""
        ...

    def penalty(self, params: Mapping[str, Tensor]) -> Tensor:
        """The penalty, a scalar that can be differentiated."""
        ...

    def threshold_masks(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of what lies under the threshold now; {} when there is no threshold."""
        ...


class Quantizer(Protocol):
    """Replaces layers of a model by quantized ones."""

    def prepare_model(self, dummy_input: Any = None) -> None:
        """Replace the layers, once."""
        ...

    def quantize_params(self) -> None:
        """Quantize the weights from their full-precision copies."""
        ...


class Observer(Protocol):
    """Statistics of one stream of tensors."""

    def update(self, x: Tensor) -> None:
        """Take in one batch, shape (batch, ...)."""
        ...

    def result(self) -> dict[str, float]:
        """The statistics of all batches so far."""
        ...


@runtime_checkable
class Collector(Protocol):
    """Observers on modules; `with collector:` attaches them and always detaches them."""

    def __enter__(self) -> Collector: ...

    def __exit__(self, *exc: object) -> None: ...

    def value(self) -> Mapping[str, Any]:
        """The statistics by canonical module name."""
        ...

    def save(self, path: str | Path) -> Path:
        """Write them; returns the file written."""
        ...
