"""Measure layer-wise compression: the sweep of nn-compress-haiku with its linear layers, on Fashion-MNIST.

    python -m docs.measure_layerwise            # what is missing
    python -m docs.measure_layerwise --again    # the sweeps anew
    python -m docs.measure_layerwise --table    # nothing; only write the page anew

The networks are those of `make results-schedules`, and are trained where they are missing; a sweep that was
interrupted is gone on with. Points and JSON files are kept in docs/results/layerwise, figures in
docs/images/layerwise; the last part of docs/layerwise.md is made of them. The last line says what is missing.
Knows nothing about how layers are compressed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distiller.apputils.intervals import wilson_interval
from distiller.atomic_file import write_whole
from distiller.layerwise import LayerwisePoint, draw_layerwise, read_points, write_source_files
from distiller.layerwise.log import CSV_NAME, SETTINGS_NAME
from docs.dense_networks import dense_checkpoint
from docs.schedule_headers import ROOT

PAGE = ROOT / "docs" / "layerwise.md"
RESULTS = ROOT / "docs" / "results" / "layerwise"
IMAGES = ROOT / "docs" / "images" / "layerwise"
NETWORKS = {
    "haiku_teacher_mnist": "The teacher: linear layers of 4704-3000-2000-2000-1000-10",
    "haiku_student_mnist": "The student: one linear layer, 4704-10",
}
TECHNIQUES = ("prune", "quant", "kmeans", "svd", "svd+prune+quant")
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BITS = (8, 6, 4, 3, 2, 1)
POINTS = len(TECHNIQUES) * len(FRACTIONS) + 2 * len(BITS)
SHOWN = (0.0, 0.5, 0.9)
"""Fractions in the page; the CSV has all."""
_BEGIN = "<!-- measured: written by `python -m docs.measure_layerwise` -->"
_END = "<!-- end of measured -->"


def flags(arch: str, checkpoint: Path) -> list[str]:
    """Of the sweep of a network."""
    return [
        "--arch", arch, "--dataset", "fashion-mnist", "-b", "256", "--seed", "1",
        "--layerwise", ",".join(TECHNIQUES), "--fractions", "0", "0.9", "0.1",
        "--layerwise-bits", *map(str, BITS), "--exp-load-weights-from", str(checkpoint),
    ]  # fmt: skip


def sweep(arch: str, again: bool) -> None:
    """Sweep a network, and keep what was found; a sweep that was interrupted goes on."""
    logs = ROOT / "logs" / "results" / "layerwise" / arch
    left = (logs / "latest_log_dir").resolve()
    resumed = ["--layerwise-resume", str(left)] if (left / SETTINGS_NAME).is_file() and not again else []
    command = [
        sys.executable,
        "compress_classifier.py",
        *flags(arch, dense_checkpoint(arch)),
        "-o",
        str(logs),
        *resumed,
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    keep(arch, left if resumed else (logs / "latest_log_dir").resolve())


def keep(arch: str, folder: Path) -> None:
    """Copy the points of a sweep, write its JSON files, and draw its figures."""
    results = RESULTS / arch
    results.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / CSV_NAME, results / CSV_NAME)
    write_source_files(read_points(results), results)
    draw_layerwise(results, IMAGES / arch)


def page(text: str) -> str:
    """The guide with its last part as the results are now."""
    block = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    measured = "\n".join(_measured())
    return block.sub(lambda _: f"{_BEGIN}\n{measured}{_END}", text, count=1)


def missing() -> list[str]:
    """The networks of which not every point was measured."""
    return [arch for arch in NETWORKS if len(read_points(RESULTS / arch)) < POINTS]


def _measured() -> Iterator[str]:
    if all(arch in missing() for arch in NETWORKS):
        return
    yield "\n## Measured on Fashion-MNIST\n"
    schedules = "../schedules/baseline_networks/haiku_{}_fashion_mnist.yaml"
    yield (
        "The networks of the source at 28x28 pixels, trained here by the schedules of\n"
        f"[the teacher]({schedules.format('teacher')}) and\n"
        f"[the student]({schedules.format('student')}); one seed. Top-1 of the 10,000 test\n"
        "images with its 95 % interval; differences within it mean nothing.\n"
    )
    for arch, title in NETWORKS.items():
        points = read_points(RESULTS / arch)
        if arch in missing():
            continue
        timed = points[0]
        yield f"### {title}\n"
        images = f"images/layerwise/{arch}"
        yield f"![Top-1 accuracy by fraction, by bits and by stored bytes]({images}/accuracy.png)\n"
        yield f"![Latency by fraction, by bits and by stored bytes]({images}/latency.png)\n"
        yield from _table(points)
        yield (
            f"\nLatency of {timed.batch_size} images ({timed.device}, threads: {timed.threads}), median; and "
            "that of the dense network,\nmeasured in turns. All points: "
            f"[layerwise.csv](results/layerwise/{arch}/layerwise.csv).\n"
        )


def _table(points: Sequence[LayerwisePoint]) -> Iterator[str]:
    yield "| technique | at | top-1 | stored bytes | bits a weight | latency (ms) | dense | factored |"
    yield "|---|---|---|---|---|---|---|---|"
    for point in points:
        if point.axis == "fraction" and point.value not in SHOWN:
            continue
        low, high = wilson_interval(point.top1_correct, point.n)
        cells = [
            f"`{point.technique}`",
            f"fraction {point.value:g}"
            if point.axis == "fraction"
            else f"{point.value:g} bit{'' if point.value == 1 else 's'}",
            f"{100 * point.accuracy:.2f} % ({100 * low:.1f}-{100 * high:.1f})",
            f"{point.stored_bytes:,} ({100 * point.stored_share:.1f} %)",
            f"{point.effective_bits:.2f}",
            *(
                "" if seconds is None else f"{1000 * seconds:.1f}"
                for seconds in (point.latency_s, point.dense_latency_s, point.factored_latency_s)
            ),
        ]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--again", action="store_true", help="sweep what has been swept, too")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the page")
    args = parser.parse_args()
    for arch in NETWORKS if args.again else missing():
        if not args.table:
            sweep(arch, args.again)
            write_whole(PAGE, page(PAGE.read_text(encoding="utf-8")))
    write_whole(PAGE, page(PAGE.read_text(encoding="utf-8")))
    left = missing()
    sys.stdout.write(f"missing: {', '.join(left)}\n" if left else "missing: nothing\n")


if __name__ == "__main__":
    main()
