"""The table of docs/export.md: the graph with exits against ONNX Runtime's own whole model, in two runs.

python benchmarks/render_graph.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results" / "graph"


def render(reports: Sequence[dict[str, Any]]) -> str:
    """A line for each mode, the runs beside each other."""
    lines = [
        "| rows | efficiency over ONNX Runtime's own whole model | over the engine at full depth | "
        "nobody exits, against the first / the second |",
        "|---|---|---|---|",
    ]
    by_run = [{(row["batch_size"], row["name"]): row for row in report["rows"]} for report in reports]
    for size in dict.fromkeys(row["batch_size"] for row in reports[0]["rows"]):
        found: list[tuple[float, ...]] = []
        for rows in by_run:
            with_exits, nobody, whole = (
                rows[size, name]["wall_clock_speedup"]  # over the engine at full depth, medians of ratios
                for name in ("engine", "engine-nobody-leaves", "onnxruntime")
            )
            layers = rows[size, "engine"]["layer_speedup"]
            found.append((with_exits / whole / layers, with_exits / layers, nobody / whole, nobody))
        over_whole, over_full, against_whole, against_full = zip(*found, strict=True)
        cells = [
            " and ".join(f"{value:.2f}" for value in over_whole),
            " and ".join(f"{value:.2f}" for value in over_full),
            " and ".join(
                f"{one:.2f}x / {other:.2f}x" for one, other in zip(against_whole, against_full, strict=True)
            ),
        ]
        lines.append(f"| {'throughput' if size is None else size} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    files = sorted(FOLDER.glob("minilm-onnxruntime-*.json"))
    print(render([json.loads(file.read_text(encoding="utf-8")) for file in files]))
