"""Early exits in a model: where a branch leaves the network, and how its answers come out.

A model with exits returns `[exit 1, ..., final]` in training mode, and its final output alone in evaluation
mode, where branches are not even computed: whoever evaluates, measures or traces it sees the network that it
was. Within `every_exit(model)` it returns the list in evaluation mode too.
Knows nothing about when an image leaves, nor about losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from distiller.errors import UsageError, require
from distiller.names import find_module, named_modules, unwrap
from distiller.observation import as_given

Gate = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]
"""(index of the exit, its branch, what the layer gave) -> what the layers behind go on with."""
_ASKED, _ANSWERS = "asks_exits", "exit_answers"
"""Attributes of the model: whether all outputs are wanted in evaluation mode; those of the pass under way."""


class BranchPoint(nn.Module):
    """A layer of the network with a branch on what it gives.

    Args:
        branched_module: the layer; what it returns is what this module returns.
        branch_net: reads that, and answers with logits, (batch, classes).
        index: of the exit, from 0 in the order of execution.
    """

    def __init__(self, branched_module: nn.Module, branch_net: nn.Module, index: int = 0) -> None:
        super().__init__()
        self.branched_module = branched_module
        self.branch_net = branch_net
        self.index = index
        self.is_checked = False  # that the network has no other way past it
        self.answers: dict[int, Tensor] | None = None  # of the forward pass under way; None: not wanted
        self.gate: Gate | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns; within a session, of those images only that go on."""
        x = self.branched_module(*args, **kwargs)
        if self.answers is not None:
            self.answers[self.index] = self.branch(x)
        return x if self.gate is None else self.gate(self.index, self.branch, x)

    def branch(self, x: Any) -> Any:
        """What the branch answers; neither it nor the layers behind see what the other writes to `x`."""
        return self.branch_net(as_given(x))


def attach_exits(model: nn.Module, exits: Sequence[tuple[str, nn.Module]]) -> None:
    """Put branches on layers of a model, in place.

    The layers keep their parameters, which the optimizer of the model may know already; those of the branches
    are new. Where a layer with parameters is named, their names become `<layer>.branched_module.<parameter>`.

    Args:
        model: the model, or a wrapper around it.
        exits: (name of the layer, branch), in the order of execution. A branch reads what the layer returns,
            and answers with logits.

    Raises:
        UnknownNameError: there is no such layer.
        UsageError: the model has exits already, or a layer is the whole model, named twice, or used under
            several names; the model stays as it is.
    """
    bare = unwrap(model)
    if exits_of(bare):
        raise UsageError("early exit: the model has exits already; attach all of them at once")
    layers: dict[nn.Module, str] = {}
    everywhere = [module for _, module in bare.named_modules(remove_duplicate=False)]
    for name, branch in exits:
        require(branch, nn.Module, f"early exit: branch of '{name}'", "a torch.nn.Module")
        layer = find_module(bare, name)
        if layer is bare or layer in layers:
            what = "is the whole model" if layer is bare else "has one already"
            raise UsageError(f"early exit: '{name}' {what}; name another layer")
        if sum(module is layer for module in everywhere) > 1:
            raise UsageError(f"early exit: '{name}' is used under several names; name another layer")
        layers[layer] = name
    if not layers:
        raise UsageError("early exit: no layer is named; give at least one")
    for index, (layer, (_, branch)) in enumerate(zip(layers, exits, strict=True)):
        _put(bare, layer, BranchPoint(layer, branch, index).train(layer.training))
    bare.register_forward_pre_hook(_open)
    bare.register_forward_hook(_answer_all)


def detach_exits(model: nn.Module) -> None:
    """Take the exits off a model, in place: layers are where they were."""
    bare = unwrap(model)
    for point in exits_of(bare):
        _put(bare, point, point.branched_module)
    for hooks, ours in ((bare._forward_pre_hooks, _open), (bare._forward_hooks, _answer_all)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
    vars(bare).pop("early_exits", None)


def exits_of(model: nn.Module) -> tuple[BranchPoint, ...]:
    """The branch points of a model in the order of execution; () when it has no exits."""
    points = (module for module in model.modules() if isinstance(module, BranchPoint))
    return tuple(sorted(points, key=lambda point: point.index))


def exit_names(model: nn.Module) -> tuple[str, ...]:
    """The canonical names of the layers that have an exit, in the order of execution."""
    names = {module: name for name, module in named_modules(model)}
    return tuple(names[point] for point in exits_of(model))


@contextmanager
def every_exit(model: nn.Module) -> Iterator[None]:
    """Within the block the model returns the list of all outputs in evaluation mode too."""
    own = vars(unwrap(model))
    before = own.get(_ASKED, False)
    own[_ASKED] = bool(exits_of(model))
    try:
        yield
    finally:
        own[_ASKED] = before


def final_output(outputs: Any) -> Any:
    """The output of the whole network, among the outputs of all exits; what is no list is it itself."""
    return outputs[-1] if isinstance(outputs, list) else outputs


def _put(bare: nn.Module, old: nn.Module, new: nn.Module) -> None:
    raw = next(raw for raw, module in bare.named_modules() if module is old)
    parent, _, child = raw.rpartition(".")
    setattr(bare.get_submodule(parent), child, new)


def _open(model: nn.Module, inputs: Any) -> None:
    """Before a forward pass of the model, or of a replica: begin a table of answers if one is wanted."""
    own = vars(model)
    is_wanted = model.training or own.get(_ASKED, False)
    if is_wanted or own.pop(_ANSWERS, None) is not None:  # of a pass that failed half-way
        points = exits_of(model)
        is_wanted = is_wanted and all(point.gate is None for point in points)
        answers: dict[int, Tensor] | None = {} if is_wanted else None
        for point in points:
            point.answers = answers
        own[_ANSWERS] = answers


def _answer_all(model: nn.Module, inputs: Any, output: Any) -> Any:
    """After it: the answers of the exits, and the output, in one list."""
    answers = vars(model).pop(_ANSWERS, None)
    if answers is None:
        return output
    points = exits_of(model)
    for point in points:
        point.answers = None
    for index in range(len(points)):
        if index not in answers:
            raise UsageError(
                f"early exit: '{exit_names(model)[index]}' did not run in the forward pass; attach the exit "
                "to a layer that does"
            )
    return [*(answers[index] for index in range(len(points))), output]
