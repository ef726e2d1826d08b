"""The tables of docs/worth-it.md, from what `consistentee benchmark MODEL --against ... --json FILE` wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from consistentee.evaluation.alternatives_view import way_title


def table(report: dict[str, Any]) -> str:
    """A line for each way: layers, accuracy, and milliseconds of an input at every batch size."""
    sizes = list(dict.fromkeys(row["batch_size"] for row in report["rows"]))
    heads = ["", "layers", "accuracy", *(f"batch {size}, ms" for size in sizes)]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name in dict.fromkeys(row["name"] for row in report["rows"]):
        rows = {row["batch_size"]: row for row in report["rows"] if row["name"] == name}
        one = next(iter(rows.values()))
        title = f"**{way_title(name)}**" if one["has_exits"] else way_title(name)
        cells = [title, f"{one['mean_exit_layer']:.1f}", f"{100 * one['accuracy']:.1f}"]
        cells += [f"{rows[size]['milliseconds']:.2f}" if size in rows else "" for size in sizes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print(table(json.loads(Path(file).read_text(encoding="utf-8"))))
