"""A teacher's answers to images, kept by the content of the image.

The key is a digest of the image's bytes: right whatever the order of the images, and never right by accident.
Where images do not come back, as augmented ones, it sees so and ends.
Knows nothing about networks or distillation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

__all__ = ["MOST_BYTES", "LogitsCache", "digests"]

_LOG = logging.getLogger(__name__)

MOST_BYTES = 64 * 2**20
"""Of the answers and digests that are kept; Python's own table of them takes another 150 bytes an image."""
_DIGEST = 16
_EPOCHS_TO_JUDGE_BY = 2
_LEAST_KNOWN = 0.25
"""The share of known images in the second epoch from which on it is worth while."""


class LogitsCache:
    """Computes what it has not seen yet, and remembers.

    What was computed first is what comes back, bit for bit. In a mini-batch of other size or order the
    teacher would have answered the same but for the last bits of the numbers.

    Args:
        most_bytes: of answers and digests; when they are reached nothing more is added.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.is_on = True
        self._most_bytes = most_bytes
        self._epochs = 0
        self._forget()

    def __len__(self) -> int:
        return len(self._row_of)

    def fetch(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The answers to images.

        Args:
            images: (batch, ...).
            compute: images -> answers (batch, ...), for those that are not known.

        Returns:
            The answers, on the device of the images.
        """
        if not self.is_on:
            return compute(images)
        keys = digests(images)
        unknown = [position for position, key in enumerate(keys) if key not in self._row_of]
        self._seen += len(keys)
        self._known += len(keys) - len(unknown)
        if len(unknown) == len(keys):
            answers = compute(images)
            self._add(keys, answers)
            return answers
        computed = None
        if unknown:
            positions = torch.tensor(unknown, device=images.device)
            computed = compute(images[positions])
        known = [position for position, key in enumerate(keys) if key in self._row_of]
        stored = self._answers[[self._row_of[keys[position]] for position in known]].to(images.device)
        if computed is None:
            return stored
        answers = stored.new_empty((len(keys), *stored.shape[1:]))
        answers[torch.tensor(known, device=images.device)] = stored
        answers[positions] = computed
        self._add([keys[position] for position in unknown], computed)
        return answers

    def end_epoch(self) -> None:
        """After an epoch: judge whether images come back, by the second one."""
        self._epochs += 1
        if self.is_on and self._epochs == _EPOCHS_TO_JUDGE_BY and self._known < _LEAST_KNOWN * self._seen:
            _LOG.info(
                "the teacher's answers are no longer kept: only %d of the %d images of an epoch had been "
                "seen before, as is so when images are augmented",
                self._known,
                self._seen,
            )
            self.is_on = False
            self._forget()
        self._seen = self._known = 0

    def state_dict(self) -> dict[str, Any]:
        """Digests (images, 16) and answers (images, ...), in the order in which they were added."""
        count = len(self._row_of)
        keys = torch.frombuffer(bytearray(b"".join(self._row_of)), dtype=torch.uint8) if count else None
        return {
            "digests": None if keys is None else keys.view(count, _DIGEST),
            "answers": self._answers[:count].clone() if count else None,
            "epochs": self._epochs,
            "is_on": self.is_on,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` holds."""
        self._forget()
        self._epochs, self.is_on = int(state["epochs"]), bool(state["is_on"])
        if state["digests"] is not None:
            keys = [bytes(row.tolist()) for row in state["digests"]]
            self._add(keys, state["answers"])

    def _forget(self) -> None:
        self._row_of: dict[bytes, int] = {}
        self._answers = torch.empty(0)
        self._seen = self._known = 0

    def _add(self, keys: list[bytes], answers: Tensor) -> None:
        """Keep the answers whose keys are new, as long as there is room."""
        size = answers[0].numel() * answers.element_size() + _DIGEST
        fresh: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            if key not in self._row_of and key not in fresh:
                fresh[key] = position
        room = max(0, self._most_bytes // size - len(self._row_of))
        fresh = dict(list(fresh.items())[:room])
        if not fresh:
            return
        begin, end = len(self._row_of), len(self._row_of) + len(fresh)
        if not begin:
            self._answers = answers.new_empty((0, *answers.shape[1:]), device="cpu")
        if end > len(self._answers):
            grown = self._answers.new_empty((max(end, 2 * len(self._answers)), *answers.shape[1:]))
            grown[:begin] = self._answers[:begin]
            self._answers = grown
        self._answers[begin:end] = answers[list(fresh.values())].cpu()
        self._row_of.update(zip(fresh, range(begin, end), strict=True))


def digests(images: Tensor) -> list[bytes]:
    """One digest for each image: of its bytes, its shape and its type; layout in memory does not count.

    Args:
        images: (batch, ...), at least one element each.
    """
    batch = images.detach().cpu().contiguous()
    rows = batch.view(len(batch), -1).view(torch.uint8).numpy()
    begin = blake2b(f"{tuple(batch.shape[1:])} {batch.dtype}".encode(), digest_size=_DIGEST)
    found = []
    for row in rows:
        digest = begin.copy()
        digest.update(row)
        found.append(digest.digest())
    return found
