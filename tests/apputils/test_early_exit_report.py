from __future__ import annotations

import json
from dataclasses import replace

from distiller.apputils.early_exit_report import EarlyExitReport
from distiller.early_exit import ExitRule
from distiller.export.latency import Latency

SLOW, FAST = (Latency(seconds, seconds, seconds, 9, 1, 1, "cpu") for seconds in (0.004, 0.002))
REPORT = EarlyExitReport(
    rule=ExitRule("entropy", (0.25, None)),
    layers=("layer1", "layer2"),
    chosen_on="",
    left=(600, 0, 400),
    left_correct=(590, 0, 350),
    all_correct=(880, 900, 950),
    mean_macs=600.0,
    whole_macs=1000.0,
    latencies=((SLOW, FAST),),
)


def test_the_report_as_text():
    lines = REPORT.to_text().splitlines()
    assert [" ".join(line.split()) for line in [lines[0], *lines[2:8]]] == [
        "early exit entropy images that left right of these right of all images",
        "exit 1 (layer1) 0.25 600/1,000 = 60.00 % 590/600 = 98.33 % 880/1,000 = 88.00 %",
        "exit 2 (layer2) never 0/1,000 = 0.00 % - 900/1,000 = 90.00 %",
        "final output 400/1,000 = 40.00 % 350/400 = 87.50 % 950/1,000 = 95.00 %",
        "top-1 with early exits: 940/1,000 = 94.00 %, 92.35 to 95.31 %; -1.00 points from the final output",
        "MACs for an image: 600 of 1,000 on average, 40.0 % saved",
        "median latency on test images, batch 1 (cpu, 1 thread): 2.000 ms, without exits 4.000 ms (2.00x)",
    ]
    assert "thresholds chosen for a share" in replace(REPORT, chosen_on="for a share").to_text()


def test_branches_that_cost_more_than_they_save_are_told_so():
    assert "-2.0 % saved" in replace(REPORT, mean_macs=1020.0).to_text()
    assert " 0.0 % saved" in replace(REPORT, mean_macs=1000.1).to_text()


def test_the_report_as_plain_data():
    plain = json.loads(json.dumps(REPORT.to_json(), allow_nan=False))
    assert plain["shares"] == [0.6, 0, 0.4]
    assert plain["thresholds"] == [0.25, None]
    assert plain["top1_percent"] == 94
    assert plain["saved_macs"] == 0.4
    assert plain["latencies"][0]["early_exit"]["median_s"] == 0.002
