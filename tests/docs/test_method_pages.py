"""Every method has its page, which says what it is, how it is run and what it exits by."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from consistentee.data.recipes import load_recipe
from consistentee.functional.criteria import CRITERIA
from consistentee.training.methods import METHODS, method_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "methods"
CRITERIA_ONLY = {"pcee", "f_pabee"}


def test_there_is_a_page_for_every_method_and_the_index_names_them() -> None:
    pages = {path.stem for path in PAGES.glob("*.md")} - {"README"}
    assert pages == set(METHODS) | CRITERIA_ONLY
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\w+)\]\(\1\.md\)", index, re.MULTILINE)) == pages


@pytest.mark.parametrize("name", sorted({*METHODS, *CRITERIA_ONLY}))
def test_a_page_has_its_parts_and_commands_that_are_there(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == [
        "Formula",
        "Where ours differs",
        "How to run it",
        "Our figures",
    ]
    assert page.startswith(f"# {name}: ")
    for link in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (PAGES / link).exists(), link
    for recipe in re.findall(r"--config (\S+)", page):
        assert load_recipe(ROOT / recipe).method in METHODS
    for method in re.findall(r"--method (\w+)", page):
        method_of(method)
    for criterion in re.findall(r"It exits by `(\w+)`", page):
        assert criterion in CRITERIA


def test_the_pages_name_formulas_that_are_there() -> None:
    losses = (ROOT / "src" / "consistentee" / "functional" / "losses.py").read_text(encoding="utf-8")
    named = {
        name
        for path in PAGES.glob("*.md")
        for text in re.findall(r"`functional/losses\.py:[^;\n]*", path.read_text(encoding="utf-8"))
        for name in re.findall(r"[a-z_]+_[a-z_]+", text.replace("functional/losses.py:", ""))
    }
    assert named
    assert all(f"def {name}(" in losses for name in named)
