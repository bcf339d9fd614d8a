from __future__ import annotations

import csv

from distiller.early_exit import curve, save_curve_csv, save_curve_png, thresholds_for_drop
from tests.early_exit.test_calibration import table


def test_the_curve_is_a_table_whose_last_line_is_the_chosen_rule(tmp_path):
    data = table("entropy")
    chosen, trades = thresholds_for_drop(data, 5), curve(data)
    with save_curve_csv(trades, chosen, tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "criterion", "threshold_1", "threshold_2", "share_exit_1", "share_exit_2", "share_final",
        "top1_percent", "mean_macs", "is_chosen",
    ]  # fmt: skip
    assert rows[0]["threshold_1"] == "never"
    assert len(rows) == len(trades) + 1
    assert [row["is_chosen"] for row in rows[-2:]] == ["0", "1"]
    assert float(rows[-1]["mean_macs"]) == chosen.mean_macs


def test_the_picture_is_a_png(tmp_path):
    data = table()
    path = save_curve_png(curve(data), thresholds_for_drop(data, 5), 100.0, tmp_path / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")
