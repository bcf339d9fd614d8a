from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.norms import l2_norm
from distiller.policy import PruningPolicy
from distiller.pruning import FMReconstructionChannelPruner, L1RankedStructureParameterPruner
from distiller.scheduler import CompressionScheduler


class Net(nn.Module):
    """conv1 - relu - conv2 - relu - fc; few enough positions for all to be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.fc = nn.Linear(20, 3)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.flatten(1))


NAMES = ["conv2.weight", "fc.weight"]


def batches(number: int = 6) -> list[torch.Tensor]:
    return [torch.randn(16, 1, 6, 6) for _ in range(number)]


def context(model) -> StepContext:
    return StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 5), 0)


def feed(pruner, model, images) -> None:
    pruner.attach(model)
    for batch in images:
        model.train()(batch)
        pruner.after_backward({}, context(model))
    pruner.detach()


def inputs_of(model: Net, images, name: str) -> torch.Tensor:
    """What the layer is given, as the rows that its weights are multiplied with: (samples, columns)."""
    x = F.relu(model.conv1(torch.cat(images)))
    if name == "conv2.weight":
        return F.unfold(x, 3, padding=1, stride=2).movedim(1, 2).flatten(0, 1).detach()
    return F.relu(model.conv2(x)).flatten(1).detach()


def refit(pruner, model) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    params = {name: param.detach() for name, param in model.named_parameters()}
    masks = pruner.compute_masks(params, context(model))
    return masks, pruner.refitted(params, masks)


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_that_stay_are_numpys_least_squares(name):
    model, images = Net(), batches()
    pruner = FMReconstructionChannelPruner("p", "Channels", 0.5, NAMES)
    feed(pruner, model, images)
    masks, fitted = refit(pruner, model)

    weight = dict(model.named_parameters())[name].detach()
    plain = L1RankedStructureParameterPruner("p", "Channels", 0.5, NAMES)
    assert torch.equal(masks[name], plain.compute_masks({name: weight}, context(model))[name])
    samples = inputs_of(model, images, name).double().numpy()
    matrix, kept = weight.flatten(1).double().numpy(), masks[name].flatten(1)[0].bool().numpy()
    expected = np.zeros_like(matrix)
    expected[:, kept] = np.linalg.lstsq(samples[:, kept], samples @ matrix.T, rcond=None)[0].T
    np.testing.assert_allclose(fitted[name].flatten(1).numpy(), expected, rtol=1e-4, atol=1e-6)

    def error(new: np.ndarray) -> float:
        return float(np.square(samples @ (new - matrix).T).sum())

    assert error(fitted[name].flatten(1).double().numpy()) < 0.9 * error(matrix * kept)


def test_with_no_channel_pruned_the_weights_stay():
    model = Net()
    pruner = FMReconstructionChannelPruner("p", "Channels", 0.01, NAMES)
    feed(pruner, model, batches(1))
    _, fitted = refit(pruner, model)
    assert all(torch.equal(fitted[name], model.get_parameter(name)) for name in NAMES)


@pytest.mark.parametrize("images_in_a_batch", [1, 4])
def test_few_samples_are_no_hindrance(images_in_a_batch):
    """Fewer rows than columns: the pseudo-inverse takes over."""
    model, images = Net(), [torch.randn(images_in_a_batch, 1, 6, 6)]
    pruner = FMReconstructionChannelPruner("p", "Channels", 0.3, NAMES)
    feed(pruner, model, images)
    masks, fitted = refit(pruner, model)
    for name in NAMES:
        samples, weight = inputs_of(model, images, name), model.get_parameter(name).detach()
        lost = (samples @ (fitted[name] - weight).flatten(1).T).norm()
        assert lost <= (samples @ (weight * masks[name] - weight).flatten(1).T).norm() * (1 + 1e-5)


def train(model, scheduler, epochs, images) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for epoch in epochs:
        scheduler.on_epoch_begin(epoch, optimizer)
        for step, batch in enumerate(images):
            where = epoch, step, len(images), optimizer
            scheduler.on_minibatch_begin(*where)
            optimizer.zero_grad()
            model.train()(batch).square().mean().backward()
            scheduler.before_parameter_optimization(*where)
            optimizer.step()
            scheduler.on_minibatch_end(*where)
        scheduler.on_epoch_end(epoch, optimizer, {})


@pytest.mark.parametrize("args", [{}, {"mask_on_forward_only": True, "use_double_copies": True}])
def test_in_training_the_layers_output_is_kept_and_fitted_once(args):
    """The second time there is nothing left to make up for, also where dense copies are kept."""
    model, images = Net(), batches(4)
    before = model(images[0]).detach()
    outputs = []
    for pruner_class in (FMReconstructionChannelPruner, L1RankedStructureParameterPruner):
        copy = Net()
        copy.load_state_dict(model.state_dict())
        scheduler = CompressionScheduler(copy)
        policy = PruningPolicy(pruner_class("p", "Channels", 0.5, "conv2.weight"), args)
        scheduler.add_policy(policy, starting_epoch=0, ending_epoch=3)
        train(copy, scheduler, [0], images)
        with scheduler.masked():
            once = copy.conv2.weight.detach().clone()
            outputs.append(copy(images[0]).detach())
        train(copy, scheduler, [1, 2], images)
        with scheduler.masked():
            assert torch.equal(copy.conv2.weight, once)
            assert int((once.flatten(2).abs().sum((0, 2)) == 0).sum()) == 3
    reconstructed, plain = outputs
    assert (reconstructed - before).norm() < 0.8 * (plain - before).norm()


def test_validation_is_not_looked_at_and_random_numbers_are_left_alone():
    model, images = Net(), batches(2)
    expected, pruner = (FMReconstructionChannelPruner("p", "Channels", 0.5, NAMES) for _ in range(2))
    feed(expected, model, images)
    pruner.attach(model)
    for batch in images:
        before = torch.get_rng_state()
        model.train()(batch)
        assert torch.equal(torch.get_rng_state(), before)
        model.eval()(batch + 5)
    pruner.detach()
    grams = [p.state_dict()["grams"]["conv2.weight"]["cpu"] for p in (expected, pruner)]
    assert torch.equal(grams[0]["sum"], grams[1]["sum"])
    assert grams[0]["count"] == grams[1]["count"] == 2 * 16 * 4


def test_a_wrapped_model_has_the_same_names():
    model, images = Net(), batches(1)
    fitted = []
    for wrapped, weights in ((model, "conv2.weight"), (nn.DataParallel(model), "module.conv2.weight")):
        pruner = FMReconstructionChannelPruner("p", "Channels", 0.5, weights)
        feed(pruner, wrapped, images)
        fitted.append(refit(pruner, model)[1]["conv2.weight"])
    assert torch.equal(*fitted)


def test_norm_groups_and_rounding_are_those_asked_for():
    """DEFECT of Distiller: it stored rounding_fn and group_size, and did not use them."""
    layer = nn.Conv2d(6, 2, 1, bias=False)
    model = nn.Sequential(layer)
    with torch.no_grad():
        # the channels' L1 norms are 3, 3.5, 2, 2, 10, 12; their L2 norms 3, 2.5, 1.4, 1.4, 7.1, 8.5
        layer.weight.copy_(torch.tensor([[3.0, 1.75, 1, 1, 5, 6], [0.0, 1.75, 1, 1, 5, 6]]).view(2, 6, 1, 1))

    def pruned(**settings) -> list[int]:
        pruner = FMReconstructionChannelPruner("p", "Channels", 0.45, "0.weight", **settings)
        mask = pruner.compute_masks({"0.weight": layer.weight.detach()}, context(model))["0.weight"]
        return torch.nonzero(mask[0, :, 0, 0] == 0).flatten().tolist()

    assert pruned() == [2, 3]
    assert pruned(rounding_fn=math.ceil) == [0, 2, 3]
    assert pruned(rounding_fn=math.ceil, magnitude_fn=l2_norm) == [1, 2, 3]
    assert pruned(group_size=2) == [2, 3]
    assert pruned(group_size=3) == []
    assert pruned(group_size=3, rounding_fn=math.ceil) == [0, 1, 2]


def test_with_a_leader_the_same_channels_go_and_each_layer_is_fitted_to_its_own_inputs():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    pruner = FMReconstructionChannelPruner("p", "Channels", 0.5, ["2.weight", "0.weight"], "Leader")
    feed(pruner, model, [torch.randn(8, 4, 3, 3)])
    masks, fitted = refit(pruner, model)
    assert torch.equal(masks["0.weight"], masks["2.weight"])
    assert all(bool(((fitted[name] != 0) == (masks[name] != 0)).all()) for name in masks)


def refusal(model: nn.Module, weights: str, **settings) -> str:
    pruner = FMReconstructionChannelPruner("p", "Channels", 0.5, weights, model=model, **settings)
    with pytest.raises(DistillerError) as error:
        PruningPolicy(pruner).check(model)
    with pytest.raises(DistillerError) as later:
        FMReconstructionChannelPruner("p", "Channels", 0.5, weights, **settings).attach(model)
    assert str(later.value) == str(error.value)
    return str(error.value)


def test_layers_that_cannot_be_reconstructed_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv1d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1))
    assert refusal(model, "0.weight") == (
        "pruner 'p', '0.weight': only convolutions of one group can be reconstructed, got 2 groups; "
        "take L1RankedStructureParameterPruner, which fits no weights"
    )
    for name, kind in (("1.weight", "Conv1d"), ("2.weight", "ConvTranspose2d")):
        assert refusal(model, name) == (
            f"pruner 'p', '{name}': only weights of two-dimensional convolutions and of linear layers can be "
            f"reconstructed, got 'weight' of {kind}"
        )


def test_refitting_needs_inputs():
    model = Net()
    with pytest.raises(DistillerError) as error:
        refit(FMReconstructionChannelPruner("p", "Channels", 0.5, "fc.weight"), model)
    assert str(error.value) == (
        "pruner 'p', 'fc.weight': no inputs of its layer have been seen in 0 mini-batches: training did not "
        "call the layer; take L1RankedStructureParameterPruner, which fits no weights"
    )


def test_inputs_that_are_nan_are_refused():
    model = Net()
    pruner = FMReconstructionChannelPruner("p", "Channels", 0.5, "conv2.weight")
    feed(pruner, model, [torch.full((1, 1, 6, 6), float("nan"))])
    with pytest.raises(DistillerError) as error:
        refit(pruner, model)
    assert str(error.value) == (
        "pruner 'p', 'conv2.weight': the inputs of its layer hold NaN or infinity; training has diverged: "
        "resume from an earlier checkpoint with a lower learning rate"
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"group_type": "Filters"}, "group_type must be 'Channels', got 'Filters'"),
        ({"ranking_noise": 2.0}, "ranking_noise must be in [0, 1], got 2.0"),
        ({"group_size": 0}, "group_size must be 1 or more, got 0"),
        (
            {"kwargs": {"block_shape": [1, 2, 1, 1]}},
            "kwargs is for group_type 'Blocks', got it for 'Channels'",
        ),
    ],
)
def test_arguments_are_checked(settings, text):
    arguments = {"group_type": "Channels", "desired_sparsity": 0.5, "weights": "w", **settings}
    with pytest.raises(DistillerError) as error:
        FMReconstructionChannelPruner("p", **arguments)
    assert str(error.value) == text
