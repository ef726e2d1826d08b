"""The page about certificates says what the formulas say."""

from __future__ import annotations

import re
from pathlib import Path

from benchmark_scripts import read, script
from consistentee.functional.bounds import losses_allowed, smallest_certifiable_rows

PAGE = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")


def test_the_table_of_rows_and_losses() -> None:
    rows = re.findall(r"^\| ([\d.]+) % \| ([\d |]+) \|$", PAGE, re.MULTILINE)
    assert [float(share) for share, _ in rows] == [0.5, 1, 2, 5]
    for share, cells in rows:
        promise = float(share) / 100
        expected = [smallest_certifiable_rows(promise)]
        expected += [losses_allowed(count, promise) for count in (1000, 2000, 5000, 20_000)]
        assert [int(cell) for cell in cells.split("|")] == expected


def test_exits_at_equal_agreement() -> None:
    rows = read("exit-layers", "e5-12l_sst2.json")["rows"]
    assert "\n".join(script("exit_layer_curves").table(rows)) in PAGE
    alone = [row for row in rows if row["exits"] == "chosen exits" and len(row["exit_layers"]) == 12]
    assert {row["batch_size"] for row in alone} == {32}  # what the page calls noise
