"""Markdown tables of what `benchmarks/run_speed.sh` measured.

python benchmarks/render_speed.py FOLDER > tables.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEADER = (
    "| batch | efficiency | speed-up over own full depth | nobody exits | full depth / transformers | "
    "full depth / ONNX Runtime | with exits / transformers |\n|---|---|---|---|---|---|---|"
)


def render(report: dict[str, Any]) -> str:
    """One table: a line for each mode."""
    rows = {(row["batch_size"], row["name"]): row for row in report["rows"]}
    lines: list[str] = []
    for size in dict.fromkeys(row["batch_size"] for row in report["rows"]):
        full, exits = rows[size, "engine-full-depth"], rows.get((size, "engine"))
        rival, last = rows.get((size, "onnxruntime")), rows.get((size, "engine-nobody-leaves"))
        beside = (
            "" if rival is None else f"{full['instances_per_second'] / rival['instances_per_second']:.2f}x"
        )
        cells = ["", "", ""]
        if exits is not None and last is not None:
            low, high = exits["wall_clock_speedup_quartiles"]
            efficiency = "" if exits["layer_speedup"] == 1 else f"{exits['efficiency']:.2f}"
            cells = [
                efficiency,
                f"{exits['wall_clock_speedup']:.2f}x ({low:.2f} to {high:.2f})",
                f"{last['wall_clock_speedup']:.2f}x",
            ]
        ratios = [
            f"{full['speedup_over_transformers']:.2f}x",
            beside,
            "" if exits is None else f"{exits['speedup_over_transformers']:.2f}x",
        ]
        lines.append(f"| {'throughput' if size is None else size} | {' | '.join([*cells, *ratios])} |")
    work, place = report["workload"], report["environment"]
    engine = report["rows"][0]
    title = ", ".join(
        [
            f"**{work['model']}, {engine['dtype']}, {engine['backend']}**: {work['rows']} rows",
            f"{work['mean_tokens']:.0f} tokens on average",
            f"exits {work.get('classifier_hidden_size', work['hidden_size'])} wide",
            f"{work['repeats']} repetitions",
            f"layer speed-up {engine['layer_speedup']:.2f}x",
            f"{place['hardware']} ({' '.join(place['cpu_flags'])})",
            f"{place['threads']} threads",
            f"torch {place['torch']}",
            f"transformers {place['transformers']}",
            f"seed {place['seed']}.",
        ]
    )
    return "\n".join([title, "", HEADER, *lines])


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).glob("*.json"))
    print("\n\n".join(render(json.loads(file.read_text(encoding="utf-8"))) for file in files))
