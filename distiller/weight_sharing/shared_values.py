"""Weights of few values: which value each element has, and how elements of one value move together.

Elements of one code have one gradient, the mean of theirs, and one value, the mean of theirs: the step of a
trained centroid whose gradient, the sum over its elements, is divided by their number, so that the learning
rate of weights suits it. Knows nothing about models, or where values come from.

Source: Han et al., Deep Compression, ICLR 2016 (arXiv 1510.00149), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distiller.tensor_cuts import TensorCuts, cut

__all__ = ["KEPT", "SharedWeights", "component_values", "means_by_code"]

KEPT = 255
"""The code of an element that shares no value, and stays as it is."""


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Parameters that share values.

    Attributes:
        values: (count,), float64, at most 255; the first is 0.
        codes: by parameter, uint8 in its shape: numbers of values, or `KEPT`.
    """

    values: Tensor
    codes: Mapping[str, Tensor]

    @property
    def sparsity(self) -> float:
        """The fraction of the elements that are zero."""
        count = sum(codes.numel() for codes in self.codes.values())
        return sum(int((codes == 0).sum()) for codes in self.codes.values()) / max(1, count)

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the elements their values.

        Args:
            tensors: by parameter; what is no parameter of these is left alone.
        """
        for name in self.codes.keys() & tensors.keys():
            tensor = tensors[name]
            tensor.copy_(component_values(tensor.detach(), self.codes[name], self.values))

    def share_gradients(self, params: Mapping[str, Tensor]) -> None:
        """Give the elements of a value the mean of their gradients; those of zero have none.

        Args:
            params: by name, before the optimizer's step.
        """
        alive = self.without_pruned(params)
        gradients: dict[str, Tensor] = {}
        for name in self.codes:
            gradient = params[name].grad
            if gradient is not None:
                gradients[name] = gradient
        alive = replace(alive, codes={name: alive.codes[name] for name in gradients})
        replace(alive, values=alive.recentred(gradients).values).write(gradients)

    def recentred(self, tensors: Mapping[str, Tensor]) -> SharedWeights:
        """With the mean of its elements for each value; zero stays, and so does a value without elements.

        Args:
            tensors: by parameter.
        """
        means = means_by_code(tensors, self.codes)[: len(self.values)]
        means = torch.where(means.isnan(), self.values, means)
        means[0] = 0.0
        return replace(self, values=means)

    def without_pruned(self, params: Mapping[str, Tensor]) -> SharedWeights:
        """With code 0 for elements that are exactly 0 by now: they have been pruned since, and count no more.

        Args:
            params: by name.
        """
        codes = {
            name: torch.where((params[name].detach() == 0) & (codes != KEPT), 0, codes).to(torch.uint8)
            for name, codes in self.codes.items()
        }
        return replace(self, codes=codes)

    def after_cuts(self, cuts: TensorCuts) -> SharedWeights:
        """With the codes of the elements that stay in a smaller model."""
        codes = {name: cut(codes, cuts.get(name, {})) for name, codes in self.codes.items()}
        return replace(self, codes=codes)


def component_values(values: Tensor, codes: Tensor, means: Tensor) -> Tensor:
    """The means that the codes stand for; what is `KEPT` stays.

    Args:
        values: the weights.
        codes: uint8, alike.
        means: (components,).
    """
    is_kept = codes == KEPT
    table = means.to(values.device, values.dtype)
    shared = table[torch.where(is_kept, 0, codes).long()]
    return torch.where(is_kept, values, shared)


@torch.no_grad()
def means_by_code(tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> Tensor:
    """The mean over all elements of each code, (256,), float64; NaN where there are none.

    Args:
        tensors: by name, floating point.
        codes: by name, uint8 in the shape of the tensor.
    """
    sums, counts = torch.zeros(2, KEPT + 1, dtype=torch.float64)
    for name, places in codes.items():
        flat = places.flatten().int()
        sums += torch.bincount(flat, tensors[name].detach().flatten().double(), KEPT + 1).cpu()
        counts += torch.bincount(flat, minlength=KEPT + 1).cpu()
    return sums / counts
