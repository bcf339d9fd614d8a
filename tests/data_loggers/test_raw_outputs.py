"""Outputs of layers as they are."""

import pytest
import torch
from torch import nn

from distiller.data_loggers.raw_outputs import RawActivationsCollector, collect_raw_outputs
from distiller.errors import StatsError, UsageError


class Twice(nn.Module):
    """linear - relu (in place) - the same relu of part of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.relu(self.fc(x))[:, :2] - 1)


def runs(*batches, mode=torch.no_grad):
    def test_fn(model):
        with mode():
            for batch in batches:
                model.eval()(batch)

    return test_fn


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outputs_are_those_of_the_layers_before_anything_changes_them(mode):
    model, data = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)), torch.randn(7, 4)
    found = collect_raw_outputs(model, runs(*data.split(3), mode=mode))
    with torch.no_grad():
        linear = model[0](data)
        assert torch.allclose(found["0"], linear, atol=1e-6)
        assert torch.allclose(found["1"], linear.relu(), atol=1e-6)
        assert torch.allclose(found["2"], model[2](linear.relu()), atol=1e-6)
    assert not any(x.requires_grad for x in found.values())
    assert list(found) == ["0", "1", "2"]


def test_samples_of_several_shapes_are_apart():
    found = collect_raw_outputs(Twice(), runs(torch.randn(3, 4), torch.randn(2, 4)))
    assert {kind: tuple(x.shape) for kind, x in found["relu"].items()} == {"6": (5, 6), "2": (5, 2)}


def test_no_more_samples_than_wanted_are_kept_of_a_layer():
    data = torch.randn(7, 4)
    found = collect_raw_outputs(nn.Sequential(nn.Linear(4, 6)), runs(*data.split(3)), max_samples=4)
    whole = collect_raw_outputs(nn.Sequential(nn.Linear(4, 6)), runs(data), max_samples=100)
    assert (len(found["0"]), len(whole["0"])) == (4, 7)
    # of all shapes together: sequences of every length would otherwise be without bound
    assert tuple(collect_raw_outputs(Twice(), runs(data[:3], data), max_samples=3)["relu"].shape) == (3, 6)


def test_the_kept_samples_do_not_hold_the_memory_of_the_whole_batch():
    found = collect_raw_outputs(nn.Sequential(nn.ReLU()), runs(torch.randn(100, 4)), max_samples=1)
    assert found["0"].untyped_storage().nbytes() == 16


def test_precision_and_values_stay_and_layout_becomes_plain():
    data = torch.randn(2, 3, 4, 4).to(torch.bfloat16).to(memory_format=torch.channels_last)
    found = collect_raw_outputs(nn.Sequential(nn.ReLU()), runs(data))["0"]
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    assert torch.equal(found, data.relu())


def test_a_scalar_is_one_sample():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean()

    found = collect_raw_outputs(nn.Sequential(Mean()), runs(torch.ones(2, 2), torch.zeros(2, 2)))
    assert found["0"].tolist() == [1.0, 0.0]


def test_there_is_a_file_for_each_layer(tmp_path):
    found = collect_raw_outputs(Twice(), runs(torch.randn(3, 4)), tmp_path)
    folder = tmp_path / "raw_outputs"
    assert sorted(path.name for path in folder.iterdir()) == ["000-fc.pt", "001-relu.pt"]
    assert torch.equal(torch.load(folder / "000-fc.pt", weights_only=True), found["fc"])
    relu = torch.load(folder / "001-relu.pt", weights_only=True)
    assert torch.equal(relu["2"], found["relu"]["2"])


def test_nothing_run_is_an_error(tmp_path):
    with pytest.raises(StatsError) as caught:
        collect_raw_outputs(Twice(), lambda model: None, tmp_path)
    assert str(caught.value) == (
        "RawActivationsCollector: no module of the model was run; "
        "the model must be called while the collector is attached"
    )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(StatsError) as caught:
        collect_raw_outputs(Twice(), lambda model: pytest.fail("ran"), tmp_path / "none")
    assert str(caught.value) == f"{tmp_path / 'none'}: no such folder to make raw_outputs in; make it first"
    (tmp_path / "raw_outputs").write_text("in the way")
    with pytest.raises(StatsError, match=r"raw_outputs: cannot be written, File exists$"):
        collect_raw_outputs(Twice(), runs(torch.randn(3, 4)), tmp_path)


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "3"])
def test_a_wrong_number_of_samples_is_an_error(wrong):
    with pytest.raises(UsageError) as caught:
        RawActivationsCollector(Twice(), max_samples=wrong)
    assert str(caught.value) == (
        f"max_samples: a number of samples from 1, or None for all, wanted, got {wrong!r}"
    )


def test_reset_forgets():
    model = Twice().eval()
    collector = RawActivationsCollector(model)
    with collector:
        model(torch.randn(1, 4))
    collector.reset()
    assert collector.value() == {}
