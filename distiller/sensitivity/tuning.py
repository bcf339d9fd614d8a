"""How blocks of images are run, and what of a network can be run in part at all.

The same for the same network and images: results depend on it in the last digits of the loss. Whether
bfloat16 is faster, where it is allowed, is measured.
Knows nothing about data sets, files or processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from distiller.errors import GraphTraceError
from distiller.evaluation_mode import answer
from distiller.replay import Program, applied, read_program
from distiller.replay.program import unbatched
from distiller.sensitivity.block_engine import EngineSettings, allowed_difference, must_be_bitwise
from distiller.sensitivity.decisions import relative_difference
from distiller.sensitivity.lane import Lane
from distiller.sensitivity.units import Unit

_CHUNK_BYTES = 2**23
"""Of the largest result for a chunk: about what stays in a cache."""
_GOOD_CHUNK, _LARGEST_CHUNK_BYTES = 64, 2**25
"""With fewer images than this laying out the weights takes its time: larger results are taken for it."""
_SMALLEST_CHUNK = 16
_CHECKED_IMAGES = 16
_FIXED_CHUNK = 64
"""Of networks that take no other number of images than they are traced with."""


def traced_program(model: nn.Module, images: Tensor) -> tuple[Program | None, str]:
    """The program of a model, or None and why there is none.

    Args:
        model: the model.
        images: a block, (batch, ...).
    """
    example = images[
        torch.arange(3, device=images.device) % len(images)
    ]  # three: no size of a layer by chance
    try:
        program = read_program(model, example)
        return (program if program.batch is None else read_program(model, images[:_FIXED_CHUNK])), ""
    except GraphTraceError as error:
        return None, str(error)


@torch.inference_mode()
def choose_settings(
    model: nn.Module, program: Program, units: Sequence[Unit], images: Tensor, *, fast: bool = False
) -> EngineSettings:
    """Chunk, memory layout and type, and the units that are run as a whole.

    Args:
        model: in evaluation mode.
        program: of the model, as `traced_program` gives it.
        units: of the sweep.
        images: a block.
        fast: take bfloat16 if it is faster.
    """
    if program.discontinuous:
        return EngineSettings(len(images), whole=_uncuttable(model, program, units, False, images))
    checked = images[: program.batch or _CHECKED_IMAGES]
    expected = answer(model, checked)
    fault = ""
    for channels_last in (True, False) if _has_images(program) else (False,):
        try:
            lane = Lane(model, program, units, (), channels_last)
            difference = relative_difference(lane.dense(checked), expected)
        except RuntimeError as error:  # torch's, of an operation that does not take that layout
            fault = str(error).splitlines()[0]
            continue
        if difference <= allowed_difference(lane):
            if fault := _influence(model, program, channels_last, images):
                break
            chunk = program.batch or _evenly(len(images), _good_chunk(image_bytes(program)))
            settings = EngineSettings(chunk, channels_last)
            if fast and not all(unit.inputs for unit in units):  # those are never run in it
                settings = replace(settings, bfloat16=_is_faster(model, program, settings, images))
            return replace(settings, whole=_uncuttable(model, program, units, channels_last, images))
        # Something unknown in it is not continuous: with sums in another order it is another network.
        fault = f"step by step its logits differ by {difference:.1g} of the largest"
    return EngineSettings(len(images), whole=dict.fromkeys(range(len(units)), fault))


def _influence(model: nn.Module, program: Program, channels_last: bool, images: Tensor) -> str:
    """Whether what a network answers to an image depends on the others of its block; empty where not."""
    lane = Lane(model, program, (), (), channels_last)
    size = min(program.batch or len(images), -(-len(images) // 2))
    try:
        parts = torch.cat([lane.dense(part) for part in images.split(size)])
    except RuntimeError as error:  # torch's, of an operation that does not take so many
        return str(error).splitlines()[0]
    difference = relative_difference(parts, answer(model, images))
    if difference <= allowed_difference(lane):
        return ""
    return (
        f"images of a block influence each other: in parts, logits differ by {difference:.1g} of the largest"
    )


def image_bytes(program: Program) -> int:
    """Of the largest result for one image, in float32."""
    shapes = [step.shape for step in program.steps if not unbatched(step.shape)]
    return 4 * max((math.prod(shape[1:]) for shape in shapes if shape is not None), default=1)


def _good_chunk(bytes_of_image: int) -> int:
    """Images, for the bytes of the largest result for one."""
    in_cache, in_memory = (limit // bytes_of_image for limit in (_CHUNK_BYTES, _LARGEST_CHUNK_BYTES))
    return max(_SMALLEST_CHUNK, in_cache, min(_GOOD_CHUNK, in_memory))


def _evenly(images: int, most: int) -> int:
    """The size of parts of no more than `most`, as few and as equal as can be."""
    return -(-images // -(-images // most))


def _has_images(program: Program) -> bool:
    return any(step.kind == "conv2d" for step in program.steps)


def _is_faster(model: nn.Module, program: Program, settings: EngineSettings, images: Tensor) -> bool:
    """Whether bfloat16 is, and is taken by every operation."""
    seconds = []
    for dtype in (None, torch.bfloat16):
        lane = Lane(model, program, (), (), settings.channels_last, dtype)
        rounds = []
        for _ in range(4):
            begin = time.perf_counter()
            try:
                lane.dense(images[: settings.chunk])
            except RuntimeError:  # torch's, of an operation that does not take that type
                return False
            rounds.append(time.perf_counter() - begin)
        seconds.append(min(rounds))
    return seconds[1] < seconds[0]


def _uncuttable(
    model: nn.Module, program: Program, units: Sequence[Unit], channels_last: bool, images: Tensor
) -> dict[int, str]:
    """Units whose variants, run together, do not give in part what they give as a whole: place -> why."""
    found = {}
    for place in range(len(units)):
        try:
            reason = _why_not_in_part(model, program, units, place, channels_last, images)
        except GraphTraceError as error:
            reason = str(error)
        except RuntimeError as error:  # torch's, of an operation that does not take so many
            reason = str(error).splitlines()[0]
        if reason:
            found[place] = reason
    return found


def _why_not_in_part(
    model: nn.Module,
    program: Program,
    units: Sequence[Unit],
    place: int,
    channels_last: bool,
    images: Tensor,
) -> str:
    """Why a unit cannot be run in part; empty where it can."""
    if must_be_bitwise(program, units[place]):
        lane, checked = Lane(model, program, units, (place,), is_bitwise=True), images
    else:
        lane = Lane(model, program, units, (place,), channels_last)
        checked = images[: program.batch or _CHECKED_IMAGES]
    if not lane.takes(checked):
        return f"values are rounded in it, and it takes {program.batch} images at a time, not {len(checked)}"
    difference = _trial(model, units[place], lane, checked)
    if difference > allowed_difference(lane):
        return f"run in part, its logits differ by {difference:.1g} of the largest"
    return ""


def _trial(model: nn.Module, unit: Unit, lane: Lane, images: Tensor) -> float:
    """How much a unit's logits differ, of the weakest level, the one in the middle and the strongest."""
    last = len(unit.levels) - 1
    made = [unit.make(unit.levels[level]) for level in sorted({0, last // 2, last})]
    variants = [variant for variant in made if variant.tensors or variant.inputs]  # the others are dense
    in_part = [
        logits
        for _, part in lane.run(images, lane.places)
        for logits in part.logits(variants, lambda layer: len(variants))
    ]
    differences = []
    for logits, variant in zip(in_part, variants, strict=True):
        with applied(model, variant):
            differences.append(relative_difference(logits, answer(model, images)))
    return max(differences, default=0.0)
