"""From levels to a schedule that trains, as plain data and as commented YAML.

    element        AutomatedGradualPruner, one for each level; or SensitivityPruner
    channel        L1RankedStructureParameterPruner_AGP of channels, one for each level
    filter, group  StructuredGroupPruner with the level of each group, then FilterRemover
    n:m            NMPruner, one for each N
    weight-bits    QuantAwareTrainRangeLinearQuantizer with the bits of each layer
    rank           LowRankFactorization with the rank of each layer

Knows nothing about where levels come from, nor about models.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from distiller.errors import UsageError
from distiller.names import owner

__all__ = ["ETA_MIN", "Chosen", "pruning_epochs", "recommended_schedule", "schedule_text"]

ETA_MIN = 0.0002
_PRUNING_SHARE = 0.6  # of the epochs; the others train what is left
_MOST_BY_DEFAULT = 0.9  # of a group, by StructuredGroupPruner
_WIDTH = 110
PrunerKind = Literal["agp", "sensitivity"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is compressed to which level.

    Attributes:
        weights: canonical names; where there are several, their filters go together.
        level: as on the axis.
        sensitivity: for `SensitivityPruner`, of these weights.
        rank: that is left.
        layers: canonical names of those that have the weight; default its owner alone.
    """

    weights: tuple[str, ...]
    level: float
    sensitivity: float | None = None
    rank: int | None = None
    layers: tuple[str, ...] = ()


def pruning_epochs(epochs: int) -> int:
    """Of so many epochs, the first ones, in which sparsity grows: 60 %, and not all of them."""
    return min(epochs - 1, math.ceil(_PRUNING_SHARE * epochs))


def recommended_schedule(
    axis: str, chosen: Sequence[Chosen], epochs: int, pruner: PrunerKind = "agp", block: int = 4
) -> dict[str, Any]:
    """The schedule as plain data.

    Args:
        axis: of the levels.
        chosen: what is compressed; what stays dense is not among it.
        epochs: of the whole training, 2 or more.
        pruner: `sensitivity`: the elements by SensitivityPruner.
        block: M of N:M.

    Raises:
        UsageError: fewer epochs, an axis of which no schedule is made, or one that has no sensitivities.
    """
    if epochs < 2:
        raise UsageError(f"epochs: pruning and training on need 2 at the least, got {epochs}")
    if pruner == "sensitivity":
        if axis != "element":
            raise UsageError(f"pruner 'sensitivity': prunes elements, got axis '{axis}'; take 'agp'")
        made = _by_sensitivity(chosen, epochs)
    elif axis == "n:m":
        made = _of_each_m(chosen, block)
    elif axis in _MAKERS:
        made = _MAKERS[axis](chosen, epochs)
    else:
        known = ", ".join([*_MAKERS, "n:m"])
        raise UsageError(f"axis '{axis}': no schedule is made of it, only of {known}")
    schedule, policies = made
    cosine = {"class": "CosineAnnealingLR", "T_max": epochs, "eta_min": ETA_MIN}
    rate = {"lr_scheduler": {"instance_name": "cosine"}, **_window(max(1, epochs - 1))}
    return {
        "version": 1,
        **schedule,
        "lr_schedulers": {"cosine": cosine},
        "policies": [*policies, rate],
    }


def schedule_text(schedule: Mapping[str, Any], comments: Sequence[str]) -> str:
    """A schedule as YAML, comments first.

    Args:
        schedule: plain data.
        comments: paragraphs, which are wrapped; lines that begin with a blank stay as they are.
    """
    lines: list[str] = []
    for paragraph in comments:
        lines += ["#"] if lines else []
        for line in paragraph.splitlines():
            wrapped = [line] if line.startswith(" ") else textwrap.wrap(line, _WIDTH - 2)
            lines += [f"# {part}".rstrip() for part in wrapped]
    sections = [_section(key, value) for key, value in schedule.items()]
    return "\n".join(["\n".join(lines) + "\n", *sections])


def _section(key: str, value: Any) -> str:
    if not isinstance(value, (dict, list)):
        return f"{key}: {value}\n"
    return yaml.safe_dump(
        {key: value}, sort_keys=False, default_flow_style=None, width=_WIDTH - 20, allow_unicode=True
    )


_Made = tuple[dict[str, Any], list[dict[str, Any]]]
"""Sections of components, and the policies that use them."""


def _elements(chosen: Sequence[Chosen], epochs: int) -> _Made:
    pruners = {
        f"to_{100 * level:g}_percent": {
            "class": "AutomatedGradualPruner",
            **_from_half(level),
            "weights": [name for own in alike for name in own.weights],
        }
        for level, alike in _by_level(chosen).items()
    }
    return {"pruners": pruners}, _pruned(pruners, pruning_epochs(epochs))


def _by_sensitivity(chosen: Sequence[Chosen], epochs: int) -> _Made:
    sensitivities = {name: own.sensitivity for own in chosen for name in own.weights}
    pruners = {"by_sensitivity": {"class": "SensitivityPruner", "sensitivities": sensitivities}}
    return {"pruners": pruners}, _pruned(pruners, pruning_epochs(epochs))


def _channels(chosen: Sequence[Chosen], epochs: int) -> _Made:
    pruners = {
        f"to_{100 * level:g}_percent": {
            "class": "L1RankedStructureParameterPruner_AGP",
            **_from_half(level),
            "group_type": "Channels",
            "weights": [name for own in alike for name in own.weights],
        }
        for level, alike in _by_level(chosen).items()
    }
    return {"pruners": pruners}, _pruned(pruners, pruning_epochs(epochs))


def _filters(chosen: Sequence[Chosen], epochs: int) -> _Made:
    levels = {own.weights[0]: own.level for own in chosen}
    highest = max(levels.values())
    pruner = {
        "class": "StructuredGroupPruner",
        "initial_sparsity": round(min(levels.values()) / 2, 6),
        "levels": levels,
        **({"max_sparsity": highest} if highest > _MOST_BY_DEFAULT else {}),
    }
    ending = pruning_epochs(epochs)
    pruners, extensions = {"to_levels": pruner}, {"smaller": {"class": "FilterRemover"}}
    remove = {"extension": {"instance_name": "smaller"}, "epochs": [ending]}
    return {"pruners": pruners, "extensions": extensions}, [*_pruned(pruners, ending), remove]


def _of_each_m(chosen: Sequence[Chosen], block: int) -> _Made:
    pruners = {}
    for level, alike in _by_level(chosen).items():
        n = block - round(level * block)
        weights = [name for own in alike for name in own.weights]
        pruners[f"{n}_of_{block}"] = {"class": "NMPruner", "n": n, "m": block, "weights": weights}
    return {"pruners": pruners}, [{"pruner": {"instance_name": name}, "epochs": [0]} for name in pruners]


def _weight_bits(chosen: Sequence[Chosen], epochs: int) -> _Made:
    overrides = {
        layer: {"bits_weights": int(own.level)}
        for own in chosen
        for layer in own.layers or map(owner, own.weights)
    }
    quantizer = {
        "class": "QuantAwareTrainRangeLinearQuantizer",
        "mode": "SYMMETRIC",
        "per_channel_wts": True,
        "overrides": overrides,
    }
    policy = {"quantizer": {"instance_name": "bits_by_layer"}, **_window(epochs)}
    return {"quantizers": {"bits_by_layer": quantizer}}, [policy]


def _ranks(chosen: Sequence[Chosen], epochs: int) -> _Made:
    layers = {owner(name): {"rank": own.rank} for own in chosen for name in own.weights}
    extensions = {"low_rank": {"class": "LowRankFactorization", "layers": layers}}
    return {"extensions": extensions}, [{"extension": {"instance_name": "low_rank"}, "epochs": [0]}]


_MAKERS: dict[str, Callable[[Sequence[Chosen], int], _Made]] = {
    "element": _elements,
    "channel": _channels,
    "filter": _filters,
    "group": _filters,
    "weight-bits": _weight_bits,
    "rank": _ranks,
}


def _from_half(level: float) -> dict[str, float]:
    return {"initial_sparsity": round(level / 2, 6), "final_sparsity": level}


def _by_level(chosen: Sequence[Chosen]) -> dict[float, list[Chosen]]:
    return {
        level: [own for own in chosen if own.level == level] for level in sorted({c.level for c in chosen})
    }


def _pruned(pruners: Mapping[str, Any], ending: int) -> list[dict[str, Any]]:
    return [{"pruner": {"instance_name": name}, **_window(ending)} for name in pruners]


def _window(ending: int) -> dict[str, int]:
    return {"starting_epoch": 0, "ending_epoch": ending, "frequency": 1}
