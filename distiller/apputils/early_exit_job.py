"""The last test with early exits: thresholds given or chosen, images leave, and what that gained is measured.

    early_exit_curve.csv  early_exit_curve.png    when thresholds are chosen

Knows nothing about training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from distiller.apputils.early_exit_report import EarlyExitReport
from distiller.apputils.early_exit_usage import leaves_early
from distiller.apputils.exit_scores import evaluate_exits
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.results_card import ResultsCard
from distiller.branch_points import exit_names, exits_of
from distiller.early_exit.calibration import curve, exit_table, thresholds_for_drop, thresholds_for_shares
from distiller.early_exit.curve_files import save_curve_csv, save_curve_png
from distiller.early_exit.executed_macs import ExitCosts, ImageCounter, exit_costs
from distiller.early_exit.rules import ExitRule
from distiller.early_exit.session import early_exits
from distiller.export.latency import Latency
from distiller.names import unwrap

_LOG = logging.getLogger(__name__)
_TIMED_BATCHES = 4
_TIMED_SINGLES = 32
_TIMED_SECONDS = 1.0
_TIMED_ROUNDS = 50


def with_early_exit(compressor: ClassifierCompressor, card: ResultsCard) -> ResultsCard:
    """The card, with the figures of a test with early exits if the flags ask for one.

    Args:
        compressor: its model as it is tested: masks applied.
        card: of the model without exits.
    """
    if not leaves_early(compressor.args):
        return card
    model = unwrap(compressor.model)
    image = torch.zeros(1, *compressor.input_shape, device=compressor.device)
    costs = exit_costs(model, image)
    rule, chosen_on = _rule(compressor, model, costs)
    _LOG.info("--- test with early exits ---------------------")
    counter = ImageCounter(model, image)
    left, left_correct = _test(compressor, model, rule, counter)
    results = evaluate_exits(model, compressor.data.test, device=compressor.device)
    report = EarlyExitReport(
        rule=rule,
        layers=exit_names(model),
        chosen_on=chosen_on,
        left=left,
        left_correct=left_correct,
        all_correct=tuple(result.top1_correct for result in results),
        mean_macs=counter.macs / sum(left),
        whole_macs=costs.trunk[-1],
        latencies=_latencies(compressor, model, rule),
    )
    return replace(card, early_exit=report)


def _rule(compressor: ClassifierCompressor, model: nn.Module, costs: ExitCosts) -> tuple[ExitRule, str]:
    """The rule that was given, or one that is chosen on validation data, with how that was done."""
    args = compressor.args
    if args.earlyexit_thresholds is not None:
        return ExitRule(args.earlyexit_criterion, tuple(args.earlyexit_thresholds)), ""
    loader = compressor.data.valid
    assert loader is not None
    chosen_from = "test images" if compressor.data.valid_is_test else "validation images"
    if compressor.data.valid_is_test:
        _LOG.warning("no validation set (--validation-split 0): thresholds are chosen on the test set")
    table = exit_table(model, loader, args.earlyexit_criterion, costs, compressor.device)
    if args.earlyexit_max_drop is not None:
        chosen = thresholds_for_drop(table, args.earlyexit_max_drop)
        wanted = f"for a drop of at most {args.earlyexit_max_drop:g} points"
    else:
        chosen = thresholds_for_shares(table, args.earlyexit_shares)
        wanted = f"for shares of {' '.join(f'{share:g}' for share in args.earlyexit_shares)}"
    folder, trades = compressor.run.require_folder(), curve(table)
    files = (
        save_curve_csv(trades, chosen, folder / "early_exit_curve.csv"),
        save_curve_png(trades, chosen, costs.trunk[-1], folder / "early_exit_curve.png"),
    )
    _LOG.info("Saved %s and %s", *files)
    chosen_on = (
        f"{wanted}, on {loader.num_samples} {chosen_from}: top-1 {chosen.top1:.2f} % (final output "
        f"{table.top1[-1]:.2f} %) with {100 * chosen.mean_macs / costs.trunk[-1]:.1f} % of the MACs"
    )
    _LOG.info("--earlyexit-criterion %s --earlyexit-thresholds %s: chosen %s",
              args.earlyexit_criterion, chosen.rule.text(), chosen_on)  # fmt: skip
    return chosen.rule, chosen_on


def _test(
    compressor: ClassifierCompressor, model: nn.Module, rule: ExitRule, counter: ImageCounter
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many of the test images left at each exit, and how many of these were answered rightly."""
    ends = len(exits_of(model)) + 1
    left, right = (torch.zeros(ends, dtype=torch.long, device=compressor.device) for _ in range(2))
    with torch.inference_mode(), early_exits(model, rule) as answer, counter.counting():
        for images, labels in compressor.data.test:
            images, labels = images.to(compressor.device), labels.to(compressor.device)
            logits, exits = answer(images)
            left += torch.bincount(exits, minlength=ends)
            right += torch.bincount(exits[logits.argmax(-1) == labels], minlength=ends)
    return tuple(left.tolist()), tuple(right.tolist())


def _latencies(
    compressor: ClassifierCompressor, model: nn.Module, rule: ExitRule
) -> tuple[tuple[Latency, Latency], ...]:
    """Of single test images, and of mini-batches: the whole network, and with early exits, in turns."""
    batches = [images for images, _ in islice(compressor.data.test, _TIMED_BATCHES)]
    batches = [images.to(compressor.device) for images in batches if len(images) == len(batches[0])]
    pooled = torch.cat(batches)
    at = torch.linspace(0, len(pooled) - 1, min(len(pooled), _TIMED_SINGLES)).long()
    singles = [pooled[index : index + 1] for index in at.tolist()]
    with torch.inference_mode(), early_exits(model, rule) as answer:
        return tuple(_timed((model, answer), images, str(compressor.device)) for images in (singles, batches))


def _timed(
    jobs: tuple[Callable[[Tensor], object], Callable[[Tensor], object]],
    batches: Sequence[Tensor],
    device: str,
) -> tuple[Latency, Latency]:
    """Both jobs on each batch in turns; the figures are of the mean over the batches."""
    rounds: list[list[float]] = []
    end = time.perf_counter() + _TIMED_SECONDS
    for count in range(_TIMED_ROUNDS + 1):
        seconds = [0.0, 0.0]
        for images in batches:
            for index, job in enumerate(jobs):
                begin = time.perf_counter()
                job(images)
                _wait_for(device)
                seconds[index] += time.perf_counter() - begin
        if count > 0:  # the first one warms up
            rounds.append([total / len(batches) for total in seconds])
            if time.perf_counter() > end:
                break
    whole, early = (_latency(column, len(batches[0]), device) for column in np.array(rounds).T)
    return whole, early


def _latency(seconds: np.ndarray, batch_size: int, device: str) -> Latency:
    p10, median, p90 = np.percentile(seconds, (10, 50, 90)).tolist()
    return Latency(median, p10, p90, len(seconds), batch_size, torch.get_num_threads(), device)


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
