"""Models factored from Python: budgets, reports, what goes with them, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distiller.errors import DistillerError, UsageError
from distiller.factorization import InputMoments, factorize
from distiller.factorization.input_moments import input_moments
from distiller.factorization.layers import LowRankPlusSparse
from distiller.factorization.replacement import factorizations_of, with_layers_whole
from distiller.factorization.sensitivity import measured_points, ranks_by_sensitivity
from distiller.factorization.summary import low_rank_summary
from distiller.graph import model_graph
from distiller.macs import count_macs
from distiller.masks import MaskStore
from distiller.model_summaries import model_summary, total_macs
from distiller.models import create_model


@pytest.mark.parametrize(
    "arch",
    [
        "lenet_300_100",
        "lenet5",
        "simplenet_cifar",
        "resnet20_cifar",
        "vgg11_bn_025_cifar",
        "minivgg_025_cifar",
        "mobilenet_025_cifar",
    ],
)
@pytest.mark.parametrize("form", ["channel", "spatial", "tucker2"])
def test_models_of_the_zoo_run_at_half_their_macs(arch, form):
    try:
        model = create_model(False, None, arch)
    except DistillerError:
        pytest.skip(f"no {arch} here")
    convolutions = [name for name, own in model.named_modules() if type(own) is nn.Conv2d and own.groups == 1]
    if not convolutions and form != "channel":
        pytest.skip("a model without convolutions")
    layers = {"*": {}}
    layers |= {name: {"form": form} for name in convolutions}
    before = total_macs(model, model.input_shape)
    report = factorize(model, layers, macs=0.5)
    now = total_macs(model, model.input_shape)
    assert report.macs == (before, now)
    assert 0.4 * before < now <= 0.5 * before
    assert report.parameters[1] == sum(param.numel() for param in model.parameters())
    assert model.eval()(torch.randn(model.input_shape)).isfinite().all()


def test_the_report_says_what_became_of_each_layer():
    model = create_model(False, None, "lenet_300_100")
    report = factorize(model, {"fc1": {"rank": 40}, "fc2": {"rank": 90}})
    one, two = report.layers
    assert (one.rank, one.break_even, one.parameters) == ((40,), (216,), (235200, 43360))
    assert str(one).startswith(
        "fc1: svd of rank 40 (break-even 216), parameters 235,200 -> 43,360, MACs 235,200 -> 43,360, energy 0."
    )
    assert str(two) == (
        "fc2: stays whole, rank 90 of form svd would not make it smaller (break-even rank 74)"
    )
    assert report.parameters == (266610, 266610 - 235200 + 43360)
    (recipe,) = factorizations_of(model)
    assert [layer.name for layer in recipe.layers] == ["fc1"]
    assert recipe.kept == ("fc2",)


def test_above_break_even_can_be_refused():
    model = create_model(False, None, "lenet_300_100")
    with pytest.raises(DistillerError) as error:
        factorize(model, {"fc2": {"rank": 75}}, above_break_even="refuse")
    assert str(error.value) == (
        "layers: 'fc2': rank 75 of form svd would not make it smaller; break-even rank 74: give a lower one, "
        "or above_break_even: keep"
    )
    assert type(model.fc2) is nn.Linear


def test_full_energy_kept_is_the_same_model(tiny_cnn):
    x = torch.randn(3, 1, 8, 8)
    wide = nn.Sequential(nn.Linear(30, 4), nn.Linear(4, 40), nn.Linear(40, 30))
    wide[2].weight.data = wide[2].weight[:, :5] @ torch.randn(5, 40)
    x, before = torch.randn(3, 30), copy.deepcopy(wide)
    report = factorize(wide, {"2": {"energy": 1.0}}, torch.zeros(1, 30))
    assert report.layers[0].rank == (5,)
    assert report.layers[0].energy == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(wide(x), before(x), atol=1e-5, rtol=1e-5)


def test_a_budget_counts_the_whole_model_and_what_other_layers_save():
    model = create_model(False, None, "lenet_300_100")
    report = factorize(model, {"*": {}, "fc1": {"rank": 150}}, parameters=0.65)
    assert report.parameters[1] <= 0.65 * 266610
    assert {layer.name: layer.rank for layer in report.layers}["fc1"] == (150,)


@pytest.mark.parametrize(
    ("layers", "budget", "text"),
    [
        (
            {"fc1": {}},
            {},
            "layers: 'fc1' has no rank; give rank, energy, parameters or macs, or a budget of all",
        ),
        ({"fc1": {"rank": 301}}, {}, "layers: 'fc1': rank must be at least 1 and at most 300, got 301"),
        (
            {"fc1": {"rank": 3}},
            {"parameters": 0.5, "macs": 0.5},
            "both 'parameters' and 'macs' given; give one",
        ),
        (
            {"fc1": {"sparse": 0.1}},
            {"macs": 0.5},
            "layers: 'fc1': 'sparse' goes with a rank of its own, not with a budget",
        ),
        (
            {"fc2": {}},
            {"macs": 0.5},
            "macs 0.5: of 266,200: the rest of the model has 236,200 MACs by itself, which leaves none of the "
            "133,100 for these layers; give more than 0.8873, or name more layers",
        ),
        (
            {"fc2": {}},
            {"macs": 0.888},
            "macs 0.888: of 266,200: the layers cost 400 MACs at the least, more than the 185 that the budget "
            "leaves them; allow more, or name more layers",
        ),
        ({"*": {}}, {"parameters": -0.5}, "parameters must be more than 0 and less than 1, got -0.5"),
        ({"*": {}}, {"macs": 1}, "macs must be more than 0 and less than 1, got 1"),
        (
            {"fc1": {"rank": 3, "whitened": True}},
            {},
            "factorization: 'fc1' is to be whitened, and there are no moments of its inputs; collect them with "
            "InputMoments",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(layers, budget, text):
    model = create_model(False, None, "lenet_300_100")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(DistillerError) as error:
        factorize(model, layers, **budget)
    assert str(error.value) == text
    assert names == [name for name, _ in model.named_modules()]


class ReadsItsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) + self.fc.weight.sum()


def test_a_model_whose_code_reads_a_weight_is_refused():
    model = ReadsItsWeight()
    with pytest.raises(UsageError) as error:
        factorize(model, {"fc": {"rank": 2}}, torch.zeros(1, 8))
    assert str(error.value).startswith(
        "factorization: the model does not run factored: failed with AttributeError: 'Sequential' object has "
        "no attribute 'weight'"
    )
    assert str(error.value).endswith("its code may read one of them itself, leave that out: fc")
    assert type(model.fc) is nn.Linear


def test_a_layer_that_is_never_called_is_refused():
    model = nn.MultiheadAttention(8, 2)
    holder = nn.Sequential(nn.Linear(8, 8))
    holder.spare = nn.Linear(8, 8)
    holder.forward = lambda x: holder[0](x)
    with pytest.raises(UsageError) as error:
        factorize(holder, {"spare": {"rank": 2}}, torch.zeros(1, 8))
    assert str(error.value) == (
        "factorization: 'spare' is not called in a forward pass (its weight may be read by other code); "
        "leave it out"
    )
    with pytest.raises(DistillerError, match="out_proj"):
        factorize(model, {"out_proj": {"rank": 2}}, (torch.zeros(1, 8),) * 3)


def test_in_the_optimizer_factors_take_the_place_of_weights():
    model = create_model(False, None, "lenet_300_100")
    slow = {"params": [model.fc2.weight], "lr": 0.01}
    rest = [param for param in model.parameters() if param is not model.fc2.weight]
    optimizer = torch.optim.SGD([{"params": rest}, slow], lr=0.1, momentum=0.9)
    model(torch.randn(4, 1, 28, 28)).sum().backward()
    optimizer.step()
    kept = {id(param): state["momentum_buffer"] for param, state in optimizer.state.items()}
    old = model.fc1.weight
    factorize(model, {"fc1": {"rank": 9}, "fc2": {"rank": 9}}, optimizer=optimizer)
    first, second = optimizer.param_groups
    assert [id(param) for param in first["params"]] == [
        id(param)
        for param in (
            model.fc1.first.weight,
            model.fc1.second.weight,
            model.fc1.second.bias,
            model.fc2.second.bias,
            *model.fc3.parameters(),
        )
    ]
    assert (second["lr"], len(second["params"])) == (0.01, 2)
    assert old not in optimizer.state
    assert model.fc1.first.weight not in optimizer.state
    assert optimizer.state[model.fc1.second.bias]["momentum_buffer"] is kept[id(model.fc1.second.bias)]
    model(torch.randn(4, 1, 28, 28)).sum().backward()
    optimizer.step()


def test_masks_are_multiplied_in_and_end_and_those_of_biases_go_on():
    model = create_model(False, None, "lenet_300_100")
    masks = MaskStore(model)
    gone = torch.ones(300, 784)
    gone[:, 100:] = 0
    masks.put("fc1.weight", gone)
    masks.put("fc1.bias", torch.zeros(300))
    masks.put("fc3.weight", torch.ones(10, 100))
    factorize(model, {"fc1": {"rank": 20}}, masks=masks)
    assert not (model.fc1.first.weight[:, 100:]).abs().max() > 1e-6
    assert set(masks.masked()) == {"fc1.second.bias", "fc3.weight"}
    assert masks["fc1.second.bias"].param_name == "fc1.second.bias"
    assert "fc1.weight" not in masks
    assert masks["fc1.first.weight"].mask is None


def test_zeros_of_a_sparse_part_stay_by_a_mask():
    model = create_model(False, None, "lenet_300_100")
    masks = MaskStore(model)
    report = factorize(model, {"fc2": {"rank": 20, "sparse": 0.05}}, masks=masks)
    assert isinstance(model.fc2, LowRankPlusSparse)
    assert int(masks["fc2.sparse.weight"].mask.sum()) == 1500
    assert report.layers[0].parameters == (30000, 20 * 400 + 1500)
    assert report.macs[1] > report.macs[0]  # zeros are multiplied
    assert report.parameters[1] == 266610 - 30000 + 20 * 400 + 1500


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 5),
        nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 5, (3, 2), padding="same", dilation=2),
        nn.Conv1d(3, 5, 3, padding=2, dilation=2),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_moments_are_those_of_what_the_weight_multiplies(layer):
    x = (
        torch.randn(4, 6)
        if isinstance(layer, nn.Linear)
        else torch.randn(2, 3, *[7] * (layer.weight.dim() - 2))
    )
    layer.bias = None
    moments = input_moments(layer, x)
    flat = layer.weight.flatten(1)
    expected = (
        layer(x).transpose(0, 1).flatten(1).square().sum(1) if x.dim() > 2 else layer(x).square().sum(0)
    )
    torch.testing.assert_close(((flat @ moments) * flat).sum(1), expected, rtol=1e-4, atol=1e-4)


def test_whitened_layers_answer_better_on_the_inputs_than_plain_ones():
    torch.manual_seed(3)
    model = create_model(False, None, "simplenet_mnist").eval()
    basis = torch.randn(6, 784)
    images = (torch.randn(64, 6) @ basis).view(-1, 1, 28, 28)
    moments = InputMoments(["conv2", "fc1"])
    moments.attach(model)
    with torch.no_grad():
        for batch in images.split(16):
            expected = model(batch)
        expected = model(images)
    moments.detach()
    errors = {}
    for whitened in (False, True):
        own = copy.deepcopy(model)
        settings = {"whitened": whitened}
        layers = {"conv2": {"rank": 8, **settings}, "fc1": {"rank": 20, **settings}}
        factorize(own, layers, moments=moments.sums)
        with torch.no_grad():
            errors[whitened] = float((own(images) - expected).norm())
    assert errors[True] < 0.5 * errors[False]


def test_whole_again_computes_the_same_and_leaves_the_model_alone():
    model = create_model(False, None, "lenet5")
    factorize(model, {"conv2": {"rank": 9, "form": "tucker2"}, "fc1": {"rank": 9}})
    whole = with_layers_whole(model, ["conv2", "fc1"], "test")
    assert repr(whole) == repr(create_model(False, None, "lenet5"))
    assert factorizations_of(whole) == ()
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(whole(x), model(x), atol=1e-4, rtol=1e-4)
    assert len(factorizations_of(model)) == 1


def test_sensitivity_evaluates_each_layer_at_each_rank_and_chooses_by_it():
    model = create_model(False, None, "lenet_300_100")
    asked = []

    def evaluate(own):
        ranks = {
            name: getattr(own, name)[0].weight.shape[0]
            for name in ("fc1", "fc2")
            if isinstance(getattr(own, name), nn.Sequential)
        }
        asked.append(ranks)
        return 1.0 + sum({"fc1": 1.0, "fc2": 100.0}[name] / rank for name, rank in ranks.items())

    points = measured_points(model, {"fc1": {}, "fc2": {}}, evaluate, ranks_each=3)
    assert asked == [{}, {"fc1": 72}, {"fc1": 144}, {"fc1": 216}, {"fc2": 25}, {"fc2": 49}, {"fc2": 74}]
    assert [point.loss for point in points["fc1"]] == pytest.approx([1 / 72, 1 / 144, 1 / 216, 0])
    chosen = ranks_by_sensitivity(model, {"fc1": {}, "fc2": {}}, evaluate, macs=0.5, ranks_each=3)
    assert chosen == {"fc1": {"form": "svd", "rank": 72}}
    assert factorize(model, chosen).macs[1] <= 0.5 * 266200
    with pytest.raises(UsageError) as error:
        ranks_by_sensitivity(model, {"fc1": {}}, evaluate)
    assert str(error.value) == "sensitivity: a budget is wanted: give one of 'parameters' and 'macs'"
    with pytest.raises(UsageError, match="^parameters must be more than 0 and less than 1, got -1$"):
        ranks_by_sensitivity(model, {"fc1": {}}, evaluate, parameters=-1)


def test_factored_models_are_traced_and_counted_as_ordinary_layers(tiny_cnn):
    factorize(tiny_cnn, {"conv2": {"rank": 2, "form": "tucker2"}, "fc": {"rank": 2}, "conv1": {"rank": 2}})
    graph = model_graph(tiny_cnn, "test")
    assert {"conv2.first", "conv2.core", "conv2.last", "fc.first", "fc.second"} <= set(graph.ops)
    names = [cost.name for cost in count_macs(tiny_cnn, torch.zeros(1, 1, 8, 8))]
    assert names[:2] == ["conv1.first", "conv1.second"]
    assert "conv2.core" in model_summary(tiny_cnn, "modules")


def test_an_optimizer_of_another_model_is_refused_and_nothing_changes():
    """The factors were in no optimizer, and were never trained."""
    model, other = (create_model(False, None, "lenet_300_100") for _ in range(2))
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(UsageError) as error:
        factorize(model, {"fc1": {"rank": 3}}, optimizer=optimizer)
    assert str(error.value) == (
        "factorize: optimizer: has none of the model's parameters, and is of another model or of a copy; give the "
        "one that trains this model, or none"
    )
    assert [name for name, _ in model.named_parameters()] == names
    partly = torch.optim.SGD(model.fc2.parameters(), lr=0.1)  # the rest is frozen
    factorize(model, {"fc1": {"rank": 3}}, optimizer=partly)


def test_the_summary_has_break_even_ranks_and_ranks_for_energies():
    model = create_model(False, None, "lenet_300_100")
    table = low_rank_summary(model, torch.zeros(1, 1, 28, 28))
    assert list(table["Name"]) == ["fc1", "fc2", "fc3"]
    assert list(table["Full rank"]) == [300, 100, 10]
    assert list(table["Break-even rank"]) == pytest.approx([216.97, 75, 9.09], abs=0.01)
    assert (table["Rank for 90 %"] <= table["Rank for 95 %"]).all()
    assert (table["Rank for 99 %"] <= table["Full rank"]).all()
    assert "217.0" in model_summary(model, "low-rank")
    with pytest.raises(UsageError, match="the model has no layer that can be factored"):
        low_rank_summary(nn.Sequential(nn.ReLU()), torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("layers", "more", "told"),
    [
        (["fc1"], {}, "factorize: layers: must be a mapping of settings by layer, as {'fc1': {'rank': 40}}, got list"),
        ({"*": {}}, {"macs": "0.5"}, "factorize: macs: must be a fraction or None, got str"),
        ({"*": {}}, {"macs": 0.5, "above_break_even": "x"}, "factorize: above_break_even: must be keep or refuse, got 'x'"),
        ({"*": {}}, {"macs": 1e-9}, "macs 1e-09: of 2,293,000 MACs that leaves none; give more than 4.4e-07"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_are_refused(layers, more, told):
    model = create_model(False, "digits", "lenet5", parallel=False)
    with pytest.raises(UsageError) as error:
        factorize(model, layers, **more)
    assert str(error.value) == told
