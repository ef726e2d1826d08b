"""The published page of generation results is what the kept figures say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def rendering() -> ModuleType:
    path = ROOT / "benchmarks" / "render_generation.py"
    spec = importlib.util.spec_from_file_location("render_generation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_kept_figures(rendering: ModuleType) -> None:
    figures = (
        rendering.read_cells(),
        rendering.read_speeds(),
        rendering.read_memory(),
        rendering.read_lossless(),
    )
    written = (ROOT / "docs" / "results-generation.md").read_text(encoding="utf-8")
    assert written == rendering.page(*figures), "Run: python benchmarks/render_generation.py"


def test_values_between_two_depths(rendering: ModuleType) -> None:
    points = [
        {"mean_exit_layer": depth, "metrics": {"rougeL": value}} for depth, value in ((10, 0.1), (20, 0.3))
    ]
    assert rendering.at_depth(points, 15, "rougeL") == pytest.approx(0.2)
    assert rendering.at_depth(points, 20, "rougeL") == pytest.approx(0.3)
    assert rendering.at_depth(points, 25, "rougeL") is None
