from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from distiller.errors import DistillerError, UnknownNameError, UsageError
from distiller.layerwise.stored_bytes import payload_bytes
from distiller.layerwise.sweep import SweepPlan, fraction_range, layers_to_compress, layerwise_points
from distiller.layerwise.techniques import prune_by_fraction, svd_by_kept_rank
from distiller.layerwise.timing import Timing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.fc1 = nn.Linear(12 * 16, 30)
        self.fc2 = nn.Linear(30, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def no_time(models):
    return [None] * len(models)


def bits_of(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def states(model, plan, **options):
    """The points, and the model's state at each measurement."""
    seen = []

    def evaluate(measured):
        assert measured is model
        assert not measured.training
        seen.append(copy.deepcopy(measured.state_dict()))
        return 3, 10, 1.5

    layers = layers_to_compress(model, options.pop("layers", ()))
    return list(
        layerwise_points(model, layers, plan, evaluate, options.pop("time", no_time), **options)
    ), seen


def test_linear_layers_alone_are_compressed_unless_others_are_named(net):
    assert list(layers_to_compress(net)) == ["fc1", "fc2"]
    assert list(layers_to_compress(net, ["*"])) == ["conv", "fc1", "fc2"]
    assert list(layers_to_compress(net, ["fc2", "conv"])) == ["conv", "fc2"]
    with pytest.raises(UnknownNameError) as error:
        layers_to_compress(net, ["bn"])
    assert str(error.value) == "no layer with a weight of two or more dimensions 'bn' in the model"


def test_a_model_without_linear_layers_is_told_of_others():
    with pytest.raises(UsageError) as error:
        layers_to_compress(nn.Sequential(nn.Conv2d(1, 2, 3)))
    assert str(error.value) == "layerwise: the model has no linear layer; name other layers, as 0"


def test_tied_weights_are_one_layer():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert list(layers_to_compress(net)) == ["0"]


def test_each_layer_is_compressed_on_its_own_and_nothing_else_is(net):
    before = copy.deepcopy(net.state_dict())
    _, (_, half) = states(net, SweepPlan(("prune",), (0.0, 0.5)))
    for name, value in half.items():
        is_compressed = name in ("fc1.weight", "fc2.weight")
        assert torch.equal(value, prune_by_fraction(before[name], 0.5) if is_compressed else before[name])


def test_convolutions_are_matrices_of_their_filters(net):
    before = net.conv.weight.detach().clone()
    _, (seen,) = states(net, SweepPlan(("svd",), (0.75,)), layers=["conv"])
    assert torch.equal(seen["conv.weight"], svd_by_kept_rank(before, 0.25))


def test_points_are_in_the_order_of_the_plan_with_bits_of_what_has_codes(net):
    points, _ = states(net, SweepPlan(("svd", "quant"), (0.0, 0.5), (4, 1)))
    assert [point.key for point in points] == [
        ("svd", "fraction", 0.0), ("svd", "fraction", 0.5), ("quant", "fraction", 0.0), ("quant", "fraction", 0.5),
        ("quant", "bits", 4.0), ("quant", "bits", 1.0),
    ]  # fmt: skip
    assert all((point.top1_correct, point.n, point.loss) == (3, 10, 1.5) for point in points)


def test_the_model_is_as_it_was_bit_for_bit_at_every_point(net):
    before, mode = bits_of(net), net.training
    plan = SweepPlan(("prune", "quant", "kmeans", "svd", "svd+prune+kmeans"), (0.0, 0.6), (2,))
    layers = layers_to_compress(net, ["*"])

    def evaluate(model):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(1)  # type: ignore[union-attr]
        return 1, 2, 0.5

    for _ in layerwise_points(net, layers, plan, evaluate, no_time):
        assert bits_of(net) == before
        assert net.training == mode


@pytest.mark.parametrize("where", ["evaluate", "time"])
def test_the_model_is_as_it_was_bit_for_bit_after_an_exception(net, where):
    before = bits_of(net)

    def fails(_):
        assert bits_of(net) != before
        raise RuntimeError("no more")

    evaluate = fails if where == "evaluate" else lambda model: (1, 2, 0.5)
    time = fails if where == "time" else no_time
    with pytest.raises(RuntimeError, match="no more"):
        list(layerwise_points(net, layers_to_compress(net), SweepPlan(("svd",), (0.8,)), evaluate, time))
    assert bits_of(net) == before


def test_an_interrupt_while_weights_are_copied_leaves_them_as_they_were(net, monkeypatch):
    before, real = bits_of(net), torch.Tensor.copy_
    calls = []

    def interrupted(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(
            layerwise_points(
                net, layers_to_compress(net), SweepPlan(("prune",), (0.8,)), lambda m: (1, 2, 0.5), no_time
            )
        )
    assert bits_of(net) == before


def test_stored_bytes_are_of_the_whole_network(net):
    points, _ = states(net, SweepPlan(("quant", "svd"), (0.0, 0.8), (4,)))
    linears = 192 * 30 + 30 * 5
    dense = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    by_key = {point.key: point for point in points}
    assert all(point.dense_bytes == dense for point in points)
    assert by_key["quant", "fraction", 0.0].stored_bytes == dense
    assert by_key["quant", "bits", 4.0].stored_bytes == dense - 4 * linears + linears // 2 + 16
    assert by_key["quant", "bits", 4.0].effective_bits == pytest.approx(4 + 8 * 16 / linears)
    assert by_key["quant", "bits", 4.0].code_bits == 4
    assert by_key["svd", "fraction", 0.8].stored_bytes == dense - 4 * linears + 4 * (6 * 222 + 1 * 35)
    assert by_key["svd", "fraction", 0.8].code_bits is None


def test_a_pipeline_has_a_prediction_and_one_technique_has_none(net):
    (alone, both), _ = states(net, SweepPlan(("prune", "svd+prune"), (0.8,)))
    dense, linears = both.dense_bytes, 4 * (192 * 30 + 30 * 5)
    predicted = sum(payload_bytes(shape, ("svd", "prune"), 0.8) for shape in ((30, 192), (5, 30)))
    assert alone.predicted_bytes is None
    assert both.predicted_bytes is not None
    assert both.predicted_bytes == dense - linears + predicted
    assert predicted == 4 * (36 + 230 + 1 + 6)  # a fifth of 6 * 30, 6 * 192, 1 * 5, 1 * 30
    assert both.predicted_bytes <= both.stored_bytes < 1.1 * both.predicted_bytes


def timed(models) -> list[Timing]:
    return [Timing(float(index + 1), 0.5, 9.0, 3, 8, 1, "cpu") for index, _ in enumerate(models)]


def test_latencies_are_of_the_compressed_the_dense_and_the_factored_network_in_turns(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(4, 2, 4, 4)
    seen = []

    def time(models):
        with torch.no_grad():
            seen.append([copy.deepcopy(model).eval() for model in models])
        return timed(models)

    (dense, low), _ = states(net, SweepPlan(("svd",), (0.0, 0.8)), layers=["conv", "fc1"], time=time)
    assert (dense.latency_s, dense.dense_latency_s, dense.factored_latency_s) == (1.0, 2.0, None)
    assert (low.latency_s, low.dense_latency_s, low.factored_latency_s) == (1.0, 2.0, 3.0)
    assert (low.latency_q1_s, low.latency_q3_s, low.batch_size, low.threads, low.device) == (
        0.5,
        9.0,
        8,
        1,
        "cpu",
    )
    compressed, whole, factored = seen[1]
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    assert not torch.equal(compressed.fc1.weight, before["fc1.weight"])
    shapes = [tuple(m.weight.shape) for m in factored.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert shapes == [(2, 2, 3, 3), (12, 2, 1, 1), (6, 192), (30, 6), (5, 30)]
    torch.testing.assert_close(factored(x), compressed(x), rtol=1e-4, atol=1e-5)


def test_finished_points_are_not_measured_again(net):
    plan = SweepPlan(("prune", "svd"), (0.0, 0.5))
    points, seen = states(net, plan, finished=plan.keys[:3])
    assert ([point.key for point in points], len(seen)) == (plan.keys[3:], 1)


def test_a_weight_that_cannot_be_compressed_is_named(net):
    with torch.no_grad():
        net.fc2.weight[0, 0] = math.nan
    with pytest.raises(DistillerError) as error:
        states(net, SweepPlan(("prune",), (0.5,)))
    assert (
        str(error.value)
        == "prune of 'fc2': layer-wise compression: a weight must hold numbers, all of them finite"
    )


def test_fractions_have_both_ends_and_no_float_noise():
    assert fraction_range(0, 0.9, 0.1) == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.mark.parametrize(
    "given, shown", [((0, 1.5, 0.1), "0 1.5 0.1"), ((0.5, 0.1, 0.1), "0.5 0.1 0.1"), ((0, 1, 0), "0 1 0")]
)
def test_fractions_out_of_range_are_refused(given, shown):
    with pytest.raises(UsageError) as error:
        fraction_range(*given)
    assert str(error.value) == (
        "layerwise: fractions are given as START STOP STEP with 0 <= START <= STOP <= 1 and a step of 1e-6 to 1, as "
        f"in '0 0.9 0.1', got {shown}"
    )


@pytest.mark.parametrize(
    "arguments, told",
    [
        (((), (0.5,)), "layerwise: each technique once, at least one, got ''"),
        ((("prune", "PRUNE"), (0.5,)), "layerwise: each technique once, at least one, got 'prune,PRUNE'"),
        ((("svd", "prune+quant"), (0.5,), (4,)), "layerwise: bits are of quant and kmeans, got 'svd,prune+quant'; add one, "
         "or leave them out"),
        ((("svd",), (0.5, 2.0)), "layerwise: fractions must lie in 0..1, got [0.5, 2.0]"),
        ((("quant",), (0.5,), (0,)), "layerwise: bits must be 1 to 16, got [0]"),
    ],
)  # fmt: skip
def test_plans_that_mean_nothing_are_refused(arguments, told):
    with pytest.raises(UsageError) as error:
        SweepPlan(*arguments)
    assert str(error.value) == told
