"""The program's job `--greedy`: greedy filter pruning with fine-tuning, and files for each iteration.

    greedy.csv                                        a line for each iteration
    greedy__<iteration>__<% of MACs>__<top1>_checkpoint.pth.tar    its network, with masks

Knows nothing about how a candidate is chosen.
"""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.measurement import Measurement
from distiller.apputils.results_card import ResultsCard
from distiller.apputils.run_seed import split_extras
from distiller.apputils.stored_exits import joint_loss
from distiller.apputils.training_loop import Batches, evaluate, train_epoch
from distiller.atomic_file import write_whole
from distiller.channel_groups import ChannelGroups, find_channel_groups
from distiller.errors import UsageError
from distiller.greedy import GreedyIteration, greedy_candidates, greedy_filter_pruning, unit_densities
from distiller.names import named_parameters, unwrap
from distiller.pruning.channel_units import unit_masks
from distiller.scheduler import CompressionScheduler

_LOG = logging.getLogger(__name__)
CSV_NAME = "greedy.csv"
_COLUMNS = ("iteration", "top1", "param_name", "normalized_macs", "total_macs", "densities")


def prune_greedily(compressor: ClassifierCompressor) -> ResultsCard:
    """Prune group by group to `--greedy-target-density`, then test.

    Candidates are compared on the validation set. Fine-tuning trains for `--greedy-ft-epochs` on the
    training set, of which `linear-grow` takes the share that the MACs have been pruned by.
    (Distiller never read `--greedy-ft-epochs`.)
    """
    args = compressor.args
    state = _interrupted(compressor)
    images = torch.zeros(1, *compressor.input_shape, device=compressor.device)
    model = unwrap(compressor.model)
    groups = find_channel_groups(model, images, "--greedy")
    candidates = greedy_candidates(model, groups)
    if compressor.data.valid_is_test:
        _LOG.warning("no validation set (--validation-split 0): candidates are compared on the test set")
    folder = compressor.run.require_folder()
    reference, dense = _reference(compressor)
    rows: list[dict[str, Any]] = list(state["rows"])
    removed: dict[str, list[int]] = {name: list(units) for name, units in state["removed"].items()}
    _LOG.info(
        "%d groups of filters to choose from; %d of %d MACs",
        len(candidates),
        groups.macs(removed),
        groups.macs(),
    )
    scheduler = CompressionScheduler(model, unit_masks(dict(named_parameters(model)), groups, removed))
    for best in greedy_filter_pruning(
        model,
        groups,
        args.greedy_target_density,
        _FineTuning(compressor),
        _Evaluation(compressor),
        args.greedy_pruning_step,
        removed,
        len(rows),
    ):
        densities = {
            name: round(density, 4) for name, density in unit_densities(candidates, best.removed).items()
        }
        rows.append(
            dict(zip(_COLUMNS, (best.iteration, best.top1, best.group, 100 * best.density, best.macs,
                                json.dumps(densities)), strict=True))
        )  # fmt: skip
        path = _save(compressor, best, rows, reference, folder)
        write_whole(folder / CSV_NAME, _csv(rows))
        _LOG.info(
            "greedy iteration %d: %s pruned to %d of %d units, %.1f %% of the MACs left, "
            "Top1 %.3f  Top5 %.3f  Loss %.3f; saved %s",
            best.iteration, best.group, groups[best.group].size - len(best.removed[best.group]),
            groups[best.group].size, 100 * best.density, best.top1, best.top5, best.loss, path,
        )  # fmt: skip
        scheduler, removed = best.scheduler, best.removed
    _tell_end(args.greedy_target_density, groups, removed)
    with scheduler.masked():
        model.load_state_dict(unwrap(scheduler.model).state_dict())
    _LOG.info("--- test ---------------------")
    return compressor.card(compressor.test(), reference, dense)


def latest_greedy_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last iteration that is in a run folder."""
    return max(folder.glob("greedy__*_checkpoint.pth.tar"), default=None)


class _FineTuning:
    """Trains a candidate: a new optimizer, the same images in the same order for all of an iteration."""

    def __init__(self, compressor: ClassifierCompressor) -> None:
        self._compressor = compressor
        self._criterion = joint_loss(compressor.model, compressor.args.earlyexit_lossweights)

    def __call__(
        self, model: nn.Module, scheduler: CompressionScheduler, iteration: int, density: float
    ) -> None:
        compressor, args = self._compressor, self._compressor.args
        assert compressor.data.train is not None
        share = 1.0 if args.greedy_finetuning_policy == "constant" else 1 - density
        if share == 0:
            return
        torch.manual_seed(compressor.seed + iteration)  # dropout, too, is the same for all candidates
        optimizer = compressor.make_optimizer(model)
        for epoch in range(iteration * args.greedy_ft_epochs, (iteration + 1) * args.greedy_ft_epochs):
            train_epoch(
                model,
                _Share(compressor.data.train, share),
                optimizer,
                scheduler,
                epoch,
                criterion=self._criterion,
                device=compressor.device,
                check_every=args.print_freq,
            )


class _Evaluation:
    """Scores a candidate on the validation set."""

    def __init__(self, compressor: ClassifierCompressor) -> None:
        self._compressor = compressor

    def __call__(self, model: nn.Module) -> tuple[float, float, float]:
        valid = self._compressor.data.valid
        assert valid is not None
        result = evaluate(model, valid, device=self._compressor.device)
        _LOG.debug("candidate: Top1 %.3f  Top5 %.3f  Loss %.3f", result.top1, result.top5, result.loss)
        return result.top1, result.top5, result.loss


class _Share:
    """The first mini-batches of each epoch of a loader, as many as a share of them."""

    def __init__(self, loader: Batches, share: float) -> None:
        self._loader = loader
        self._count = math.ceil(share * len(loader))

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._loader, self._count)

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        self._loader.set_epoch(epoch)


def _interrupted(compressor: ClassifierCompressor) -> dict[str, Any]:
    """What the checkpoint of a greedy pruning knows of it; of none, a beginning."""
    path = compressor.args.resumed_checkpoint_path
    if not path:
        return {"rows": [], "removed": {}}
    assert compressor.checkpoint is not None
    state = compressor.checkpoint.extras.get("greedy")
    if not isinstance(state, dict) or not {"rows", "removed"} <= state.keys():
        raise UsageError(
            f"--resume-from {path}: is not of a greedy pruning; to begin one with its weights give "
            "--exp-load-weights-from"
        )
    return state


def _reference(compressor: ClassifierCompressor) -> tuple[Measurement, nn.Module | None]:
    """The uncompressed model's figures, with the model where it is the one that is at hand."""
    known = compressor.known_reference()
    if known is not None:
        return known, None
    if compressor.is_smaller:
        figures, whole = compressor.whole(None)
        return compressor.with_latencies((figures, whole))[0], whole
    _LOG.info("--- test of the model to start from ---------------------")
    dense = copy.deepcopy(compressor.model)
    figures = compressor.measure(dense, compressor.test(dense))
    return compressor.with_latencies((figures, dense))[0], dense


def _save(
    compressor: ClassifierCompressor,
    best: GreedyIteration,
    rows: list[dict[str, Any]],
    reference: Measurement,
    folder: Path,
) -> Path:
    extras = {
        **split_extras(compressor.args, compressor.seed),
        "reference": asdict(reference),
        "greedy": {"rows": rows, "removed": best.removed},
    }
    name = f"greedy__{best.iteration:03d}__{100 * best.density:.1f}__{best.top1:.1f}"
    with best.scheduler.masked():
        return save_checkpoint(
            best.iteration,
            compressor.args.arch,
            best.model,
            None,
            best.scheduler,
            extras,
            name=name,
            dir=folder,
        )


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([row[column] for column in _COLUMNS] for row in rows)
    return text.getvalue()


def _tell_end(target: float, groups: ChannelGroups, removed: dict[str, list[int]]) -> None:
    """How much is left, and what that means: the filters are zero, and still there."""
    macs, dense = groups.macs(removed), groups.macs()
    if macs > target * dense:
        _LOG.warning(
            "--greedy-target-density %g: not reached, each group that can be pruned has one unit left", target
        )
    _LOG.info(
        "without its pruned filters the network has %d MACs, %.1f %% of %d; they are masked, "
        "and go with --thinnify", macs, 100 * macs / dense, dense,
    )  # fmt: skip
