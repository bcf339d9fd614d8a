"""Masked weights are exactly zero at every evaluation and in every checkpoint of a training run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distiller.apputils import classifier_training
from distiller.apputils.checkpoint import read_checkpoint
from distiller.apputils.classifier_training import ClassifierTraining
from distiller.apputils.image_classifier import ClassifierCompressor

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")

NAME = "fc2.weight"
PRUNER = f"""
pruners:
  p: {{class: SparsityLevelParameterPruner, levels: {{{NAME}: 0.5}}}}
policies:
  - {{pruner: {{instance_name: p, args: {{ARGS}}}}, epochs: [1, 3]}}
"""
L0 = f"""
extensions:
  l0: {{class: L0Regularizer, reg_regims: {{{NAME}: [0.0, Elements]}}, keep_probability: 0.35, gate_lr: 0.2}}
policies:
  - {{extension: {{instance_name: l0}}, epochs: [1, 3]}}
"""
FORWARD_ONLY = "mask_on_forward_only: true"
SCHEDULES = {
    "plain": PRUNER.replace("ARGS", ""),
    "forward only": PRUNER.replace("ARGS", FORWARD_ONLY),
    "forward only, then kept": PRUNER.replace("ARGS", f"{FORWARD_ONLY}, keep_mask: true"),
    "dense copies": PRUNER.replace("ARGS", f"{FORWARD_ONLY}, use_double_copies: true, mask_gradients: true"),
    "l0": L0,
}
"""The policy acts in epochs 1 and 3 of 0..4."""
GOES_ON_DENSE = ("forward only", "dense copies")
OPTIMIZERS = {
    "SGD": "--optimizer sgd --momentum 0.9 --wd 0.001",
    "Adam": "--optimizer adam --lr 0.002 --wd 0.001",
    "AdamW": "--optimizer adamw --lr 0.002 --wd 0.01",
}


class Watch:
    """Notes the weight and its mask at each validation and at each saving, by epoch and place."""

    def __init__(self, training: ClassifierTraining, monkeypatch: pytest.MonkeyPatch) -> None:
        self.training = training
        self.seen: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}
        compressor = training.compressor
        validate, save = compressor.validate, classifier_training.save_checkpoint

        def watched_validation(epoch: int):
            self.note(epoch, "validation", training.model.state_dict()[NAME])
            return replace(validate(epoch), top1_correct=epoch)  # each epoch is the best so far

        def watched_saving(epoch: int, *args, **kwargs):
            path = save(epoch, *args, **kwargs)
            for name in ("checkpoint.pth.tar", "best.pth.tar"):
                checkpoint = read_checkpoint(path.with_name(name))
                assert checkpoint.epoch == epoch
                self.note(epoch, name, checkpoint.state_dict[NAME])
            return path

        monkeypatch.setattr(compressor, "validate", watched_validation)
        monkeypatch.setattr(classifier_training, "save_checkpoint", watched_saving)

    def note(self, epoch: int, place: str, weight: Tensor) -> None:
        mask = self.training.scheduler.masks.masked().get(NAME)
        self.seen[epoch, place] = weight.clone(), None if mask is None else mask.clone()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_masked_weights_are_zero_at_each_validation_and_in_each_checkpoint(
    flags, open_run, tmp_path, monkeypatch, kind, optimizer
):
    file = tmp_path / "s.yaml"
    file.write_text(SCHEDULES[kind])
    args = flags(f"{OPTIMIZERS[optimizer]} --epochs 5 --compress", file)
    training = ClassifierTraining(ClassifierCompressor(args, open_run))
    watch = Watch(training, monkeypatch)
    training.run()

    places = ("validation", "checkpoint.pth.tar", "best.pth.tar")
    assert set(watch.seen) == {(epoch, place) for epoch in range(5) for place in places}
    for (epoch, place), (weight, mask) in watch.seen.items():
        if epoch == 0:
            assert mask is None
            continue
        assert mask is not None
        is_pruned = mask == 0
        assert 0.1 < is_pruned.float().mean() < 0.9, (epoch, place)
        assert torch.count_nonzero(weight[is_pruned]) == 0, (epoch, place)
        assert torch.count_nonzero(weight[~is_pruned]) > 0.9 * int((~is_pruned).sum()), (epoch, place)
    if kind in GOES_ON_DENSE:  # what is watched is not so by itself
        mask = training.scheduler.masks[NAME].mask
        assert torch.count_nonzero(training.model.state_dict()[NAME][mask == 0]) > 0
