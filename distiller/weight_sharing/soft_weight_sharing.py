"""Soft weight sharing as a policy: weights are drawn to components of a mixture that is learned with them.

Knows nothing about data, or what is done with the mixture in the end (`quantize_to_mixture`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from distiller.errors import CheckpointError, DistillerError
from distiller.interfaces import LossComponent, Policy, PolicyLoss, StepContext
from distiller.names import named_parameters, owner, resolve_all
from distiller.pruning.settings import (
    LARGEST,
    Names,
    as_names,
    check_number,
    check_whole_number,
    checked_number,
    checked_whole_number,
)
from distiller.registry import EXTENSIONS
from distiller.regularization.refusals import refuse_nan
from distiller.signatures import Checked
from distiller.tensor_cuts import TensorCuts
from distiller.weight_sharing.components import (
    MOST_COMPONENTS,
    assign_to_components,
    check_share,
    start_mixture,
)
from distiller.weight_sharing.history import SharingHistory
from distiller.weight_sharing.learned_mixture import LearnedMixture
from distiller.weight_sharing.mixture import Mixture
from distiller.weight_sharing.priors import BETA_SETTINGS, GAMMA_SETTINGS, BetaPrior, GammaPrior

__all__ = ["ALL", "SoftWeightSharing", "default_weights"]

ALL = "all"
"""The name of the mixture that all parameters share."""
_WIDEST, _NARROWEST = -20.0, 20.0  # of log-precisions: standard deviations of 2e4 and 5e-5
_SHARE = Checked(lambda value: check_share("", value), {"exclusiveMinimum": 0, "exclusiveMaximum": 1})
_RATE = Annotated[float, checked_number(most=1000.0)]


@EXTENSIONS.register
class SoftWeightSharing(Policy):
    """Adds tau * C to the loss, the negative log-likelihood of the weights under a Gaussian mixture.

        C = -sum_i log sum_j pi_j N(w_i; mu_j, 1 / lambda_j) + priors of lambda and pi_0

    Component 0 stays at zero. The means of the others, all precisions and the mixing weights are learned by
    an Adam of their own, with a learning rate each; the weights by the optimizer of the training. What the
    mixture is for comes afterwards: `QuantizeToMixture` gives every weight the value of its component.

    The mixture of each epoch, and a sample of the weights, are part of the checkpoint: `--plot-mixture` draws
    them.

    Args:
        name: the instance's name in the schedule.
        model: the model in training; the mixture begins with what its weights are now.
        weights: parameter names or patterns, "*" for all; None, the default: every parameter of two or more
            dimensions.
        components: with that at zero, from 2 to 255.
        pi_zero: share of the zero component, in (0, 1).
        learn_pi_zero: it is learned, too; else it stays.
        initial_means: "linspace": equally far apart over the range of the weights, the default; "quantiles",
            "kmeans"; or `components - 1` numbers.
        initial_std: of every component, above 0.
        tau: the strength, from 0; the loss is the mean over samples, C a sum over weights.
        zero_prior: Gamma on the precision of the zero component: {mean, variance} or {alpha, beta}; None, the
            default: none.
        prior: the same for each of the others.
        pi_zero_prior: Beta on pi_0, {alpha, beta}; only with `learn_pi_zero`.
        mean_lr: learning rate of the means, from 0; 0 keeps them.
        precision_lr: of the logarithms of precisions (and scales).
        mixing_lr: of the logits of the mixing weights.
        per_parameter: a mixture for each parameter, rather than one for all.
        scaling: the mixture of a layer is that of the first layer times a learned scale.
        every: steps from one penalty to the next, from 1; it then counts so many times as much.
        history: how many weights of each epoch are kept for plots, 0 for none.
        okz12: mixing weights and density as in okz12/NeuralNetworkCompression, see `learned_mixture`.

    Raises:
        DistillerError: a name that the model does not have, or a setting out of its range.

    Source: Ullrich, Meeds, Welling, Soft Weight-Sharing for Neural Network Compression, ICLR 2017 (arXiv
    1702.04008).
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        weights: Names | None = None,
        components: Annotated[int, checked_whole_number(2, MOST_COMPONENTS)] = 16,
        pi_zero: Annotated[float, _SHARE] = 0.99,
        learn_pi_zero: bool = False,
        initial_means: Literal["linspace", "quantiles", "kmeans"] | list[float] = "linspace",
        initial_std: Annotated[float, checked_number(above=0)] = 0.25,
        tau: Annotated[float, checked_number()] = 1e-6,
        zero_prior: Annotated[dict[str, float], GAMMA_SETTINGS] | None = None,
        prior: Annotated[dict[str, float], GAMMA_SETTINGS] | None = None,
        pi_zero_prior: Annotated[dict[str, float], BETA_SETTINGS] | None = None,
        mean_lr: _RATE = 5e-5,
        precision_lr: _RATE = 3e-3,
        mixing_lr: _RATE = 3e-3,
        per_parameter: bool = False,
        scaling: bool = False,
        every: Annotated[int, checked_whole_number(1)] = 1,
        history: Annotated[int, checked_whole_number(0)] = 10_000,
        okz12: bool = False,
    ) -> None:
        check_whole_number("components", components, least=2, most=MOST_COMPONENTS)
        check_whole_number("every", every, least=1, most=10**9)
        check_share("pi_zero", pi_zero)
        check_number("initial_std", initial_std, above=0)
        check_number("tau", tau, most=LARGEST)
        self._refuse_what_does_nothing(learn_pi_zero, pi_zero_prior, per_parameter, scaling, okz12)
        self.name, self.tau, self.every = name, tau, every
        params = dict(named_parameters(model))
        self.param_names = (
            resolve_all(as_names(weights), params) if weights is not None else default_weights(model)
        )
        refuse_nan(name, {key: params[key] for key in self.param_names})
        self._zero_prior = GammaPrior.of(zero_prior, "zero_prior") if zero_prior else None
        self._prior = GammaPrior.of(prior, "prior") if prior else None
        self._share_prior = BetaPrior.of(pi_zero_prior, "pi_zero_prior") if pi_zero_prior else None

        groups = {key: (key,) for key in self.param_names} if per_parameter else {ALL: self.param_names}
        self._groups: dict[str, tuple[str, ...]] = groups
        self._start = partial(
            start_mixture, components=components, pi_zero=pi_zero, means=initial_means, std=initial_std
        )
        self._learn = partial(LearnedMixture, learns_zero_share=learn_pi_zero, okz12=okz12)
        self._has_begun = False
        self.learned = self._started(params)
        layers = list(dict.fromkeys(owner(key) for key in self.param_names))
        device = params[self.param_names[0]].device
        self.log_scales = {
            layer: torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
            for layer in (layers[1:] if scaling else ())
        }
        rates = {"means": mean_lr, "log_precisions": precision_lr, "logits": mixing_lr}
        self._optimizer = torch.optim.Adam(
            [
                *(
                    {"params": [learned.tensors[key] for learned in self.learned.values()], "lr": rate}
                    for key, rate in rates.items()
                ),
                *(
                    [{"params": list(self.log_scales.values()), "lr": precision_lr}]
                    if self.log_scales
                    else []
                ),
            ]
        )
        self.history = SharingHistory({key: params[key].shape for key in self.param_names}, history)

    def penalty(self, params: Mapping[str, Tensor]) -> Tensor:
        """C of the parameters, by canonical name: a scalar, not multiplied by tau."""
        total = None
        for group, names in self._groups.items():
            learned = self.learned[group]
            flat = [params[name].reshape(-1) for name in names]
            scaled = [self._unscaled(name, values) for name, values in zip(names, flat, strict=True)]
            term = learned.penalty(torch.cat(scaled))
            term = term + learned.hyper_penalty(self._zero_prior, self._prior, self._share_prior)
            total = term if total is None else total + term
        assert total is not None
        for name in self.param_names:
            scale = self.log_scales.get(owner(name))
            total = total if scale is None else total + params[name].numel() * scale
        return total

    def mixture_of(self, param_name: str) -> Mixture:
        """The mixture of a parameter as it is now, in that parameter's scale.

        Args:
            param_name: canonical, one of `param_names`.
        """
        group = next(group for group, names in self._groups.items() if param_name in names)
        mixture = self.learned[group].mixture()
        log_scale = self.log_scales.get(owner(param_name))
        if log_scale is None:
            return mixture
        scale = log_scale.detach().double().exp().cpu()
        return Mixture(mixture.means * scale, mixture.precisions / scale.square(), mixture.mixing)

    def check(self, model: nn.Module) -> None:  # noqa: D102
        resolve_all(self.param_names, dict(named_parameters(model)))

    def acts_on(self, model: nn.Module) -> tuple[str, ...]:  # noqa: D102
        return resolve_all(self.param_names, dict(named_parameters(model)))

    def on_epoch_begin(self, ctx: StepContext) -> None:
        """Refuse parameters that hold NaN; in the first epoch, begin with the weights as they are by now."""
        params = self._params(ctx)
        refuse_nan(self.name, params)
        if not self._has_begun:
            self._has_begun = True
            for group, fresh in self._started(params).items():
                self.learned[group].load({key: tensor.detach() for key, tensor in fresh.tensors.items()})
        self.history.begin(params)

    def before_backward_pass(self, ctx: StepContext, loss: Tensor) -> PolicyLoss | None:  # noqa: D102
        if ctx.global_step % self.every:
            return None
        penalty = (self.tau * self.every * self.penalty(self._params(ctx))).to(loss.dtype)
        return PolicyLoss(loss + penalty, (LossComponent(f"{type(self).__name__}_loss", penalty.detach()),))

    def before_parameter_optimization(self, ctx: StepContext) -> None:
        """Let the mixture take a step, if there was a penalty."""
        self._optimizer.step()  # what has no gradient stays
        for group in self._optimizer.param_groups:
            for tensor in group["params"]:
                tensor.grad = None
        with torch.no_grad():
            for learned in self.learned.values():
                learned.log_precisions.clamp_(_WIDEST, _NARROWEST)

    def on_epoch_end(self, ctx: StepContext, metrics: Mapping[str, float]) -> None:
        """Keep the epoch's mixtures, and a sample of its weights."""
        params = self._params(ctx)
        mixtures = {name: self.mixture_of(name) for name in params}
        zeros = sum(
            int((assign_to_components(param, mixtures[name], "l2") == 0).sum())
            for name, param in params.items()
        )
        sparsity = zeros / sum(param.numel() for param in params.values())
        shown = {group: self.learned[group].mixture() for group in self._groups}
        self.history.add(ctx.epoch, params, shown, {**metrics, "sparsity": sparsity})

    def follow_thinning(self, cuts: TensorCuts) -> None:  # noqa: D102
        self.history.follow_thinning(cuts)

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        count = len(next(iter(self.learned.values())).log_precisions)
        each = " each" if len(self._groups) > 1 else ""
        what = f"{type(self).__name__}: {', '.join(self.param_names)}"
        return f"{what}: {count} components{each}, tau {self.tau:g}"

    def state_dict(self) -> dict[str, Any]:
        """The mixtures, the state of their optimizer, and the history."""
        return {
            "has_begun": self._has_begun,
            "mixtures": {
                group: {key: tensor.detach().clone() for key, tensor in learned.tensors.items()}
                for group, learned in self.learned.items()
            },
            "log_scales": {layer: scale.detach().clone() for layer, scale in self.log_scales.items()},
            "optimizer": self._optimizer.state_dict(),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the mixtures in `state`.

        Raises:
            CheckpointError: they are of other parameters, or of other sizes.
        """
        saved = {group: _sizes(tensors) for group, tensors in state["mixtures"].items()}
        here = {group: _sizes(learned.tensors) for group, learned in self.learned.items()}
        if saved != here or state["log_scales"].keys() != self.log_scales.keys():
            raise CheckpointError(
                f"the checkpoint's mixtures of '{self.name}' are of {saved}, this schedule's of {here}; "
                "resume with the same schedule"
            )
        for group, tensors in state["mixtures"].items():
            self.learned[group].load(tensors)
        with torch.no_grad():
            for layer, scale in state["log_scales"].items():
                self.log_scales[layer].copy_(scale)
        self._has_begun = bool(state["has_begun"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.history.load_state_dict(state["history"])

    def _started(self, params: Mapping[str, Tensor]) -> dict[str, LearnedMixture]:
        """Mixtures as they begin, of the weights as they are."""
        return {
            group: self._learn(self._start(_joined(params, names)), device=params[names[0]].device)
            for group, names in self._groups.items()
        }

    def _unscaled(self, name: str, values: Tensor) -> Tensor:
        """The weights in the scale of the first layer."""
        scale = self.log_scales.get(owner(name))
        return values if scale is None else values * (-scale).exp().to(values.dtype)

    def _params(self, ctx: StepContext) -> dict[str, nn.Parameter]:
        params = ctx.masks.params
        return {name: params[name] for name in self.param_names}

    @staticmethod
    def _refuse_what_does_nothing(
        learn_pi_zero: bool, pi_zero_prior: object, per_parameter: bool, scaling: bool, okz12: bool
    ) -> None:
        if pi_zero_prior and not learn_pi_zero:
            raise DistillerError("pi_zero_prior: does nothing where pi_zero stays; give learn_pi_zero: true")
        if per_parameter and scaling:
            raise DistillerError(
                "both 'per_parameter' and 'scaling' given: a mixture of its own needs no scale"
            )
        if okz12 and learn_pi_zero:
            raise DistillerError("both 'okz12' and 'learn_pi_zero' given: there pi_zero is fixed")


def default_weights(model: nn.Module) -> tuple[str, ...]:
    """The names of all parameters of two or more dimensions.

    Raises:
        DistillerError: there are none.
    """
    found = tuple(name for name, param in named_parameters(model) if param.dim() >= 2)
    if not found:
        raise DistillerError("weights: the model has no parameter of two or more dimensions; name some")
    return found


def _joined(params: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return torch.cat([params[name].detach().reshape(-1).float() for name in names])


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {key: tensor.numel() for key, tensor in tensors.items()}
