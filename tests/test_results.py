"""The published page of results is what the kept cells say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
CELLS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def rendering() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_results", ROOT / "benchmarks" / "render_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_page_of_results_is_made_from_the_kept_cells(rendering: ModuleType):
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == rendering.page([read(path) for path in CELLS]), (
        "Run: python benchmarks/render_results.py benchmarks/results docs/results.md"
    )


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_a_cell_is_what_its_name_says(path: Path):
    cell = read(path)
    assert path.stem == f"{cell['backbone']}_{cell['task']}_{cell['method']}_{cell['seed']}"
    assert cell["config"]["seed"] == cell["seed"]
    assert "source" not in cell["data"]  # no paths


def test_layers_saved_and_accuracy_at_a_speed_up(rendering: ModuleType):
    curve = [[0.9, 0.80, 4.0], [0.5, 0.79, 2.0], [0.1, 0.60, 1.0]]
    cell = {"per_layer_accuracy": [0.6, 0.7, 0.75, 0.8], "criteria": {"policy": {"curve": curve}}}
    assert rendering.layers_saved_at(cell, "policy", 0.79) == 0.5
    assert rendering.layers_saved_at(cell, "policy", 0.8) == 0.0
    assert rendering.layers_saved_at(cell, "policy", 0.9) == 0.0
    assert rendering.accuracy_at(cell, "policy", 1.5) == 0.79
    assert rendering.accuracy_at(cell, "policy", 4) == 0.60
