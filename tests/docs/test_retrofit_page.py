"""The figures of docs/retrofit.md are those of the kept files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "retrofit"
PAGE = (ROOT / "docs" / "retrofit.md").read_text(encoding="utf-8")


def kept(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["e5-12l_sst2_held-out", "e5-12l_sst2_dev"])
def test_tables(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("render_retrofit", None)
    import render_retrofit  # pyright: ignore[reportMissingImports]

    assert render_retrofit.render([kept(f"{name}_{seed}") for seed in (0, 1, 2)]) in PAGE


def test_choices_and_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ablate_retrofit  # pyright: ignore[reportMissingImports]
    import retrofit_pairs  # pyright: ignore[reportMissingImports]

    choices = kept("e5-12l_sst2_choices")
    assert ablate_retrofit.render(choices) in (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for line in retrofit_pairs.table(sorted((RESULTS / "pairs").glob("*.json"))):
        assert line in PAGE


def test_sentences() -> None:
    held_out, dev = kept("e5-12l_sst2_held-out_0"), kept("e5-12l_sst2_dev_0")
    certificate = held_out["certificate"]
    for said in (
        f"agrees on {100 * held_out['agreement']:.2f} %",
        f"{certificate['losses']:g} disagreements of {certificate['losses_allowed']:g} allowed",
        f"{held_out['layer_speedup']:.2f}x fewer layers",
        f"{held_out['seconds'] / 60:.1f} minutes",
        f"on {100 * dev['agreement']:.1f} % of the dev sentences only, at {dev['layer_speedup']:.2f}x",
        f"{held_out['num_train_texts']:,} for the exits, {held_out['num_policy_texts']:,} for the policy",
    ):
        assert said in PAGE
    assert dev["threshold"] == held_out["threshold"]
    for row in held_out["speed"]:
        if row["name"] == "engine":
            assert f"{row['wall_clock_speedup']:.2f}x" in PAGE
