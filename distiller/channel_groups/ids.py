"""Ids of channels: which of them stand or fall together, and which cannot fall at all.

An id is a number. A tensor of the network is stood for by a tensor of ids of the same shape, one
for each element, stretched (stride 0) along the dimensions in which it does not change. Ids are
united pair by pair in whole tensors; what belongs together is found once, at the end.

A channel can be cut out of a tensor only as a slice. So the ids of a tensor may in the end differ
along one dimension alone: where they differ along several, they are united along the others.
Knows nothing about networks or operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Solution:
    """What the ids came to.

    Attributes:
        unit_of: (ids,) the unit that an id belongs to, numbered from 0.
        reasons: by unit that cannot be removed, the first reason.
        notes: by unit, the texts noted of it, each once.
    """

    unit_of: Tensor
    reasons: dict[int, str]
    notes: dict[int, tuple[str, ...]]


@dataclass(slots=True)
class IdSpace:
    """All ids of one network, and what is known of them."""

    size: int = 0
    _pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    _notes: list[tuple[Tensor, str]] = field(default_factory=list)
    _constant: list[tuple[Tensor, tuple[int, ...], str]] = field(default_factory=list)
    _sliced: list[Tensor] = field(default_factory=list)

    def new(self, *shape: int) -> Tensor:
        """So many new ids, (shape)."""
        count = int(np.prod(shape))
        self.size += count
        return torch.arange(self.size - count, self.size).reshape(shape)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """The ids at the same places stand or fall together; the shapes are broadcast."""
        a, b = torch.broadcast_tensors(a, b)
        for dim in range(a.dim()):
            if a.stride(dim) == b.stride(dim) == 0:
                a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
        a, b = a.reshape(-1), b.reshape(-1)
        differ = a != b
        self._pairs.append((a[differ], b[differ]))

    def unite_along(self, ids: Tensor, dim: int) -> None:
        """What lies at the same place in all slices along `dim` stands or falls together."""
        self.unite(ids, ids.narrow(dim, 0, 1))

    def fix(self, ids: Tensor, reason: str) -> None:
        """These ids cannot be removed, and why."""
        self._fixed.append((squeezed(ids).reshape(-1), reason))

    def note(self, ids: Tensor, text: str) -> None:
        """Something to be told of these ids."""
        self._notes.append((squeezed(ids).reshape(-1), text))

    def keep_along(self, ids: Tensor, dims: Iterable[int], reason: str) -> None:
        """Nothing can be removed along these dimensions: what differs along them cannot be removed."""
        dims = tuple(dim % ids.dim() for dim in dims)
        if any(ids.shape[dim] > 1 and ids.stride(dim) != 0 for dim in dims):
            self._constant.append((squeezed(ids), dims, reason))

    def cut_as_slices(self, ids: Tensor) -> None:
        """A tensor with these ids occurs: what is removed must be slices along one dimension."""
        if sum(size > 1 and stride != 0 for size, stride in zip(ids.shape, ids.stride(), strict=True)) > 1:
            self._sliced.append(squeezed(ids))

    def solve(self) -> Solution:
        """Find what belongs together."""
        unit_of = self._components()
        while self._unite_to_slices(unit_of):
            unit_of = self._components()
        reasons: dict[int, str] = {}
        notes: dict[int, dict[str, None]] = {}
        for ids, reason in self._fixed:
            for unit in unit_of[ids].unique().tolist():
                reasons.setdefault(unit, reason)
        for ids, dims, reason in self._constant:
            units = unit_of[ids]
            for dim in dims:
                differs = (units != units.narrow(dim, 0, 1)).any(dim, keepdim=True).expand_as(units)
                for unit in units[differs].unique().tolist():
                    reasons.setdefault(unit, reason)
        for ids, text in self._notes:
            for unit in unit_of[ids].unique().tolist():
                notes.setdefault(unit, {})[text] = None
        return Solution(unit_of, reasons, {unit: tuple(texts) for unit, texts in notes.items()})

    def _components(self) -> Tensor:
        a = torch.cat([pair[0] for pair in self._pairs] or [torch.empty(0, dtype=torch.long)]).numpy()
        b = torch.cat([pair[1] for pair in self._pairs] or [torch.empty(0, dtype=torch.long)]).numpy()
        graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(self.size, self.size))
        return torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))

    def _unite_to_slices(self, unit_of: Tensor) -> bool:
        """Unite along all dimensions but the longest where units differ along several; whether any did."""
        found = False
        for ids in self._sliced:
            varying = varying_dims(unit_of[ids])
            longest = max(varying, key=lambda dim: ids.shape[dim], default=None)
            for dim in varying:
                if len(varying) > 1 and dim != longest:
                    self.unite_along(ids, dim)
                    found = True
        return found


def stretched(ids: Tensor) -> Tensor:
    """The same ids, with stride 0 along every dimension in which they do not change."""
    for dim, size in enumerate(ids.shape):
        if size > 1 and ids.stride(dim) != 0 and bool((ids == ids.narrow(dim, 0, 1)).all()):
            ids = ids.narrow(dim, 0, 1).expand(ids.shape)
    return ids


def squeezed(ids: Tensor) -> Tensor:
    """The same ids, of size 1 along every dimension with stride 0."""
    for dim in range(ids.dim()):
        if ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    return ids


def varying_dims(ids: Tensor) -> list[int]:
    """The dimensions along which the ids change."""
    return [
        dim
        for dim, size in enumerate(ids.shape)
        if size > 1 and ids.stride(dim) != 0 and not bool((ids == ids.narrow(dim, 0, 1)).all())
    ]
