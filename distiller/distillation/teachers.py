"""Networks that teach: frozen, in evaluation mode, one or several together.

Knows nothing about students, losses or where the networks come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from distiller.auxiliary_outputs import main_logits
from distiller.errors import DistillerError
from distiller.evaluation_mode import evaluating
from distiller.names import canonical_state_dict, find_module
from distiller.observation import as_given

__all__ = ["Teacher", "Teachers", "final_logits"]


@dataclass(frozen=True, slots=True)
class Teacher:
    """A network that teaches.

    Attributes:
        model: any network that answers the student's images with the student's classes.
        weight: of its answer among those of several teachers, above 0.
        told: what it is called in messages.
    """

    model: nn.Module
    weight: float = 1.0
    told: str = "the teacher"


class Teachers:
    """Teachers that answer together.

    Their parameters ask for no gradients from now on, and the networks are in evaluation mode whenever they
    answer: their batch norms use what they learned, and never move. (Distiller left its teacher in training
    mode: it answered by the statistics of the mini-batch, and those it had learned drifted.)

    Args:
        teachers: one or more.
        half: let them compute in 16 bits: float16 on CUDA, bfloat16 elsewhere. Their answers come as float32.

    Raises:
        DistillerError: there are none, or a weight is not above 0.
    """

    def __init__(self, teachers: Sequence[Teacher], half: bool = False) -> None:
        if not teachers:
            raise DistillerError("teachers: at least one is wanted")
        for teacher in teachers:
            if not teacher.weight > 0:
                raise DistillerError(
                    f"teachers: the weight of {teacher.told} must be above 0, got {teacher.weight}"
                )
            teacher.model.requires_grad_(False).eval()
        self.all = tuple(teachers)
        self._device: torch.device | None = None
        self._half = half
        self._remedy = (
            "let it compute in 32 bits (half: false, or no --kd-half)" if half else "give another teacher"
        )

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each teacher."""
        return tuple(teacher.weight for teacher in self.all)

    @property
    def told(self) -> str:
        """What they are called in messages."""
        return " and ".join(teacher.told for teacher in self.all)

    @torch.no_grad()
    def answers(self, *inputs: Any) -> Tensor:
        """The logits of each teacher: (batch, teachers, classes, ...), in float32.

        Raises:
            DistillerError: they are no logits, or not finite; names the teacher.
        """
        moved = self._moved(inputs)
        found = []
        for teacher in self.all:
            with evaluating(teacher.model):
                logits = final_logits(teacher.model(*moved), teacher.told).float()
            count = int((~logits.isfinite()).sum())
            if count:
                raise DistillerError(
                    f"distillation: {teacher.told} answers with logits that are not finite, {count} of "
                    f"{logits.numel()} are NaN or infinite; {self._remedy}"
                )
            found.append(logits)
        return torch.stack(found, dim=1)

    def answers_and_features(self, names: Sequence[str], *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`answers`, and the outputs of modules of the first teacher, by name."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _inputs, output: seen.__setitem__(name, as_given(output))

        model = self.all[0].model
        handles = [
            find_module(model, name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)
        ]
        try:
            answers = self.answers(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        return answers, {name: _feature(seen.get(name), name, self.all[0].told) for name in names}

    @cached_property
    def fingerprint(self) -> str:
        """A short text that is another one for teachers with other weights; the same in 16 bits."""
        digest = blake2b(digest_size=16)
        for teacher in self.all:
            for name, value in canonical_state_dict(teacher.model).items():
                digest.update(name.encode())
                if isinstance(value, Tensor) and value.numel():
                    digest.update(value.detach().cpu().float().contiguous().view(-1).numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> None:
        """Move them, and bring them to 16 bits where that is asked for."""
        if self._device == device:
            return
        _ = self.fingerprint  # of the weights as they were given
        self._device = device
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
        for teacher in self.all:
            teacher.model.to(device)
            if self._half:
                _compute_in(teacher.model, dtype)
        self._half = False  # done

    def _moved(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs without gradients; the teachers where they are."""
        first = next((value for value in inputs if isinstance(value, Tensor)), None)
        if first is None:
            raise DistillerError("distillation: the student was called without a tensor; give it one")
        self.to(first.device)
        return [value.detach() if isinstance(value, Tensor) else value for value in inputs]


def final_logits(output: Any, told: str) -> Tensor:
    """The logits in a network's output: of several exits the last, beside auxiliary classifiers the main.

    Args:
        output: a tensor, a list of exits with the final one last, or a tuple with a field `logits` (as
            torchvision's Inception and GoogLeNet give while they train).
        told: what the network is called in messages.

    Raises:
        DistillerError: it is none of these.
    """
    found = main_logits(output[-1] if isinstance(output, list) and output else output)
    if isinstance(found, Tensor):
        return found
    raise DistillerError(
        f"distillation: {told} must answer with logits (a tensor, a list of exits, or a tuple with a field "
        f"'logits'), got {type(output).__name__}"
    )


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring a network to 16 bits; what goes in and comes out may stay in 32."""

    def narrow(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in inputs
        )

    def widen(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        return output.float() if isinstance(output, Tensor) else output

    model.to(dtype)
    model.register_forward_pre_hook(narrow)
    model.register_forward_hook(widen)


def _feature(output: Any, name: str, told: str) -> Tensor:
    if isinstance(output, Tensor):
        return output.float()
    got = "nothing, it is not run" if output is None else type(output).__name__
    raise DistillerError(f"hints: '{name}' of {told} must give a tensor, got {got}")
