"""L0 regularization: every group of weights gets a gate, and the expected number of open gates is penalised.

While its policy is open the gates are the masks of their parameters, so that forward passes see
weight * gate, evaluations and checkpoints too; the optimizer goes on with the dense weights.
Knows nothing about losses, data or how masks are applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from distiller.errors import CheckpointError
from distiller.interfaces import ForwardActs, LossComponent, Policy, PolicyLoss, StepContext
from distiller.masks import PLAIN_RULES, MaskRules
from distiller.names import named_parameters
from distiller.pruning.criteria import mask_like
from distiller.pruning.settings import check_number, checked_number, some_by_name
from distiller.registry import EXTENSIONS
from distiller.regularization.hard_concrete import location_of, open_probability, sampled_gates, steady_gates
from distiller.regularization.refusals import refuse_nan
from distiller.regularization.regimes import ELEMENTS, Regime, Regimes, checked_entry, family_dims
from distiller.signatures import Checked
from distiller.tensor_cuts import Kept, TensorCuts, cut, replace_data

__all__ = ["L0Regularizer"]

_GROUPS = (ELEMENTS, "2D", "Rows", "Cols", "Channels", "Filters", "3D", "4D")
_ENTRY = checked_entry(_GROUPS)
_PROBABILITY = Checked(location_of, {"exclusiveMinimum": 0, "exclusiveMaximum": 1})
_FASTEST = 1000.0  # locations beyond +-10 are open or closed for good: a step of this is past all sense
_GATED = MaskRules(forward_only=True, double_copies=True, mask_gradients=True, passing=True)


@EXTENSIONS.register
class L0Regularizer(Policy):
    """Learns which groups of weights to keep: lambda * sum_g P(gate_g != 0) joins the loss.

    In training each forward pass sees the weights times gates drawn from the hard concrete distribution;
    evaluations and checkpoints see them times the gates without noise. Both the loss and the penalty
    teach the gates' locations, which an Adam of their own updates. At the end of the policy's last epoch
    the gates are multiplied into the weights, and what has a gate of 0 stays masked.

    It is an extension, not one of the `regularizers`: it has states of its own, and acts at every step of
    the training loop. A parameter may have a mask from a pruner besides, in any order of the policies, but
    not one that acts on its forward pass only (`mask_on_forward_only`).

    Args:
        name: the instance's name in the schedule.
        model: the model in training; names and shapes are checked against it.
        reg_regims: [lambda, group] by parameter name, pattern or `*`: lambda is 0 or more (the paper's
            lambda / N, for a loss that is the mean over N samples), group one of Elements, 2D, Rows,
            Cols, Channels, Filters, 3D and 4D (table in `regimes`).
        keep_probability: that a gate is not 0 at the beginning, in (0, 1); below 0.31 the gates of
            evaluations begin closed.
        gate_lr: learning rate of the gates' locations, more than 0, at most 1000.

    Raises:
        DistillerError: a name that the model does not have, an unknown group, a number out of range, or a
            tensor that does not have such groups.

    Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization" (2018).
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        reg_regims: Annotated[dict[str, Annotated[list[Any], _ENTRY]], some_by_name],
        keep_probability: Annotated[float, _PROBABILITY] = 0.95,
        gate_lr: Annotated[float, checked_number(above=0, most=_FASTEST)] = 0.01,
    ) -> None:
        check_number("gate_lr", gate_lr, above=0, most=_FASTEST)
        location = location_of(keep_probability)
        self.name = name
        self._regimes = Regimes(model, reg_regims, _GROUPS)
        self._locations = {
            param_name: _gate_per_group(param, regime, location)
            for param_name, param, regime in self._regimes.of(dict(named_parameters(model)))
        }
        self._optimizer = torch.optim.Adam(self._locations.values(), lr=gate_lr)
        self._noise: dict[str, Tensor] = {}

    def penalty(self) -> Tensor:
        """The expected number of open gates, each times its lambda; a scalar."""
        terms = [
            self._regimes.by_name[name].strength * open_probability(location).sum()
            for name, location in self._locations.items()
        ]
        return torch.stack(terms).sum()

    def gates(self) -> dict[str, Tensor]:
        """The gates without noise by parameter name; size 1 in dimensions that do not tell groups apart."""
        return {name: steady_gates(location.detach()) for name, location in self._locations.items()}

    def check(self, model: nn.Module) -> None:  # noqa: D102
        self._regimes.select([name for name, _ in named_parameters(model)])

    def forward_acts(self, model: nn.Module) -> ForwardActs:  # noqa: D102
        return ForwardActs(gates=frozenset(self._locations))

    def acts_on(self, model: nn.Module) -> tuple[str, ...]:  # noqa: D102
        return self._regimes.select([name for name, _ in named_parameters(model)])

    def on_epoch_begin(self, ctx: StepContext) -> None:
        """Refuse parameters that hold NaN."""
        params = ctx.masks.params
        refuse_nan(self.name, {name: params[name] for name in self._locations})

    def on_minibatch_begin(self, ctx: StepContext) -> None:  # noqa: D102
        for name, location in self._locations.items():
            self._noise[name] = torch.rand_like(location)
        self._put(ctx, self._drawn())

    def before_backward_pass(self, ctx: StepContext, loss: Tensor) -> PolicyLoss:  # noqa: D102
        penalty = self.penalty()
        return PolicyLoss(loss + penalty, (LossComponent(f"{type(self).__name__}_loss", penalty.detach()),))

    def before_parameter_optimization(self, ctx: StepContext) -> None:
        """Pass the gradients of the gated weights on to the gates, and let these take a step."""
        if not self._noise:
            return
        gates: list[Tensor] = []
        gradients: list[Tensor] = []
        params = dict(named_parameters(ctx.model))
        for name, drawn in self._drawn().items():
            entry, gradient = ctx.masks[name], params[name].grad
            if gradient is None:
                continue
            assert entry.dense is not None, "the rules of gates ask for dense copies"
            of_gated = gradient.to(drawn.dtype) * entry.dense
            for slot, mask in entry.slots.items():
                if slot != self._slot:
                    of_gated = of_gated * mask
            gates.append(drawn)
            gradients.append(of_gated.sum_to_size(drawn.shape))
        torch.autograd.backward(gates, gradients)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._noise = {}

    def on_minibatch_end(self, ctx: StepContext) -> None:  # noqa: D102
        self._put(ctx, self.gates())

    def has_final_sparsity(self, ctx: StepContext) -> bool:
        """Whether the gates have become masks."""
        return ctx.epoch >= ctx.window.last

    def on_epoch_end(self, ctx: StepContext, metrics: Mapping[str, float]) -> None:
        """After the last epoch multiply the gates into the weights, and keep what is 0 masked."""
        if ctx.epoch != ctx.window.last:
            return
        params = dict(named_parameters(ctx.model))
        for name, gates in self.gates().items():
            params[name].data.mul_(gates)
            ctx.masks.put(name, mask_like(params[name], gates != 0), self._slot, PLAIN_RULES)

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Go on with the gates of the groups that stay, and with what their optimizer knows of them."""
        for name, location in self._locations.items():
            kept = _told_apart(cuts.get(name, {}), location)
            if not kept:
                continue
            for key, value in self._optimizer.state[location].items():
                if value.shape == location.shape:
                    self._optimizer.state[location][key] = cut(value, kept)
            if name in self._noise:
                self._noise[name] = cut(self._noise[name], kept)
            replace_data(location, cut(location, kept))

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        closed = sum(int((gates == 0).sum()) for gates in self.gates().values())
        count = sum(location.numel() for location in self._locations.values())
        return f"{type(self).__name__}: {', '.join(self._locations)}: {closed} of {count} gates closed"

    def state_dict(self) -> dict[str, Any]:
        """The gates' locations, and the state of their optimizer."""
        return {
            "locations": {name: location.detach().clone() for name, location in self._locations.items()},
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the gates in `state`.

        Raises:
            CheckpointError: they are of other parameters or groups.
        """
        saved = {name: tuple(location.shape) for name, location in state["locations"].items()}
        here = {name: tuple(location.shape) for name, location in self._locations.items()}
        if saved != here:
            raise CheckpointError(
                f"the checkpoint's gates of '{self.name}' are of {saved}, this schedule's of {here}; "
                "resume with the same schedule"
            )
        with torch.no_grad():
            for name, location in state["locations"].items():
                self._locations[name].copy_(location)
        self._optimizer.load_state_dict(state["optimizer"])

    def _drawn(self) -> dict[str, Tensor]:
        """The gates of this mini-batch."""
        return {name: sampled_gates(self._locations[name], noise) for name, noise in self._noise.items()}

    @property
    def _slot(self) -> str:
        return f"regularizer {self.name}"

    def _put(self, ctx: StepContext, gates: Mapping[str, Tensor]) -> None:
        params = dict(named_parameters(ctx.model))
        for name, values in gates.items():
            ctx.masks.put(name, mask_like(params[name], values.detach()), self._slot, _GATED)


def _told_apart(kept: Kept, gates: Tensor) -> Kept:
    """What stays of a parameter's gates: they have size 1 where groups are not told apart."""
    return {dim: indices for dim, indices in kept.items() if gates.shape[dim] > 1}


def _gate_per_group(param: Tensor, regime: Regime, location: float) -> Tensor:
    """The locations of a parameter's gates: its shape, with size 1 where groups are not told apart."""
    kept = range(param.dim()) if regime.group == ELEMENTS else family_dims(regime.families[0])
    shape = [size if dim in kept else 1 for dim, size in enumerate(param.shape)]
    return torch.full(shape, location, device=param.device, requires_grad=True)
