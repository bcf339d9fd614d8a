"""The schedule extension that factors layers of the model in training.

Knows nothing about how factors are found, or about checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any

from torch import nn

from distiller.epoch_window import EpochWindow
from distiller.errors import DistillerError
from distiller.factorization.factorize import FactorizationReport, factorize, recipe_of
from distiller.factorization.input_moments import InputMoments
from distiller.factorization.planning import (
    AboveBreakEven,
    check_budgets,
    check_share,
    example_input,
    plan_without_weights,
)
from distiller.factorization.replacement import (
    apply_factorization,
    copied,
    factorizations_of,
    require_runs,
    with_layers_whole,
)
from distiller.factorization.settings import LAYER_SETTINGS, layers_of
from distiller.interfaces import StepContext
from distiller.layer_replacement import LayerReplacer
from distiller.names import unwrap
from distiller.pruning.settings import check_whole_number, checked_whole_number, some_named
from distiller.registry import EXTENSIONS
from distiller.signatures import Checked

__all__ = ["LowRankFactorization"]

_LOG = logging.getLogger(__name__)
_MOST_BATCHES = 10**6


_SOME_LAYERS = some_named("layer name or pattern")
_Share = Annotated[float, Checked(check_share, {"exclusiveMinimum": 0, "exclusiveMaximum": 1})]


@EXTENSIONS.register
class LowRankFactorization(LayerReplacer):
    """Replaces layers by products of smaller ones, W ~ L R, before the first mini-batch of its first epoch.

    The factors are ordinary layers under the name of the old one (`fc1.first`, `fc1.second`; of `tucker2`
    `first`, `core`, `last`; of a sparse part `sparse`), which train on, with the optimizer's settings of the
    weight that they take the place of. Policies of later epochs name their parameters (`fc1.first.weight`),
    those of earlier epochs the old ones. Once done, there is nothing more to do: further epochs are idle.

    With `whitened` layers the policy needs two epochs: in the first it collects the second moments of their
    inputs, and it factors at the beginning of the second.

    Args:
        name: the instance's name in the schedule.
        layers: settings by name or pattern of a layer; default every layer that can be factored. `form`: svd
            (linear layers), channel (default of convolutions), spatial or tucker2; one of `rank` (a number,
            or [in, out] of tucker2), `energy`, `parameters` and `macs` (fractions of the layer's own);
            `sparse`, the fraction of elements that a sparse part has; `whitened: true`, the error is least
            on the layer's inputs.
        parameters: a budget for the layers that have no rank of their own: the fraction of the WHOLE model's
            parameters that it is to have, more than 0 and less than 1.
        macs: the same of its multiply-accumulates; not together with `parameters`.
        above_break_even: `keep`: a layer that its rank would not make smaller stays whole; `refuse`: it is
            an error.
        calibration_batches: mini-batches that moments of inputs are collected from, 1 or more.

    Raises:
        DistillerError: a setting out of range, or two that exclude each other.

    Source: Denton et al., "Exploiting Linear Structure Within Convolutional Networks for Efficient
    Evaluation" (2014); of the forms, see `decompositions`.
    """

    def __init__(
        self,
        name: str,
        layers: Annotated[dict[str, Annotated[dict[str, Any], LAYER_SETTINGS]], _SOME_LAYERS] | None = None,
        parameters: _Share | None = None,
        macs: _Share | None = None,
        above_break_even: AboveBreakEven = "keep",
        calibration_batches: Annotated[int, checked_whole_number(1, _MOST_BATCHES)] = 32,
    ) -> None:
        check_budgets(parameters, macs)
        check_whole_number("calibration_batches", calibration_batches, least=1, most=_MOST_BATCHES)
        self.name = name
        self.layers: Mapping[str, Mapping[str, Any]] = layers or {"*": {}}
        self.above_break_even: AboveBreakEven = above_break_even
        self.calibration_batches = calibration_batches
        self.report: FactorizationReport | None = None
        """Of the factorization; None before it."""
        self._budget = {"parameters": parameters, "macs": macs}
        self._moments: InputMoments | None = None

    @property
    def is_whitened(self) -> bool:
        """Whether the errors of some layers are to be least on their inputs."""
        return any(settings.get("whitened") for settings in self.layers.values())

    def epoch_of_replacement(self, window: EpochWindow) -> int:
        """The first epoch; with whitened layers the second."""
        return window.epochs[min(int(self.is_whitened), len(window.epochs) - 1)]

    def check_epochs(self, window: EpochWindow) -> None:
        """See to it that there is an epoch to collect in."""
        if self.is_whitened and len(window.epochs) < 2:
            raise DistillerError(
                "'whitened' needs two epochs, got one: inputs are collected in the first, and layers are "
                "factored at the beginning of the second"
            )

    def check(self, model: nn.Module) -> None:
        """See to it, before training, that the model can be factored so, as far as ranks are known.

        Raises:
            DistillerError: it cannot, or nothing says what input it takes.
        """
        if hasattr(unwrap(model), "quantizer_metadata"):
            raise DistillerError(
                f"'{self.name}': the model is prepared by a quantizer; factor it first, in a run of its own, "
                "and quantize its checkpoint (--exp-load-weights-from)"
            )
        self.foreseen(model)

    def is_done(self, model: nn.Module) -> bool:
        """Whether all layers asked for have been factored, or looked at and kept."""
        done = _done(model)
        if not done:
            return False
        try:
            return set(layers_of(with_layers_whole(model, done, self.name), self.layers)) <= done
        except DistillerError:
            return False

    def foreseen(self, model: nn.Module) -> nn.Module:
        """A copy with the layers factored; where the rank follows from weights, at break-even rank."""
        inputs = example_input(model)
        plans = plan_without_weights(
            model, self.layers, inputs, **self._budget, above_break_even=self.above_break_even
        )
        recipe = recipe_of(plans)
        trial = copied(unwrap(model), f"'{self.name}'")
        apply_factorization(trial, recipe, has_weights=False)
        require_runs(trial, inputs, [layer.name for layer in recipe.layers], f"'{self.name}'")
        return trial

    def recalled(self, model: nn.Module) -> nn.Module:
        """A copy with its layers whole again."""
        done = _done(model)
        whole = with_layers_whole(model, done, f"'{self.name}'")
        return with_layers_whole(model, layers_of(whole, self.layers), f"'{self.name}'")

    def on_epoch_begin(self, ctx: StepContext) -> None:
        """Factor the layers, in the epoch of that; collect inputs, in the one before."""
        if self.is_done(ctx.model):
            if ctx.epoch == self.epoch_of_replacement(ctx.window):
                _LOG.info("'%s': the layers are factored already, nothing is done", self.name)
            return
        if ctx.epoch < self.epoch_of_replacement(ctx.window):
            whitened = [name for name, own in layers_of(ctx.model, self.layers).items() if own.whitened]
            self._moments = InputMoments(whitened)
            self._moments.attach(ctx.model)
        elif ctx.epoch == self.epoch_of_replacement(ctx.window):
            self._factor(ctx)

    def on_minibatch_end(self, ctx: StepContext) -> None:
        """Stop collecting after so many mini-batches, at the latest before validation."""
        assert ctx.minibatch is not None
        seen = ctx.minibatch + 1
        if self._moments is not None and seen in (self.calibration_batches, ctx.minibatches_per_epoch):
            self._moments.detach()

    def has_final_sparsity(self, ctx: StepContext) -> bool:
        """Whether the layers are factored: the best epoch is looked for among those of the smaller model."""
        return ctx.epoch >= self.epoch_of_replacement(ctx.window)

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        epoch = self.epoch_of_replacement(ctx.window)
        if ctx.epoch < epoch:
            return f"{type(self).__name__}: collects what the layers read, of {', '.join(self.layers)}"
        if ctx.epoch > epoch:
            return f"{type(self).__name__}: has factored {', '.join(self.layers)}"
        budget = "".join(f" to {value:.1%} of the {key}" for key, value in self._budget.items() if value)
        return f"{type(self).__name__}: factors {', '.join(self.layers)}{budget} before the first mini-batch"

    def state_dict(self) -> dict[str, Any]:
        """The moments of inputs, while they are needed."""
        return {"moments": {} if self._moments is None else self._moments.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the moments in `state`."""
        moments = state["moments"]
        self._moments = InputMoments(moments) if moments else None
        if self._moments is not None:
            self._moments.load_state_dict(moments)

    def _factor(self, ctx: StepContext) -> None:
        if ctx.optimizer is None:
            raise DistillerError(
                f"'{self.name}': needs the optimizer, in which factors take the place of weights; pass it to "
                "on_epoch_begin"
            )
        moments = {} if self._moments is None else self._moments.sums
        self.report = factorize(
            ctx.model,
            self.layers,
            **self._budget,
            above_break_even=self.above_break_even,
            moments=moments,
            optimizer=ctx.optimizer,
            masks=ctx.masks,
        )
        self._moments = None
        for policy in ctx.policies:
            policy.follow_thinning({})  # nothing was cut, but what is kept of the model's structure is old
        for layer in self.report.layers:
            _LOG.info("'%s': %s", self.name, layer)
        for what, (was, now) in (("parameters", self.report.parameters), ("MACs", self.report.macs)):
            _LOG.info("'%s': %s of the model: %s -> %s", self.name, what, f"{was:,}", f"{now:,}")


def _done(model: nn.Module) -> set[str]:
    """The layers that were factored, or looked at and kept."""
    recipes = factorizations_of(model)
    factored = {layer.name for recipe in recipes for layer in recipe.layers}
    return factored.union(*(recipe.kept for recipe in recipes))
