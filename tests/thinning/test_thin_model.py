"""remove_filters, remove_channels and contract_model: what comes out, what goes with it, what is told."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import distiller
from distiller.errors import DistillerError, GraphTraceError, UnknownNameError, UsageError
from distiller.interfaces import Policy
from distiller.masks import MaskRules, MaskStore, create_model_masks_dict
from distiller.thinning import contract_model, remove_channels, remove_filters

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
}


def conv(inputs: int, outputs: int, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=bias)


class Flattening(nn.Module):
    """conv1 - bn1 - relu - conv2 - relu - pool - flatten - fc: a channel of conv2 is four columns of fc."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 3, 8, 8)
        self.conv1, self.bn1, self.conv2 = conv(3, 6), nn.BatchNorm2d(6), conv(6, 5)
        self.fc = nn.Linear(20, 4)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.max_pool2d(x, 4).flatten(1))


class Separable(nn.Module):
    """A depthwise convolution between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 3, 8, 8)
        self.conv1, self.depthwise, self.conv2 = conv(3, 6), conv(6, 6, groups=6), conv(6, 5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(self.conv2(self.depthwise(F.relu(self.conv1(x)))).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 3, 8, 8)
        self.stem, self.a, self.b = conv(3, 6), conv(6, 4), conv(4, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.b(F.relu(self.a(x))) + x)
        return self.fc(x.mean((2, 3)))


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 3, 8, 8)
        self.stem, self.shared, self.fc = conv(3, 4), conv(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.shared(F.relu(self.shared(F.relu(self.stem(x))))).mean((2, 3)))


def zeroed(model, dim=0, **indices):
    """The weights of layers at zero, at these indices."""
    with torch.no_grad():
        for name, zeros in indices.items():
            model.get_submodule(name).weight.index_fill_(dim, torch.tensor(zeros), 0)
    return model


def images(count=4):
    return torch.randn(count, 3, 8, 8)


def outputs(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def shapes(model):
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


class Told(Policy):
    def __init__(self) -> None:
        self.cuts = {}

    def follow_thinning(self, cuts):
        self.cuts.update(cuts)


@pytest.mark.parametrize(
    ("model", "zeros", "macs"),
    [
        (Flattening(), {"conv1": [1, 4], "conv2": [0, 3]}, 64 * 9 * (3 * 4 + 4 * 3) + 12 * 4),
        (Separable(), {"conv1": [1, 4]}, 64 * 9 * (3 * 4 + 4 + 4 * 5) + 5 * 4),
        (Residual(), {"stem": [1, 4], "b": [1, 4]}, 64 * 9 * (3 * 4 + 4 * 4 + 4 * 4) + 4 * 4),
        (Twice(), {"stem": [1], "shared": [1]}, 64 * 9 * (3 * 3 + 2 * 3 * 3) + 3 * 4),
    ],
    ids=["flatten", "depthwise", "residual", "shared"],
)
def test_a_thinned_model_answers_as_before_and_is_smaller(model, zeros, macs):
    zeroed(model, **zeros)
    x = images()
    before, dense = outputs(model, x), sum(p.numel() for p in model.parameters())

    report = remove_filters(model, None, None, None, None)

    torch.testing.assert_close(outputs(model, x), before, rtol=0, atol=1e-6)
    assert report.has_removed
    assert report.has_same_outputs
    assert report.kept == report.leftovers == ()
    assert report.parameters == (dense, sum(p.numel() for p in model.parameters()))
    assert report.macs[1] == macs < report.macs[0]
    for name, (_, after) in report.layers.items():
        assert tuple(model.get_parameter(name).shape) == after
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), x)


def test_the_report_counts_units_by_group_and_shapes_by_layer():
    report = remove_filters(zeroed(Flattening(), conv1=[1, 4], conv2=[3]), None, None, None, None)
    assert report.groups == {"conv1.weight": (6, 4), "conv2.weight": (5, 4)}
    assert report.layers == {
        "conv1.weight": ((6, 3, 3, 3), (4, 3, 3, 3)),
        "conv2.weight": ((5, 6, 3, 3), (4, 4, 3, 3)),
        "fc.weight": ((4, 20), (4, 16)),
    }


def test_layers_are_told_their_sizes_by_their_own_names():
    """Distiller set `in_channels` on linear layers, which have `in_features`."""
    model = zeroed(Flattening(), conv1=[1], conv2=[3])
    remove_filters(model, None, None, None, None)
    assert (model.fc.in_features, model.fc.out_features) == (16, 4)
    assert not hasattr(model.fc, "in_channels")
    assert (model.conv2.in_channels, model.conv2.out_channels, model.bn1.num_features) == (5, 4, 5)


def test_grouped_convolutions_lose_whole_groups():
    """Distiller raised ValueError for groups other than 1 and the number of channels."""
    model = nn.Sequential(conv(3, 8), conv(8, 8, groups=4), conv(8, 2), nn.Flatten())
    model.input_shape = (1, 3, 8, 8)
    zeroed(model, **{"0": [2, 3]})
    before = outputs(model, x := images())
    remove_filters(model, None, None, None, None)
    assert model[1].groups == 3
    torch.testing.assert_close(outputs(model, x), before, rtol=0, atol=1e-6)


def test_remove_channels_takes_what_no_layer_reads_with_its_biases_and_shifts():
    model = zeroed(Flattening(), dim=1, conv2=[0, 5])
    nn.init.normal_(model.bn1.bias)
    before = outputs(model, x := images())
    report = remove_channels(model, None, None, None, None)
    assert report.groups == {"conv1.weight": (6, 4)}
    assert report.leftovers == ()
    torch.testing.assert_close(outputs(model, x), before, rtol=0, atol=1e-6)


def test_contract_model_takes_both_in_one_recipe():
    model = zeroed(zeroed(Flattening(), conv1=[1], conv2=[3]), dim=1, conv2=[0])
    before = outputs(model, x := images())
    report = contract_model(model, None, None, None, None)
    assert report.groups == {"conv1.weight": (6, 4), "conv2.weight": (5, 4)}
    assert shapes(model)["conv1.weight"] == (4, 3, 3, 3)
    assert len(model.thinning_recipes) == 1
    torch.testing.assert_close(outputs(model, x), before, rtol=0, atol=1e-6)
    fresh = Flattening()
    distiller.thinning.apply_recipe(
        fresh, distiller.ThinningRecipe.from_plain(model.thinning_recipes[0], "here")
    )
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(fresh, x), before, rtol=0, atol=1e-6)


def test_masked_weights_count_as_zero():
    """Distiller looked at the weights alone, which are masked only in the course of a mini-batch."""
    model = Flattening()
    masks = MaskStore(model)
    mask = torch.ones_like(model.conv1.weight)
    mask[[1, 4]] = 0
    masks.put("conv1.weight", mask, rules=MaskRules(forward_only=True))
    dense = model.conv1.weight.detach().clone()
    report = remove_filters(model, masks, None, None, None)
    assert report.groups == {"conv1.weight": (6, 4)}
    assert torch.equal(masks["conv1.weight"].mask, torch.ones(4, 3, 3, 3))
    assert torch.equal(model.conv1.weight, dense[[0, 2, 3, 5]])


def test_maskers_in_a_plain_dict_are_looked_at_and_cut():
    model = Flattening()
    masks = create_model_masks_dict(model)
    masks["conv1.weight"].mask = torch.ones_like(model.conv1.weight)
    masks["conv1.weight"].mask[[1, 4]] = 0
    remove_filters(model, masks, "resnet20_cifar", "cifar10", None)
    assert masks["conv1.weight"].mask.shape == model.conv1.weight.shape == (4, 3, 3, 3)
    assert masks["conv2.weight"].mask is None


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_goes_on_as_one_whose_state_was_cut_by_hand(make):
    """Distiller cut the momentum of SGD, and raised NotImplementedError for all else."""
    model = Flattening()
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer, images())
    zeroed(model, conv1=[1, 4])
    with torch.no_grad():
        model.bn1.bias[[1, 4]] = 0
    by_hand, its_optimizer = cut_by_hand(model, optimizer, make)

    remove_filters(model, None, None, None, optimizer)

    for _ in range(3):
        x = images()
        step(model, optimizer, x)
        step(by_hand, its_optimizer, x)
    for (name, param), other in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(param, other), name


def cut_by_hand(model, optimizer, make):
    """A narrower model built as such, with filters 0, 2, 3 and 5 of conv1, and an optimizer of its own."""
    kept = [0, 2, 3, 5]
    narrow = Flattening()
    narrow.conv1, narrow.bn1, narrow.conv2 = conv(3, 4), nn.BatchNorm2d(4), conv(4, 5)
    of = {name: lambda t: t[kept] for name in ("conv1.weight", "bn1.weight", "bn1.bias")}
    of |= {"conv2.weight": lambda t: t[:, kept], "bn1.running_mean": lambda t: t[kept]}
    of |= {"bn1.running_var": lambda t: t[kept]}
    same = lambda t: t  # noqa: E731
    narrow.load_state_dict({n: of.get(n, same)(value) for n, value in model.state_dict().items()})
    its_optimizer = make(narrow.parameters())
    for (name, param), other in zip(model.named_parameters(), narrow.parameters(), strict=True):
        its_optimizer.state[other] = {
            key: of.get(name, same)(value).clone() if value.dim() else value.clone()
            for key, value in optimizer.state[param].items()
        }
    return narrow, its_optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_training_goes_on_while_the_loss_of_before_is_still_held(dtype):
    """Autograd remembers a parameter's shape as long as a graph that led to it is there."""
    model = zeroed(Flattening(), conv1=[1, 4]).to(dtype)
    seen = []
    model.conv2.weight.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    loss = model(images().to(dtype)).square().mean()
    loss.backward()
    remove_filters(model, None, None, None, None)
    model(images().to(dtype)).square().mean().backward()
    assert loss.isfinite()
    assert seen == [(5, 6, 3, 3), (5, 4, 3, 3)]
    assert model.conv2.weight.grad is not None
    assert model.conv2.weight.grad.dtype == dtype


def test_policies_are_told_what_became_smaller():
    policy = Told()
    remove_filters(zeroed(Flattening(), conv2=[3]), None, None, None, None, policies=(policy,))
    assert policy.cuts["conv2.weight"] == {0: (0, 1, 2, 4)}
    assert policy.cuts["fc.weight"] == {1: tuple(i for i in range(20) if i // 4 != 3)}


def test_what_is_coupled_and_not_zero_is_told_by_name(caplog):
    model = zeroed(Residual(), stem=[0, 2], b=[2])
    with caplog.at_level(logging.INFO):
        report = remove_filters(model, None, None, None, None)
    assert shapes(model)["stem.weight"] == (5, 3, 3, 3)
    told = "stem.weight: 1 zero filter stays (0), coupled with b.weight (1 not zero: 0)"
    assert [str(kept) for kept in report.kept] == [told]
    assert [record.getMessage() for record in caplog.records] == [
        f"remove_filters: {told}",
        "remove_filters: stem.weight 6 -> 5",
        "remove_filters: parameters 622 -> 519 (83.4 % of before)",
        "remove_filters: MACs 38,040 -> 31,700 (83.3 % of before)",
        f"remove_filters: outputs are those of the masked model to {report.change:.1e} of their scale",
    ]
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_a_shift_that_is_left_behind_is_a_warning_with_the_measured_change(caplog):
    model = zeroed(Flattening(), conv1=[1, 4])
    with torch.no_grad():
        model.bn1.bias[4] = 2
    masked = copy.deepcopy(model)
    report = remove_filters(model, None, None, None, None)
    assert report.leftovers == ("bn1.bias",)
    assert not report.has_same_outputs
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    before = outputs(masked, x)
    change = float((outputs(model, x) - before).abs().max() / before.abs().max())
    assert report.change == pytest.approx(change, rel=1e-4)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == (
        f"remove_filters: outputs differ from those of the masked model by {report.change:.2g} of their "
        "scale: of what was removed not zero: bn1.bias; fine-tune, or mask whole channel groups before thinning"
    )


def test_without_a_shift_the_same_removal_is_exact(caplog):
    model = zeroed(Flattening(), conv1=[1, 4])
    with torch.no_grad():
        model.bn1.bias.fill_(2)
        model.bn1.bias[[1, 4]] = 0
    report = remove_filters(model, None, None, None, None)
    assert report.change < 1e-6
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_running_mean_counts_as_a_shift():
    model = zeroed(Flattening(), conv1=[1])
    model.bn1.running_mean.fill_(-1)
    report = remove_filters(model, None, None, None, None)
    assert report.leftovers == ("bn1.running_mean",)
    assert report.change > 1e-3


def test_a_layer_that_is_all_zero_keeps_one_filter():
    """Distiller raised ValueError in the midst of training."""
    model = zeroed(Flattening(), conv1=list(range(6)))
    report = remove_filters(model, None, None, None, None)
    assert shapes(model)["conv1.weight"] == (1, 3, 3, 3)
    assert [str(kept) for kept in report.kept] == [
        "conv1.weight: 1 zero filter stays (0): all of its group are zero, and one has to stay"
    ]


def test_nothing_to_remove_is_a_warning_that_says_why(caplog):
    model = Flattening()
    before = shapes(model)
    report = remove_filters(model, None, None, None, None)
    assert not report.has_removed
    assert report.change == 0
    assert report.parameters[0] == report.parameters[1]
    zeroed(model, fc=[1])
    remove_filters(model, None, None, None, None)
    contract_model(Flattening(), None, None, None, None)
    assert shapes(model) == before
    assert not hasattr(model, "thinning_recipes")
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "remove_filters: nothing was removed: no filter of the weights is zero",
        "remove_filters: nothing was removed: the zero ones cannot go: fc.weight: 1 zero filter stays (1): "
        "the network returns it",
        "contract_model: nothing was removed: no filter or channel of the weights is zero",
    ]


def test_wrapped_models_are_thinned_inside():
    model = zeroed(Flattening(), conv1=[1])
    remove_filters(nn.DataParallel(model), None, None, None, None)
    assert shapes(model)["conv1.weight"] == (5, 3, 3, 3)


def test_mode_and_random_state_stay_as_they_were():
    model = zeroed(Flattening(), conv1=[1])
    model.bn1.eval()
    state = torch.get_rng_state()
    remove_filters(model, None, None, None, None)
    assert model.training
    assert not model.bn1.training
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model.bn1.num_batches_tracked) == 0


def test_architecture_and_data_set_stand_in_for_an_input_shape():
    for arch, dataset in (("resnet20_cifar", None), (None, "cifar10")):
        model = Flattening()
        model.fc = nn.Linear(5 * 8 * 8, 4)
        del model.input_shape
        zeroed(model, conv1=[1])
        assert remove_filters(model, None, arch, dataset, None).groups == {"conv1.weight": (6, 5)}


def test_a_model_of_unknown_input_is_refused():
    model = Flattening()
    del model.input_shape
    with pytest.raises(UsageError) as refusal:
        remove_filters(model, None, None, None, None)
    assert str(refusal.value) == (
        "remove_filters: the model has no 'input_shape'; set it, batch included, or give 'dataset' or 'arch'"
    )
    with pytest.raises(UnknownNameError, match="unknown data set 'cifar'"):
        remove_filters(model, None, None, "cifar", None)


class Branching(Flattening):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_a_model_that_cannot_be_traced_says_who_asked():
    with pytest.raises(GraphTraceError, match="torch.export cannot trace it for remove_channels"):
        remove_channels(Branching(), None, None, None, None)


class Watchful(Flattening):
    """Its code knows how many channels there are, which no layer says."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self.counts = counts

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if not torch.compiler.is_compiling() and x.size(1) not in self.counts:
            raise RuntimeError(f"there are {x.size(1)} channels")
        return self.fc(F.max_pool2d(F.relu(self.conv2(x)), 4).flatten(1))


def test_a_group_that_the_model_does_not_run_without_stays_and_is_told():
    model = zeroed(Watchful(6), conv1=[1], conv2=[3])
    report = remove_filters(model, None, None, None, None)
    assert report.groups == {"conv2.weight": (5, 4)}
    [kept] = report.kept
    assert (kept.name, kept.indices) == ("conv1.weight", (1,))
    assert kept.reason.endswith("RuntimeError: there are 5 channels")


def test_a_model_whose_thinned_copy_does_not_run_stays_as_it_is():
    model = Watchful(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, images())
    before = copy.deepcopy(zeroed(model, conv1=[1, 4]))
    with pytest.raises(DistillerError) as refusal:
        remove_filters(model, None, None, None, optimizer)
    assert str(refusal.value).startswith(
        "remove_filters: the thinned model: failed with RuntimeError: there are 4 channels ("
    )
    assert str(refusal.value).endswith("; the model stays as it was")
    assert shapes(model) == shapes(before)
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    assert optimizer.state[model.conv1.weight]["momentum_buffer"].shape == (6, 3, 3, 3)


def test_an_optimizer_whose_state_cannot_be_cut_leaves_the_model_as_it_is():
    model = zeroed(Flattening(), conv1=[1])
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer, images())
    zeroed(model, conv1=[1])
    before = shapes(model)
    with pytest.raises(DistillerError, match="use SGD, Adam or AdamW"):
        contract_model(model, None, None, None, optimizer)
    assert shapes(model) == before


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_that_cannot_be_copied_is_told_so():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.utils.weight_norm(nn.Conv2d(8, 6, 1)))
    model.input_shape = (1, 3, 8, 8)  # type: ignore[assignment]
    model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UsageError) as caught:
        contract_model(model, None, None, None, None)
    text = str(caught.value)
    assert text.startswith("thinning: the model cannot be copied: failed with RuntimeError: ")
    assert text.endswith(
        "; thinning is tried on a copy first: take off what computes weights, as torch.nn.utils.weight_norm does "
        "(remove_weight_norm)"
    )


def test_zero_filters_that_a_parametrization_makes_stay_and_are_told():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1))
    nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original0[2] = 0
        model[0].bias[2] = 0
    model.input_shape = (1, 3, 8, 8)  # type: ignore[assignment]
    report = remove_filters(model, None, None, None, None)
    assert not report.has_removed
    assert [str(kept) for kept in report.kept] == [
        "0.weight: 1 zero filter stays (2): a parametrization makes it of other tensors; take that off first"
    ]
