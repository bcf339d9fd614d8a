"""Rewinding: an earlier network's weights come back under the masks of now, as lottery tickets want it.

The extension is in this package because it may read a checkpoint; importing `distiller` registers it.
Knows nothing about which pruner made the masks.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distiller.apputils.checkpoint import Checkpoint, load_state, read_checkpoint
from distiller.apputils.structure import cut_by, recipes_of
from distiller.errors import CheckpointError, DistillerError
from distiller.interfaces import Policy, StepContext
from distiller.names import canonical_state_dict, named_parameters, unwrap
from distiller.registry import EXTENSIONS
from distiller.tensor_cuts import TensorCuts, cut, cut_shape

__all__ = ["WeightRewinder", "kept_weights", "put_back"]

_LOG = logging.getLogger(__name__)


def kept_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies, in main memory, of a model's parameters and buffers, by canonical name."""
    return {name: value.detach().to("cpu", copy=True) for name, value in canonical_state_dict(model).items()}


def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `kept_weights` into the model that they are of."""
    here = canonical_state_dict(model)
    with torch.no_grad():
        for name, value in weights.items():
            here[name].copy_(value)


@EXTENSIONS.register
class WeightRewinder(Policy):
    """Puts earlier weights back at the beginning of each epoch of its policy: w <- mask * w_earlier.

    Everything that the model's state holds goes back, statistics of batch norms too; the masks in force
    stay, those that pruners have computed for this epoch included, and the optimizer begins anew (momentum
    and moments are forgotten). Learning rates are not rewound: the schedule says what they are.

    The earlier weights are those that the model has when the schedule is loaded: untrained ones where the
    run starts from scratch. They are part of the run's checkpoints, which become twice as large.

    Args:
        name: the instance's name in the schedule.
        model: the model in training.
        checkpoint: file whose weights are put back instead, as one of `--save-untrained-model`.
        late: late rewinding: in its first epoch the policy puts nothing back; the weights that this epoch
            begins with are those that its other epochs put back.

    Raises:
        DistillerError: `checkpoint` and `late` together.
        CheckpointError: the checkpoint cannot be read, or is of another model.

    Source: Frankle, Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks"
    (arXiv 1803.03635); late rewinding: Frankle et al., "Stabilizing the Lottery Ticket Hypothesis"
    (arXiv 1903.01611).
    """

    def __init__(
        self, name: str, model: nn.Module, checkpoint: str | None = None, late: bool = False
    ) -> None:
        if checkpoint is not None and late:
            raise DistillerError("both 'checkpoint' and 'late' given; give one")
        if checkpoint is None and not late and getattr(unwrap(model), "is_foreseen", False):
            raise DistillerError(
                "the weights that the run started with are of the model before its layers are replaced; give "
                "'late: true', or rewind before that epoch"
            )
        self.name = name
        self._shapes = {name: value.shape for name, value in canonical_state_dict(model).items()}
        self._origin = f"of {checkpoint}" if checkpoint else "that the run started with"
        self._weights: dict[str, Tensor] | None = None
        if checkpoint is not None:
            self._weights = _weights_in(checkpoint, model)
        elif not late:
            self._weights = kept_weights(model)
        self._is_late = late

    def acts_on(self, model: nn.Module) -> tuple[str, ...]:
        """All parameters: it cannot put back those of layers that were replaced."""
        return tuple(name for name, _ in named_parameters(model))

    def on_minibatch_begin(self, ctx: StepContext) -> None:
        """Before the first mini-batch, when the masks of this epoch are there, rewind."""
        if ctx.minibatch != 0:
            return
        if self._weights is None:
            self._weights = kept_weights(ctx.model)
            if ctx.window.last == ctx.epoch:
                _LOG.warning("'%s': epoch %d %s", self.name, ctx.epoch, self._doing(ctx))
            return
        if ctx.optimizer is None:
            raise DistillerError(
                f"'{self.name}': needs the optimizer, which begins anew; pass it to on_minibatch_begin"
            )
        put_back(ctx.model, self._weights)
        for entry in ctx.masks.values():
            entry.is_dirty = True  # so that the scheduler masks the weights before the forward pass
        ctx.optimizer.state.clear()
        _LOG.info("'%s': epoch %d %s", self.name, ctx.epoch, self._doing(ctx))

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Of the earlier weights those stay that the model still has."""
        for name, kept in cuts.items():
            self._shapes[name] = torch.Size(cut_shape(self._shapes[name], kept))
            if self._weights is not None:
                self._weights[name] = cut(self._weights[name], kept)

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        return f"{type(self).__name__}: {self._doing(ctx)}"

    def state_dict(self) -> dict[str, Any]:
        """The earlier weights; None before there are any."""
        return {"weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the earlier weights in `state`.

        Raises:
            CheckpointError: they are not of this model.
        """
        weights = state["weights"]
        if weights is not None:
            shapes = {name: value.shape for name, value in weights.items()}
            if shapes != self._shapes:
                raise CheckpointError(
                    f"the weights that '{self.name}' puts back are of another model than this one; "
                    "resume with the same model"
                )
        self._weights = weights

    def _doing(self, ctx: StepContext) -> str:
        """What happens in an epoch, in words that continue its number."""
        first = ctx.window.start
        if not self._is_late:
            return f"begins with the weights {self._origin}"
        if ctx.epoch != first:
            return f"begins with the weights that epoch {first} began with"
        if ctx.window.last == first:
            return "keeps weights that no later epoch puts back; give its policy more epochs"
        return "keeps the weights that it begins with, for the policy's later epochs"


def _weights_in(path: str, model: nn.Module) -> dict[str, Tensor]:
    """The weights of a checkpoint, as they would be in the model.

    Of a checkpoint from before the model was thinned, those of what the model still has.
    """
    checkpoint, recipes = read_checkpoint(path), recipes_of(model)
    done = len(checkpoint.thinning_recipes)
    if done < len(recipes) and checkpoint.thinning_recipes == recipes[:done]:
        state = cut_by(recipes[done:], checkpoint.state_dict)
        checkpoint = Checkpoint(checkpoint.path, state, arch=checkpoint.arch, thinning_recipes=recipes)
    stand_in = copy.deepcopy(model)
    load_state(stand_in, checkpoint)
    return kept_weights(stand_in)
