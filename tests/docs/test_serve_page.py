"""The page about serving: what it tells people to type exists, and its figures are those of the kept file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmark_scripts import read, script
from consistentee.serving.classification import ClassifierService
from consistentee.serving.metrics import ServerMetrics
from consistentee.serving.requests import PREDICT_FIELDS, ServerLimits

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


def test_fields_limits_and_counters_are_named() -> None:
    for field in PREDICT_FIELDS:
        assert f"`{field}`" in PAGE or field == "truncation_direction"
    limits = ServerLimits()
    for said in (
        f"{limits.max_bytes:,} bytes, {limits.max_batch} texts, {limits.max_tokens:,} tokens",
        f"`--max-queue` ({limits.max_queue})",
        f"`--deadline-ms` ({limits.deadline_ms:,.0f})",
        f"within {limits.body_seconds:g} s",
    ):
        assert said in PAGE
    metrics = ServerMetrics(4, "m")
    metrics.set_point("p", 0.1, 0.9)
    names = re.findall(r"^# TYPE consistentee_(\w+) ", metrics.text().decode(), re.MULTILINE)
    for name in names:
        if not name.endswith("_created") and name != "model_info":
            assert f"`{name}" in PAGE, name
    assert ClassifierService.kind == "classifier"


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import render_serving  # pyright: ignore[reportMissingImports]

    sys.modules.pop("render_serving")
    path = ROOT / "benchmarks" / "results" / "serving" / "e5-12l_sst2.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    assert render_serving.render(report) in PAGE
    found = render_serving.ratios(report)
    for said in (
        f"p50 {found['p50']:.2f}, p95 {found['p95']:.2f} of full depth's",
        f"goodput {found['goodput']:.2f}x full depth's and {found['goodput_plain']:.1f}x that of plain transformers",
        f"{report['overhead_ms']:.2f} ms",
        f"SLO {report['slo_ms']:.0f} ms",
    ):
        assert said in PAGE, said
    during = report["overload"]["during"]
    assert during["wrong"] == 0
    assert f"{during['statuses']['200']:,} answers, none wrong" in PAGE


def test_figures_of_prompts_that_join() -> None:
    report = read("serving", "joining-smollm2-30l.json")
    assert script("joining_prompts").render(report) in PAGE
    one_a_second, beyond = report["loads"]
    for load in (one_a_second, beyond):
        assert load["joining"]["texts"] == load["waiting"]["texts"]
        assert load["joining"]["first_token_p95_ms"] < load["waiting"]["first_token_p95_ms"]


def test_figures_of_workers() -> None:
    rows = read("serving", "workers-e5-12l_sst2.json")["rows"]
    assert "\n".join(script("serving_workers").table(rows)) in PAGE
    assert all((row["wrong"], row["statuses"]) == (0, ["200"]) for row in rows)
