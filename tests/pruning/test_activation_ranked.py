from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.models import create_model
from distiller.names import named_parameters
from distiller.policy import PruningPolicy
from distiller.pruning import (
    ActivationAPoZRankedFilterPruner,
    ActivationAPoZRankedFilterPruner_AGP,
    ActivationMeanRankedFilterPruner,
    ActivationMeanRankedFilterPruner_AGP,
)
from distiller.scheduler import CompressionScheduler
from tests.doubles import train

BOTH = [ActivationAPoZRankedFilterPruner, ActivationMeanRankedFilterPruner]


class Net(nn.Module):
    """conv1 - relu - conv2 - bn - relu, functions all; notes the activations of its training as arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 2, 6, 6)
        self.conv1 = nn.Conv2d(2, 8, 3)
        self.conv2 = nn.Conv2d(8, 10, 3, bias=False)
        self.bn = nn.BatchNorm2d(10)
        self.notes: dict[str, list[np.ndarray]] = {"conv1.weight": [], "conv2.weight": []}

    def forward(self, x):
        x = F.relu(self.conv1(x))
        y = F.relu(self.bn(self.conv2(x)))
        if self.training:
            self.notes["conv1.weight"].append(x.detach().numpy().copy())
            self.notes["conv2.weight"].append(y.detach().numpy().copy())
        return y


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 4, 6, 6)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))))


@pytest.mark.parametrize("pruner_class", BOTH)
def test_a_weight_of_two_layers_is_refused_as_a_layer_called_twice_is(pruner_class):
    model = Tied()
    with pytest.raises(DistillerError) as caught:
        PruningPolicy(pruner_class("p", "Filters", 0.5, ["a.weight"], model=model)).check(model)
    assert str(caught.value) == (
        "pruner 'p', 'a.weight': the weight is shared by a and b, and has the activations of all of them; take a "
        "pruner that does not look at activations"
    )


@pytest.fixture
def net() -> Net:
    return Net()


def context(model, epoch: int = 0, epochs: int = 5) -> StepContext:
    return StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, epochs), epoch)


def feed(pruner, model, batches) -> None:
    """Mini-batches of training, without the optimizer."""
    ctx = context(model)
    pruner.attach(model)
    for images in batches:
        model(images)
        pruner.after_backward({}, ctx)
    pruner.detach()


def masks_of(pruner, model, epoch: int = 0) -> dict[str, list[float]]:
    """The value of the mask for each filter."""
    params = {name: param.detach() for name, param in named_parameters(model)}
    masks = pruner.compute_masks(params, context(model, epoch))
    assert all(bool((mask.flatten(1) == mask.flatten(1)[:, :1]).all()) for mask in masks.values())
    return {name: mask.flatten(1)[:, 0].tolist() for name, mask in masks.items()}


def by_hand(net: Net, name: str, measure) -> np.ndarray:
    return np.array(
        [measure(np.concatenate(net.notes[name])[:, channel]) for channel in range(net_channels(name))]
    )


def net_channels(name: str) -> int:
    return {"conv1.weight": 8, "conv2.weight": 10}[name]


@pytest.mark.parametrize("name", ["conv1.weight", "conv2.weight"])
def test_the_filters_whose_activations_are_zero_most_often_go(net, name):
    pruner = ActivationAPoZRankedFilterPruner("p", "Filters", 0.5, [name])
    feed(pruner, net, [torch.randn(4, 2, 6, 6) for _ in range(3)])
    apoz = by_hand(net, name, lambda values: (values == 0).mean())
    np.testing.assert_allclose(pruner.scores(name).numpy(), apoz, rtol=1e-12)
    gone = np.argsort(-apoz, kind="stable")[: len(apoz) // 2]
    assert masks_of(pruner, net)[name] == [float(i not in gone) for i in range(len(apoz))]


@pytest.mark.parametrize("name", ["conv1.weight", "conv2.weight"])
def test_the_filters_of_least_mean_activation_go(net, name):
    """DEFECT of Distiller: its mean ranking was inverted, and pruned the most active filters."""
    pruner = ActivationMeanRankedFilterPruner("p", "Filters", 0.5, [name])
    feed(pruner, net, [torch.randn(4, 2, 6, 6) for _ in range(3)])
    means = by_hand(net, name, lambda values: values.mean(dtype=np.float64))
    np.testing.assert_allclose(pruner.scores(name).numpy(), means, rtol=1e-6)
    gone = np.argsort(means, kind="stable")[: len(means) // 2]
    assert masks_of(pruner, net)[name] == [float(i not in gone) for i in range(len(means))]


def test_the_filter_that_is_most_active_stays(net):
    """DEFECT of Distiller: its mean ranking was inverted; here in one number."""
    with torch.no_grad():
        net.conv1.bias.copy_(torch.tensor([0.0, 0, 0, 9, 0, 0, 0, 0]))
    pruner = ActivationMeanRankedFilterPruner("p", "Filters", 0.99, "conv1.weight")
    feed(pruner, net, [torch.randn(4, 2, 6, 6)])
    assert masks_of(pruner, net)["conv1.weight"] == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("pruner_class", BOTH)
def test_how_the_images_are_split_into_mini_batches_does_not_matter(net, pruner_class):
    images = torch.randn(12, 2, 6, 6)
    net.bn.eval()  # its statistics in training are those of a mini-batch
    scores = []
    for sizes in ([12], [4, 4, 4], [1, 5, 6]):
        pruner = pruner_class("p", "3D", 0.5, ["conv?.weight"])
        feed(pruner, net, images.split(sizes))
        scores.append([pruner.scores(name) for name in ("conv1.weight", "conv2.weight")])
    for others in scores[1:]:
        for one, other in zip(scores[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pruner_class", BOTH)
def test_validation_while_attached_is_not_collected(net, pruner_class):
    batches = [torch.randn(4, 2, 6, 6) for _ in range(2)]
    pruner = pruner_class("p", "Filters", 0.5, "conv1.weight")
    feed(pruner, net, batches)
    expected = pruner.scores("conv1.weight")

    other = pruner_class("p", "Filters", 0.5, "conv1.weight")
    other.attach(net)
    for images in batches:
        net.train()(images)
        other.after_backward({}, context(net))
        net.eval()(100 + torch.randn(3, 2, 6, 6))
    other.detach()
    net.train()(100 + torch.randn(3, 2, 6, 6))
    assert torch.equal(other.scores("conv1.weight"), expected)
    assert other.seen == 2


@pytest.mark.parametrize(
    ("pruner_class", "counts"),
    [(ActivationAPoZRankedFilterPruner_AGP, [1, 8]), (ActivationMeanRankedFilterPruner_AGP, [1, 8])],
)
def test_agp_forms_follow_the_schedule(net, pruner_class, counts):
    pruner = pruner_class("p", 0.1, 0.8, "3D", "conv2.weight")
    feed(pruner, net, [torch.randn(4, 2, 6, 6)])
    assert [masks_of(pruner, net, epoch)["conv2.weight"].count(0) for epoch in (0, 4)] == counts


@pytest.mark.parametrize("pruner_class", BOTH)
def test_with_a_leader_its_activations_decide_for_all(pruner_class):
    model = create_model(False, "cifar10", "resnet20_cifar", parallel=False, input_shape=(1, 3, 8, 8))
    weights = ["layer1.0.conv2.weight", "layer1.1.conv2.weight", "layer1.2.conv2.weight"]
    pruner = pruner_class("p", "Filters", 0.25, weights, "Leader")
    feed(pruner, model, [torch.randn(4, 3, 8, 8)])
    alone = pruner_class("p", "Filters", 0.25, weights[0])
    feed(alone, model, [])
    alone.load_state_dict(pruner.state_dict())
    assert list(pruner.state_dict()["means"]) == weights[:1]
    masks = masks_of(pruner, model)
    assert set(masks) == set(weights)
    assert all(mask == masks_of(alone, model)[weights[0]] for mask in masks.values())


@pytest.mark.parametrize("pruner_class", BOTH)
def test_what_is_pruned_stays_pruned_although_batch_norm_makes_it_lively(tiny_cnn, pruner_class):
    """A filter that is zero has the activation relu(beta) behind its batch norm: never zero, and large."""
    with torch.no_grad():
        tiny_cnn.bn1.bias.fill_(3.0)
    scheduler = CompressionScheduler(tiny_cnn)
    pruner = pruner_class("p", "Filters", 0.5, "conv1.weight")
    scheduler.add_policy(PruningPolicy(pruner), starting_epoch=0, ending_epoch=4)
    masks = []
    for epoch in range(4):
        train(tiny_cnn, scheduler, [epoch])
        masks.append(scheduler.masks["conv1.weight"].mask.flatten(1)[:, 0].tolist())  # type: ignore[union-attr]
    assert masks == [masks[0]] * 4
    assert masks[0].count(0) == 2


def test_attaching_leaves_random_numbers_statistics_and_modes_alone(tiny_cnn):
    before = torch.get_rng_state(), {name: value.clone() for name, value in tiny_cnn.state_dict().items()}
    pruner = ActivationAPoZRankedFilterPruner("p", "Filters", 0.5, "conv1.weight")
    pruner.attach(tiny_cnn)
    assert tiny_cnn.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in tiny_cnn.state_dict().items())


def test_a_wrapped_model_has_the_same_names(tiny_cnn):
    scores = []
    images = torch.randn(4, 1, 8, 8)
    for model, weights in ((tiny_cnn, "conv1.weight"), (nn.DataParallel(tiny_cnn), "module.conv1.weight")):
        pruner = ActivationAPoZRankedFilterPruner("p", "Filters", 0.5, weights)
        feed(pruner, model, [images])
        scores.append(pruner.scores("conv1.weight"))
    assert torch.equal(*scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(tiny_cnn, dtype):
    tiny_cnn.to(dtype)
    pruner = ActivationMeanRankedFilterPruner("p", "Filters", 0.5, ["conv1.weight", "conv2.weight"])
    feed(pruner, tiny_cnn, [torch.randn(4, 1, 8, 8, dtype=dtype)])
    assert {name: mask.count(0) for name, mask in masks_of(pruner, tiny_cnn).items()} == {
        "conv1.weight": 2,
        "conv2.weight": 3,
    }


def test_hooks_are_gone_after_detach_and_never_twice_there(tiny_cnn):
    pruner = ActivationAPoZRankedFilterPruner("p", "Filters", 0.5, ["conv1.weight", "conv2.weight"])

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_cnn.modules())

    pruner.attach(tiny_cnn)
    assert hooks() == 2
    pruner.attach(tiny_cnn)
    assert hooks() == 2
    pruner.detach()
    pruner.detach()
    assert hooks() == 0


def refusal(pruner, model) -> str:
    """What `check` says; without the model it cannot tell, and the first epoch begins with the same words."""
    policy = PruningPolicy(pruner)
    with pytest.raises(DistillerError) as error:
        policy.check(model)
    pruner._model = None
    policy.check(model)
    with pytest.raises(DistillerError) as later:
        policy.on_epoch_begin(context(model))
    assert str(later.value) == str(error.value)
    return str(error.value)


def test_a_parameter_without_activations_is_refused_by_name(tiny_cnn):
    pruner = ActivationAPoZRankedFilterPruner(
        "p", "Filters", 0.5, ["conv1.weight", "fc.weight"], model=tiny_cnn
    )
    assert refusal(pruner, tiny_cnn) == (
        "pruner 'p', 'fc.weight': no ReLU follows 'fc' (over batch norm, dropout, element-wise addition and "
        "max-pooling), got the output of the model; take a pruner that does not look at activations"
    )


def test_the_shape_of_the_input_must_be_known(tiny_cnn):
    del tiny_cnn.input_shape
    pruner = ActivationMeanRankedFilterPruner_AGP("p", 0.1, 0.5, "Filters", "conv1.weight", model=tiny_cnn)
    assert refusal(pruner, tiny_cnn) == (
        "'ActivationMeanRankedFilterPruner_AGP' needs the shape of the model's input: "
        "set model.input_shape, as (1, 3, 32, 32)"
    )


def test_arguments_are_checked():
    with pytest.raises(DistillerError) as error:
        ActivationAPoZRankedFilterPruner("p", "Channels", 0.5, "conv1.weight")  # type: ignore[arg-type]
    assert str(error.value) == "group_type must be '3D' or 'Filters', got 'Channels'"


def test_masks_need_something_seen(tiny_cnn):
    pruner = ActivationAPoZRankedFilterPruner("p", "Filters", 0.5, "conv1.weight")
    with pytest.raises(DistillerError) as error:
        masks_of(pruner, tiny_cnn)
    assert str(error.value) == (
        "pruner 'p', 'conv1.weight': there are no scores to rank by after 0 mini-batches; training did not "
        "call the layer: take a pruner that does not look at activations"
    )


def test_activations_that_are_nan_are_refused(tiny_cnn):
    pruner = ActivationMeanRankedFilterPruner("p", "Filters", 0.5, "conv1.weight")
    feed(pruner, tiny_cnn, [torch.full((2, 1, 8, 8), float("nan"))])
    with pytest.raises(
        DistillerError, match=r"^pruner 'p', 'conv1\.weight': cannot rank by scores, got 4 NaN"
    ):
        masks_of(pruner, tiny_cnn)
