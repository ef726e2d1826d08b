"""The page about exit criteria names what the table has, with the thresholds that it takes and the sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from consistentee.functional.criteria import CRITERIA, EXIT_CRITERIA, GENERATION_CRITERIA

PAGE = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text(encoding="utf-8")
OF_ROWS, OF_TOKENS = PAGE.split("## Text generators")


def rows_of(part: str) -> dict[str, list[str]]:
    """Cells of a table by the criterion."""
    lines = re.findall(r"^\| `(\w+)` \| (.*) \|$", part, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in lines}


@pytest.mark.parametrize("part, criteria", [(OF_ROWS, CRITERIA), (OF_TOKENS, GENERATION_CRITERIA)])
def test_every_criterion_is_there_with_its_thresholds(part: str, criteria: tuple[str, ...]) -> None:
    rows = rows_of(part)
    assert sorted(rows) == sorted(criteria)
    for name, cells in rows.items():
        known = EXIT_CRITERIA[name].thresholds
        if known.layers:
            wanted = f"{'above' if known.above_low else 'at least'} {known.low:g}"
        else:
            wanted = f"[{known.low:g}, {known.high:g}]"
        assert cells[1].startswith(wanted), name
        for paper in re.findall(r"arXiv:[\d.]+|202\d\.[\w.-]+\d", EXIT_CRITERIA[name].source):
            assert paper in PAGE, name
