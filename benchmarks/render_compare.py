"""Write the tables of docs/results-methods.md from the kept cells of run_compare.sh; what stands above them stays.

Usage: python benchmarks/render_compare.py benchmarks/results/compare docs/results-methods.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consistentee.atomic_files import write_text
from consistentee.evaluation.comparison.summary import summarise
from consistentee.evaluation.comparison.tables import comparison_sheets, made_on, markdown_sheet

MARK = "<!-- What follows is written by benchmarks/render_compare.py. -->"
RESAMPLES = 1000
OF_OTHERS = ("weighted_sum/confident_patience", "weighted_sum/similar_patience")
"""Criteria that need no training of their own: rivals whose exits are those of another method."""


def main() -> None:
    """Read the cells, write what follows the mark."""
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/render_compare.py CELLS_FOLDER PAGE.md")
    cells = read_cells(Path(sys.argv[1]))
    if not cells:
        sys.exit(f"{sys.argv[1]} holds no finished cell. Run benchmarks/run_compare.sh first.")
    page = Path(sys.argv[2])
    above = page.read_text(encoding="utf-8").partition(MARK)[0]
    write_text(page, above + MARK + "\n\n" + tables(summary_of(cells, RESAMPLES)))


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """The kept cells."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def summary_of(cells: Sequence[dict[str, Any]], resamples: int) -> dict[str, Any]:
    """Every criterion on everybody's exits, and those of `OF_OTHERS` that are there beside the methods."""
    labels = {cell["label"] for cell in cells}
    also = [pair for pair in OF_OTHERS if pair.split("/")[0] in labels]
    published = [f"{pair.replace('/', ':published/', 1)}" for pair in OF_OTHERS]
    also += [pair for pair in published if pair.split("/")[0] in labels]
    return summarise(cells, criteria=("all",), also=also, resamples=resamples)


def tables(summary: Mapping[str, Any]) -> str:
    """All sheets as Markdown, and on what they were made."""
    return (
        "\n\n".join([*map(markdown_sheet, comparison_sheets(summary)), made_on(summary["environments"])])
        + "\n"
    )


if __name__ == "__main__":
    main()
