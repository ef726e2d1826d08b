"""The published page of generation results is what the kept figures say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmark_scripts import script
from consistentee.evaluation.generation import evaluate_generation
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.generator import GeneratedText, TextGenerator
from saved_generators import generator_folder, tiny_rows

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def rendering() -> ModuleType:
    return script("render_generation")


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


def test_variants_are_measured_in_the_batches_of_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one configuration gets two figures: 16 bits round differently in another batch."""
    saved = load_model(generator_folder(tmp_path / "model"), LoadedGenerator)
    rows = tiny_rows(7)
    batches: list[list[list[int]]] = []
    batch = TextGenerator._batch

    def noted(self: TextGenerator, prompts: Any, encoded: Any, *rest: Any) -> list[GeneratedText]:
        batches.append([list(ids) for ids in encoded])
        return batch(self, prompts, encoded, *rest)

    monkeypatch.setattr(TextGenerator, "_batch", noted)
    evaluation = evaluate_generation(saved, rows, batch_size=3, max_new_tokens=4)
    measured = batches[: len(batches) // 2]  # texts with exits; then those of all layers
    batches.clear()
    first, *others = script("run_generation").variants(saved, rows, evaluation)
    assert len(measured) == 3
    assert batches == 4 * measured
    assert first["metrics"] == {name: evaluation.metrics[name] for name in first["metrics"]}
    assert len(others) == 3
    assert saved.early_exit_model.config.full_depth_first_token


def test_slower_exits_are_called_slower() -> None:
    def row(name: str, clock: float) -> dict[str, Any]:
        figures = {
            "wall_clock_speedup": clock,
            "layer_speedup": 1.1,
            "speedup_over_transformers": 1.3 * clock,
        }
        return {"name": name, "batch_size": 8, **figures}

    summary = script("generation_speed_tables").speed_summary
    for clock, words in (
        (0.96, "is **slower** than our own full depth: 0.96x at batches 8"),
        (1.1, "is not always"),
    ):
        rows = [row("engine-full-depth", 1.0), row("engine", clock)]
        text = " ".join(summary({"alpaca": {"workload": {"exits": "model"}, "rows": rows}}))
        assert "Full depth is 1.30x as fast as `transformers`" in text
        assert words in text
