"""Whether an operation in place can give a new tensor instead without anyone telling the difference.

It can where nobody reads the overwritten memory afterwards but through the operation's result. Memory
counts as shared wherever that cannot be ruled out.
Knows nothing about which operations become modules.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules import batchnorm, conv, instancenorm, normalization, pooling

from distiller.functional_modules.forward_trace import VALUE
from distiller.functional_modules.operation_names import MOVEMENT, operation_name, plain_name

_NEW_TENSOR = (
    conv._ConvNd,
    nn.Linear,
    nn.Embedding,
    batchnorm._NormBase,
    instancenorm._InstanceNorm,
    normalization.LayerNorm,
    normalization.GroupNorm,
    pooling._AvgPoolNd,
    pooling._MaxPoolNd,
    pooling._AdaptiveAvgPoolNd,
    pooling._AdaptiveMaxPoolNd,
)
_OUTSIDE = object()
OUTPUT_IS_NEW = "_distiller_output_is_new"
"""Attribute of a rewritten class: whether its forward gives memory that nobody else has."""

Memory = frozenset[Any]


class SharedMemory:
    """Which operations' results may share memory, asked in the order of the graph.

    Args:
        graph: as traced.
        root: the module whose forward it is.
        computing: plain names of functions whose result is always a new tensor.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, computing: frozenset[str]) -> None:
        self._root, self._computing = root, computing
        self._memory: dict[fx.Node, Memory] = {}
        self._nodes = list(graph.nodes)

    def pass_by(self, node: fx.Node) -> None:
        """Take note of a node that stays as it is."""
        self._memory[node] = self._shared_with(node)

    def made_new(self, node: fx.Node) -> None:
        """Take note of a node that gives a new tensor."""
        self._memory[node] = frozenset((node,))

    def read_result_instead(self, node: fx.Node, written: fx.Node) -> None:
        """Let what reads `written` after `node` has written to it read `node`'s result, the same tensor."""
        later = set(self._nodes[self._nodes.index(node) + 1 :])
        written.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)

    def may_be_new(self, node: fx.Node, written: fx.Node) -> bool:
        """Whether `node`, which writes to the result of `written`, can give a new tensor instead."""
        memory = self._memory[written]
        if _OUTSIDE in memory:
            return False
        ahead: dict[fx.Node, Memory] = {**self._memory, node: frozenset((node,))}
        for later in self._nodes[self._nodes.index(node) + 1 :]:
            if any(memory & ahead[read] for read in later.all_input_nodes):
                return False
            ahead[later] = self._shared_with(later, ahead)
        return True

    def output_is_new(self) -> bool:
        """Whether what the forward returns shares no memory with what it is given or the module holds."""
        returned = self._nodes[-1].all_input_nodes
        return all(_OUTSIDE not in self._memory[node] for node in returned)

    def _shared_with(self, node: fx.Node, known: dict[fx.Node, Memory] | None = None) -> Memory:
        memory = self._memory if known is None else known
        if node.op in ("placeholder", "get_attr"):
            return frozenset((node, _OUTSIDE))
        read = frozenset(item for other in node.all_input_nodes for item in memory[other])
        if node.op == "call_module":
            module = self._root.get_submodule(str(node.target))
            if _gives_new_tensor(module):
                return frozenset((node,))
            return read | {node} | ({_OUTSIDE} if _gives_own_state(module, node.meta[VALUE]) else set())
        name, is_in_place = plain_name(operation_name(node))
        if node.op != "output" and name in self._computing and name not in MOVEMENT:
            flags = [*node.args[1:], node.kwargs.get("inplace")]
            if is_in_place or any(flag is True for flag in flags):
                return memory[node.all_input_nodes[0]]
            return frozenset((node,))
        return read | {node}


def _gives_new_tensor(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return _last_gives_new_tensor(list(module))
    if (is_new := getattr(type(module), OUTPUT_IS_NEW, None)) is not None:
        return is_new
    return isinstance(module, _NEW_TENSOR) and type(module).forward.__module__.startswith("torch.nn.")


def _last_gives_new_tensor(modules: list[nn.Module]) -> bool:
    """Of a sequence: what its last modules may only pass on, one before them has to have made."""
    for module in reversed(modules):
        if _gives_new_tensor(module):
            return True
        is_plain = type(module).__module__.startswith("torch.nn.") and not list(module.children())
        if not is_plain or any(True for _ in module.parameters()):
            return False
    return False


def _gives_own_state(module: nn.Module, value: Any) -> bool:
    held = [*module.parameters(), *module.buffers()]
    held += [x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor)]
    return isinstance(value, Tensor) and any(_storage(value) == _storage(tensor) for tensor in held)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
