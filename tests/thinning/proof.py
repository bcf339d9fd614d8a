"""That a network is thinned as it should be: masked and thinned agree, and the thinned one lives on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.macs import count_macs
from distiller.masks import MaskStore
from distiller.names import named_parameters
from distiller.pruning.channel_units import unit_masks
from distiller.thinning import ThinningRecipe, apply_recipe, thinning_recipe
from distiller.thinning.trial import measured_change, removable_groups
from tests.channel_groups.cutting import first_units, randomize


def telling(model: nn.Module) -> nn.Module:
    """No norm, scale or classifier is as it is at first: next to nothing, or the same for all channels."""
    with torch.no_grad():
        for name, param in randomize(model).named_parameters():
            if param.dim() > 1 and ("layer_scale" in name or bool((param == param.flatten()[0]).all())):
                param.normal_(0, 0.3)
    return model


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """One step on a loss of all that the model returns; leaves the model in evaluation mode."""
    model.train()
    optimizer.zero_grad()
    outputs = [out for out in pytree.tree_leaves(model(x)) if isinstance(out, Tensor)]
    torch.stack([out.log_softmax(-1)[:, 0].mean() for out in outputs]).sum().neg().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # batch norms of two values have any slope
    optimizer.step()
    model.eval()


def count_parameters(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def check_thinning(build: Callable[[], nn.Module], x: Tensor, rounds: int = 1) -> nn.Module:
    """Thin a network by 30 % of every removable group, so often, and hold it to everything; returns it."""
    model = telling(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-4)
    store = MaskStore(model)
    for _ in range(rounds):
        train_step(model, optimizer, x)
        groups = removable_groups(model, x[:1], "the test")
        removed = first_units(groups.removable())
        assert removed
        params = dict(named_parameters(model))
        for name, mask in unit_masks(params, groups, removed).items():
            store.put(name, mask)
            params[name].data.mul_(mask)
        masked, before = copy.deepcopy(model), count_parameters(model)

        apply_recipe(model, thinning_recipe(model, groups, removed), optimizer, store)

        assert model(x).isfinite().all()
        assert measured_change(masked, model, x) < 1e-4
        assert count_parameters(model) < before
        macs = sum(layer.macs for layer in count_macs(model, x[:1]))
        assert macs == groups.macs(removed) < groups.macs()
        for name, param in named_parameters(model):
            state = optimizer.state.get(param, {})
            assert state.get("momentum_buffer", param).shape == param.shape, name
    train_step(model, optimizer, x)
    check_reload(build, model, x)
    return model


def check_reload(build: Callable[[], nn.Module], model: nn.Module, x: Tensor) -> None:
    """A fresh network, recipes through JSON and the state dict answer the same to the bit."""
    fresh = build().eval()
    for plain in json.loads(json.dumps(model.thinning_recipes)):
        apply_recipe(fresh, ThinningRecipe.from_plain(plain, "the test"))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), model.eval()(x))
