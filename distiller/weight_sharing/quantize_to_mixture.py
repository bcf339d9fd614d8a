"""The end of soft weight sharing as a policy: components merge, and every weight gets its component's value.

From then on the weights stay shared: what the optimizer changes, all weights of a component change together.
Knows nothing about data or files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from distiller.errors import CheckpointError, DistillerError
from distiller.interfaces import Policy, StepContext
from distiller.masks import PLAIN_RULES
from distiller.names import named_parameters, resolve_all
from distiller.pruning.criteria import mask_like
from distiller.pruning.settings import (
    Names,
    as_names,
    check_number,
    check_whole_number,
    checked_number,
    checked_whole_number,
)
from distiller.registry import EXTENSIONS
from distiller.regularization.refusals import refuse_nan
from distiller.tensor_cuts import TensorCuts
from distiller.weight_sharing.components import (
    MOST_COMPONENTS,
    Assignment,
    assign_to_components,
    fit_mixture,
    merge_components,
    start_mixture,
)
from distiller.weight_sharing.mixture import Mixture
from distiller.weight_sharing.shared_values import SharedWeights
from distiller.weight_sharing.soft_weight_sharing import SoftWeightSharing, default_weights

__all__ = ["QuantizeToMixture", "mixture_of_weights", "share_weights"]

_LOG = logging.getLogger(__name__)


def share_weights(
    params: Mapping[str, Tensor], mixture: Mixture, mode: Assignment = "l2", recentre: bool = False
) -> SharedWeights:
    """Which component each weight belongs to, and the values of the components. Changes nothing.

    Args:
        params: by canonical name.
        mixture: with the components that are to stay, see `merge_components`.
        mode: see `assign_to_components`.
        recentre: a component's value is the mean of its weights, rather than its own mean; where it has none
            it stays.
    """
    codes = {name: assign_to_components(param, mixture, mode) for name, param in params.items()}
    shared = SharedWeights(mixture.means.clone(), codes)
    return shared.recentred(params) if recentre else shared


def mixture_of_weights(params: Mapping[str, Tensor], components: int = 16, pi_zero: float = 0.9) -> Mixture:
    """A mixture fitted to weights as they are, by expectation maximization from their k-means.

    Args:
        params: by canonical name.
        components: with that at zero, from 2 to 255.
        pi_zero: share of the zero component that it begins with.

    Raises:
        DistillerError: there are no weights, one is no finite number, or a setting is out of its range.
    """
    if not params:
        raise DistillerError("mixture_of_weights: at least one parameter is wanted, got none")
    check_whole_number("components", components, least=2, most=MOST_COMPONENTS)
    values = torch.cat([param.detach().reshape(-1).float() for param in params.values()])
    spread = float(values.std(correction=0).clamp(min=1e-6))
    return fit_mixture(values, start_mixture(values, components, pi_zero, "kmeans", spread / 4))


@EXTENSIONS.register
class QuantizeToMixture(Policy):
    """Gives every weight the value of its component, and keeps it so: zero is pruned, the others are shared.

    Before the first mini-batch of its first epoch the mixtures that `SoftWeightSharing` of the same schedule
    has learned are merged, and the weights take their values. In the epochs of this policy all weights of a
    component have the mean of their gradients, so that they change together (the centroids are trained); a
    mask keeps zeros, also afterwards. Let it act until the end of training: after it each weight goes its own
    way again.

    Parameters without a learned mixture have one fitted to them, all together, by expectation maximization.

    Args:
        name: the instance's name in the schedule.
        model: the model in training.
        weights: parameter names or patterns; None, the default: those with a learned mixture, and where the
            schedule has none every parameter of two or more dimensions.
        mode: "l2": the nearest mean; "responsibility": the most responsible component; "p": zero where the
            zero component is that, others stay as they are; "p_l2": zero by either, else the nearest mean;
            "zero_bin": zero by "l2", others stay.
        merge_kl: neighbouring components of less divergence (the lesser KL, in nats) merge; 0: none.
        zero_merge_kl: the same of the zero component and its neighbours; None: as `merge_kl`.
        recentre: values are the means of their weights, rather than those of the components.
        train_centroids: the values are trained; else they stay as they are, whatever the optimizer does.
        components: of a mixture that is fitted, from 2 to 255.

    Raises:
        DistillerError: a name that the model does not have, or a setting out of its range.

    Source: Ullrich, Meeds, Welling, arXiv 1702.04008, appendix B; trained centroids: Han et al., Deep
    Compression (arXiv 1510.00149), section 3.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        weights: Names | None = None,
        mode: Assignment = "l2",
        merge_kl: Annotated[float, checked_number()] = 1.0,
        zero_merge_kl: Annotated[float, checked_number()] | None = None,
        recentre: bool = False,
        train_centroids: bool = True,
        components: Annotated[int, checked_whole_number(2, MOST_COMPONENTS)] = 16,
    ) -> None:
        check_number("merge_kl", merge_kl)
        if zero_merge_kl is not None:
            check_number("zero_merge_kl", zero_merge_kl)
        check_whole_number("components", components, least=2, most=MOST_COMPONENTS)
        assign_to_components(torch.zeros(0), start_mixture(torch.zeros(1)), mode)  # refuses another mode
        self.name = name
        self.mode: Assignment = mode
        self._merge_kl, self._zero_merge_kl = merge_kl, zero_merge_kl
        self._recentre, self._trains, self._components = recentre, train_centroids, components
        params = dict(named_parameters(model))
        self._asked = None if weights is None else resolve_all(as_names(weights), params)
        if self._asked is None:
            default_weights(model)
        self.shared: list[SharedWeights] = []

    def check(self, model: nn.Module) -> None:  # noqa: D102
        resolve_all(self._asked or (), dict(named_parameters(model)))

    def acts_on(self, model: nn.Module) -> tuple[str, ...]:  # noqa: D102
        return (
            resolve_all(self._asked, dict(named_parameters(model))) if self._asked else default_weights(model)
        )

    def chosen(self, model: nn.Module, policies: Iterable[Policy]) -> tuple[str, ...]:
        """The names of the parameters that it quantizes, in a schedule of these policies.

        Args:
            model: of the policy's epochs.
            policies: of the schedule; those that learn mixtures say what is quantized where no names were
                given.
        """
        if self._asked is not None:
            return self._asked
        return tuple(_learners(policies)) or default_weights(model)

    def on_minibatch_begin(self, ctx: StepContext) -> None:
        """Before the first mini-batch, quantize."""
        if ctx.minibatch == 0 and not self.shared:
            self.quantize(ctx)

    def before_parameter_optimization(self, ctx: StepContext) -> None:
        """Give all weights of a component the mean of their gradients."""
        for shared in self.shared:
            shared.share_gradients(ctx.masks.params)

    def on_minibatch_end(self, ctx: StepContext) -> None:
        """Give them one value again: what the optimizer remembers of them may differ."""
        params = ctx.masks.params
        for index, shared in enumerate(self.shared):
            alive = shared.without_pruned(params)
            if self._trains:
                alive = alive.recentred(params)
                self.shared[index] = replace(shared, values=alive.values)
            alive.write(params)

    def quantize(self, ctx: StepContext) -> None:
        """Merge components, prune, and share; what the policy does in its first epoch."""
        params = ctx.masks.params
        for mixture, names in self._mixtures(ctx):
            chosen = {name: params[name] for name in names}
            refuse_nan(self.name, chosen)
            merged = merge_components(mixture, self._merge_kl, self._zero_merge_kl)
            shared = share_weights(chosen, merged, self.mode, self._recentre)
            self.shared.append(shared)
            shared.write(params)
            for name, codes in shared.codes.items():
                ctx.masks.put(name, mask_like(params[name], codes != 0), self._slot, PLAIN_RULES)
            _LOG.info(
                "'%s': %s: %d of %d components left, sparsity %.2f %%",
                self.name, ", ".join(names), len(merged), len(mixture), 100 * shared.sparsity,
            )  # fmt: skip
            if shared.sparsity == 1:
                _LOG.warning(
                    "'%s': all weights of %s are zero now; let the mixture be learned for longer, begin "
                    "with a smaller initial_std, or give a smaller merge_kl",
                    self.name, ", ".join(names),
                )  # fmt: skip

    def has_final_sparsity(self, ctx: StepContext) -> bool:
        """Whether the weights have been quantized by the end of the epoch."""
        return ctx.epoch >= ctx.window.start

    def follow_thinning(self, cuts: TensorCuts) -> None:  # noqa: D102
        self.shared = [shared.after_cuts(cuts) for shared in self.shared]

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        what = ", ".join(self._asked) if self._asked else "what has a mixture"
        return f"{type(self).__name__}: {what}: quantized in epoch {ctx.window.start}, by {self.mode}"

    def state_dict(self) -> dict[str, Any]:
        """The values and the codes."""
        return {"shared": [{"values": shared.values, "codes": dict(shared.codes)} for shared in self.shared]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the sharing in `state`.

        Raises:
            CheckpointError: it is of other parameters.
        """
        found = [SharedWeights(entry["values"], dict(entry["codes"])) for entry in state["shared"]]
        names = {name for shared in found for name in shared.codes}
        if found and self._asked is not None and names != set(self._asked):
            raise CheckpointError(
                f"the checkpoint's '{self.name}' shares weights of {', '.join(sorted(names))}, this "
                f"schedule's of {', '.join(sorted(self._asked))}; resume with the same schedule"
            )
        self.shared = found

    @property
    def _slot(self) -> str:
        return f"extension {self.name}"

    def _mixtures(self, ctx: StepContext) -> list[tuple[Mixture, tuple[str, ...]]]:
        """Mixtures, and the parameters that each is of."""
        learned, names = _learners(ctx.policies), self.chosen(ctx.model, ctx.policies)
        found: list[tuple[Mixture, list[str]]] = []
        for name in names:
            if name not in learned:
                continue
            mixture = learned[name].mixture_of(name)
            same = next((other for known, other in found if known.equals(mixture)), None)
            if same is None:
                found.append((mixture, [name]))
            else:
                same.append(name)
        left = tuple(name for name in names if name not in learned)
        if left:
            params = ctx.masks.params
            refuse_nan(self.name, {name: params[name] for name in left})
            if any(params[name].numel() == 0 for name in left):
                raise DistillerError(f"'{self.name}': cannot share the weights of an empty parameter")
            found.append(
                (mixture_of_weights({name: params[name] for name in left}, self._components), list(left))
            )
        return [(mixture, tuple(names)) for mixture, names in found]


def _learners(policies: Iterable[Policy]) -> dict[str, SoftWeightSharing]:
    """By parameter, who learns its mixture."""
    learners = (policy for policy in policies if isinstance(policy, SoftWeightSharing))
    return {name: learner for learner in learners for name in learner.param_names}
