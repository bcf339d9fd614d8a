"""The headers of the schedules under schedules/, and their index, written from the results that are kept.

A header says "Measured (`make ...`; docs/results/MODEL_DATASET/NAME.json)"; what follows is written from
that file. Until there is one it says "Not measured yet" instead of "Measured".
Knows nothing about how results come about.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "schedules" / "README.md"
MADE_BY = "make results-schedules"
SECTIONS = {
    "quantizer": "quantizers",
    "pruner": "pruners",
    "regularizer": "regularizers",
    "extension": "extensions",
}
"""The words of policies, with their sections."""
INTRODUCTION = """\
<!-- Written by `python -m docs.measure_schedules --headers`: edit the schedules instead. -->
# Schedules

Each file opens with its purpose, its command and what was measured with it: top-1 of the 10,000 test images
of Fashion-MNIST, one run and one seed each. `make results-schedules` measures what has no result yet,
`python -m docs.measure_schedules --again` all of them anew; on another machine the numbers come out a little
different. The networks are small and the trainings short: the 95 % intervals in the headers are about a
percentage point wide, or wider, so that differences of a few tenths mean nothing, and a pruned network may be
better than the dense one because it was trained for longer.

How to write a schedule of your own is in [docs/schedules.md](../docs/schedules.md), what each class does in
[docs/reference](../docs/reference/README.md).

"""
_HEADINGS = (
    "| schedule | what it does | classes | dense | result | sparsity of the weights | structures |",
    "|---|---|---|---|---|---|---|",
)
_WIDTH = 110
_MEASURED = r"(?:Measured|Not measured yet) \((`[^`]+`; (docs/results/\S+\.json))\)"
_MOST_LISTED = 4


@dataclass(frozen=True, slots=True)
class Shipped:
    """A schedule under `schedules/`, and what its header says.

    Attributes:
        path: the file.
        text: what is in it.
    """

    path: Path
    text: str

    @property
    def header(self) -> str:
        """The comment that the file opens with, without the marks."""
        lines = self.text.splitlines()
        end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
        return "\n".join(line[1:].strip() for line in lines[:end])

    @property
    def flags(self) -> list[str]:
        """The flags of the one command in the header."""
        joined = self.header.replace("\\\n", " ")
        (line,) = re.findall(r"^python compress_classifier\.py (.*)$", joined, re.MULTILINE)
        return shlex.split(line)

    @property
    def results(self) -> Path | None:
        """The results that the header is written from, or will be; None when it names none."""
        found = re.search(rf"^{_MEASURED}", self.header, re.MULTILINE)
        return ROOT / found[2] if found else None

    @property
    def is_ours_to_run(self) -> bool:
        """Whether this script measures it; others are measured by other targets of the Makefile."""
        return any(f"{words} (`{MADE_BY}`;" in self.header for words in ("Measured", "Not measured yet"))

    @property
    def data(self) -> dict[str, Any]:
        """The YAML."""
        return yaml.safe_load(self.text)


def shipped() -> list[Shipped]:
    """All schedules to train under, the dense baselines first."""
    paths = sorted(
        (path for path in (ROOT / "schedules").rglob("*.yaml") if path.parent.name != "post_train_quant"),
        key=lambda path: ("baseline" not in str(path), str(path)),
    )
    return [Shipped(path, path.read_text(encoding="utf-8")) for path in paths]


def measured_block(schedule: Shipped) -> str:
    """The part of the header that is written from the results, down to the next empty line."""
    assert schedule.results is not None
    card = json.loads(schedule.results.read_text(encoding="utf-8"))
    measured, dense = card["measured"], _dense_figures(schedule.results, card)
    ((made_by, _),) = re.findall(rf"^# {_MEASURED}", schedule.text, re.MULTILINE)
    opening = f"# Measured ({made_by})"
    images = f"on the {measured['n']:,} test images:"
    lines = [
        f"{opening}, {images}" if len(opening) + len(images) + 2 <= _WIDTH else f"{opening},\n# {images}"
    ]
    if dense is None:
        lines.append(f"#   {_accuracy(measured)}")
        return "\n".join(lines) + "\n"
    if "early_exit" in card:
        return "\n".join([*lines, *_exit_lines(measured, card["early_exit"])]) + "\n"
    entries = card.get("structures", [])
    is_thinned, is_factored = card.get("is_thinned", False), card.get("is_factored", False)
    is_quantized = any("quantizer" in policy for policy in schedule.data["policies"])
    # Quantization rounds small weights to zero by itself.
    is_pruned = (not is_quantized and measured["weight_sparsity"] >= 0.01) or any(
        entry["count"] for entry in entries
    )
    done = "thinned" if is_thinned else "pruned" if is_pruned else "quantized" if is_quantized else "trained"
    done = "factored" if is_factored else done
    lines += [
        f"#   dense     {_accuracy(dense)}",
        f"#   {done:9} {_accuracy(measured)}",
    ]
    if is_thinned or is_factored:
        lines += _smaller_lines(card)
    if is_quantized:
        lines += [
            f"#   weights packed at their bits {measured['bytes_quantized']:,} bytes of "
            f"{dense['bytes_dense']:,} ({dense['bytes_dense'] / measured['bytes_quantized']:.2f}x fewer);",
            "#   simulated in floating point, so that nothing is faster",
        ]
    if is_pruned:
        lines += [
            f"#   sparsity of the weights {100 * measured['weight_sparsity']:.2f} %, "
            f"{measured['nonzeros']:,} non-zero parameters of {measured['parameters']:,};",
            f"#   stored sparse {measured['bytes_sparse']:,} bytes of {measured['bytes_dense']:,}; "
            + ("zeros" if is_thinned or is_factored else "latency unchanged (zeros")
            + " are multiplied"
            + ("" if is_thinned or is_factored else ")"),
        ]
    if (packed := card.get("packed")) is not None:
        lines.append(
            f"#   packed file {packed['bytes']:,} bytes of {packed['original_bytes']:,} "
            f"({packed['compression_rate']:.1f}x)"
        )
    for text in _structure_lines(entries):
        lines += textwrap.wrap(text, _WIDTH, initial_indent="#   ", subsequent_indent="#     ")
    return "\n".join(lines) + "\n"


def with_block(schedule: Shipped) -> str:
    """The schedule's text with its header as the results are now."""
    block = re.compile(r"^# (?:Measured|Not measured yet) \(.*?(?=^#$|^[^#]|^$)", re.MULTILINE | re.DOTALL)
    return block.sub(lambda _: measured_block(schedule), schedule.text, count=1)


def index() -> str:
    """schedules/README.md: one row a schedule, with what was measured."""
    rows = []
    for schedule in shipped():
        path = schedule.path.relative_to(ROOT / "schedules").as_posix()
        title = schedule.header.splitlines()[0].rstrip(".")
        cells = ["", "", "not measured here", ""]
        if schedule.results is not None and schedule.results.exists():
            card = json.loads(schedule.results.read_text(encoding="utf-8"))
            measured, dense = card["measured"], _dense_figures(schedule.results, card)
            cells = [
                "" if dense is None else f"{dense['top1_percent']:.2f} %",
                f"{card.get('early_exit', measured)['top1_percent']:.2f} %",
                f"{100 * measured['weight_sparsity']:.2f} %",
                "; ".join(_gains(card)),
            ]
        elif "Measured (`make demo`" in schedule.header:
            cells[2] = "see its header"
        classes = ", ".join(f"`{name}`" for name in classes_of(schedule.data))
        rows.append(f"| [{path}]({path}) | {title} | {classes} | " + " | ".join(cells) + " |")
    return INTRODUCTION + "\n".join([*_HEADINGS, *rows]) + "\n"


def classes_of(data: Mapping[str, Any]) -> list[str]:
    """The classes of the components that policies use, learning rates aside, in the order of the file."""
    used = {
        policy[word]["instance_name"] for policy in data["policies"] for word in SECTIONS if word in policy
    }
    return list(
        dict.fromkeys(
            component["class"]
            for section in SECTIONS.values()
            for name, component in (data.get(section) or {}).items()
            if name in used
        )
    )


def _smaller_lines(card: Mapping[str, Any]) -> list[str]:
    """What is gone from a thinned or factored network, and how much faster it really is."""
    measured, dense, ratios = card["measured"], card["reference"], card["ratios"]
    single, batch = measured["latency_single"], measured["latency_batch"]
    return [
        f"#   removed: {measured['macs']:,} of {dense['macs']:,} MACs left ({ratios['macs']:.2f}x fewer), "
        f"{measured['parameters']:,} of",
        f"#   {dense['parameters']:,} parameters, {measured['bytes_checkpoint']:,} of "
        f"{dense['bytes_checkpoint']:,} bytes; measured in turns with the dense one",
        f"#   ({single['device']}, threads: {single['threads']}): {ratios['latency_single']:.2f}x as fast at "
        f"batch {single['batch_size']}, {ratios['latency_batch']:.2f}x at batch {batch['batch_size']}",
    ]


def _exit_lines(whole: Mapping[str, Any], exits: Mapping[str, Any]) -> list[str]:
    """Accuracy of the last output and with early exits, who leaves where, and how much faster that is."""
    leaving = ", ".join(
        f"{100 * share:.2f} %{'' if at else ' leave'} at {layer}"
        for at, (share, layer) in enumerate(zip(exits["shares"], exits["layers"], strict=False))
    )
    first = exits["latencies"][0]["whole"]
    faster = (
        f"{pair['whole']['median_s'] / pair['early_exit']['median_s']:.2f}x{'' if at else ' as fast'} "
        f"at batch {pair['whole']['batch_size']}"
        for at, pair in enumerate(exits["latencies"])
    )
    return [
        f"#   all of it  {_accuracy(whole)}",
        f"#   with exits {_accuracy(exits)}",
        f"#   {leaving}: {_share_of_macs(exits)}; measured in turns with all of it",
        f"#   ({first['device']}, threads: {first['threads']}): {', '.join(faster)}",
    ]


def _exits(card: Mapping[str, Any]) -> list[str]:
    if "early_exit" not in card:
        return []
    exits = card["early_exit"]
    batch = exits["latencies"][-1]
    times = batch["whole"]["median_s"] / batch["early_exit"]["median_s"]
    return [f"early exits: {_share_of_macs(exits)}, {times:.2f}x as fast"]


def _share_of_macs(exits: Mapping[str, Any]) -> str:
    return f"{100 * exits['mean_macs'] / exits['whole_macs']:.1f} % of the MACs"


def _gains(card: Mapping[str, Any]) -> list[str]:
    return [*_removed(card), *_exits(card), *_packed(card), *_structure_totals(card.get("structures", []))]


def _packed(card: Mapping[str, Any]) -> list[str]:
    return [f"packed {card['packed']['compression_rate']:.1f}x smaller"] if card.get("packed") else []


def _removed(card: Mapping[str, Any]) -> list[str]:
    if not (card.get("is_thinned", False) or card.get("is_factored", False)):
        return []
    return [f"{card['ratios']['macs']:.2f}x fewer MACs, {card['ratios']['latency_batch']:.2f}x as fast"]


def _structure_lines(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line a kind: how many in all, and where."""
    for kind, of_kind in _by_kind(entries).items():
        if 1 < len(of_kind) <= _MOST_LISTED:
            where = "; " + ", ".join(f"{e['weight']} {e['count']:,} of {e['of']:,}" for e in of_kind)
        else:
            where = f" in {of_kind[0]['weight'] if len(of_kind) == 1 else f'{len(of_kind)} parameters'}"
        yield _total(kind, of_kind) + where


def _structure_totals(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return [_total(kind, of_kind) for kind, of_kind in _by_kind(entries).items()]


def _by_kind(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    kinds = dict.fromkeys(entry["kind"] for entry in entries)
    return {kind: [entry for entry in entries if entry["kind"] == kind] for kind in kinds}


def _total(kind: str, entries: Sequence[Mapping[str, Any]]) -> str:
    count, total = (sum(entry[key] for entry in entries) for key in ("count", "of"))
    return f"{kind}: {count:,} of {total:,} = {100 * count / total:.2f} %"


def _dense_figures(results: Path, card: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of the dense network: what the run knew of it, or the baseline's results; None for a baseline.

    Of one with early exits: its own, when no image leaves early.
    """
    if results.stem == "dense":
        return None
    if "early_exit" in card:
        return card["measured"]
    if card["reference"] is not None:
        return card["reference"]
    return json.loads((results.parent / "dense.json").read_text(encoding="utf-8"))["measured"]


def _accuracy(figures: Mapping[str, Any]) -> str:
    low, high = figures["top1_interval_95_percent"]
    return (
        f"{figures['top1_correct']:,}/{figures['n']:,} = {figures['top1_percent']:.2f} %, "
        f"{low:.2f} to {high:.2f} %"
    )
