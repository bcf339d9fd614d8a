"""What soft weight sharing keeps of each epoch: mixtures, figures, and a sample of the weights.

Plain data, so that it can be a part of checkpoints.
Knows nothing about how mixtures are learned or drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distiller.tensor_cuts import TensorCuts, cut
from distiller.weight_sharing.mixture import Mixture

__all__ = ["EpochOfSharing", "SharingHistory"]


@dataclass(frozen=True, slots=True)
class EpochOfSharing:
    """An epoch's end.

    Attributes:
        epoch: from 0.
        mixtures: by what they are of: `all`, or the parameter's name.
        figures: `loss` and `top1` (percent) of validation, and `sparsity`: the fraction of the weights whose
            nearest mean is zero.
        weights: by parameter, the sample, float32.
    """

    epoch: int
    mixtures: Mapping[str, Mixture]
    figures: Mapping[str, float]
    weights: Mapping[str, Tensor]


class SharingHistory:
    """The epochs so far.

    Args:
        shapes: of the parameters, by canonical name.
        samples: how many weights are kept of each epoch, equally far apart in each parameter, in proportion
            to its size; 0: none.

    Attributes:
        before: by parameter, the sample as it was before the first epoch; {} until then.
        epochs: in order.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], samples: int) -> None:
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        total = sum(sizes.values())
        self._places = {
            name: _spread(size, min(size, -(-samples * size // total)) if total else 0)
            for name, size in sizes.items()
        }
        self.before: dict[str, Tensor] = {}
        self.epochs: list[EpochOfSharing] = []

    def begin(self, params: Mapping[str, Tensor]) -> None:
        """Keep the weights as they are before the first epoch."""
        if not self.before:
            self.before = self._sample(params)

    def add(
        self,
        epoch: int,
        params: Mapping[str, Tensor],
        mixtures: Mapping[str, Mixture],
        figures: Mapping[str, float],
    ) -> None:
        """Keep an epoch, at its end."""
        self.epochs.append(EpochOfSharing(epoch, dict(mixtures), dict(figures), self._sample(params)))

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Of the samples those stay whose weights do."""
        for name, kept in cuts.items():
            if name not in self._places:
                continue
            ids = torch.arange(torch.Size(self._shapes[name]).numel()).view(self._shapes[name])
            left = cut(ids, kept)
            self._shapes[name] = tuple(left.shape)
            left = left.flatten()
            stays = torch.isin(self._places[name], left)
            self._places[name] = torch.searchsorted(left, self._places[name][stays])
            for sample in (self.before, *(entry.weights for entry in self.epochs)):
                if name in sample:
                    sample[name] = sample[name][stays]  # type: ignore[index] - they are ours

    def state_dict(self) -> dict[str, Any]:
        """As plain data and tensors."""
        return {
            "places": dict(self._places),
            "before": dict(self.before),
            "epochs": [
                {
                    "epoch": entry.epoch,
                    "mixtures": {
                        group: {
                            "means": mixture.means,
                            "precisions": mixture.precisions,
                            "mixing": mixture.mixing,
                        }
                        for group, mixture in entry.mixtures.items()
                    },
                    "figures": dict(entry.figures),
                    "weights": dict(entry.weights),
                }
                for entry in self.epochs
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` left off; the shapes are those of the parameters now."""
        self._places = dict(state["places"])
        self.before = dict(state["before"])
        self.epochs = epochs_in(state)

    def _sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: params[name].detach().reshape(-1)[places.to(params[name].device)].float().cpu()
            for name, places in self._places.items()
        }


def epochs_in(state: Mapping[str, Any]) -> list[EpochOfSharing]:
    """The epochs of a history's `state_dict`."""
    return [
        EpochOfSharing(
            entry["epoch"],
            {group: Mixture(**tensors) for group, tensors in entry["mixtures"].items()},
            dict(entry["figures"]),
            dict(entry["weights"]),
        )
        for entry in state["epochs"]
    ]


def _spread(size: int, count: int) -> Tensor:
    """`count` whole numbers from 0 to size - 1, equally far apart."""
    return (
        (torch.arange(count) * size + size // 2) // max(count, 1)
        if count
        else torch.zeros(0, dtype=torch.long)
    )
