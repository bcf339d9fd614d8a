"""Distiller's own schedules, where they are at hand: what is in them, and which model each one is for.

They lie beside the project and are never copied into it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from distiller.models import RNNModel, create_model, input_shape_for

FOLDER = (Path(__file__).resolve().parents[2] / "../shared/compat/schedules").resolve()
SECTION_OF = {
    "pruner": "pruners",
    "regularizer": "regularizers",
    "quantizer": "quantizers",
    "lr_scheduler": "lr_schedulers",
    "extension": "extensions",
}
VOCABULARY = 33_278
"""Words of WikiText-2, on which the schedules of the language model are."""

# A row of the table of weights that Distiller logs: | 0 | module.x.weight | (16, 3, 3, 3) | 432 | 400 |
_ROW = re.compile(r"^# +\|\s*[\d.]+ \| +(\S+) +\| \(([\d, ]+)\) *\| +(\d+) \| +(\d+) ", re.MULTILINE)
_COMMAND = re.compile(r"^#.*\b(compress_classifier|main)\.py +(-.*)$", re.MULTILINE)
_ARCH = re.compile(r"(?:^| )(?:-a|--arch)[= ]+(\S+)")
_LONG_OPTION = re.compile(r"--[\w-]+=\S+")


def schedule_files() -> list[Path]:
    """Every schedule, in the order of names; none where the folder is absent."""
    return sorted(FOLDER.rglob("*.yaml"))


@dataclass(frozen=True)
class DistillerSchedule:
    """One of their files.

    Attributes:
        path: where it is.
    """

    path: Path

    def __str__(self) -> str:
        return self.path.relative_to(FOLDER).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def data(self) -> dict[str, Any]:
        """The file as PyYAML reads it: of a key given twice the last one."""
        return yaml.safe_load(self.text)

    @property
    def arch(self) -> str:
        """The architecture in the first command of the header; 'word_language_model' for that program."""
        program, arguments = self._command
        if program == "main":
            return "word_language_model"
        found = _ARCH.search(arguments)
        assert found is not None, f"{self.path.name}: no -a or --arch in the command of the header"
        return found[1]

    @property
    def dataset(self) -> str:
        """The data set in the first command of the header."""
        program, arguments = self._command
        if program == "main":
            return "wikitext2"
        rest = _LONG_OPTION.sub("", _ARCH.sub("", arguments))
        found = re.search("imagenet|cifar", rest, re.IGNORECASE)
        assert found is not None, f"{self.path.name}: no data set in the command of the header"
        return {"imagenet": "imagenet", "cifar": "cifar10"}[found[0].lower()]

    def header_table(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """(shape, non-zeros) of each weight at the end of Distiller's own run, where the header has them."""
        return {
            bare(name): (tuple(int(size) for size in shape.split(",")), int(sparse))
            for name, shape, _, sparse in _ROW.findall(self.text)
        }

    def true_model(self) -> nn.Module:
        """The model of the command in its true size, on the meta device: names and shapes, no data."""
        with torch.device("meta"):
            return self._language_model() if self.arch == "word_language_model" else self._image_model()

    def task(self, is_true_size: bool = False) -> Task:
        """The model of the command with random weights, and random data of the smallest shape it takes.

        Unless of true size, wide linear layers are narrowed, and the language model is small.
        """
        if self.arch == "word_language_model":
            return _language_task(self._language_model() if is_true_size else self._language_model(50, 60))
        model = self._image_model()
        if not is_true_size:
            _narrow_classifier(model)
        return _image_task(model)

    @property
    def _command(self) -> tuple[str, str]:
        found = _COMMAND.search(self.text)
        assert found is not None, f"{self.path.name}: no command in the header"
        return found[1], found[2]

    def _image_model(self) -> nn.Module:
        size = next(size for size in (32, 64, 224) if input_shape_for(self.arch, 3, size)[1] == size)
        return create_model(
            False, self.dataset, self.arch, parallel=False, num_classes=None, input_shape=(1, 3, size, size)
        )

    def _language_model(self, words: int = VOCABULARY, size: int | None = None) -> RNNModel:
        arguments = self._command[1]
        emsize, nhid = (int(re.search(rf"--{flag} (\d+)", arguments)[1]) for flag in ("emsize", "nhid"))  # type: ignore[index]
        return RNNModel(words, size or emsize, size or nhid, dropout=0.65, tied="--tied" in arguments)


@dataclass(frozen=True)
class Task:
    """A model, and a mini-batch to train it on.

    Attributes:
        model: on the CPU.
        inputs: what the model is called with.
        targets: class indices, of as many as the model's outputs have rows.
    """

    model: nn.Module
    inputs: Sequence[Any]
    targets: Tensor

    def loss(self) -> Tensor:
        outputs = self.model(*self.inputs)
        logits = outputs[0].flatten(0, 1) if isinstance(outputs, tuple) else outputs
        return nn.functional.cross_entropy(logits, self.targets)


def bare(name: str) -> str:
    """A parameter's name without what DataParallel put into it."""
    return name.replace("module.", "")


def components(data: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """The class of each component of a schedule, by (section, name)."""
    return {
        (section, name): component["class"]
        for section in SECTION_OF.values()
        for name, component in (data.get(section) or {}).items()
    }


def _image_task(model: nn.Module) -> Task:
    images = torch.randn(2, *model.input_shape[1:])  # type: ignore[index]
    return Task(model, (images,), torch.tensor([0, 1]))


def _language_task(model: RNNModel) -> Task:
    words = torch.tensor([[1, 2], [3, 4], [5, 6]])  # (steps, batch)
    return Task(model, (words, model.init_hidden(2)), torch.tensor([3, 4, 5, 6, 7, 8]))


def _narrow_classifier(model: nn.Module, width: int = 64) -> None:
    """The hidden layers of AlexNet's classifier hold 54 million weights; names stay, the widths shrink."""
    classifier = getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Sequential):
        return
    linear = [layer for layer in classifier if isinstance(layer, nn.Linear)]
    for index, layer in enumerate(classifier):
        if isinstance(layer, nn.Linear):
            inputs = layer.in_features if layer is linear[0] else width
            outputs = layer.out_features if layer is linear[-1] else width
            classifier[index] = nn.Linear(inputs, outputs, bias=layer.bias is not None)
        elif isinstance(layer, nn.BatchNorm1d):
            classifier[index] = nn.BatchNorm1d(width)
