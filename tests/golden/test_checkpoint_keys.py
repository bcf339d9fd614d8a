"""What a checkpoint holds: its keys, and the types and shapes of their values."""

from __future__ import annotations

import json
from typing import Any

import torch

from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.checkpoint_schema import key_path
from distiller.config import dict_config
from distiller.quantization import PostTrainLinearQuantizer
from tests.doubles import train

# What is in there is PyTorch's own, and differs from version to version.
FOREIGN = ("optimizer.state_dict.param_groups", "scheduler.policies[1].state")
SCHEDULE = {
    "pruners": {
        "agp": {
            "class": "AutomatedGradualPruner",
            "initial_sparsity": 0.1,
            "final_sparsity": 0.5,
            "weights": ["conv2.weight"],
        }
    },
    "lr_schedulers": {"decay": {"class": "StepLR", "step_size": 1}},
    "policies": [
        {
            "pruner": {"instance_name": "agp", "args": {"mask_on_forward_only": True}},
            "starting_epoch": 0,
            "ending_epoch": 3,
            "frequency": 1,
        },
        {"lr_scheduler": {"instance_name": "decay"}, "epochs": [0, 1]},
    ],
}


def keys_of(value: Any, place: tuple[Any, ...] = ()) -> dict[str, str]:
    path = key_path(*place)
    if isinstance(value, torch.Tensor):
        return {path: f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"}
    if isinstance(value, (list, tuple)) and len(value) > 9:
        return {path: f"{type(value).__name__} of {len(value)}"}
    if path in FOREIGN or not isinstance(value, (dict, list, tuple)) or not value:
        return {path: type(value).__name__}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: kind for key, item in items for name, kind in keys_of(item, (*place, key)).items()}


def written(path) -> str:
    return json.dumps(keys_of(torch.load(path, weights_only=True)), indent=0) + "\n"


def test_the_keys_of_a_checkpoint_of_training(golden, fixed_net, tmp_path):
    fixed_net.train()
    optimizer = torch.optim.SGD(fixed_net.parameters(), lr=0.1, momentum=0.9)
    scheduler = dict_config(fixed_net, optimizer, SCHEDULE)
    train(fixed_net, scheduler, [0], optimizer)
    with scheduler.masked():
        path = save_checkpoint(0, "tiny", fixed_net, optimizer, scheduler, {"seed": 1}, dir=tmp_path)
    golden("checkpoint_keys.json", written(path))


def test_the_keys_of_a_checkpoint_of_a_quantized_model(golden, fixed_net, fixed_images, tmp_path):
    overrides = {"fc": {"mode": "SYMMETRIC"}}
    PostTrainLinearQuantizer(
        fixed_net, bits_activations=None, overrides=overrides, save_fp_weights=True
    ).prepare_model(fixed_images[:1])
    golden("quantized_checkpoint_keys.json", written(save_checkpoint(0, "tiny", fixed_net, dir=tmp_path)))
