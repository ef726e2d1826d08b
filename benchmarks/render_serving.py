"""The table of docs/serve.md, from what `consistentee benchmark MODEL --serve --json FILE` wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SERVED = ("exits", "full depth", "transformers")


def cell(figures: dict[str, Any]) -> str:
    values = [figures[name] for name in ("p50_ms", "p95_ms")]
    return " / ".join("-" if value is None else f"{value:.0f}" for value in values)


def render(report: dict[str, Any]) -> str:
    lines = [
        "| requests/s (of full depth's most) | exits: p50 / p95 ms, goodput | full depth | plain transformers |",
        "|---|---|---|---|",
        f"| one at a time | {' | '.join(cell(report['unloaded'][name]) for name in SERVED)} |",
    ]
    for load in report["loads"]:
        cells = [f"{cell(load[name])}, {load[name]['goodput']:.1f}" for name in SERVED]
        lines.append(f"| {load['rate']:.1f} ({load['share_of_full_depth']:g}x) | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """The marks: at half of full depth's rate, and goodput over the rates."""
    half = next(load for load in report["loads"] if load["share_of_full_depth"] == 0.5)
    best = {name: max(load[name]["goodput"] for load in report["loads"]) for name in SERVED}
    return {
        "p50": half["exits"]["p50_ms"] / half["full depth"]["p50_ms"],
        "p95": half["exits"]["p95_ms"] / half["full depth"]["p95_ms"],
        "goodput": best["exits"] / best["full depth"],
        "goodput_plain": best["exits"] / best["transformers"],
        "saturated": report["saturated"]["exits"]["answers_per_second"]
        / report["saturated"]["full depth"]["answers_per_second"],
    }


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(render(found))
    print(ratios(found))
