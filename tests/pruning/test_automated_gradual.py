import pytest
import torch

from distiller.errors import DistillerError, UnknownNameError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.names import named_parameters
from distiller.pruning.automated_gradual import AutomatedGradualPruner

WINDOW = EpochWindow.spanning(2, 12, 2)  # 2, 4, 6, 8, 10


@pytest.fixture
def params(tiny_cnn) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in named_parameters(tiny_cnn)}


@pytest.fixture
def at(tiny_cnn):
    masks = MaskStore(tiny_cnn)
    return lambda epoch: StepContext(tiny_cnn, masks, None, WINDOW, epoch)


def test_sparsity_follows_the_schedule_over_the_window(params, at):
    pruner = AutomatedGradualPruner("p", 0.0, 0.8, ["conv2.weight"])
    for epoch, expected in zip(WINDOW.epochs, [0.0, 0.4625, 0.7, 0.7875, 0.8], strict=True):
        mask = pruner.compute_masks(params, at(epoch))["conv2.weight"]
        assert int((mask == 0).sum()) == int(round(expected * 216, 9))
        assert pruner.target_sparsity(at(epoch)) == {"conv2.weight": pytest.approx(expected, abs=1e-12)}


def test_an_initial_sparsity_of_zero_prunes_nothing_at_first(params, at):
    """DEFECT of Distiller: IndexError where no element was to be pruned (k = 0)."""
    mask = AutomatedGradualPruner("p", 0.0, 0.8, "fc.weight").compute_masks(params, at(2))["fc.weight"]
    assert torch.equal(mask, torch.ones_like(mask))


def test_a_list_of_epochs_is_gone_through_like_a_window(tiny_cnn, params):
    """DEFECT of Distiller: an `epochs:` list gave the pruner the frequency None, on which it failed."""
    pruner, window = AutomatedGradualPruner("p", 0.0, 0.8, ["conv2.weight"]), EpochWindow((1, 2, 6, 9))
    for epoch, passed in ((1, 0), (2, 1 / 8), (6, 5 / 8), (9, 1)):
        ctx = StepContext(tiny_cnn, MaskStore(tiny_cnn), None, window, epoch)
        mask = pruner.compute_masks(params, ctx)["conv2.weight"]
        assert int((mask == 0).sum()) == int(round(216 * 0.8 * (1 - (1 - passed) ** 3), 9))


def test_weights_already_masked_stay_masked_as_sparsity_grows(params, at):
    pruner = AutomatedGradualPruner("p", 0.1, 0.9, ["conv2.weight"])
    mask = pruner.compute_masks(params, at(2))["conv2.weight"]
    for epoch in WINDOW.epochs[1:]:
        regrown = {"conv2.weight": torch.randn(mask.shape) * mask}
        new = pruner.compute_masks(regrown, at(epoch))["conv2.weight"]
        assert (new <= mask).all()
        mask = new


def test_sparsity_may_fall(params, at):
    pruner = AutomatedGradualPruner("p", 0.8, 0.2, ["conv2.weight"])
    zeros = [int((pruner.compute_masks(params, at(e))["conv2.weight"] == 0).sum()) for e in WINDOW.epochs]
    assert zeros == sorted(zeros, reverse=True)
    assert (zeros[0], zeros[-1]) == (172, 43)


def test_weights_are_found_by_name_pattern_and_wrapped_name(params):
    pruner = AutomatedGradualPruner("p", 0, 0.5, ["module.fc.weight", "conv?.weight"])
    assert pruner.select(list(params)) == ("fc.weight", "conv1.weight", "conv2.weight")


def test_defect_a_single_string_is_one_name_not_a_text_to_search(at):
    """DEFECT of Distiller: it searched the text, so that 'layer1.conv.weight' pruned 'conv.weight' too."""
    params = {"conv.weight": torch.randn(4), "layer1.conv.weight": torch.randn(4)}
    pruner = AutomatedGradualPruner("p", 0.1, 0.5, "layer1.conv.weight")
    assert pruner.select(list(params)) == ("layer1.conv.weight",)
    assert list(pruner.compute_masks(params, at(10))) == ["layer1.conv.weight"]


def test_names_that_match_nothing_are_refused(params):
    with pytest.raises(UnknownNameError) as error:
        AutomatedGradualPruner("p", 0, 0.5, ["fc.weigth"]).select(list(params))
    assert str(error.value) == "no parameter 'fc.weigth' in the model; did you mean 'fc.weight'?"


def test_distillers_call_sets_the_mask_of_one_parameter(tiny_cnn, params, at):
    masks = MaskStore(tiny_cnn)
    pruner = AutomatedGradualPruner("p", 0.0, 0.5, ["fc.weight", "conv1.weight"])
    pruner.set_param_mask(params["fc.weight"], "fc.weight", masks, at(10))
    pruner.set_param_mask(params["fc.bias"], "fc.bias", masks, at(10))
    assert list(masks.masked()) == ["fc.weight"]
    assert int((masks.masked()["fc.weight"] == 0).sum()) == 12


def test_nan_is_refused_with_pruner_and_parameter(params, at):
    params["fc.weight"] = torch.full((4, 6), float("nan"))
    with pytest.raises(DistillerError, match=r"^pruner 'agp', 'fc\.weight': cannot be pruned, got 24 NaN"):
        AutomatedGradualPruner("agp", 0.0, 0.5, ["fc.weight"]).compute_masks(params, at(10))
