import torch
from torch import nn

from distiller.functional_modules.replacement import replace_modules


def test_modules_are_replaced_at_every_name_once_made():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU6()), nn.Linear(2, 2))
    made = []

    def make(name, module):
        made.append(name)
        return nn.Tanh()

    assert replace_modules(model, nn.ReLU, make) == ["0", "1.0"]
    assert made == ["0"]
    assert model[0] is model[1][0]
    assert isinstance(model[1][1], nn.ReLU6)


def test_one_for_which_nothing_is_made_stays():
    model = nn.Sequential(nn.ReLU())
    before = model[0]
    assert replace_modules(model, nn.ReLU, lambda name, module: None) == []
    assert model[0] is before


def test_hooks_of_every_kind_go_over_and_their_handles_stay_good():
    model, seen = nn.Sequential(nn.ReLU()), []
    handles = [
        model[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append("pre"), with_kwargs=True),
        model[0].register_forward_hook(lambda module, args, output: seen.append("post"), always_call=True),
        model[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append("back")),
    ]
    replace_modules(model, nn.ReLU, lambda name, module: nn.Tanh())
    model(torch.ones(1, requires_grad=True) * 1).sum().backward()
    assert seen == ["pre", "post", "back"]
    for handle in handles:
        handle.remove()
    model(torch.ones(1))
    assert seen == ["pre", "post", "back"]
