from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distiller.errors import DistillerError
from distiller.pruning.structured_groups import StructuredGroupTaylorPruner
from distiller.thinning.removal import apply_recipe, thinning_recipe
from distiller.thinning.trial import model_groups
from tests.channel_groups.cutting import randomize
from tests.pruning.structured_nets import (
    INNER,
    OF_STREAM,
    STREAM,
    Residual,
    at,
    masks_of,
    removed_by,
)


def trained(model: nn.Module, pruner: StructuredGroupTaylorPruner, steps: int = 3) -> list[Tensor]:
    """Train on random images; returns the images of each mini-batch."""
    ctx = at(model)
    pruner.attach(model)
    seen = []
    for _ in range(steps):
        seen.append(torch.randn(5, *model.input_shape[1:]))  # type: ignore[misc]
        model.zero_grad()
        model(seen[-1]).square().sum().backward()
        names = pruner.select(list(ctx.masks.params))
        pruner.after_backward({name: ctx.masks.params[name] for name in names}, ctx)
    pruner.detach()
    return seen


def gated_gradients(model: nn.Module, norms: list[nn.Module], images: list[Tensor]) -> Tensor:
    """The mean squared gradient by a gate, a factor of 1, on each channel that the batch norms put out."""
    squares = []
    for x in images:
        gate = torch.ones(norms[0].num_features, requires_grad=True)  # type: ignore[arg-type]
        hooks = [
            norm.register_forward_hook(
                lambda module, inputs, output, gate=gate: output * gate.view(1, -1, 1, 1)
            )
            for norm in norms
        ]
        model(x).square().sum().backward()
        for hook in hooks:
            hook.remove()
        assert gate.grad is not None
        squares.append(gate.grad.square())
    return torch.stack(squares).mean(0)


def test_taylor_scores_are_those_of_gates_on_the_batch_norms_of_all_layers_of_the_group():
    model = randomize(Residual()).train()
    pruner = StructuredGroupTaylorPruner("p", model, final_sparsity=0.5)
    images = trained(model, pruner)
    stream = gated_gradients(model, [model.bn0, model.bn2], images)  # type: ignore[list-item]
    inner = gated_gradients(model, [model.bn1], images)  # type: ignore[list-item]
    removed = removed_by(masks_of(pruner, model), model)
    assert removed == {
        STREAM: sorted(stream.argsort()[:2].tolist()),
        INNER: sorted(inner.argsort()[:3].tolist()),
    }
    scores = {name: pruner._means[name].mean().float() for name in (STREAM, INNER)}
    torch.testing.assert_close(scores[STREAM], stream, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores[INNER], inner, rtol=1e-3, atol=1e-5)


def test_taylor_needs_gradients_and_says_which():
    model = Residual()
    pruner = StructuredGroupTaylorPruner("p", model, final_sparsity=0.5, weights="stem.weight")
    names = pruner.select([name for name, _ in model.named_parameters()])
    pruner.after_backward({}, at(model))
    assert pruner.seen == 1
    with pytest.raises(DistillerError) as caught:
        masks_of(pruner, model)
    assert len(names) == len(OF_STREAM)
    assert str(caught.value) == (
        "pruner 'p', 'stem.weight': there are no scores to rank by after 1 mini-batches; gradients must reach "
        "conv1.weight, fc.weight: train them, or take another pruner"
    )


def test_taylor_refuses_frozen_readers_before_training():
    model = Residual()
    model.fc.weight.requires_grad_(False)
    pruner = StructuredGroupTaylorPruner("p", model, final_sparsity=0.5, weights="stem.weight")
    with pytest.raises(DistillerError) as caught:
        pruner.select([name for name, _ in model.named_parameters()])
    assert str(caught.value) == (
        "pruner 'p', 'stem.weight': 'fc.weight', by which its units are ranked, is not trained (requires_grad is "
        "False), and has no gradients; train it, protect the group, or take another pruner"
    )


def test_taylor_begins_anew_after_a_thinning():
    model = Residual()
    pruner = StructuredGroupTaylorPruner("p", model, final_sparsity=0.5)
    trained(model, pruner)
    recipe = thinning_recipe(model, model_groups(model, "test"), {STREAM: [2]})
    apply_recipe(model, recipe)
    pruner.follow_thinning(recipe.tensors)
    assert pruner.seen == 0
    trained(model, pruner)
    removed = removed_by(masks_of(pruner, model), model)
    assert {name: len(units) for name, units in removed.items()} == {STREAM: 1, INNER: 3}


def test_channels_that_no_layer_reads_by_weights_are_ranked_by_their_filters():
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_shape = (1, 2, 3)
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y @ y.transpose(1, 2)

    model = Gram()
    with torch.no_grad():
        model.linear.weight[2].mul_(1e-3)
        model.linear.bias[2].mul_(1e-3)
    pruner = StructuredGroupTaylorPruner("p", model, final_sparsity=0.25)
    trained(model, pruner)
    assert removed_by(masks_of(pruner, model), model) == {"linear.weight": [2]}
