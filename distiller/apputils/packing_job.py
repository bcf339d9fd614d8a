"""The program's packed files: `--pack` of a checkpoint, or of what another job ended with, and `--unpack`.

Knows nothing about the format of the file.
"""

from __future__ import annotations

import logging
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distiller.apputils.checkpoint import write_document
from distiller.apputils.checkpoint_format import document_of
from distiller.apputils.given_flags import given_flags
from distiller.apputils.image_classifier import ClassifierCompressor, Run
from distiller.apputils.inference_state import inference_state
from distiller.apputils.onnx_path import path_outside
from distiller.apputils.packed_checkpoint import contents_of, pack_contents, read_packed_checkpoint
from distiller.apputils.results_card import ResultsCard
from distiller.apputils.run_seed import SPLIT_EXTRAS
from distiller.errors import UsageError
from distiller.packing import PackReport

__all__ = ["check_pack", "pack_checkpoint", "unpack_checkpoint", "with_packed"]

_LOG = logging.getLogger(__name__)
_ENDING = ".dsz"
_KEPT_EXTRAS = (
    *SPLIT_EXTRAS,
    "reference",
    "before_quantization",
    "best_top1",
    "quantized_top1",
    "is_untrained",
)


def check_pack(compressor: ClassifierCompressor) -> None:
    """Refuse a file that `--pack` cannot write, before anything that takes long.

    Raises:
        UsageError: it is a folder, or its folder is not there or cannot be written.
    """
    given = compressor.args.pack
    outside = path_outside("--pack", given) if given else None
    if outside is None:
        return
    try:
        with tempfile.TemporaryFile(dir=outside.parent):
            return
    except OSError as error:
        raise UsageError(
            f"--pack {given}: cannot be written, {error.strerror or error}; give a file in a folder that can"
        ) from error


def pack_checkpoint(compressor: ClassifierCompressor) -> None:
    """Pack the model of a checkpoint as it is."""
    checkpoint = compressor.checkpoint
    assert checkpoint is not None
    _pack(compressor, checkpoint.epoch or 0, checkpoint.extras)


def with_packed(compressor: ClassifierCompressor, card: ResultsCard, epoch: int | None = None) -> ResultsCard:
    """Pack the model that a results card is of.

    Args:
        compressor: whose model has its masked weights zero.
        card: of the model.
        epoch: the last that was finished; default the checkpoint's.

    Returns:
        The card with what the packed file takes.
    """
    checkpoint = compressor.checkpoint
    extras: dict[str, Any] = {} if checkpoint is None else dict(checkpoint.extras)
    if epoch is not None:
        extras = {"seed": compressor.seed}
    extras["reference"] = None if card.reference is None else asdict(card.reference)
    extras["before_quantization"] = None if card.before is None else asdict(card.before)
    if epoch is None:
        epoch = 0 if checkpoint is None else checkpoint.epoch or 0
    return replace(card, packed=_pack(compressor, epoch, extras))


def unpack_checkpoint(args: Namespace, open_run: Callable[[], Run]) -> Path:
    """Write the checkpoint that a packed file holds into the run folder: `<its name>_checkpoint.pth.tar`.

    Raises:
        CheckpointError: it is no packed file of a checkpoint, damaged, or the checkpoint cannot be written.
    """
    checkpoint = read_packed_checkpoint(args.unpack)
    if "arch" in given_flags(args) and args.arch != checkpoint.arch:
        raise UsageError(f"--arch {args.arch}: {args.unpack} is of '{checkpoint.arch}'; leave the flag out")
    document = contents_of(checkpoint)
    path = open_run().require_folder() / f"{Path(args.unpack).name.removesuffix(_ENDING)}_checkpoint.pth.tar"
    write_document(document, path)
    _LOG.info("Unpacked %s (%d tensors) to: %s", args.unpack, len(checkpoint.state_dict), path)
    return path


def _untimed(value: Any) -> Any:
    """Figures without latencies, so that the same network gives the same file."""
    if not isinstance(value, Mapping):
        return value
    return {key: None if key.startswith("latency_") else figure for key, figure in value.items()}


def _pack(compressor: ClassifierCompressor, epoch: int, extras: Mapping[str, Any]) -> PackReport:
    args = compressor.args
    state = inference_state(compressor.model)
    kept = {key: _untimed(extras[key]) for key in _KEPT_EXTRAS if extras.get(key) is not None}
    contents = document_of(epoch, args.arch, compressor.model, extras=kept)
    contents["quantizer"] = state.quantizer
    path = path_outside("--pack", args.pack) or compressor.run.require_folder() / args.pack
    whole, _ = compressor.whole(None)
    report = pack_contents(contents, path, state.tensors, original_bytes=whole.bytes_dense)
    for note in state.notes:
        _LOG.info("%s", note)
    _LOG.info("--- packed ---------------------\n%s", report.to_text())
    _LOG.info("Saved packed model to: %s", path)
    return report
