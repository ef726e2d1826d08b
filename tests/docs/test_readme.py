"""Files and code that README, CONTRIBUTING and the page about the method name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:[\w.-]+/)+|[\w./-]+\.(?:toml|txt|md|py|yaml)|\.ci/run)`", text)
    places = (ROOT, ROOT / "src" / "consistentee", ROOT / "benchmarks")
    missing = [name for name in paths if not any((place / name).exists() for place in places)]
    assert not missing


def test_the_methods_page_names_code_that_exists() -> None:
    source = ROOT / "src" / "consistentee"
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?::(\w+))?`", page)
    assert len(named) >= 20
    for path, symbol in named:
        text = (source / path).read_text(encoding="utf-8")
        assert not symbol or re.search(rf"^(def|class) {symbol}\b", text, re.MULTILINE), f"{path}:{symbol}"
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
