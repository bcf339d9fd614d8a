"""Operations that move, cut, join, pool or reduce: ids go where the elements go.

Knows nothing about weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from distiller.channel_groups.call import Call, fixed, opaque, over, sliced
from distiller.channel_groups.network_ids import State, Value


def move(call: Call) -> Value:
    """Run the operation on the ids."""
    ids = call.ids("self")
    if ids is None:
        return None
    args = {name: _shaped_like(call, name, value) for name, value in call.args.items()}
    if call.name in (
        "view",
        "_unsafe_view",
    ):  # stretched ids lie otherwise in memory than the network's tensor
        moved = ids.reshape(call.args["size"])
    else:
        moved = call.target(**{**args, "self": ids})
    if isinstance(moved, (tuple, list)):
        return tuple(sliced(call, part) for part in moved)
    return sliced(call, moved)


def move_fixed_along(dims_name: str) -> Callable[[Call], Value]:
    """Run the operation on the ids; nothing may be removed along the dimensions that it tells apart."""

    def rule(call: Call) -> Value:
        ids = call.ids("self")
        reorders = call.name in ("roll", "flip", "index_select")
        if ids is not None and (reorders or call.shape != tuple(ids.shape)):
            dims = pytree.tree_leaves(call.args[dims_name])
            call.net.space.keep_along(ids, dims, f"{call.told} takes channels by their number")
        return move(call)

    return rule


def split(call: Call) -> Value:
    """Parts of equal size are cut alike: what lies at the same place in each stands or falls together."""
    parts, ids = move(call), call.ids("self")
    if ids is None:
        return tuple(None for _ in call.shapes)
    assert isinstance(parts, tuple)
    dim = call.args["dim"]
    if len(set(call.shapes)) > 1:
        call.net.space.keep_along(ids, [dim], f"{call.told} is into parts of different sizes")
    elif ids.stride(dim) != 0:
        for part in parts[1:]:
            assert isinstance(part, Tensor)
            assert isinstance(parts[0], Tensor)
            call.net.space.unite(part, parts[0])
    return parts


def concatenate(call: Call) -> Value:
    """Join parts: along the other dimensions all of them are cut alike."""
    dim = call.args["dim"] % len(call.shape)
    shapes = call.operand_shapes["tensors"]
    parts: list[Tensor] = []
    for value, shape in zip(call.args["tensors"], shapes, strict=True):
        ids = call.net.of_elements(value) if isinstance(value, State) else value
        if ids is None:
            ids = fixed(call, shape, f"{call.told} puts it beside what has no channels")
        parts.append(ids)
    if call.name == "stack":
        parts = [ids.unsqueeze(dim) for ids in parts]
    for ids in parts[1:]:
        if any(i != dim and size > 1 for i, size in enumerate(call.shape)):
            _unite_sides(call, parts[0], ids, dim)
    return sliced(call, torch.cat(parts, dim))


def index(call: Call) -> Value:
    """Take rows by constant numbers, which stay what they are."""
    ids, indices = call.ids("self"), call.args["indices"]
    known = all(index is None or isinstance(index, State) for index in indices)
    if ids is None or not known:
        return opaque(call) if ids is not None else None
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    call.net.space.keep_along(ids, dims, f"{call.told} takes channels by their number")
    taken = ids[tuple(slice(None) if index is None else index.tensor.cpu() for index in indices)]
    return sliced(call, taken)


def pixel_shuffle(call: Call) -> Value:
    """A channel of the result is a square of channels."""
    moved = move(call)
    if isinstance(moved, Tensor):
        for dim in (-2, -1):
            call.net.space.unite_along(moved, dim)
        return moved.narrow(-1, 0, 1).narrow(-2, 0, 1).expand(moved.shape)
    return moved


def channel_shuffle(call: Call) -> Value:
    """Shuffle: every group is cut alike."""
    ids = call.ids("self")
    if ids is not None:
        call.net.space.cut_as_slices(ids.unflatten(1, (call.args["groups"], -1)))
    return move(call)


def pool(call: Call) -> Value:
    """Pool over the last dimensions."""
    ids = call.ids("self")
    results = tuple(over(call, ids, range(-int(call.name[-2]), 0), shape) for shape in call.shapes)
    return results[0] if len(results) == 1 else results


def resize(call: Call) -> Value:
    """Resize all dimensions after (batch, channels)."""
    ids = call.ids("input" if "input" in call.args else "self")
    return None if ids is None else over(call, ids, range(2, ids.dim()), call.shape)


def pad(call: Call) -> Value:
    """Pad: nothing may be removed along what is padded."""
    ids, pad = call.ids("self"), call.args["pad" if "pad" in call.args else "padding"]
    if ids is None:
        return None
    padded = [-1 - i for i in range(len(pad) // 2) if any(pad[2 * i : 2 * i + 2])]
    return over(call, ids, padded, call.shape)


def reduce(call: Call) -> Value:
    """Sum up, average or the like over dimensions."""
    ids = call.ids("self")
    if ids is None:
        return None
    dims = call.args.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(ids.dim()))
    dims = [dim % ids.dim() for dim in dims]
    kept = [1 if dim in dims else size for dim, size in enumerate(ids.shape)]
    ids = over(call, ids, dims, kept)
    assert ids is not None
    if len(call.shape) != ids.dim():
        for dim in sorted(dims, reverse=True):
            ids = ids.squeeze(dim)
    return ids


def along(call: Call) -> Value:
    """Softmax and the like: mixes what lies along one dimension."""
    ids = call.ids("self")
    return ids if ids is None else over(call, ids, [call.args["dim"]], call.shape)


def glu(call: Call) -> Value:
    """Gate one half of the channels by the other."""
    ids = call.ids("self")
    if ids is None:
        return None
    halves = ids.chunk(2, call.args["dim"])
    call.net.space.unite(*halves)
    return halves[0]


def _shaped_like(call: Call, name: str, value: Any) -> Any:
    if isinstance(value, State):
        return value.tensor.cpu()
    is_operand = isinstance(call.operand_shapes.get(name), tuple)
    return torch.zeros(1).expand(call.operand_shapes[name]) if is_operand else value


def _unite_sides(call: Call, first: Tensor, ids: Tensor, dim: int) -> None:
    for other in range(ids.dim()):
        varies = [p.shape[other] > 1 and p.stride(other) != 0 for p in (first, ids)]
        if other != dim and any(varies):
            for part in (first, ids):
                call.net.space.unite_along(part, dim)
            call.net.space.unite(first.narrow(dim, 0, 1), ids.narrow(dim, 0, 1))
            return
