"""Follows the channels of a network through the operations of its exported graph.

Knows nothing about what any operation does to them, nor what the groups are for.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from distiller.channel_groups.call import Call
from distiller.channel_groups.network_ids import NetworkIds, State, Value
from distiller.channel_groups.rules import follow
from distiller.errors import GraphTraceError
from distiller.graph_trace import aten_name, export_program, region_at
from distiller.names import canonical
from distiller.thinned_layers import COUNTING_NORMS


def follow_channels(model: nn.Module, dummy_input: Any, purpose: str, remedy: str) -> NetworkIds:
    """The ids of a network's parameters and buffers, with all that was found of them.

    The network is followed in evaluation mode. Where parameters are left over (auxiliary classifiers), so is
    what it does in training mode; its products are no work of the network.

    Args:
        model: the model; not a wrapper around one.
        dummy_input: a tensor, or a tuple of the model's positional arguments, on any device.
        purpose: what the channels are followed for, named in the error.
        remedy: how to go without, named in the error.

    Raises:
        GraphTraceError: `torch.export` cannot trace the model.
    """
    exported = export_program(model, dummy_input, purpose, remedy)
    net = NetworkIds()
    _follow(exported, model, net)
    if _has_others(exported, model):
        work = len(net.work)
        composed = {module for module in model.modules() if next(module.children(), None) is not None}
        try:
            in_training = export_program(model, dummy_input, purpose, remedy, composed)
        except GraphTraceError:  # too small an input for what training adds: nobody trains on it either
            return net
        _follow(in_training, model, net)
        del net.work[work:]
    return net


def _follow(exported: torch.export.ExportedProgram, model: nn.Module, net: NetworkIds) -> None:
    results = _run(exported.graph_module, _placeholders(exported, model, net), net, model)
    for value in pytree.tree_leaves(results, is_leaf=lambda leaf: isinstance(leaf, State)):
        if isinstance(value, Tensor):
            net.space.fix(value, "the network returns it")


def _has_others(exported: torch.export.ExportedProgram, model: nn.Module) -> bool:
    """Whether the model has parameters that the program does not read."""
    names = exported.graph_signature.inputs_to_parameters
    read = {names[node.name] for node in exported.graph.nodes if node.name in names and node.users}
    tensors = {operator.attrgetter(name)(model) for name in read}
    return any(param not in tensors for param in model.parameters())


def _placeholders(exported: torch.export.ExportedProgram, model: nn.Module, net: NetworkIds) -> list[Value]:
    """Inputs have one id that stays; parameters and buffers are what they are."""
    signature = exported.graph_signature
    raw_names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {
        **exported.constants,
        **{
            name: exported.constants[key] for name, key in signature.inputs_to_lifted_tensor_constants.items()
        },
    }
    # A tensor under two names is one: the first name of the model's own order stands for it.
    first: dict[Tensor, str] = {}
    for raw, tensor in (*model.named_parameters(), *model.named_buffers()):
        first.setdefault(tensor, canonical(raw, model))
    values: list[Value] = []
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in raw_names:
            tensor = operator.attrgetter(raw_names[node.name])(model)
            values.append(State(first.get(tensor), tensor.detach()))
        elif node.name in constants and isinstance(constants[node.name], Tensor):
            values.append(State(None, constants[node.name]))  # type: ignore[arg-type]
        elif isinstance(node.meta.get("val"), Tensor):
            ids = net.space.new(1)
            net.space.fix(ids, "it is of the network's input")
            values.append(ids.expand(tuple(node.meta["val"].shape)))
        else:
            values.append(None)
    return values


def _run(program: fx.GraphModule, arguments: Sequence[Value], net: NetworkIds, model: nn.Module) -> Value:
    """The values of the outputs of `program`."""
    values: dict[fx.Node, Value] = {}
    pending = iter(arguments)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(pending)
        elif node.op == "get_attr":
            attribute = operator.attrgetter(str(node.target))(program)
            values[node] = State(None, attribute) if isinstance(attribute, Tensor) else None
        elif node.op == "output":
            leaves = pytree.tree_leaves(node.args)
            return tuple(values[leaf] if isinstance(leaf, fx.Node) else None for leaf in leaves)
        elif node.op == "call_function":
            values[node] = _value(node, program, values, net, model)
    raise AssertionError("an exported program ends in its output")


def _value(
    node: fx.Node, program: fx.GraphModule, values: dict[fx.Node, Value], net: NetworkIds, model: nn.Module
) -> Value:
    if node.target is operator.getitem:
        value, index = values[node.args[0]], node.args[1]  # type: ignore[index]
        return value[index] if isinstance(value, tuple) else value  # type: ignore[index]
    at = region_at(node)
    if at is not None:
        region = program.get_submodule(str(node.args[at].target))  # type: ignore[union-attr]
        operands = [values[n] if isinstance(n, fx.Node) else None for n in node.args[at + 1 :]]
        return _run(region, operands, net, model)  # type: ignore[arg-type]
    shapes = tuple(
        tuple(int(size) for size in leaf.shape)
        for leaf in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(leaf, Tensor)
    )
    if not shapes:
        return None
    args = _by_name(node)
    call = Call(
        net=net,
        name=aten_name(node),
        where=_where(node, model),
        target=node.target,
        args={name: fx.map_arg(arg, values.__getitem__) for name, arg in args.items()},  # type: ignore[arg-type]
        shapes=shapes,
        operand_shapes={name: fx.map_arg(arg, _operand_shape) for name, arg in args.items()},
        operands=tuple((values[n], _operand_shape(n) or ()) for n in node.all_input_nodes),
        is_in_counting_norm=isinstance(model.get_submodule(_path(node)), COUNTING_NORMS),
    )
    return follow(call)


def _by_name(node: fx.Node) -> dict[str, Any]:
    """The arguments by name, those left out by their defaults."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(index): arg for index, arg in enumerate(node.args)} | dict(node.kwargs)
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def _operand_shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def _where(node: fx.Node, model: nn.Module) -> str:
    return canonical(_path(node), model)


def _path(node: fx.Node) -> str:
    return next((path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
