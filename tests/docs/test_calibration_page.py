"""The page about certificates says what the formulas say, and what it tells people to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from consistentee.cli.main import app
from consistentee.functional.bounds import losses_allowed, smallest_certifiable_rows

PAGE = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")
TYPED = re.findall(r"^(?:\$ )?(consistentee .*)$", PAGE, re.MULTILINE)


def test_the_table_of_rows_and_losses() -> None:
    rows = re.findall(r"^\| ([\d.]+) % \| ([\d |]+) \|$", PAGE, re.MULTILINE)
    assert [float(share) for share, _ in rows] == [0.5, 1, 2, 5]
    for share, cells in rows:
        promise = float(share) / 100
        expected = [smallest_certifiable_rows(promise)]
        expected += [losses_allowed(count, promise) for count in (1000, 2000, 5000, 20_000)]
        assert [int(cell) for cell in cells.split("|")] == expected


@pytest.mark.parametrize("line", [line for line in TYPED if not line.startswith("consistentee: ")])
def test_what_is_typed_parses(line: str) -> None:
    command, _, _ = app.parse_args(
        shlex.split(line, comments=True)[1:], exit_on_error=False, print_error=False
    )
    assert command is not None
