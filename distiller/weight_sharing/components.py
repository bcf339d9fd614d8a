"""What is done with the components of a mixture: where they begin, how they are fitted and merged, and which
of them a weight belongs to.

Knows nothing about models or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from distiller.errors import DistillerError, did_you_mean
from distiller.pruning.settings import check_number, check_whole_number
from distiller.quantization.codebook.kmeans_1d import kmeans_1d
from distiller.schedule_yaml import shown
from distiller.weight_sharing.mixture import Mixture, log_terms, mixture_moments
from distiller.weight_sharing.shared_values import KEPT

__all__ = [
    "MOST_COMPONENTS",
    "Assignment",
    "Means",
    "assign_to_components",
    "check_share",
    "divergence",
    "fit_mixture",
    "merge_components",
    "start_mixture",
]

Means = Literal["linspace", "quantiles", "kmeans"]
Assignment = Literal["l2", "p", "p_l2", "responsibility", "zero_bin"]
MOST_COMPONENTS = KEPT
"""Codes are of 8 bits, and one of them is that of what stays as it is."""
_KMEANS_SAMPLE = 20_000
_LEAST_VARIANCE = 1e-12


def start_mixture(
    values: Tensor,
    components: int = 16,
    pi_zero: float = 0.99,
    means: Means | Sequence[float] = "linspace",
    std: float = 0.25,
) -> Mixture:
    """A mixture to begin with: one component at zero, the others alike.

    Args:
        values: the weights, any shape, finite.
        components: all of them, from 2 to 255.
        pi_zero: the share of the zero component, in (0, 1).
        means: of the others: "linspace": equally far apart from the least weight to the largest; "quantiles":
            equally many weights apart; "kmeans": their k-means; or `components - 1` numbers.
        std: of every component, above 0.

    Raises:
        DistillerError: not as many means as there are components, an unknown way to find them, a number out
            of range, or weights that are no finite numbers.
    """
    check_whole_number("components", components, least=2, most=MOST_COMPONENTS)
    check_share("pi_zero", pi_zero)
    if not values.numel() or not values.isfinite().all():
        got = "none" if not values.numel() else f"{int((~values.isfinite()).sum())} that are not"
        raise DistillerError(f"a mixture needs weights, all of them finite numbers, got {got}")
    check_number("std", std, above=0)
    free = _free_means(values.detach().reshape(-1).double().cpu(), components - 1, means)
    mixing = torch.full((components,), (1 - pi_zero) / (components - 1), dtype=torch.float64)
    mixing[0] = pi_zero
    return Mixture(
        torch.cat((torch.zeros(1, dtype=torch.float64), free)),
        torch.full((components,), std**-2, dtype=torch.float64),
        mixing,
    )


def check_share(argument: str, value: float) -> None:
    """Refuse what is no share of several.

    Raises:
        DistillerError: it is not more than 0 and less than 1.
    """
    if not 0 < value < 1:
        raise DistillerError(f"{argument} must be in (0, 1), got {value!r}".lstrip())


def fit_mixture(values: Tensor, start: Mixture, steps: int = 30, least_std: float = 1e-3) -> Mixture:
    """Expectation maximization: the mixture that the weights are likely under; the mean of zero stays.

    Args:
        values: the weights, any shape, finite.
        start: where it begins.
        steps: of expectation maximization.
        least_std: no component becomes narrower.

    Source: Dempster, Laird, Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm (1977).
    """
    means, precisions, mixing = (x.clone() for x in (start.means, start.precisions, start.mixing))
    for _ in range(steps):
        found = mixture_moments(
            values, *(x.to(values.device) for x in (means, precisions.log(), mixing.log()))
        )
        shares, pulls, excesses = (x.cpu() for x in (found.shares, found.pulls, found.excesses))
        counted = shares.clamp(min=1e-9)
        mean_distances = pulls / precisions / counted
        squares = (excesses + shares) / precisions / counted
        shift = mean_distances.clone()
        shift[0] = 0.0
        means = means + shift
        variances = squares - 2 * shift * mean_distances + shift.square()
        precisions = variances.clamp(min=max(least_std**2, _LEAST_VARIANCE)).reciprocal()
        mixing = counted / counted.sum()
    return Mixture(means, precisions, mixing)


def divergence(mixture: Mixture) -> Tensor:
    """The lesser of KL(N_j || N_k) and KL(N_k || N_j) of each pair of components, (components, components).

        KL(N_1 || N_2) = (log(lambda_1 / lambda_2) + lambda_2 / lambda_1 + lambda_2 (mu_1 - mu_2)^2 - 1) / 2

    It is small where one of the two covers the other.
    """
    precisions = mixture.precisions
    ratio = precisions.unsqueeze(0) / precisions.unsqueeze(1)
    gap = mixture.means.unsqueeze(0) - mixture.means.unsqueeze(1)
    one_way = (-ratio.log() + ratio + precisions.unsqueeze(0) * gap.square() - 1) / 2
    return torch.minimum(one_way, one_way.t())


def merge_components(
    mixture: Mixture, threshold: float = 1.0, zero_threshold: float | None = None
) -> Mixture:
    """Merge neighbours that overlap, the closest first, until none does.

    Two components become one of their shares, mean and variance together. What merges with the zero component
    becomes part of it: that stays at zero, with its precision. Without that a narrow zero component loses
    weights that are all but zero to a component beside it, whose mean is nearer to them.

    Args:
        mixture: as it was learned.
        threshold: neighbours of less `divergence` merge; 0: none does.
        zero_threshold: the same beside the zero component; None: as the others.

    Returns:
        The mixture, zero first, the others by their means.

    Raises:
        DistillerError: a threshold below 0, or none.

    Source: Ullrich, Meeds, Welling, arXiv 1702.04008, appendix B.
    """
    zero_threshold = threshold if zero_threshold is None else zero_threshold
    check_number("threshold", threshold)
    check_number("zero_threshold", zero_threshold)
    order = mixture.means[1:].argsort(stable=True) + 1
    order = torch.cat((torch.zeros(1, dtype=order.dtype), order))
    mixture = _taken(mixture, order)
    while len(mixture) > 1:
        line = mixture.means.argsort(stable=True).tolist()  # along the axis, zero among them
        pairs = list(pairwise(line))
        found = divergence(mixture)
        excess = [
            float(found[first, second]) - (zero_threshold if 0 in (first, second) else threshold)
            for first, second in pairs
        ]
        best = min(range(len(pairs)), key=excess.__getitem__)
        if not excess[best] < 0:
            break
        mixture = _merged(mixture, *sorted(pairs[best]))
    return mixture


def assign_to_components(values: Tensor, mixture: Mixture, mode: Assignment = "l2") -> Tensor:
    """Which component each weight belongs to; one that is exactly 0 belongs to zero.

    Args:
        values: the weights, any shape.
        mixture: of at most 255 components.
        mode: "l2": the component whose mean is nearest; "responsibility": the one of the largest
            responsibility; "p": zero where that is the zero component, others stay as they are; "p_l2": zero
            where "p" or "l2" says so, else as "l2"; "zero_bin": zero where "l2" says so, others stay.

    Returns:
        uint8 in the shape of `values`: numbers of components, or `KEPT`.

    Raises:
        DistillerError: no such mode, or more components than codes.
    """
    if mode not in get_args(Assignment):
        raise DistillerError(
            f"mode: must be one of {', '.join(get_args(Assignment))}, got {shown(mode)}"
            f"{did_you_mean(str(mode), get_args(Assignment))}"
        )
    check_whole_number("components", len(mixture), least=1, most=MOST_COMPONENTS)
    flat = values.detach().reshape(-1)
    nearest = _nearest(flat, mixture) if mode in ("l2", "p_l2", "zero_bin") else None
    likely = _most_responsible(flat, mixture) if mode in ("p", "p_l2", "responsibility") else None
    if mode == "p_l2":
        assert nearest is not None
        assert likely is not None
        codes = torch.where(likely == 0, 0, nearest)
    else:
        codes = nearest if nearest is not None else likely
        assert codes is not None
        if mode in ("p", "zero_bin"):
            codes = torch.where(codes == 0, 0, KEPT)
    return torch.where(flat == 0, 0, codes).to(torch.uint8).view(values.shape)


def _free_means(values: Tensor, count: int, means: Means | Sequence[float]) -> Tensor:
    if not isinstance(means, str):
        if len(means) != count:
            raise DistillerError(
                f"initial_means: must be {count} numbers, one for each component but zero, got {len(means)}"
            )
        found = torch.tensor(list(means), dtype=torch.float64)
        if not found.isfinite().all():
            raise DistillerError(f"initial_means: must be finite numbers, got {shown(list(means))}")
        return found
    if means not in get_args(Means):
        raise DistillerError(
            f"initial_means: must be {', '.join(get_args(Means))} or a list of numbers, got {shown(means)}"
            f"{did_you_mean(means, get_args(Means))}"
        )
    low, high = (float(x) for x in values.aminmax())
    if means == "linspace" or low == high:
        return torch.linspace(low, high, count, dtype=torch.float64)
    ordered = values.sort().values
    if means == "quantiles":
        places = (torch.arange(count, dtype=torch.float64) + 0.5) / count * (len(ordered) - 1)
        return ordered[places.round().long()]
    every = -(-len(ordered) // _KMEANS_SAMPLE)
    found = kmeans_1d(ordered[every // 2 :: every].unsqueeze(0).numpy(), count, "quantile", has_zero=True)
    return torch.from_numpy(found[0])


def _taken(mixture: Mixture, order: Tensor) -> Mixture:
    return Mixture(mixture.means[order], mixture.precisions[order], mixture.mixing[order])


def _merged(mixture: Mixture, first: int, second: int) -> Mixture:
    """`second` merged into `first`, which comes before it in the mixture."""
    pair = torch.tensor([first, second])
    shares = mixture.mixing[pair]
    means, precisions, mixing = (x.clone() for x in (mixture.means, mixture.precisions, mixture.mixing))
    mixing[first] = shares.sum()
    if first != 0:
        shares = shares / shares.sum()
        means[first] = (shares * mixture.means[pair]).sum()
        spread = mixture.precisions[pair].reciprocal() + (mixture.means[pair] - means[first]).square()
        precisions[first] = (shares * spread).sum().reciprocal()
    kept = torch.tensor([index for index in range(len(mixture)) if index != second])
    return _taken(Mixture(means, precisions, mixing), kept)


def _nearest(flat: Tensor, mixture: Mixture) -> Tensor:
    """The nearest mean; in the middle the upper one, and of equal means the first component."""
    means = mixture.means.to(flat.device, torch.promote_types(flat.dtype, torch.float32))
    levels, order = means.sort(stable=True)
    is_new = torch.cat((torch.ones_like(levels[:1], dtype=torch.bool), levels[1:] != levels[:-1]))
    levels, order = levels[is_new], order[is_new]
    middles = (levels[1:] + levels[:-1]) / 2
    return order[torch.searchsorted(middles, flat.to(levels.dtype), right=True)]


def _most_responsible(flat: Tensor, mixture: Mixture) -> Tensor:
    parameters = (mixture.means, mixture.precisions.log(), mixture.mixing.log())
    on_device = [x.to(flat.device) for x in parameters]
    parts = [log_terms(part.double(), *on_device).argmax(1) for part in flat.split(65_536)]
    return torch.cat(parts) if parts else torch.zeros_like(flat, dtype=torch.long)
