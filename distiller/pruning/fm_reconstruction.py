"""Pruning of input channels, with the weights that stay fitted to the layer's output.

The least squares are in `pruning.reconstruction`.
Knows nothing about when it is called or how masks are applied.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distiller.errors import DistillerError
from distiller.interfaces import DataDrivenPruner, StepContext
from distiller.names import named_modules, named_parameters
from distiller.norms import Norm, l1_norm
from distiller.pruning.activation_statistics import RunningMean, observe
from distiller.pruning.ranked_structures import RankedStructurePruner
from distiller.pruning.ranking import ranked_structures
from distiller.pruning.reconstruction import gram_matrix, input_samples, reconstructed_weights
from distiller.pruning.schedule import ConstantSparsity
from distiller.pruning.settings import Fraction, Names, check_fraction, checked_whole_number, naming
from distiller.registry import PRUNERS
from distiller.tensor_cuts import TensorCuts

__all__ = ["FMReconstructionChannelPruner"]

POINTS_PER_IMAGE = 10
"""Output positions of a convolution whose inputs are looked at, of each image."""


@PRUNERS.register
class FMReconstructionChannelPruner(RankedStructurePruner, DataDrivenPruner):
    """Prunes the input channels of least norm, and fits the weights that stay to the layer's output.

        minimise |X_kept W'^T - X W^T|^2 over W'

    X are inputs of the layer in the mini-batches of training seen since the last masks: for a convolution the
    patches under 10 output positions of each image, drawn by a generator of the pruner's own. Of them only
    X^T X is kept, in float64: (channels * kernel height * kernel width)^2 numbers for each weight. Layers are
    convolutions in two dimensions with one group, and linear ones.

    Args:
        name: the instance's name in the schedule.
        group_type: 'Channels'.
        desired_sparsity: the fraction of input channels to prune, 0..1; all of them only if it is 1.
        weights: names and shell patterns, or a single one, of weights of convolutions and linear layers.
        group_dependency: 'Leader' to rank the first of the weights for all of them.
        kwargs: nothing; taken as Distiller does.
        magnitude_fn: the norm that channels are ranked by, (tensor, dimension) -> norms; default L1.
        group_size: how many neighbouring channels stand or fall together, default 1.
        rounding_fn: from the number of channels (groups) to prune, a float, to a whole number.
        ranking_noise: the probability that a ranking is disturbed, 0..1: each magnitude is multiplied by a
            draw from N(0, 1), of torch's generator.
        model: where `check` looks for the layers, so that a schedule is refused before it trains; a
            schedule's reader supplies it. Left out, what is wrong shows when the first epoch begins.

    Raises:
        DistillerError: an argument out of range.

    Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv 1707.06168),
    section 3.1, the reconstruction; channels are chosen by norm.
    """

    norm = l1_norm

    def __init__(
        self,
        name: str,
        group_type: Literal["Channels"],
        desired_sparsity: Fraction,
        weights: Names,
        group_dependency: Literal["Leader"] | None = None,
        kwargs: dict[str, list[int]] | None = None,
        magnitude_fn: Callable[[Tensor, int], Tensor] = l1_norm,
        group_size: Annotated[int, checked_whole_number(1)] = 1,
        rounding_fn: Callable[[float], int] = math.floor,
        ranking_noise: Fraction = 0.0,
        model: nn.Module | None = None,
    ) -> None:
        if group_type != "Channels":
            raise DistillerError(f"group_type must be 'Channels', got '{group_type}'")
        check_fraction("ranking_noise", ranking_noise, one_allowed=True)
        super().__init__(
            name,
            group_type,
            weights,
            ConstantSparsity(desired_sparsity),
            group_dependency,
            kwargs,
            ranking_noise,
            group_size,
            rounding_fn,
        )
        self._norm = Norm(str(magnitude_fn), magnitude_fn)
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._grams: dict[str, RunningMean] = {}
        self._generator = torch.Generator().manual_seed(0)

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Count the channels of each of `params` and, in the model if it was given, look at their layers.

        Raises:
            DistillerError: one has not as many channels as its leader, a number that `group_size` does not
                divide, or a layer that is not supported.
        """
        super().check(params)
        if self._model is not None:
            self._layers(self._model)

    def attach(self, model: nn.Module) -> None:
        """Begin to look at the inputs of the layers.

        Raises:
            DistillerError: a layer is not supported.
        """
        self.detach()
        for param_name, layer in self._layers(model).items():
            self._handles.append(observe(self, model, layer, True, self._taker(param_name, layer)))

    def detach(self) -> None:
        """Look no longer."""
        while self._handles:
            self._handles.pop().remove()

    def reset(self) -> None:
        """Forget the inputs."""
        self.seen = 0
        self._grams = {}

    def after_backward(self, params: Mapping[str, nn.Parameter], ctx: StepContext) -> None:
        """Count the mini-batch."""
        self.seen += 1

    def refitted(self, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights fitted to the output that `params` had, zero where masked.

        Raises:
            DistillerError: no inputs of a layer have been seen.
        """
        weights: dict[str, Tensor] = {}
        for name, mask in masks.items():
            with naming(self.name, name):
                if name not in self._grams:
                    raise DistillerError(
                        f"no inputs of its layer have been seen in {self.seen} mini-batches: training did "
                        "not call the layer; take L1RankedStructureParameterPruner, which fits no weights"
                    )
                param, gram = params[name], self._grams[name].mean().flatten(2).flatten(0, 1)
                if not gram.isfinite().all():
                    raise DistillerError(
                        "the inputs of its layer hold NaN or infinity; training has diverged: resume from an "
                        "earlier checkpoint with a lower learning rate"
                    )
                fitted = reconstructed_weights(
                    param.flatten(1), gram.to(param.device), mask.flatten(1)[0] != 0
                )
                weights[name] = fitted.view(param.shape)
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Mini-batches seen, Gram matrices by parameter and device, and the generator of positions."""
        return {
            "seen": self.seen,
            "grams": {name: gram.state_dict() for name, gram in self._grams.items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the inputs in `state`."""
        self.seen = state["seen"]
        self._grams = {name: RunningMean.from_state(part) for name, part in state["grams"].items()}
        self._generator.set_state(state["generator"])

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Go on with what was seen of the input channels that stay."""
        for name, gram in self._grams.items():
            if 1 in (kept := cuts.get(name, {})):
                gram.follow_thinning({0: kept[1], 2: kept[1]})

    def _stay(self, param_name: str, param: Tensor, fraction: float) -> Tensor:
        return ranked_structures(param, self.group_type, fraction, self._norm, **self._ranking)

    def _layers(self, model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
        modules = dict(named_modules(model))
        layers: dict[str, nn.Conv2d | nn.Linear] = {}
        for param_name in self.select([name for name, _ in named_parameters(model)]):
            with naming(self.name, param_name):
                layer_name, _, kind = param_name.rpartition(".")
                layer = modules.get(layer_name)
                if isinstance(layer, nn.Conv2d) and layer.groups != 1:
                    raise DistillerError(
                        f"only convolutions of one group can be reconstructed, got {layer.groups} groups; "
                        "take L1RankedStructureParameterPruner, which fits no weights"
                    )
                if not isinstance(layer, (nn.Conv2d, nn.Linear)) or kind != "weight":
                    raise DistillerError(
                        "only weights of two-dimensional convolutions and of linear layers can be "
                        f"reconstructed, got '{kind}' of {type(layer).__name__}"
                    )
                layers[param_name] = layer
        return layers

    def _taker(self, param_name: str, layer: nn.Conv2d | nn.Linear) -> Callable[[Tensor], None]:
        me = weakref.proxy(self)

        def take(inputs: Tensor) -> None:
            samples = input_samples(layer, inputs, POINTS_PER_IMAGE, me._generator)
            mean = me._grams.setdefault(param_name, RunningMean())
            # (channels, places in a kernel) twice, so that channels can be taken out
            shape = 2 * (layer.weight.shape[1], layer.weight[0, 0].numel())
            mean.add(gram_matrix(samples).view(shape), len(samples))

        return take
