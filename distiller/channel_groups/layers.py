"""Ids through norms, embeddings and products: linear layers, matrix products, attention.

Knows nothing about convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from distiller.channel_groups.call import (
    Call,
    channel_vector,
    lay,
    opaque,
    united,
    volume,
    with_computed_weight,
)
from distiller.channel_groups.network_ids import State, Value


def batch_norm(call: Call) -> Value:
    """Scale, shift and statistics are by channel."""
    ids = call.ids("input")
    if ids is None:
        return None
    vector = channel_vector(call, ids, 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        state = call.state(name)
        if state is not None:
            call.net.space.unite(call.net.vector(state, 0, "channel"), vector)
    return ids


def layer_norm(call: Call) -> Value:
    """Scale and shift are by element; notes that statistics are taken over the channels."""
    ids = call.ids("input")
    if ids is None:
        return None
    dims = range(-len(call.args["normalized_shape"]), 0)
    if any(ids.stride(dim) != 0 and ids.shape[dim] > 1 for dim in dims):
        call.net.space.note(ids, call.where or call.name)
    operands = [ids]
    for name in ("weight", "bias"):
        elements = call.ids(name) if name in call.args else None
        if elements is not None:
            operands.append(elements)
    return united(call, operands)


def counted_sum(call: Call) -> Value:
    """A sum in a norm that counts removed channels as zeros: they may go; noted as of a layer norm."""
    ids = call.ids("self")
    if ids is not None:
        call.net.space.note(ids, call.where)
    return None


def prelu(call: Call) -> Value:
    """Slopes are by channel, or one for all."""
    ids, slope = call.ids("self"), call.state("weight")
    if ids is not None and slope is not None and slope.tensor.numel() > 1:
        call.net.space.unite(call.net.vector(slope, 0, "channel"), channel_vector(call, ids, 1))
    return ids


def embedding(call: Call) -> Value:
    """The columns of the table are its channels."""
    weight = call.state("weight")
    if weight is None:
        return opaque(call)
    return lay(call.net.vector(weight, 1, "output"), -1, call.shape)


def linear(call: Call) -> Value:
    """A linear layer; its weight is (out, in)."""
    return matrix(call, "input", call.state("weight"), call.state("bias"), (1, 0))


def matmul(call: Call) -> Value:
    """A product of two activations, or of one with a matrix of weights (in, out)."""
    name = "other" if "other" in call.args else "mat2"
    weight = call.state(name)
    if weight is not None and weight.tensor.dim() == 2 and call.state("self") is None:
        return matrix(call, "self", weight, None, (0, 1))
    a, b = call.ids("self"), call.ids(name)
    if min(len(call.operand_shapes["self"]), len(call.operand_shapes[name])) < 2:
        return opaque(call)
    return contract(
        call,
        None if a is None else a.unsqueeze(-1),
        None if b is None else b.unsqueeze(-3),
        (*call.shape[:-1], call.operand_shapes["self"][-1], call.shape[-1]),
        -2,
    )


def einsum(call: Call) -> Value:
    """A product of two activations over one index."""
    equation = call.args["equation"].replace(" ", "")
    terms, arrow, out = equation.partition("->")
    letters = terms.split(",")
    if (
        "." in equation
        or not arrow
        or len(letters) != 2
        or any(len(set(term)) != len(term) for term in letters)
    ):
        return opaque(call)
    summed = [letter for letter in dict.fromkeys("".join(letters)) if letter not in out]
    if len(summed) != 1 or not all(summed[0] in term for term in letters):
        return opaque(call)
    sizes: dict[str, int] = {}
    for term, shape in zip(letters, call.operand_shapes["tensors"], strict=True):
        sizes.update(zip(term, shape, strict=True))
    order = out + summed[0]
    laid: list[Tensor | None] = []
    for term, value in zip(letters, call.args["tensors"], strict=True):
        ids = call.net.of_elements(value) if isinstance(value, State) else value
        if ids is not None:
            ids = ids.permute([term.index(letter) for letter in order if letter in term])
            for place, letter in enumerate(order):
                if letter not in term:
                    ids = ids.unsqueeze(place)
        laid.append(ids)
    return contract(call, laid[0], laid[1], [sizes[letter] for letter in order], -1)


def attention(call: Call) -> Value:
    """softmax(q k^T / sqrt(d)) v: d stays, for the scale's sake; whole heads can go."""
    q, k, v = (call.ids(name) for name in ("query", "key", "value"))
    *batch, rows, width = call.operand_shapes["query"]
    columns, outputs = call.operand_shapes["value"][-2:]
    for ids in (q, k):
        if ids is not None:
            call.net.space.unite_along(ids, -1)
    scores = contract(
        call,
        None if q is None else q.unsqueeze(-2),
        None if k is None else k.unsqueeze(-3),
        (*batch, rows, columns, width),
        -1,
    )
    mask = call.ids("attn_mask")
    if mask is not None and scores is not None:
        call.net.space.unite(mask.expand(scores.shape), scores)
    return contract(
        call,
        None if scores is None else scores.unsqueeze(-1),
        None if v is None else v.unsqueeze(-3),
        (*batch, rows, columns, outputs),
        -2,
    )


def matrix(call: Call, name: str, weight: State | None, bias: State | None, dims: tuple[int, int]) -> Value:
    """A product with a parameter, whose dimensions of inputs and outputs are `dims`."""
    net, ids = call.net, None if call.state(name) else call.ids(name)  # a table that is read has no channels
    if weight is None:
        return with_computed_weight(call)
    macs = weight.tensor.numel() * volume(call.shape[:-1])
    label = weight.name or call.told
    leading = None if ids is None else ids.narrow(-1, 0, 1)
    if (
        ids is not None
        and (ids.stride(-1) == 0 or ids.shape[-1] == 1)
        and any(size > 1 and stride != 0 for size, stride in zip(ids.shape, ids.stride(), strict=True))
    ):  # channels lie along another dimension, which the product leaves alone
        assert leading is not None
        net.add_work(label, macs, leading)
        return leading.expand(call.shape)
    if ids is not None:
        net.space.unite(net.vector(weight, dims[0], "input"), channel_vector(call, ids, -1))
    outputs = net.vector(weight, dims[1], "output")
    if bias is not None:
        net.space.unite(net.vector(bias, 0, "output"), outputs)
    inputs = None if ids is None else net.vector(weight, dims[0], "input")
    net.add_work(label, macs, inputs, outputs)
    return lay(outputs, -1, call.shape)


def contract(call: Call, a: Tensor | None, b: Tensor | None, shape: Sequence[int], dim: int) -> Tensor | None:
    """Ids of a product of two activations that are laid out alike, with the dimension that is summed over.

    What differs along other dimensions too (the heads of attention) is cut there alone.
    """
    space = call.net.space
    operands = [ids.expand(tuple(shape)) for ids in (a, b) if ids is not None]
    varies_elsewhere = any(
        size > 1 and ids.stride(i) != 0
        for ids in operands
        for i, size in enumerate(shape)
        if i != dim % len(shape)
    )
    for ids in operands:
        if varies_elsewhere:
            space.unite_along(ids, dim)
        if len(operands) == 1:
            space.keep_along(ids, [dim], f"{call.told} is with what has no channels")
    for first, second in pairwise(operands):
        space.unite(first, second)
    call.net.add_work(call.told, volume(shape), *operands[:1])
    if not operands or not varies_elsewhere:
        return None
    result = operands[0].select(dim, 0)
    for ids in operands[1:]:  # united above: where one does not vary, the other stands or falls as a whole
        for other, stride in enumerate(ids.select(dim, 0).stride()):
            if stride == 0:
                result = result.narrow(other, 0, 1).expand(result.shape)
    space.cut_as_slices(result)
    return result
