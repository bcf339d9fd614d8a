"""What every collector must do."""

from __future__ import annotations

import copy
import csv
import importlib
import json
import pkgutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from distiller import atomic_file, data_loggers, interfaces
from distiller.data_loggers.activation_stats import (
    RecordsActivationStatsCollector,
    SummaryActivationStatsCollector,
    percent_of_zeros,
)
from distiller.data_loggers.collector import ActivationCollector, collector_context
from distiller.data_loggers.histograms import ActivationHistogramsCollector
from distiller.data_loggers.one_pass import OnePassQuantStatsCollector
from distiller.data_loggers.quant_stats import QuantCalibrationStatsCollector, collect_quant_stats
from distiller.data_loggers.raw_outputs import RawActivationsCollector
from distiller.data_loggers.stats_collector import QuantStatsCollector
from distiller.errors import DistillerError, UnknownNameError, UsageError

IMAGES = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(1))
SHARED = "act"


class Net(nn.Module):
    """A convolution before a ReLU that is called twice, in place or not, and a linear layer."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(1, 2, 3)
        self.act = nn.ReLU(inplace)
        self.identity = nn.Identity()
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x)).flatten(1)
        return self.act(self.identity(self.fc(x)))


def two_passes(collector: Any, feed: Callable[[], None]) -> None:
    feed()
    collector.start_second_pass()
    feed()
    collector.stop_second_pass()


def one_pass(collector: Any, feed: Callable[[], None]) -> None:
    feed()


def read_summary(path: Path) -> dict[str, float]:
    header, row = csv.reader(path.read_text().splitlines())
    return dict(zip(header, map(float, row), strict=True))


def read_records(path: Path) -> dict[str, dict[str, list[Any]]]:
    value: dict[str, dict[str, list[Any]]] = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        of_layer = value.setdefault(row.pop("layer"), {name: [] for name in row if name != "layer"})
        for name, cell in row.items():
            of_layer[name].append(cell if name == "shape" else float(cell))
    return value


def read_outputs(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.pt"))
    return {file.stem.partition("-")[2]: torch.load(file, weights_only=True) for file in files}


def histograms(model: nn.Module) -> ActivationHistogramsCollector:
    stats = collect_quant_stats(Net().eval(), lambda model: feed(model)())
    return ActivationHistogramsCollector(model, stats, nbins=8)


def as_plain(value: Any) -> Any:
    """Nested data with lists in the place of tensors, and text in that of keys that are shapes."""
    if isinstance(value, Tensor):
        return value.flatten().tolist()
    return {str(key): as_plain(item) for key, item in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Row:
    """How a collector is made, fed within `with collector:`, and held to what the modules put out.

    `told` takes a number out of the value of a module; `true` finds the same of all its outputs. `read` is
    what a file of the collector's says its value is.
    """

    make: Callable[[nn.Module], Any]
    feed: Callable[..., None]
    told: Callable[[Any], float]
    true: Callable[[list[Tensor]], float]
    read: Callable[[Path], Any]


COLLECTORS: dict[type[Any], Row] = {
    QuantCalibrationStatsCollector: Row(
        QuantCalibrationStatsCollector,
        two_passes,
        told=lambda value: value["output"]["total_numel"],
        true=lambda outputs: sum(output.numel() for output in outputs),
        read=lambda path: yaml.safe_load(path.read_text()),
    ),
    SummaryActivationStatsCollector: Row(
        lambda model: SummaryActivationStatsCollector(model, "sparsity_ofm", percent_of_zeros, classes=None),
        one_pass,
        told=lambda value: value,
        true=lambda outputs: 100 * np.mean(torch.cat([output.flatten() for output in outputs]).numpy() == 0),
        read=read_summary,
    ),
    RecordsActivationStatsCollector: Row(
        lambda model: RecordsActivationStatsCollector(model, classes=None),
        one_pass,
        told=lambda value: sum(value["l2"]),
        true=lambda outputs: sum(
            np.linalg.norm(sample) for output in outputs for sample in output.flatten(1)
        ),
        read=read_records,
    ),
    OnePassQuantStatsCollector: Row(
        OnePassQuantStatsCollector,
        one_pass,
        told=lambda value: value["output"]["total_numel"],
        true=lambda outputs: sum(output.numel() for output in outputs),
        read=lambda path: yaml.safe_load(path.read_text()),
    ),
    ActivationHistogramsCollector: Row(
        histograms,
        one_pass,
        told=lambda value: sum(value["output"]["hist"]),
        true=lambda outputs: sum(output.numel() for output in outputs),
        read=lambda path: torch.load(path, weights_only=True),
    ),
    RawActivationsCollector: Row(
        RawActivationsCollector,
        one_pass,
        told=lambda value: sum(map(sum, value.values() if isinstance(value, dict) else [value])),
        true=lambda outputs: sum(float(output.sum()) for output in outputs),
        read=read_outputs,
    ),
}
ABSTRACT = {QuantStatsCollector}


def collector_classes() -> set[type[ActivationCollector]]:
    """Every class of the package that can be used as a collector."""
    for module in pkgutil.iter_modules(data_loggers.__path__):
        importlib.import_module(f"{data_loggers.__name__}.{module.name}")
    found, waiting = set(), [ActivationCollector]
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        waiting += subclasses
        found |= {cls for cls in subclasses if cls.__module__.startswith("distiller.")}
    return found


def test_every_collector_has_a_row_here() -> None:
    assert set(COLLECTORS) == collector_classes() - ABSTRACT


@pytest.fixture(params=sorted(COLLECTORS, key=str))
def kind(request) -> Any:
    return request.param


@pytest.fixture
def model() -> nn.Module:
    return Net().eval()


def feed(model: nn.Module, batch_size: int = 4) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            for batch in IMAGES.split(batch_size):
                model(batch.clone())

    return run


def collected(kind: Any, model: nn.Module, batch_size: int = 4) -> Any:
    """A collector of this kind that has seen all images and is detached."""
    collector = COLLECTORS[kind].make(model)
    with collector:
        COLLECTORS[kind].feed(collector, feed(model, batch_size))
    return collector


def hooks(model: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in model.modules() for name in kinds for hook in getattr(module, name).values()]


def numbers(value: Any, place: str = "") -> dict[str, float]:
    """The numbers in nested data by their places, lists in order of size; without shapes, which are text."""
    if isinstance(value, list):
        value = dict(enumerate(sorted(value)))
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in numbers(item, f"{place}.{key}").items()}
    return {} if isinstance(value, str) else {place: value}


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_it_keeps_the_interface(kind, model) -> None:
    assert isinstance(COLLECTORS[kind].make(model), interfaces.Collector)


def test_detached_it_leaves_no_hooks_and_the_model_as_it_was(kind, model) -> None:
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    collected(kind, model)
    assert hooks(model) == []
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_an_error_in_the_block_detaches_it(kind, model) -> None:
    collector = COLLECTORS[kind].make(model)
    for context in (collector, collector_context(collector)):
        with pytest.raises(RuntimeError), context:
            assert hooks(model) != []
            model(torch.zeros(1, 3, 6, 6))
        assert hooks(model) == []


def test_a_name_that_matches_nothing_attaches_nothing(kind, model) -> None:
    with pytest.raises(UnknownNameError), collector_context(COLLECTORS[kind].make(model), ["cnov"]):
        pass
    assert hooks(model) == []


def test_it_is_attached_once_at_a_time(kind, model) -> None:
    collector = COLLECTORS[kind].make(model)
    with collector:
        attached = len(hooks(model))
        with pytest.raises(UsageError):
            collector.start()
        assert len(hooks(model)) == attached
    assert hooks(model) == []


def test_what_it_saw_stays_until_it_is_reset_and_it_works_again_then(kind, model) -> None:
    collector = collected(kind, model)
    first = as_plain(collector.value())
    feed(model)()  # detached: not seen
    assert as_plain(collector.value()) == first
    collector.reset()
    assert collector.value() == {}
    with collector:
        COLLECTORS[kind].feed(collector, feed(model))
    assert as_plain(collector.value()) == first


def test_the_model_computes_the_same_while_it_is_attached(kind, model) -> None:
    with torch.no_grad():
        expected = model(IMAGES)
        with COLLECTORS[kind].make(model):
            assert torch.equal(model(IMAGES), expected)


def test_training_goes_on_as_without_it_bit_for_bit(kind) -> None:
    def trained(is_attached: bool) -> list[Tensor]:
        model = Net(inplace=True).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        collector = COLLECTORS[kind].make(model) if is_attached else nullcontext()
        torch.manual_seed(7)
        with collector:
            for batch in IMAGES.split(4):
                loss = model(nn.functional.dropout(batch, 0.2)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return [*model.state_dict().values(), torch.get_rng_state()]

    pairs = zip(trained(is_attached=True), trained(is_attached=False), strict=True)
    assert all(torch.equal(with_it, without) for with_it, without in pairs)


def test_its_value_is_plain_data_by_canonical_name(kind, model) -> None:
    value = as_plain(collected(kind, nn.DataParallel(model, device_ids=[])).value())
    assert set(value) == {"conv", "act", "fc"}
    assert json.loads(json.dumps(value))
    assert yaml.safe_load(yaml.safe_dump(value)) == value


def test_its_numbers_do_not_depend_on_how_the_data_are_cut_into_batches(kind, model) -> None:
    whole = numbers(as_plain(collected(kind, model, batch_size=len(IMAGES)).value()))
    for batch_size in (1, 5):
        assert numbers(as_plain(collected(kind, model, batch_size).value())) == pytest.approx(
            whole, rel=1e-5, abs=1e-6
        )


def test_an_operation_in_place_changes_none_of_its_numbers(kind, model) -> None:
    inplace = Net(inplace=True).eval()
    collector = collected(kind, inplace)
    assert as_plain(collector.value()) == as_plain(collected(kind, model).value())
    assert inplace.act.inplace is True


def test_a_module_that_is_called_twice_is_one_that_saw_all_of_it(kind, model) -> None:
    outputs: dict[str, list[Tensor]] = {name: [] for name in ("conv", SHARED, "fc")}
    for name, seen in outputs.items():
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, seen=seen: seen.append(output)  # pyright: ignore
        )
    feed(model)()
    row, value = COLLECTORS[kind], as_plain(collected(kind, Net().eval()).value())
    assert len(outputs[SHARED]) == len(outputs["conv"]) + len(outputs["fc"])
    assert {name: row.told(value[name]) for name in outputs} == pytest.approx(
        {name: row.true(seen) for name, seen in outputs.items()}
    )


def test_it_saves_what_its_value_is(kind, model, tmp_path) -> None:
    collector = collected(kind, model)
    path = collector.save(tmp_path / "collected")
    assert list(tmp_path.iterdir()) == [path]
    assert as_plain(COLLECTORS[kind].read(path)) == as_plain(collector.value())


def test_a_save_that_fails_leaves_the_old_file_whole_and_nothing_else(
    kind, model, tmp_path, monkeypatch
) -> None:
    path = collected(kind, model).save(tmp_path / "collected")
    before = contents(tmp_path)

    def fails(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for target, name in ((atomic_file.os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fails)
            with pytest.raises(DistillerError, match="cannot be written, No space left on device"):
                collected(kind, model, batch_size=3).save(path)
        assert contents(tmp_path) == before


def test_a_folder_that_is_not_there_is_told(kind, model, tmp_path) -> None:
    with pytest.raises(DistillerError, match="cannot be written, No such file or directory"):
        collected(kind, model).save(tmp_path / "nowhere" / "collected")
