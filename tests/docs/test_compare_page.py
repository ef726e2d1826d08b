"""The page of compared methods: its cells are what their names say, and its figures are theirs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from benchmark_scripts import RESULTS, ROOT, script
from consistentee.evaluation.comparison.summary import summarise
from consistentee.training.methods import METHODS

FILES = sorted((RESULTS / "compare").glob("*.json"))
PAGE = (ROOT / "docs" / "results-methods.md").read_text(encoding="utf-8")
SHEET = re.compile(r"^## (\S+), (\S+): accuracy along the curve, %\n\n((?:\|.*\n)+)", re.MULTILINE)


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    return script("render_compare").read_cells(RESULTS / "compare")


def test_cells_are_what_their_names_say(cells: list[dict[str, Any]]) -> None:
    assert len(cells) == len(FILES) > 0
    for path, cell in zip(FILES, cells, strict=True):
        label = cell["label"].replace(":", "-")
        assert path.stem == f"{cell['backbone']}_{cell['set']}_{label}_{cell['seed']}"
        assert "/" not in json.dumps(cell["data"])  # no paths
        assert cell["method"] in METHODS


def test_areas_are_those_of_the_cells(cells: list[dict[str, Any]]) -> None:
    found = summarise(cells, resamples=2)["summary"]
    areas = {
        (entry["set"], entry["backbone"], entry["method"], entry["criterion"] or "-"): entry["area"]["mean"]
        for entry in found
        if entry["set"] and entry["is_curve"]
    }
    written: dict[tuple[str, str, str, str], float] = {}
    for name, backbone, rows in SHEET.findall(PAGE):
        for row in rows.splitlines()[2:]:
            method, criterion, _, area, *_ = (part.strip() for part in row.strip("|").split("|"))
            written[name, backbone, method, criterion] = float(area.split()[0])
    assert written
    for key, area in areas.items():
        assert written[key] == pytest.approx(100 * area, abs=0.051), key


def test_what_a_tolerance_buys_is_read_off_a_cell(cells: list[dict[str, Any]]) -> None:
    tolerance = script("threshold_tolerance")
    cell = next(cell for cell in cells if cell["label"] == "consistent" and tolerance.usable(cell))
    found = tolerance.outcomes_of_rules(cell, 250, 20, 0)
    shares = [found[loss, 0.5][3] for loss in (0.0, 0.0025, 0.005, 0.01)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < shares[0] < 1
    losses = [found[0.0, margin][0] for margin in (0.0, 0.5)]
    assert losses[1] <= losses[0]
    assert not tolerance.usable(next(cell for cell in cells if cell["label"] == "plain"))


def test_a_tolerance_tells_points_with_one_rounded_threshold_apart(cells: list[dict[str, Any]]) -> None:
    tolerance = script("threshold_tolerance")
    cell = next(cell for cell in cells if cell["label"] == "consistent" and tolerance.usable(cell))
    found = tolerance.outcomes_of_rules(cell, 250, 5, 0)
    figures = cell["criteria"]["policy"]
    alike = figures | {"curve": [[0.999999, *point[1:]] for point in figures["curve"]]}
    other = cell | {"criteria": cell["criteria"] | {"policy": alike}}
    assert tolerance.outcomes_of_rules(other, 250, 5, 0) == found


def test_the_table_of_validated_thresholds_is_that_of_the_cells(cells: list[dict[str, Any]]) -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for backbone in {cell["backbone"] for cell in cells}:
        lines = script("validated_thresholds").table(cells, "consistent", backbone)
        assert len(lines) == 12
        for line in lines:
            assert line in page


def test_every_method_is_named() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name, method in METHODS.items():
        assert not method.labels or name in results
    for path in (ROOT / "recipes" / "published").glob("*.yaml"):
        assert path.stem.split("_released")[0] in results
