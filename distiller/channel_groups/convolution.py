"""Ids through convolutions: dense, grouped, depthwise and transposed.

A grouped convolution is cut in one of two ways, whichever is the finer: by whole groups (its weight
loses filters, and there are fewer groups), or by the same channels of every group (the number of
groups stays).
Knows nothing about other operations.
"""

from __future__ import annotations

from torch import Tensor

from distiller.channel_groups.call import Call, channel_vector, lay, opaque, volume, with_computed_weight
from distiller.channel_groups.network_ids import Role, Value


def convolution(call: Call) -> Value:
    """The ids after a convolution; its weight is (out, in / groups, ...)."""
    weight, ids, groups = call.state("weight"), call.ids("input"), call.args["groups"]
    if weight is None:
        return with_computed_weight(call)
    net, inputs = call.net, None
    per_group = weight.tensor.shape[1]
    by_whole_groups = groups > 1 and ids is not None and groups >= per_group
    role: Role = "through" if by_whole_groups else "output"
    outputs = net.vector(weight, 0, role)
    if ids is not None:
        grouped = channel_vector(call, ids, 1).reshape(groups, per_group)
        if by_whole_groups:
            net.space.unite_along(grouped, 1)
            net.space.unite(outputs.reshape(groups, -1), grouped[:, :1])
        else:
            inputs = net.vector(weight, 1, "input")
            net.space.unite_along(grouped, 0)
            net.space.unite(inputs, grouped[0])
    if groups > 1 and not by_whole_groups:
        net.space.unite_along(outputs.reshape(groups, -1), 0)
    macs = volume(call.shape) * weight.tensor[0].numel()
    net.add_work(weight.name or call.told, macs, outputs, inputs)
    return _with_bias(call, outputs, role)


def transposed_convolution(call: Call) -> Value:
    """The ids after a transposed convolution; its weight is (in, out / groups, ...)."""
    weight, ids, groups = call.state("weight"), call.ids("input"), call.args["groups"]
    if weight is None:
        return with_computed_weight(call)
    if ids is None:
        return opaque(call)
    net = call.net
    per_group = weight.tensor.shape[1]
    by_whole_groups = groups > 1 and groups >= per_group
    inputs = net.vector(weight, 0, "through" if by_whole_groups else "input")
    net.space.unite(inputs, channel_vector(call, ids, 1))
    grouped = inputs.reshape(groups, -1)
    macs = volume(call.operand_shapes["input"]) * weight.tensor[0].numel()
    if by_whole_groups:
        net.space.unite_along(grouped, 1)
        net.add_work(weight.name or call.told, macs, inputs)
        return _with_bias(call, grouped[:, :1].expand(groups, per_group).reshape(-1), "through")
    net.space.unite_along(grouped, 0)
    outputs = net.vector(weight, 1, "output")
    net.add_work(weight.name or call.told, macs, inputs, outputs)
    return _with_bias(call, outputs.repeat(groups), "output")


def _with_bias(call: Call, outputs: Tensor, role: Role) -> Tensor:
    bias = call.state("bias")
    if bias is not None:
        call.net.space.unite(call.net.vector(bias, 0, role), outputs)
    return lay(outputs, 1, call.shape)
