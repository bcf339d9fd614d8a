"""What operations are called, and which of them only move values or make new ones.

Knows nothing about modules.
"""

from __future__ import annotations

from torch import fx

CREATED = frozenset(
    f"{start}{kind}{end}"
    for start, end in (("new_", ""), ("", "_like"))
    for kind in ("empty", "full", "ones", "zeros", "tensor", "rand", "randn")
)
"""Operations that take form, type and device from a tensor, nothing from its values."""

# Plain names of functions, of methods of tensors and of operators; `get` reads an attribute such as `x.T`.
_MOVEMENT_WORDS = """
    adjoint alias alpha_dropout as_strided atleast_1d bfloat16 broadcast_tensors broadcast_to
    channel_shuffle chunk clone contiguous copy cpu cuda data detach double dropout dropout1d
    dropout2d dropout3d dsplit expand expand_as feature_alpha_dropout fill flatten flip fliplr
    flipud float gather get getitem H half hsplit index_fill index_put index_select lift_fresh masked_fill
    masked_scatter masked_select meshgrid mH moveaxis movedim mT narrow native_channel_shuffle pad permute
    pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll rot90
    scatter select setitem split split_with_sizes squeeze swapaxes swapdims t T take tensor_split tile to
    transpose tril triu type type_as unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze
    view view_as vsplit where zero
"""
MOVEMENT = frozenset(_MOVEMENT_WORDS.split())
"""Plain names of operations that put values elsewhere, pass them on or choose among them: nothing to
quantize there. Their result may be the memory of their argument."""

_ALIASES = {
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "true_divide": "div",
    "truediv": "div",
    "mm": "matmul",
    "multiply": "mul",
    "special_expit": "sigmoid",
    "special_softmax": "softmax",
    "subtract": "sub",
}
_OPERATORS = frozenset(("add", "sub", "mul", "truediv", "matmul"))


def operation_name(node: fx.Node) -> str:
    """The name of a call of a function or method as it was written, `getattr`'s that of the attribute."""
    if node.op == "call_method":
        return str(node.target)
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", node.target))


def plain_name(name: str) -> tuple[str, bool]:
    """An operation's one name, and whether it was written as one in place.

    Args:
        name: `add`, `__radd__`, `add_`, `iadd`, `relu_`, `concat`, ...
    """
    is_in_place = False
    bare = name.strip("_") if name.startswith("__") else name
    if bare.endswith("_"):
        bare, is_in_place = bare[:-1], True
    elif bare[:1] == "i" and bare[1:] in _OPERATORS:
        bare, is_in_place = bare[1:], True
    elif name.startswith("__r") and bare[1:] in _OPERATORS:
        bare = bare[1:]
    return _ALIASES.get(bare, bare), is_in_place
