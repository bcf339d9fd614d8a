import torch

from distiller.early_exit import exit_names
from distiller.models import create_model


def test_it_is_resnet50_with_two_exits():
    with torch.device("meta"):
        plain = create_model(False, "imagenet", "resnet50")
        model = create_model(False, "imagenet", "resnet50_earlyexit")
        outputs = model.train()(torch.randn(2, 3, 64, 64))
    assert exit_names(model) == ("layer1.2.relu3", "layer2.3.relu3")
    assert [x.shape for x in outputs] == [(2, 1000)] * 3
    theirs = {name: tuple(x.shape) for name, x in plain.state_dict().items()}
    ours = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert {name: ours[name] for name in theirs} == theirs
    assert {name: ours[name] for name in ours.keys() - theirs.keys() if name.endswith("weight")} == {
        "layer1.2.relu3.branch_net.2.weight": (1000, 256),
        "layer2.3.relu3.branch_net.2.weight": (1000, 512),
    }
