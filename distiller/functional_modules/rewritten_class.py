"""A subclass of a module's class whose forward is a graph of operations.

An instance of the class becomes one of the subclass, and has all that it had: parameters, hooks, mode.
The forward looks its modules and parameters up by name each time it runs, so that a copy runs its own,
and what takes a module's place later is run in its place.
Knows nothing about how the graph came about.
"""

from __future__ import annotations

import linecache
import operator
import types
from itertools import count

import torch
from torch import fx, nn

from distiller.functional_modules.forward_trace import VALUE
from distiller.functional_modules.in_place import OUTPUT_IS_NEW

_NUMBERS = count()


def rewritten_class(cls: type[nn.Module], graph: fx.Graph, name: str, output_is_new: bool) -> type[nn.Module]:
    """`cls` with the forward that `graph` describes.

    Args:
        cls: the class, whose name the subclass has too.
        graph: of its forward; results that nothing reads are taken out of it.
        name: of the module, for tracebacks.
        output_is_new: whether the forward's result shares memory with nothing that was there before.
    """
    _without_unread(graph)
    code = graph.python_code("self")
    path = f"<forward of {name or 'the model'}, operations as modules, {next(_NUMBERS)}>"
    namespace = dict(code.globals)
    exec(compile(code.src, path, "exec"), namespace)
    linecache.cache[path] = (len(code.src), None, code.src.splitlines(keepends=True), path)
    attributes = {
        "forward": namespace["forward"],
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        OUTPUT_IS_NEW: output_is_new,
    }
    return types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(attributes))


def is_rewritten(module: nn.Module) -> bool:
    """Whether a module's forward is one that was written here."""
    return OUTPUT_IS_NEW in vars(type(module))


def _without_unread(graph: fx.Graph) -> None:
    """Take out sizes, and items of lists, that were looked up for nothing."""
    for node in reversed(list(graph.nodes)):
        is_item = node.target is operator.getitem
        is_attribute = node.target is getattr or (node.op == "get_attr")
        is_size = node.target == "size" or isinstance(node.meta.get(VALUE), torch.Size)
        if not node.users and node.op != "output" and (is_item or is_attribute or is_size):
            graph.erase_node(node)
