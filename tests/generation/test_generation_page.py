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


def test_depths_on_the_references_are_those_of_the_curves(rendering: ModuleType) -> None:
    evaluation = {
        "criterion": "policy",
        "curve": [{"threshold": 0.5, "mean_exit_layer": 3.0}],
        "other_criteria": {"static": {"curve": [{"threshold": 2.0, "mean_exit_layer": 2.2}]}},
    }
    assert rendering.depth_on_references(evaluation, "policy", 0.5) == 3.0
    assert rendering.depth_on_references(evaluation, "static", 2.0) == 2.2
