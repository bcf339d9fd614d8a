from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from distiller.config import file_config
from distiller.errors import DistillerError, ScheduleError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.names import named_parameters
from distiller.pruning import (
    GradientRankedFilterPruner,
    GradientRankedFilterPruner_AGP,
    TaylorFORankedFilterPruner,
    TaylorFORankedFilterPruner_AGP,
    loss_removed,
    squared_loss_removed,
)
from distiller.pruning.gradient_ranked import absolute_loss_removed

BOTH = [GradientRankedFilterPruner, TaylorFORankedFilterPruner]


def context(model, epoch: int = 0) -> StepContext:
    return StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 5), epoch)


def feed(pruner, model, batches) -> list[dict[str, np.ndarray]]:
    """Mini-batches without the optimizer; returns the gradients of each."""
    gradients = []
    params = dict(named_parameters(model))
    selected = {name: params[name] for name in pruner.select(list(params))}
    pruner.attach(model)
    for images in batches:
        model.zero_grad()
        model(images).square().mean().backward()
        pruner.after_backward(selected, context(model))
        gradients.append(
            {name: param.grad.numpy().copy() for name, param in params.items() if param.grad is not None}
        )
    pruner.detach()
    return gradients


def gone(pruner, model, name: str, epoch: int = 0) -> list[int]:
    params = {name: param.detach() for name, param in named_parameters(model)}
    mask = pruner.compute_masks(params, context(model, epoch))[name].flatten(1)
    assert bool((mask == mask[:, :1]).all())
    return torch.nonzero(mask[:, 0] == 0).flatten().tolist()


def images(number: int = 4) -> torch.Tensor:
    return torch.randn(number, 1, 8, 8)


@pytest.mark.parametrize(
    ("pruner_class", "of_sum"),
    [(GradientRankedFilterPruner, np.abs), (TaylorFORankedFilterPruner, np.square)],
)
@pytest.mark.parametrize("name", ["conv2.weight", "fc.weight"])
def test_the_filters_of_least_score_go(tiny_cnn, pruner_class, of_sum, name):
    pruner = pruner_class("p", "Filters", 0.5, [name])
    gradients = feed(pruner, tiny_cnn, [images() for _ in range(3)])
    params = {key: p.detach().numpy().astype(np.float64) for key, p in tiny_cnn.named_parameters()}
    bias = name.replace("weight", "bias")
    sums = [
        (params[name] * step[name]).reshape(len(params[name]), -1).sum(axis=1) + params[bias] * step[bias]
        for step in gradients
    ]
    scores = np.mean([of_sum(one) for one in sums], axis=0)
    np.testing.assert_allclose(pruner.scores(name).numpy(), scores, rtol=1e-4, atol=1e-10)
    assert gone(pruner, tiny_cnn, name) == sorted(np.argsort(scores, kind="stable")[: len(scores) // 2])


def test_the_score_is_how_much_the_loss_falls_without_the_filter():
    """Exactly so for a loss that is linear in the weights and biases."""
    weights, slope = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    bias, bias_slope = torch.randn(5), torch.randn(5)

    def loss(w: torch.Tensor, b: torch.Tensor) -> float:
        return float((w.double() * slope.double()).sum() + (b.double() * bias_slope.double()).sum())

    removed = []
    for i in range(5):
        without, without_bias = weights.clone(), bias.clone()
        without[i], without_bias[i] = 0, 0
        removed.append(loss(weights, bias) - loss(without, without_bias))
    for function, of_removed in (
        (loss_removed, np.copy),
        (absolute_loss_removed, np.abs),
        (squared_loss_removed, np.square),
    ):
        scores = function([weights, bias], [slope, bias_slope]).numpy()
        np.testing.assert_allclose(scores, of_removed(removed), rtol=1e-5, atol=1e-6)


def test_half_precision_is_scored_in_single():
    weights, gradients = torch.full((2, 3), 300.0).half(), torch.full((2, 3), 300.0).half()
    assert loss_removed([weights], [gradients]).tolist() == [270000.0] * 2  # past the largest half


@pytest.mark.parametrize("pruner_class", BOTH)
def test_smaller_mini_batches_give_scores_that_are_no_less(tiny_cnn, pruner_class):
    """The gradient of the whole is the mean of those of equal parts; scores are convex in it (Jensen)."""
    tiny_cnn.bn1.eval()  # its statistics in training are those of a mini-batch
    together = images(12)
    scores = []
    for size in (12, 4, 2):
        pruner = pruner_class("p", "Filters", 0.5, "conv2.weight")
        feed(pruner, tiny_cnn, together.split(size))
        scores.append(pruner.scores("conv2.weight"))
    for larger, smaller in pairwise(scores):
        assert (smaller >= larger * (1 - 1e-4)).all()


class Gated(nn.Module):
    """Factors, 1 to begin with, on the channels of a module's output."""

    def __init__(self, module: nn.Module, channels: int) -> None:
        super().__init__()
        self.module = module
        self.gates = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        x = self.module(x)
        return x * self.gates.view(1, -1, *[1] * (x.dim() - 2))


def norm_of(kind: type[nn.Module], channels: int) -> nn.Module:
    """A batch norm as training leaves it."""
    norm = kind(channels)
    nn.init.normal_(norm.weight, 1.0)  # type: ignore[arg-type]
    nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    return norm


def conv(outputs: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(3, outputs, 3, bias=bias)


STACKS = {
    "convolution with bias": lambda: (1, [conv(5, bias=True)]),
    "convolution without bias": lambda: (1, [conv(5)]),
    "convolution, norm": lambda: (2, [conv(5), norm_of(nn.BatchNorm2d, 5)]),
    "convolution with bias, norm": lambda: (2, [conv(5, bias=True), norm_of(nn.BatchNorm2d, 5)]),
    "convolution, ReLU, pooling, norm": lambda: (
        4,
        [conv(5, bias=True), nn.ReLU(), nn.MaxPool2d(2), norm_of(nn.BatchNorm2d, 5)],
    ),
    "convolution, pooling, flattening, norm": lambda: (
        4,
        [conv(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm_of(nn.BatchNorm1d, 5)],
    ),
    "norm with frozen statistics": lambda: (2, [conv(5), norm_of(nn.BatchNorm2d, 5).eval()]),
    "linear layer": lambda: (2, [nn.Flatten(), nn.Linear(192, 5)]),
    "linear layer, norm": lambda: (3, [nn.Flatten(), nn.Linear(192, 5), norm_of(nn.BatchNorm1d, 5)]),
}
"""(number of the modules that are gated, the layer and what follows)"""


@pytest.mark.parametrize(
    ("pruner_class", "of_gradient"),
    [(GradientRankedFilterPruner, torch.abs), (TaylorFORankedFilterPruner, torch.square)],
)
@pytest.mark.parametrize("stack", STACKS)
def test_the_score_is_the_gradient_of_a_gate_put_behind_the_filters(stack, pruner_class, of_gradient):
    gated, modules = STACKS[stack]()
    model = nn.Sequential(*modules, nn.Flatten(), nn.LazyLinear(4))
    model.input_shape = (1, 3, 8, 8)  # type: ignore[assignment]
    model(torch.zeros(2, 3, 8, 8))
    index, layer = next((i, m) for i, m in enumerate(modules) if isinstance(m, (nn.Conv2d, nn.Linear)))
    batches = [torch.randn(6, 3, 8, 8) for _ in range(3)]
    pruner = pruner_class("p", "Filters", 0.4, f"{index}.weight", model=model)
    pruner.check({f"{index}.weight": layer.weight.detach()})
    feed(pruner, model, batches)

    gate = Gated(nn.Sequential(*modules[:gated]), 5)
    reference = nn.Sequential(gate, *modules[gated:], *list(model)[len(modules) :])
    expected = []
    for batch in batches:
        (gradient,) = torch.autograd.grad(reference(batch).square().mean(), gate.gates)
        expected.append(of_gradient(gradient.double()))
    expected = torch.stack(expected).mean(0)
    assert expected.min() > 1e-5  # not the rounding of a zero
    torch.testing.assert_close(pruner.scores(f"{index}.weight"), expected, rtol=1e-3, atol=1e-7)
    assert gone(pruner, model, f"{index}.weight") == sorted(expected.argsort()[:2].tolist())


@pytest.mark.parametrize("pruner_class", BOTH)
def test_filters_with_a_batch_norm_behind_them_are_not_ranked_by_rounding(pruner_class):
    """DEFECT of Distiller: the loss does not depend on the scale of such a filter, so sum(w * g) is 0."""
    model = nn.Sequential(conv(8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    model.input_shape = (1, 3, 8, 8)  # type: ignore[assignment]
    pruner = pruner_class("p", "Filters", 0.5, "0.weight")
    batches = [torch.randn(6, 3, 8, 8)]
    (gradients,) = feed(pruner, model, batches)
    weights = model.get_parameter("0.weight").detach().double()
    sums = (weights * torch.from_numpy(gradients["0.weight"])).flatten(1)
    assert (sums.sum(1).abs() <= 1e-4 * sums.abs().sum(1)).all()
    with torch.no_grad():  # four hardly reach the loss; that their weights are larger does not change it
        model.get_parameter("1.weight")[::2] *= 1e-3
        model.get_parameter("0.weight")[::2] *= 10
    pruner.reset()
    feed(pruner, model, batches)
    assert gone(pruner, model, "0.weight") == [0, 2, 4, 6]


@pytest.mark.parametrize("pruner_class", BOTH)
def test_a_new_window_begins_with_a_reset(tiny_cnn, pruner_class):
    later = [images() for _ in range(2)]
    fresh, reset = (pruner_class("p", "Filters", 0.5, "conv2.weight") for _ in range(2))
    feed(reset, tiny_cnn, [images()])
    reset.reset()
    assert reset.seen == 0
    for pruner in (fresh, reset):
        feed(pruner, tiny_cnn, later)
    assert torch.equal(fresh.scores("conv2.weight"), reset.scores("conv2.weight"))


@pytest.mark.parametrize("pruner_class", [GradientRankedFilterPruner_AGP, TaylorFORankedFilterPruner_AGP])
def test_agp_forms_follow_the_schedule(tiny_cnn, pruner_class):
    pruner = pruner_class("p", 0.2, 0.7, "3D", "conv2.weight")
    feed(pruner, tiny_cnn, [images()])
    less, more = (gone(pruner, tiny_cnn, "conv2.weight", epoch) for epoch in (0, 4))
    assert (len(less), len(more)) == (1, 4)
    assert set(less) < set(more)


@pytest.mark.parametrize("pruner_class", BOTH)
def test_with_a_leader_its_scores_decide_for_all(pruner_class):
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
    led = pruner_class("p", "Filters", 0.5, ["2.weight", "0.weight"], "Leader")
    alone = pruner_class("p", "Filters", 0.5, "2.weight")
    batches = [images()]
    for pruner in (led, alone):
        feed(pruner, model, batches)
    assert gone(led, model, "0.weight") == gone(led, model, "2.weight") == gone(alone, model, "2.weight")


@pytest.mark.parametrize("pruner_class", BOTH)
def test_mini_batches_whose_gradients_do_not_reach_a_parameter_do_not_count_for_it(tiny_cnn, pruner_class):
    expected, pruner = (pruner_class("p", "Filters", 0.5, "conv2.weight") for _ in range(2))
    batches = [images()]
    feed(expected, tiny_cnn, batches)
    tiny_cnn.zero_grad()
    pruner.attach(tiny_cnn)
    pruner.after_backward({"conv2.weight": tiny_cnn.conv2.weight}, context(tiny_cnn))
    feed(pruner, tiny_cnn, batches)
    assert torch.equal(pruner.scores("conv2.weight"), expected.scores("conv2.weight"))
    assert pruner.seen == 2


@pytest.mark.parametrize(
    ("frozen", "name"),
    [
        ("conv2.weight", "conv2.weight"),
        ("conv2.bias", "conv2.weight"),
        ("bn1.weight", "conv1.weight"),
        ("bn1.bias", "conv1.weight"),
    ],
)
def test_a_parameter_that_no_gradient_reaches_is_refused_by_name(tiny_cnn, frozen, name):
    tiny_cnn.get_parameter(frozen).requires_grad_(False)
    pruner = GradientRankedFilterPruner("p", "Filters", 0.5, name)
    feed(pruner, tiny_cnn, [images()])
    with pytest.raises(DistillerError) as error:
        gone(pruner, tiny_cnn, name)
    assert str(error.value) == (
        f"pruner 'p', '{name}': there are no scores to rank by after 1 mini-batches; no gradient reaches "
        "the parameter, or its bias, or the batch norm behind it: train them, or take another pruner"
    )


def test_gradients_that_are_nan_are_refused(tiny_cnn):
    pruner = TaylorFORankedFilterPruner("p", "Filters", 0.5, "conv2.weight")
    feed(pruner, tiny_cnn, [torch.full((2, 1, 8, 8), float("inf"))])
    with pytest.raises(
        DistillerError, match=r"^pruner 'p', 'conv2\.weight': cannot rank by scores, got 6 NaN"
    ):
        gone(pruner, tiny_cnn, "conv2.weight")


@pytest.mark.parametrize("pruner_class", BOTH)
def test_a_batch_norm_that_is_not_affine_is_refused_when_the_schedule_is_read(
    tiny_cnn, tmp_path, pruner_class
):
    tiny_cnn.bn1 = nn.BatchNorm2d(4, affine=False)
    path = tmp_path / "schedule.yaml"
    path.write_text(f"""\
version: 1
pruners:
  p:
    class: {pruner_class.__name__}
    group_type: Filters
    desired_sparsity: 0.5
    weights:
      - conv2.weight
      - conv1.weight
policies:
  - pruner: {{instance_name: p}}
    epochs: [0]
""")
    with pytest.raises(ScheduleError) as error:
        file_config(tiny_cnn, None, path)
    (fault,) = error.value.faults
    assert fault.line == 9
    refused = (
        "pruner 'p', 'conv1.weight': the batch norm 'bn1' behind it has no gamma of its own to rank by; make it "
        "a module with affine=True, or take a pruner that does not look at gradients"
    )
    assert fault.text.startswith(refused)
    with pytest.raises(DistillerError) as error:
        pruner_class("p", "Filters", 0.5, "conv1.weight").attach(tiny_cnn)
    assert str(error.value) == refused


@pytest.mark.parametrize("pruner_class", BOTH)
def test_only_models_with_batch_norms_need_a_graph(pruner_class):
    without = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten())
    pruner = pruner_class("p", "Filters", 0.5, "0.weight", model=without)
    pruner.check({"0.weight": without.get_parameter("0.weight").detach()})
    pruner.attach(without)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6))
    with pytest.raises(DistillerError) as error:
        pruner_class("p", "Filters", 0.5, "0.weight", model=model).check({})
    assert str(error.value) == (
        f"'{pruner_class.__name__}' needs the shape of the model's input: set model.input_shape, as (1, 3, 32, 32)"
    )
