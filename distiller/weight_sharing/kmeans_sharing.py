"""A schedule extension that gives weights few values in training, by k-means, and trains these values.

Unlike `CodebookQuantizer`, which prepares layers when the schedule is read, it begins in any epoch, on the
parameters as they are by then: pruned, thinned or factorized. Knows nothing about quantized layers or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from distiller.errors import CheckpointError, DistillerError
from distiller.interfaces import Policy, StepContext
from distiller.names import named_parameters
from distiller.pruning.settings import SettingsByName, check_whole_number, checked_whole_number, some_by_name
from distiller.quantization.codebook.kmeans_1d import kmeans_1d
from distiller.registry import EXTENSIONS
from distiller.tensor_cuts import TensorCuts
from distiller.weight_sharing.shared_values import SharedWeights

__all__ = ["KMeansWeightSharing"]

_MOST_BITS = 7


@EXTENSIONS.register
class KMeansWeightSharing(Policy):
    """Lets the elements of a weight share few values, which are then trained.

    Before the first mini-batch of its first epoch each weight is clustered by k-means; elements that are
    masked or exactly 0 by then stay 0 and do not count. From there on the elements of a cluster have the
    mean of their gradients, so that they move together and stay equal, to the last bit. Codes stay as they
    were found.

    Its policy should last as long as training does: after it elements go their own ways again. Pruners may
    act at the same time, thinning too.

    Args:
        name: the instance's name in the schedule.
        model: the model in training; names are checked against it.
        bits: by parameter name, pattern or `*`, 1 to 7: a weight has up to 2^bits values beside 0.

    Raises:
        DistillerError: a name that the model does not have, or a number out of range.

    Source: Han, Mao, Dally, "Deep Compression", ICLR 2016, section 3. There a centroid's gradient is the sum
        over its elements; here their mean, for which the learning rate of weights suits.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        bits: Annotated[dict[str, Annotated[int, checked_whole_number(1, _MOST_BITS)]], some_by_name],
    ) -> None:
        self.name = name
        self._bits = SettingsByName("bits", bits)
        for key, value in bits.items():
            check_whole_number(f"bits['{key}']", value, least=1, most=_MOST_BITS)
        self._shared: dict[str, SharedWeights] = {}

    @property
    def shared(self) -> dict[str, SharedWeights]:
        """By parameter name, its values and codes; {} before the first step."""
        return dict(self._shared)

    def check(self, model: nn.Module) -> None:  # noqa: D102
        self.acts_on(model)

    def acts_on(self, model: nn.Module) -> tuple[str, ...]:  # noqa: D102
        return self._bits.select([name for name, _ in named_parameters(model)])

    def on_minibatch_begin(self, ctx: StepContext) -> None:
        """Before the first mini-batch of all, cluster the weights.

        Raises:
            DistillerError: a weight is not finite.
        """
        if self._shared:
            return
        params = ctx.masks.params
        for name in self._bits.select(list(params)):
            weight, bits, mask = params[name].detach(), self._bits.get(name), ctx.masks[name].lasting_mask
            assert bits is not None
            if not weight.isfinite().all():
                raise DistillerError(
                    f"'{self.name}': '{name}' has values that are not finite, which have no nearest value; "
                    "start from weights that are finite"
                )
            weight = weight if mask is None else weight * mask
            row = weight.flatten().to(torch.float64).cpu().numpy()[None]
            values = torch.from_numpy(kmeans_1d(row, 2 ** int(bits))[0])
            shared = SharedWeights(torch.cat([torch.zeros(1), values]), {name: _codes(weight, values)})
            shared.write(params)
            self._shared[name] = shared

    def before_parameter_optimization(self, ctx: StepContext) -> None:
        """Give the elements of a cluster the mean of their gradients."""
        for shared in self._shared.values():
            shared.share_gradients(ctx.masks.params)

    def on_minibatch_end(self, ctx: StepContext) -> None:
        """Give the elements of a cluster their mean: what the optimizer remembers may differ between them."""
        params = ctx.masks.params
        for name, shared in self._shared.items():
            alive = shared.without_pruned(params).recentred(params)
            alive.write(params)
            self._shared[name] = replace(shared, values=alive.values)

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Go on with the codes of the elements that stay."""
        self._shared = {name: shared.after_cuts(cuts) for name, shared in self._shared.items()}

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        widths = {name: self._bits.get(name) for name in self.acts_on(ctx.model)}
        told = ", ".join(f"{name} ({bits} bits)" for name, bits in widths.items())
        return f"{type(self).__name__}: {told}"

    def state_dict(self) -> dict[str, Any]:
        """The values and the codes."""
        return {
            "shared": {
                name: {"values": shared.values, "codes": shared.codes[name]}
                for name, shared in self._shared.items()
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the sharing in `state`.

        Raises:
            CheckpointError: it is of other parameters.
        """
        for name in state["shared"]:
            if self._bits.get(name) is None:
                raise CheckpointError(
                    f"the checkpoint has codes of '{name}', which '{self.name}' does not share; "
                    "resume with the same schedule"
                )
        self._shared = {
            name: SharedWeights(entry["values"], {name: entry["codes"]})
            for name, entry in state["shared"].items()
        }


def _codes(weight: Tensor, values: Tensor) -> Tensor:
    """The code of the nearest value, the larger of two that are as near; 0 where the weight is exactly 0."""
    middles = ((values[1:] + values[:-1]) / 2).to(weight.device)
    nearest = torch.bucketize(weight.to(torch.float64), middles, right=True) + 1
    return torch.where(weight == 0, 0, nearest).to(torch.uint8)
