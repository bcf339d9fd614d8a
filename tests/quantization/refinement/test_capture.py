"""Batches, and tensors taken from a running model."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from distiller.errors import UsageError
from distiller.quantization.refinement.capture import (
    call_counts,
    count_inputs,
    each_batch,
    inputs_of,
    outputs_of,
)


class Shared(nn.Module):
    """first, then `twice` two times with an in-place ReLU behind it, then last; `idle` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.idle = nn.Linear(3, 3)
        self.runs: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = self.twice(x).relu_()
        self.runs.append("last")
        return self.last(x)


def test_calls_are_counted_in_the_order_of_execution() -> None:
    model = Shared()
    layers = dict(reversed(list(model.named_children())))
    counts = call_counts(model, layers, (torch.randn(2, 3),))
    assert list(counts.items()) == [("first", 1), ("twice", 2), ("last", 1)]
    assert not any(layer._forward_pre_hooks for layer in model.children())


@torch.no_grad()
def test_every_call_is_captured_as_it_was_and_the_run_ends_with_the_last() -> None:
    model, x = Shared(), torch.randn(5, 3)
    first = model.twice(model.first(x))
    second = model.twice(first.relu())
    captured = outputs_of(model, model.twice, 2, (x,))
    assert [torch.equal(*pair) for pair in zip(captured, (first, second), strict=True)] == [True, True]
    captured = inputs_of(model, model.twice, 2, (x,))
    assert torch.equal(captured[1], first.relu())
    assert model.runs == []
    assert not model.twice._forward_hooks
    assert not model.twice._forward_pre_hooks


def test_what_a_model_raises_is_not_swallowed_and_the_hook_is_gone() -> None:
    model = Shared()
    with pytest.raises(RuntimeError):
        inputs_of(model, model.last, 1, (torch.randn(2, 7),))
    assert not model.last._forward_pre_hooks


def test_batches_are_tensors_or_tuples_of_arguments_or_a_function() -> None:
    one, other = torch.zeros(2, 3), torch.ones(4, 3)
    assert [len(arguments) for arguments in each_batch([one, (one, other), [other]])] == [1, 2, 1]
    assert count_inputs(lambda: iter([one, other])) == 6


@pytest.mark.parametrize(
    "batches, text",
    [
        ([], "batches: there are none; give at least one batch of inputs"),
        (3, "batches: must be a list of tensors or a function that returns one, got int"),
        (
            iter([torch.ones(1)]),
            "batches: are needed more than once, a list_iterator gives them once; "
            "pass a list, or a function that returns one",
        ),
        ([torch.ones(1), "x"], "batches[1]: must be a tensor, or a tuple that begins with one, got str"),
        ([()], "batches[0]: must be a tensor, or a tuple that begins with one, got tuple"),
    ],
)
def test_other_batches_are_refused(batches, text) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        list(each_batch(batches))
