"""What a schedule of Distiller promises, read from its YAML alone, and what came of it.

A promise follows the run and says at its end how many groups of weights are zero and how many should be.
Written after the description of the methods, without the library's own pruning code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tests.compat.distiller_schedules import SECTION_OF, bare

Weights = Mapping[str, Tensor]


class Measured(NamedTuple):
    """How many groups of one weight are zero, and how many were promised."""

    name: str
    zero: int
    promised: float
    tolerance: float


class Window(NamedTuple):
    """When a policy acts: its active epochs, and the `ending_epoch` that is written."""

    epochs: Sequence[int]
    end: int


def window_of(policy: Mapping[str, Any]) -> Window:
    """The window of a policy of the YAML."""
    if "epochs" in policy:
        return Window(policy["epochs"], policy["epochs"][-1] + 1)
    start, end = policy["starting_epoch"], policy["ending_epoch"]
    return Window(range(start, end, policy["frequency"]), end)


def groups_of(weight: Tensor, kind: str, block: int = 1) -> Tensor:
    """The groups of a weight as rows, (groups, elements of a group).

    Args:
        weight: (out, in) or (out, in, height, width).
        kind: 'elements', 'Filters', 'Channels', 'Rows' (input features), '2D', '4D' or 'Blocks'.
        block: neighbouring kernels whose elements at one position make a block.
    """
    if kind == "elements":
        return weight.reshape(-1, 1)
    if kind == "Filters":
        return weight.flatten(1)
    if kind in ("Channels", "Rows"):
        return weight.transpose(0, 1).flatten(1)
    if kind == "2D":
        return weight.flatten(2).flatten(0, 1)
    if kind == "4D":
        return weight.reshape(1, -1)
    assert kind == "Blocks"
    return weight.reshape(-1, block, weight[0, 0].numel()).transpose(1, 2).reshape(-1, block)


def zero_groups(weight: Tensor, kind: str, block: int = 1) -> Tensor:
    """Whether each group is zero."""
    return (groups_of(weight, kind, block) == 0).all(1)


@dataclass
class Promise:
    """What one policy promises of the weights it names; the methods below are called as the run goes."""

    names: Sequence[str]
    window: Window
    shapes = MappingProxyType({})  # of the weights before the run, by name

    def begins(self, weights: Weights) -> None:
        """Before anything else."""
        self.shapes = {name: weights[name].shape for name in self.names}

    def gone(self, name: str, kind: str, weights: Weights) -> int:
        """How many filters or channels of a weight were removed since the run began; none of other kinds."""
        dim = {"Filters": 0, "Channels": 1, "Rows": 1}.get(kind)
        shape = self.shapes.get(name)
        return 0 if dim is None or shape is None else shape[dim] - weights[name].size(dim)

    def prepare(self, weights: Weights) -> None:
        """Change the weights so that there is something to keep and something to prune."""

    def epoch_begins(self, epoch: int, weights: Weights) -> None:
        """Before the scheduler's `on_epoch_begin`."""

    def minibatch_begins(self, epoch: int, minibatch: int, weights: Weights) -> None:
        """Before the scheduler's `on_minibatch_begin`."""

    def forward(self, epoch: int, minibatch: int, weights: Weights) -> None:
        """Before the forward pass."""

    def stepped(self, epoch: int, weights: Weights) -> None:
        """After the optimizer's step, before the scheduler's `on_minibatch_end`."""

    def measure(self, weights: Weights) -> Iterator[Measured]:
        """What came of it, at the end of the policy's last epoch or later."""
        return iter(())


@dataclass
class Level(Promise):
    """floor(fraction * groups) of each weight are zero, or removed; to within one where they are elements."""

    fraction: Fraction
    kind: str = "elements"
    block: int = 1

    def promised(self, weight: Tensor, gone: int = 0) -> int:
        return math.floor(self.fraction * (groups_of(weight, self.kind, self.block).size(0) + gone))

    def measure(self, weights: Weights) -> Iterator[Measured]:
        for name in self.names:
            gone = self.gone(name, self.kind, weights)
            zero = gone + int(zero_groups(weights[name], self.kind, self.block).sum())
            yield Measured(name, zero, self.promised(weights[name], gone), self.kind == "elements")


@dataclass
class SameChannels(Level):
    """With a leader the same groups go in all weights: none of them is zero in one and not in another."""

    def measure(self, weights: Weights) -> Iterator[Measured]:
        yield from super().measure(weights)
        leader = zero_groups(weights[self.names[0]], self.kind)
        for name in self.names[1:]:
            differing = zero_groups(weights[name], self.kind) ^ leader
            yield Measured(f"{name} unlike its leader", int(differing.sum()), 0, 0)


@dataclass
class KeptElements(Promise):
    """Zero are those that a rule of the method prunes; the rule is applied here, step by step, as well."""

    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def measure(self, weights: Weights) -> Iterator[Measured]:
        for name in self.names:
            promised = int((~self.kept[name]).sum())
            assert 0 < promised < weights[name].numel()
            # Float32 and float64 may differ about what lies on a threshold.
            tolerance = max(1.0, 1e-6 * weights[name].numel())
            yield Measured(name, int((weights[name] == 0).sum()), promised, tolerance)


class Sensitivity(KeptElements):
    """|w| > sensitivity * the standard deviation at the first epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sensitivities = {bare(name): s for name, s in self.settings["sensitivities"].items()}
        self.deviations: dict[str, float] = {}

    def epoch_begins(self, epoch: int, weights: Weights) -> None:
        for name in self.names:
            if epoch == self.window.epochs[0]:
                self.deviations[name] = float(weights[name].double().std())
            if epoch == self.window.epochs[-1]:
                threshold = self.sensitivities[name] * self.deviations[name]
                self.kept[name] = weights[name].double().abs() > threshold


class Baidu(KeptElements):
    """|w| > a threshold that rises epoch by epoch, and faster from the ramp on."""

    def prepare(self, weights: Weights) -> None:
        for name in self.names:  # as spread as the thresholds are
            weights[name].normal_(0, 0.15)

    def epoch_begins(self, epoch: int, weights: Weights) -> None:
        if epoch == self.window.epochs[-1]:
            for name in self.names:
                self.kept[name] = weights[name].double().abs() > self._threshold(epoch)

    def _threshold(self, epoch: int) -> float:
        start, end = self.window.epochs[0], self.window.end
        frequency = self.window.epochs[1] - start
        ramp = start + self.settings["ramp_epoch_offset"]
        slope = 2 * self.settings["q"] * frequency / (2 * (ramp - start) + 3 * (end - ramp))
        ramp_slope = slope * self.settings["ramp_slope_mult"]
        assert epoch >= ramp
        return (slope * (ramp - start + 1) + ramp_slope * (epoch - ramp + 1)) / frequency


class Splicing(KeptElements):
    """What falls under a low threshold goes, what is over a high one comes back; at every mini-batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sensitivities = {bare(name): s for name, s in self.settings["sensitivities"].items()}
        self.moments: dict[str, tuple[float, float]] = {}

    def epoch_begins(self, epoch: int, weights: Weights) -> None:
        if epoch in self.window.epochs:
            self._splice(epoch, weights)

    def minibatch_begins(self, epoch: int, minibatch: int, weights: Weights) -> None:
        if epoch in self.window.epochs and minibatch > 0:
            for name in self.names:  # as if training had made some of the pruned weights grow
                pruned, grown = ~self.kept[name], torch.rand_like(weights[name])
                weights[name][pruned] = grown[pruned] * 2 * self._thresholds(name, epoch, weights)[1]
            self._splice(epoch, weights)

    def _splice(self, epoch: int, weights: Weights) -> None:
        for name in self.names:
            magnitudes = weights[name].double().abs()
            low, high = self._thresholds(name, epoch, weights)
            kept = self.kept.get(name, torch.ones_like(magnitudes, dtype=torch.bool))
            self.kept[name] = (kept & (magnitudes >= low)) | (magnitudes >= high)

    def _thresholds(self, name: str, epoch: int, weights: Weights) -> tuple[float, float]:
        if name not in self.moments:
            magnitudes = weights[name].double().abs()
            self.moments[name] = float(magnitudes.mean()), float(magnitudes.std())
        mean, deviation = self.moments[name]
        growth = 1 + self.settings["sensitivity_multiplier"] * (epoch - self.window.epochs[0])
        threshold = mean + self.sensitivities[name] * growth * deviation
        return threshold * self.settings["low_thresh_mult"], threshold * self.settings["hi_thresh_mult"]


@dataclass
class DroppedFilters(Promise):
    """Drawn anew at every first mini-batch: about that fraction of all filters is zero in the forward pass.

    After the mini-batch they are back: at the end none is zero.
    """

    initial: float
    final: float

    def __post_init__(self) -> None:
        self.dropped: dict[int, int] = {}

    def forward(self, epoch: int, minibatch: int, weights: Weights) -> None:
        if epoch in self.window.epochs and minibatch == 0:
            self.dropped[epoch] = sum(int(zero_groups(weights[name], "Filters").sum()) for name in self.names)

    def measure(self, weights: Weights) -> Iterator[Measured]:
        filters = sum(weights[name].size(0) for name in self.names)
        for epoch, chance in ((self.window.epochs[0], self.initial), (self.window.epochs[-1], self.final)):
            deviation = math.sqrt(filters * chance * (1 - chance))
            yield Measured(f"epoch {epoch}", self.dropped[epoch], filters * chance, 4 * deviation)
        for name in self.names:
            yield Measured(name, int(zero_groups(weights[name], "Filters").sum()), 0, 0)


@dataclass
class GroupLasso(Promise):
    """The groups whose mean magnitude is at most lambda after the last step of all are zero, and stay so.

    Those that were zero when the network was thinned are not there any more.

    Without threshold criteria there are none.
    """

    settings: Mapping[str, Any]
    is_kept: bool

    def __post_init__(self) -> None:
        self.regimes = {bare(name): regime for name, regime in self.settings["reg_regims"].items()}
        self.has_threshold = "threshold_criteria" in self.settings
        self.small: dict[str, int] = {}
        assert self.settings.get("threshold_criteria", "Mean_Abs") == "Mean_Abs"
        assert self.is_kept == self.has_threshold

    def prepare(self, weights: Weights) -> None:
        """As if training had made every other group small; of whole layers every other layer."""
        if self.has_threshold:
            for index, name in enumerate(self.names):
                groups = groups_of(weights[name], self.regimes[name][1])
                small = torch.arange(len(groups)) % 2 == (0 if len(groups) > 1 else index % 2)
                scaled = torch.where(small[:, None], groups * 1e-3, groups)
                weights[name].copy_(_ungrouped(scaled, weights[name], self.regimes[name][1]))

    def penalty(self, weights: Weights) -> float:
        """The sum of lambda * the Euclidean norm of each group."""
        return sum(
            strength * float(groups_of(weights[name].double(), kind).norm(dim=1).sum())
            for name, (strength, kind) in self.regimes.items()
        )

    def stepped(self, epoch: int, weights: Weights) -> None:
        if epoch == self.window.epochs[-1] and self.has_threshold:
            for name, (strength, kind) in self.regimes.items():
                means = groups_of(weights[name].double(), kind).abs().mean(1)
                self.small[name] = int((means <= strength).sum())

    def measure(self, weights: Weights) -> Iterator[Measured]:
        if self.has_threshold:
            groups = sum(len(groups_of(weights[name], self.regimes[name][1])) for name in self.names)
            gone = sum(self.gone(name, self.regimes[name][1], weights) for name in self.names)
            assert 0 < sum(self.small.values()) + gone < groups + gone
        for name, small in self.small.items():
            zero = zero_groups(weights[name], self.regimes[name][1])
            yield Measured(name, int(zero.sum()), small, 0)


def _ungrouped(groups: Tensor, weight: Tensor, kind: str) -> Tensor:
    """The weight whose groups are these."""
    if kind == "Channels":
        return groups.view(weight.size(1), weight.size(0), *weight.shape[2:]).transpose(0, 1)
    return groups.view(weight.shape)


_SPARSITY_OF_CLASS = {
    "AutomatedGradualPruner": "final_sparsity",
    "ActivationAPoZRankedFilterPruner_AGP": "final_sparsity",
    "L1RankedStructureParameterPruner": "desired_sparsity",
    "L1RankedStructureParameterPruner_AGP": "final_sparsity",
}
_RULE_OF_CLASS: Mapping[str, type[KeptElements]] = {
    "SensitivityPruner": Sensitivity,
    "BaiduRNNPruner": Baidu,
    "SplicingPruner": Splicing,
}


def promises_of(data: Mapping[str, Any]) -> list[Promise]:
    """The promises of the policies of pruners and regularizers, in the order of the file."""
    found: list[Promise] = []
    for policy in data.get("policies", ()):
        word = next(word for word in SECTION_OF if word in policy)
        component = data[SECTION_OF[word]][policy[word]["instance_name"]]
        if word == "pruner":
            found.append(_promise_of_pruner(component, window_of(policy)))
        elif word == "regularizer":
            args = policy[word].get("args", {})
            found.append(_promise_of_regularizer(component, window_of(policy), args))
    return found


def _promise_of_pruner(component: Mapping[str, Any], window: Window) -> Promise:
    kind = component["class"]
    if kind in _RULE_OF_CLASS:
        listed = component.get("weights") or component["sensitivities"]
        return _RULE_OF_CLASS[kind](_names(listed), window, component)
    names = _names(component["weights"])
    if kind == "BernoulliFilterPruner_AGP":
        return DroppedFilters(names, window, component["initial_sparsity"], component["final_sparsity"])
    fraction = Fraction(str(component[_SPARSITY_OF_CLASS[kind]]))
    if kind == "AutomatedGradualPruner":
        return Level(names, window, fraction)
    repetitions, depth, *_ = component.get("kwargs", {}).get("block_shape", (1, 1))
    promise = SameChannels if component.get("group_dependency") == "Leader" else Level
    return promise(names, window, fraction, component["group_type"], repetitions * depth)


def _promise_of_regularizer(
    component: Mapping[str, Any], window: Window, args: Mapping[str, Any]
) -> GroupLasso:
    assert component["class"] == "GroupLassoRegularizer"
    return GroupLasso(_names(component["reg_regims"]), window, component, args.get("keep_mask", False))


def _names(listed: Sequence[str] | Mapping[str, Any] | str) -> list[str]:
    return [bare(name) for name in ([listed] if isinstance(listed, str) else listed)]


class Rates:
    """The learning rate that each LR scheduler promises, as a factor of the first one."""

    FACTORS: ClassVar[Mapping[str, Any]] = {
        "ExponentialLR": lambda s, epoch: s["gamma"] ** epoch,
        "StepLR": lambda s, epoch: s["gamma"] ** (epoch // s["step_size"]),
        "MultiStepLR": lambda s, epoch: s["gamma"] ** sum(m <= epoch for m in s["milestones"]),
        "MultiStepMultiGammaLR": lambda s, epoch: math.prod(
            gamma for m, gamma in zip(s["milestones"], s["gammas"], strict=True) if m <= epoch
        ),
    }

    def __init__(self, data: Mapping[str, Any]) -> None:
        policies = [policy for policy in data["policies"] if "lr_scheduler" in policy]
        assert len(policies) <= 1
        self.window = window_of(policies[0]) if policies else None
        if policies:
            self.settings = data["lr_schedulers"][policies[0]["lr_scheduler"]["instance_name"]]

    def after(self, epoch: int) -> float:
        """The factor after an epoch; the absolute epoch counts, whenever the policy began."""
        if self.window is None or epoch < self.window.epochs[0]:
            return 1.0
        return self.FACTORS[self.settings["class"]](self.settings, min(epoch, self.window.epochs[-1]) + 1)
