"""Layers of a student that learn from layers of its teacher.

    fitnets    mean squared difference; a learned regressor brings the student's channels to the teacher's
               where they are others, and larger maps are averaged down to the smaller
    attention  distance of the maps of where both look; channels do not matter

Knows nothing about logits or schedules.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from distiller.distillation.losses import attention_loss, hint_loss
from distiller.errors import CheckpointError, DistillerError
from distiller.names import find_module
from distiller.observation import as_given, watch_output
from distiller.tensor_cuts import TensorCuts, cut, replace_data

__all__ = ["Hint", "HintKind", "Hints", "features_alike"]

_LOG = logging.getLogger(__name__)

HintKind = Literal["fitnets", "attention"]


@dataclass(frozen=True, slots=True)
class Hint:
    """A layer that learns from a layer.

    Attributes:
        teacher: module of the (first) teacher, by its canonical name.
        student: module of the student, likewise.
        weight: of its loss, above 0.
        kind: which loss.
    """

    teacher: str
    student: str
    weight: float = 1.0
    kind: HintKind = "fitnets"


class Hints:
    """The hints of a policy, with the regressors that they learn.

    A regressor is a linear map of the channels (a 1x1 convolution where there are maps). It begins with the
    first features that are seen, and an Adam of its own trains it.

    Args:
        hints: any number.
        regressor_lr: learning rate of the regressors.
    """

    def __init__(self, hints: Sequence[Hint], regressor_lr: float = 1e-3) -> None:
        self.all = tuple(hints)
        self._rate = regressor_lr
        self._regressors: dict[int, _Regressor] = {}
        self._features: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """Those that are looked at."""
        return tuple(dict.fromkeys(hint.teacher for hint in self.all))

    @property
    def student_layers(self) -> tuple[str, ...]:
        """Those that learn."""
        return tuple(dict.fromkeys(hint.student for hint in self.all))

    def check(self, student: nn.Module) -> None:
        """Refuse layers that the student does not have, and a student spread over several devices.

        Raises:
            DistillerError: saying which.
        """
        for hint in self.all:
            find_module(student, hint.student)
        spread = [m for m in student.modules() if isinstance(m, nn.DataParallel) and len(m.device_ids) > 1]
        if self.all and spread:
            raise DistillerError(
                "hints: not with a student that is spread over several devices, whose layers give parts of a "
                "mini-batch; give one device, or --load-serialized"
            )

    def attach(self, student: nn.Module) -> None:
        """Look at the student's layers while it trains."""
        self.detach()
        for name in self.student_layers:
            self._handles.append(watch_output(find_module(student, name), self._keeping(name)))

    def detach(self) -> None:
        """Look no longer, and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._features = [], {}

    def losses(self, teacher_features: Mapping[str, Tensor]) -> list[Tensor]:
        """The loss of each hint, without its weight, from the last forward pass of both networks."""
        found = []
        for index, (hint, (ours, theirs)) in enumerate(
            zip(self.all, self.compare(teacher_features), strict=True)
        ):
            if hint.kind == "attention":
                found.append(attention_loss(ours, theirs))
                continue
            if ours.shape[_channels(ours)] != theirs.shape[_channels(theirs)]:
                ours = self._regressor(index, ours, theirs)(ours)
            found.append(hint_loss(ours, theirs))
        return found

    def compare(self, teacher_features: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The features of student and teacher of each hint, from the last forward pass of both networks, with
        maps of one size.

        Raises:
            DistillerError: they cannot be compared.
        """
        found = []
        for hint in self.all:
            ours = self._features.get(hint.student)
            if not isinstance(ours, Tensor):
                got = "nothing, it is not run" if ours is None else type(ours).__name__
                raise DistillerError(f"hints: '{hint.student}' of the student must give a tensor, got {got}")
            theirs = teacher_features[hint.teacher]
            ours = ours if ours.dtype == torch.float64 else ours.float()
            found.append(features_alike(ours, theirs.to(ours.dtype), hint))
        return found

    def step(self) -> None:
        """After the backward pass the regressors take a step."""
        for regressor in self._regressors.values():
            regressor.step()

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Regressors read the channels that stay, where the layer's own weight tells which."""
        for index, hint in enumerate(self.all):
            kept = cuts.get(f"{hint.student}.weight", {}).get(0)
            if index in self._regressors and kept is not None:
                self._regressors[index].read_only(kept)

    def state_dict(self) -> dict[str, Any]:
        """The regressors and their optimizers' states, by the number of the hint."""
        return {str(index): regressor.state_dict() for index, regressor in self._regressors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the regressors in `state`.

        Raises:
            CheckpointError: they are of other hints.
        """
        known = {str(index) for index in range(len(self.all))}
        if not set(state) <= known:
            raise CheckpointError(
                f"the checkpoint has regressors of {len(state)} hints, this schedule has {len(self.all)} "
                "hints; resume with the same schedule"
            )
        self._regressors = {
            int(key): _Regressor.from_state(saved, self._rate) for key, saved in state.items()
        }

    def _keeping(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._features[name] = as_given(output)

        return keep

    def _regressor(self, index: int, ours: Tensor, theirs: Tensor) -> _Regressor:
        inputs, outputs = ours.shape[_channels(ours)], theirs.shape[_channels(theirs)]
        known = self._regressors.get(index)
        if known is not None and known.weight.shape == (outputs, inputs):
            known.to(ours.device)
            return known
        if known is not None:
            _LOG.info(
                "hints: '%s' has %d channels now: its regressor begins anew", self.all[index].student, inputs
            )
        bound = 1 / math.sqrt(inputs)
        weight = torch.empty(outputs, inputs, device=ours.device, dtype=ours.dtype).uniform_(-bound, bound)
        bias = torch.zeros(outputs, device=ours.device, dtype=ours.dtype)
        self._regressors[index] = _Regressor(weight, bias, self._rate)
        return self._regressors[index]


class _Regressor:
    """A linear map of channels with an Adam of its own: weight (outputs, inputs), bias (outputs,)."""

    def __init__(self, weight: Tensor, bias: Tensor, rate: float) -> None:
        self.weight, self.bias = weight.requires_grad_(True), bias.requires_grad_(True)
        self._optimizer = torch.optim.Adam([self.weight, self.bias], lr=rate)

    def __call__(self, features: Tensor) -> Tensor:
        if features.dim() == 4:
            return F.conv2d(features, self.weight[:, :, None, None], self.bias)
        return F.linear(features, self.weight, self.bias)

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def to(self, device: torch.device) -> None:
        """A state from a checkpoint is in main memory: it follows the student."""
        if self.weight.device == device:
            return
        for tensor in (self.weight, self.bias):
            tensor.data = tensor.data.to(device)
        self._optimizer.load_state_dict(self._optimizer.state_dict())  # brings its moments to the device

    def read_only(self, inputs: Any) -> None:
        """Keep the columns of the channels that stay."""
        for key, value in self._optimizer.state[self.weight].items():
            if value.shape == self.weight.shape:
                self._optimizer.state[self.weight][key] = cut(value, {1: inputs})
        replace_data(self.weight, cut(self.weight, {1: inputs}))

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight": self.weight.detach().clone(),
            "bias": self.bias.detach().clone(),
            "optimizer": self._optimizer.state_dict(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], rate: float) -> _Regressor:
        regressor = cls(state["weight"].clone(), state["bias"].clone(), rate)
        regressor._optimizer.load_state_dict(state["optimizer"])
        return regressor


def features_alike(ours: Tensor, theirs: Tensor, hint: Hint) -> tuple[Tensor, Tensor]:
    """Features with maps of one size: the larger are averaged down.

    Args:
        ours: (batch, channels), (batch, positions, channels) or (batch, channels, height, width).
        theirs: of as many dimensions.
        hint: for messages.

    Raises:
        DistillerError: they cannot be compared.
    """
    where = (
        f"hints: '{hint.student}' gives {tuple(ours.shape)}, '{hint.teacher}' of the teacher "
        f"{tuple(theirs.shape)}"
    )
    if ours.dim() != theirs.dim() or ours.dim() not in (2, 3, 4) or len(ours) != len(theirs):
        raise DistillerError(f"{where}; give layers whose outputs have as many dimensions, 2 to 4")
    if hint.kind == "attention" and ours.dim() != 4:
        raise DistillerError(f"{where}; attention is of maps: give convolutions, or kind fitnets")
    if ours.dim() == 3 and ours.shape[1] != theirs.shape[1]:
        raise DistillerError(f"{where}; give layers with as many positions")
    if ours.dim() == 4 and ours.shape[2:] != theirs.shape[2:]:
        size = (min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3]))
        ours, theirs = F.adaptive_avg_pool2d(ours, size), F.adaptive_avg_pool2d(theirs, size)
    return ours, theirs


def _channels(features: Tensor) -> int:
    """The dimension that channels are counted along."""
    return 1 if features.dim() == 4 else features.dim() - 1
