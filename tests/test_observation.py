import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from distiller.observation import unobserved, watch_inputs, watch_output


def test_watchers_see_what_a_module_is_given_and_returns():
    seen = []
    layer = nn.ReLU()
    handles = [
        watch_inputs(layer, lambda module, inputs: seen.append(("in", module, inputs[0].tolist()))),
        watch_output(layer, lambda module, inputs, output: seen.append(("out", module, output.tolist()))),
    ]
    assert layer(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    assert seen == [("in", layer, [-1.0, 2.0]), ("out", layer, [0.0, 2.0])]
    for handle in handles:
        handle.remove()
    layer(torch.ones(1))
    assert len(seen) == 2


def test_an_unobserved_model_is_watched_again_in_the_same_order_also_after_an_error():
    seen = []
    model = nn.Sequential(nn.ReLU())
    watch_output(model[0], lambda *_: seen.append(1))
    model[0].register_forward_hook(lambda *_: seen.append(2))
    watch_output(model[0], lambda *_: seen.append(3))
    with pytest.raises(KeyError), unobserved(model):
        model(torch.ones(1))
        assert seen == [2]
        raise KeyError
    seen.clear()
    model(torch.ones(1))
    assert seen == [1, 2, 3]


def test_a_copy_made_unobserved_is_not_watched():
    seen = []
    model = nn.Sequential(nn.ReLU())
    watch_inputs(model[0], lambda *_: seen.append(1))
    with unobserved(model):
        twin = copy.deepcopy(model)
    twin(torch.ones(1))
    assert seen == []


def test_hooks_that_make_a_models_weights_stay():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    prune.custom_from_mask(model[0], "weight", torch.zeros(2, 2))
    with torch.no_grad():
        model[0].weight_orig.fill_(1.0)
    with unobserved(model):
        assert torch.equal(model(torch.ones(1, 2)), torch.zeros(1, 2))


def test_a_watcher_can_be_removed_within():
    seen = []
    model = nn.Sequential(nn.ReLU())
    handle = watch_inputs(model[0], lambda *_: seen.append(1))
    handle.remove()
    with unobserved(model):
        pass
    model(torch.ones(1))
    assert seen == []
