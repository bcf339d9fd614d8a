import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distiller.apputils import checkpoint as checkpoints
from distiller.apputils.checkpoint import (
    load_checkpoint,
    load_lean_checkpoint,
    load_state,
    read_checkpoint,
    restore_optimizer,
    restore_quantizer,
    restore_rng_state,
    save_checkpoint,
)
from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.errors import CheckpointError, UsageError
from distiller.quantization import PostTrainLinearQuantizer
from distiller.scheduler import CompressionScheduler

ROOT = Path(__file__).resolve().parents[2]
COMPAT = ROOT / "../shared/compat/checkpoints"
needs_compat = pytest.mark.skipif(not COMPAT.is_dir(), reason=f"Distiller's checkpoints are not at {COMPAT}")


class Net(nn.Module):
    def __init__(self, width=3, arch=None):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 2)
        if arch is not None:
            self.arch = arch

    def forward(self, x):
        return self.fc(nn.functional.dropout(self.bn(self.conv(x)).mean((2, 3)), 0.5, self.training))


def bits(model):
    return {
        name: (value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).tolist())
        for name, value in model.state_dict().items()
    }


def message(call, *args, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# --- a checkpoint of another model


def test_a_checkpoint_of_another_model_is_refused_and_the_model_untouched(tmp_path):
    path = save_checkpoint(0, "resnet20_cifar", nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), dir=tmp_path)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5), nn.BatchNorm1d(5))
    model.arch = "simplenet_cifar"  # type: ignore[assignment]
    before = bits(model)
    assert message(load_state, model, read_checkpoint(path)) == (
        f"{path}: is of another model: the checkpoint is of 'resnet20_cifar', "
        "the model is 'simplenet_cifar'; "
        "2 of another form, first '1.weight' is (2, 2) float in the checkpoint, (5, 2) float in the model; "
        "4 missing, first '2.weight'; create the model as 'resnet20_cifar'"
    )
    assert bits(model) == before


def test_missing_and_unexpected_names_are_counted_without_archs(tmp_path):
    torch.save({"fc.weight": torch.ones(1), "x": torch.ones(1), "y": torch.ones(1)}, tmp_path / "w.pt")
    assert message(load_state, nn.Linear(1, 1), read_checkpoint(tmp_path / "w.pt")) == (
        f"{tmp_path / 'w.pt'}: is of another model: the checkpoint is of an unknown model, "
        "the model is 'Linear'; 2 missing, first 'weight'; 3 unexpected, first 'fc.weight'; "
        "give a checkpoint of this model"
    )


def test_another_arch_is_refused_though_the_weights_would_fit(tmp_path):
    path = save_checkpoint(0, "a", Net(), dir=tmp_path)
    assert message(load_state, Net(arch="b"), read_checkpoint(path)) == (
        f"{path}: is of another model: the checkpoint is of 'a', the model is 'b'; create the model as 'a'"
    )


def test_sizes_of_a_model_that_goes_by_the_same_name_are_no_other_model(tmp_path):
    path = save_checkpoint(0, "net", nn.Sequential(nn.Linear(3, 1)), dir=tmp_path)
    model = nn.Sequential(nn.Linear(3, 2))
    model.arch = "net"  # type: ignore[assignment]
    assert message(load_state, model, read_checkpoint(path)) == (
        f"{path}: has tensors of other sizes than the model: the checkpoint is of 'net', the model is 'net'; "
        "2 of another form, first '0.weight' is (1, 3) float in the checkpoint, (2, 3) float in the model; "
        "one of them was thinned or made with other settings; give a checkpoint of this model"
    )


def test_another_kind_of_number_is_refused(tmp_path):
    torch.save({"weight": torch.ones(1, 1, dtype=torch.int8), "bias": torch.ones(1)}, tmp_path / "w.pt")
    assert "'weight' is (1, 1) integer in the checkpoint, (1, 1) float in the model" in message(
        load_state, nn.Linear(1, 1), read_checkpoint(tmp_path / "w.pt")
    )


def test_unexpected_weights_are_logged_when_not_strict(tmp_path, caplog):
    path = save_checkpoint(0, "net", Net(), dir=tmp_path)
    torch.save({**Net().state_dict(), "extra": torch.ones(1)}, path)
    assert "1 unexpected, first 'extra'" in message(load_state, Net(), read_checkpoint(path))
    load_checkpoint(Net(), path)
    assert caplog.messages == [f"{path}: left aside, having no place in the model: ['extra']"]


def test_missing_weights_are_refused_though_not_strict(tmp_path):
    torch.save({"fc.weight": torch.ones(2, 3)}, tmp_path / "w.pt")
    assert "missing, first 'conv.weight'" in message(load_checkpoint, Net(), tmp_path / "w.pt", strict=False)


IMAGES = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(1))


class Other(nn.Module):
    def __init__(self, arch=None):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 5)
        if arch is not None:
            self.arch = arch

    def forward(self, x):
        return self.first(x).flatten(1)


def quantized(model, dynamic=True):
    """The model prepared with or without statistics."""
    stats = None if dynamic else collect_quant_stats(model.eval(), lambda model: model(IMAGES))
    PostTrainLinearQuantizer(model, model_activation_stats=stats).prepare_model(IMAGES)
    return model


def test_a_checkpoint_of_a_quantized_model_says_so(tmp_path):
    path = save_checkpoint(0, "net", quantized(Net()), dir=tmp_path)
    text = message(load_state, Net(), read_checkpoint(path))
    assert text.startswith(f"{path}: is of a model that PostTrainLinearQuantizer has prepared: ")
    assert text.endswith("; prepare the model with the same quantizer first")


@pytest.mark.parametrize("make", [Other, lambda: quantized(Other())], ids=["as it is", "prepared"])
def test_a_checkpoint_of_another_quantized_model_is_told_as_that(tmp_path, make):
    path = save_checkpoint(0, "net", quantized(Net()), dir=tmp_path)
    text = message(load_state, make(), read_checkpoint(path))
    assert text.startswith(f"{path}: is of another model: the checkpoint is of 'net', the model is 'Other'; ")
    assert text.endswith("; give a checkpoint of this model")


@pytest.mark.filterwarnings("ignore:.*operations stay in floating point")
def test_a_quantized_model_is_prepared_as_its_checkpoint_says(tmp_path):
    model = quantized(Net(), dynamic=False)
    path = save_checkpoint(0, "net", model, dir=tmp_path)
    fresh = Net().eval()
    quantizer = restore_quantizer(fresh, read_checkpoint(path))
    load_state(fresh, read_checkpoint(path))
    assert isinstance(quantizer, PostTrainLinearQuantizer)
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    assert restore_quantizer(fresh, read_checkpoint(save_checkpoint(0, "net", Net(), dir=tmp_path))) is None


@pytest.mark.filterwarnings("ignore:.*operations stay in floating point")
def test_another_model_is_not_prepared_as_a_checkpoint_says(tmp_path):
    """The statistics in it are of the other model too, and were all that the message spoke of."""
    path = save_checkpoint(0, "net", quantized(Net(), dynamic=False), dir=tmp_path)
    assert message(restore_quantizer, Other("other"), read_checkpoint(path)) == (
        f"{path}: is of another model: the checkpoint is of 'net', the model is 'other'; create the model as 'net'"
    )
    assert message(restore_quantizer, Other(), read_checkpoint(path)) == (
        f"{path}: is of a quantized model, and this one cannot be quantized alike: activation statistics: 3 of 3 "
        "layers are not in the model ('conv', 'bn', 'fc'); the statistics are of another model, collect them "
        "from this one"
    )


# --- load_checkpoint and its parts


def trained(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 5, 5)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.9)}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True}),
    ],
)
@pytest.mark.parametrize("is_given", [True, False])
def test_optimizers_go_on_bit_equal(tmp_path, kind, settings, is_given):
    model = Net()
    optimizer = kind(
        [{"params": model.fc.parameters(), "lr": 0.5}, {"params": model.conv.parameters()}], **settings
    )
    trained(model, optimizer)
    path = save_checkpoint(3, "net", model, optimizer, dir=tmp_path)
    resumed = Net()
    fresh = kind([{"params": resumed.fc.parameters()}, {"params": resumed.conv.parameters()}], lr=1.0)
    resumed, _, loaded, start = load_checkpoint(resumed, path, optimizer=fresh if is_given else None)
    assert loaded is not None
    assert start == 4
    assert (loaded is fresh) == is_given
    for net, its_optimizer in ((model, optimizer), (resumed, loaded)):
        torch.manual_seed(5)
        trained(net, its_optimizer)
    assert bits(resumed) == bits(model)


def test_two_optimizers_restored_from_one_checkpoint_do_not_share_state(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer)
    read = read_checkpoint(save_checkpoint(0, "net", model, optimizer, dir=tmp_path))
    other = Net()
    first = restore_optimizer(other, read)
    trained(other, first)
    second = restore_optimizer(other, read)
    assert second is not None
    buffer = second.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(buffer, optimizer.state_dict()["state"][0]["momentum_buffer"])


def test_another_optimizer_is_refused(tmp_path):
    model = Net()
    path = save_checkpoint(0, "net", model, torch.optim.SGD(model.parameters(), lr=0.1), dir=tmp_path)
    given = torch.optim.Adam(model.parameters())
    assert message(load_checkpoint, model, path, given) == f"{path}: its optimizer is SGD, got Adam; use SGD"


def test_an_optimizer_of_other_groups_is_refused(tmp_path):
    model = Net()
    path = save_checkpoint(0, "net", model, torch.optim.SGD(model.parameters(), lr=0.1), dir=tmp_path)
    given = torch.optim.SGD(reversed(list(model.parameters())), lr=0.1)
    assert message(load_checkpoint, model, path, given) == (
        f"{path}: its optimizer has other parameters, or in other groups; "
        "build the optimizer as in the run that was saved, or start with a fresh one"
    )


def test_optimizers_that_cannot_be_rebuilt_are_named(tmp_path):
    model = Net()
    path = save_checkpoint(0, "net", model, torch.optim.Adagrad(model.parameters()), dir=tmp_path)
    assert message(load_checkpoint, model, path) == (
        f"{path}: its optimizer Adagrad cannot be rebuilt: it is not one of SGD, Adam, AdamW; "
        "create it and pass it"
    )
    stranger = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=0.1)
    path = save_checkpoint(0, "net", model, stranger, dir=tmp_path)
    assert "cannot be rebuilt: it trains parameters that are not the model's" in message(
        load_checkpoint, model, path
    )


def test_a_damaged_optimizer_entry_is_refused(tmp_path):
    model = Net()
    path = save_checkpoint(0, "net", model, torch.optim.SGD(model.parameters(), lr=0.1), dir=tmp_path)
    torch.save({**torch.load(path, weights_only=True), "optimizer": {"class": "SGD"}}, path)
    assert message(load_checkpoint, model, path) == (f"{path}: 'optimizer.state_dict' is missing")


def test_masks_come_back_in_a_scheduler_without_policies(tmp_path):
    model = Net()
    scheduler = CompressionScheduler(model)
    scheduler.masks["fc.weight"].mask = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    with scheduler.masked():
        path = save_checkpoint(0, "net", model, scheduler=scheduler, dir=tmp_path)
    _, loaded, _, _ = load_checkpoint(Net(), path)
    assert loaded is not None
    assert {name: mask.tolist() for name, mask in loaded.masks.masked().items()} == {
        "fc.weight": [[1, 0, 1], [0, 1, 0]]
    }
    assert read_checkpoint(path).state_dict["fc.weight"][0, 1] == 0


def test_masks_of_a_distiller_checkpoint_come_back(tmp_path):
    content = {
        "state_dict": nn.DataParallel(Net()).state_dict(),
        "compression_sched": {"masks_dict": {"module.fc.weight": torch.eye(2, 3), "module.fc.bias": None}},
    }
    torch.save(content, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    _, scheduler, optimizer, start = load_checkpoint(Net(), tmp_path / "old.pth.tar")
    assert scheduler is not None
    assert {name: mask.tolist() for name, mask in scheduler.masks.masked().items()} == {
        "fc.weight": [[1, 0, 0], [0, 1, 0]]
    }
    assert (optimizer, start) == (None, 0)


def test_lean_loading_takes_the_weights_alone(tmp_path):
    model, fresh = Net(), Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = save_checkpoint(5, "net", model, optimizer, CompressionScheduler(model), dir=tmp_path)
    assert load_checkpoint(fresh, path, lean_checkpoint=True) == (fresh, None, None, 0)
    assert bits(fresh) == bits(model)


def test_model_goes_to_the_device_asked_for(tmp_path):
    path = save_checkpoint(0, "net", Net(), dir=tmp_path)
    assert load_lean_checkpoint(Net(), path, model_device="meta").fc.weight.is_meta  # type: ignore[union-attr]


def test_model_is_created_from_the_checkpoints_arch_and_dataset(tmp_path, monkeypatch):
    model = Net()
    model.dataset = "digits"  # type: ignore[assignment]
    path = save_checkpoint(0, "net", model, dir=tmp_path)
    asked = []
    monkeypatch.setattr(
        checkpoints, "create_model", lambda *args, **kwargs: asked.append((args, kwargs)) or Net(arch="net")
    )
    assert bits(load_lean_checkpoint(None, path)) == bits(model)
    assert asked == [((False, "digits", "net"), {"parallel": False})]


def test_model_cannot_be_created_without_arch_and_dataset(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "w.pt")
    assert message(load_lean_checkpoint, None, tmp_path / "w.pt") == (
        f"{tmp_path / 'w.pt'}: its model cannot be created: the file does not say its arch and dataset; "
        "create the model and pass it"
    )


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    def epochs(model, optimizer, first, last):
        for _ in range(first, last):
            for _ in range(3):
                images = torch.randn(4, 1, 5, 5) * random.random() + np.random.rand()  # noqa: NPY002
                optimizer.zero_grad()
                model(images).square().mean().backward()
                optimizer.step()

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    epochs(model, optimizer, 0, 2)
    path = save_checkpoint(1, "net", model, optimizer, dir=tmp_path)
    epochs(model, optimizer, 2, 4)

    for draw in (random.random, np.random.rand, lambda: torch.rand(7)):
        draw()
    resumed, _, its_optimizer, start = load_checkpoint(Net(), path)
    generators = read_checkpoint(path).rng
    assert generators is not None
    restore_rng_state(generators)
    epochs(resumed, its_optimizer, start, 4)
    assert bits(resumed) == bits(model)


def test_saving_draws_no_random_numbers(tmp_path):
    model = Net()
    save_checkpoint(0, "net", model, dir=tmp_path)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    Net()
    assert torch.equal(torch.rand(3), drawn)


# --- Distiller's own files


@needs_compat
def test_distillers_dense_resnet20_loads_into_its_model():
    path = COMPAT / "checkpoint_trained_dense.pth.tar"
    model = checkpoints.create_model(False, "cifar10", "resnet20_cifar", parallel=False)
    _, _, optimizer, start = load_checkpoint(model, path, strict=True)
    assert (optimizer, start) == (None, 180)
    assert torch.equal(
        model.state_dict()["layer3.2.bn2.running_var"],
        read_checkpoint(path).state_dict["layer3.2.bn2.running_var"],
    )


@needs_compat
def test_distillers_thinned_resnet20_is_rebuilt_and_takes_weights_and_masks():
    path = COMPAT / "checkpoint_trained_channel_regularized_resnet20.pth.tar"
    model: Any = checkpoints.create_model(False, "cifar10", "resnet20_cifar", parallel=False)
    dense = sum(param.numel() for param in model.parameters())
    _, scheduler, _, start = load_checkpoint(model, path)
    assert (dense, sum(param.numel() for param in model.parameters())) == (272_474, 235_774)
    assert start == 180
    assert scheduler is not None
    assert scheduler.masks.masked()["layer1.0.conv2.weight"].shape == (16, 11, 3, 3)
    assert (model.layer1[0].conv1.out_channels, model.layer1[0].conv2.in_channels) == (11, 11)
    assert model.layer1[0].bn1.num_features == 11
    for name, value in read_checkpoint(path).state_dict.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("model", "file", "text"),
    [
        (nn.Linear(1, 1), None, "checkpoint: file: must be a path, got NoneType"),
        (nn.Linear(1, 1), 5, "checkpoint: file: must be a path, got int"),
        (5, "saved", "checkpoint: model: must be a torch.nn.Module, got int"),
    ],
)
def test_arguments_of_another_type_are_refused(tmp_path, model, file, text):
    path = save_checkpoint(0, "net", nn.Linear(1, 1), dir=tmp_path) if file == "saved" else file
    with pytest.raises(UsageError) as caught:
        load_checkpoint(model, path)
    assert str(caught.value) == text
