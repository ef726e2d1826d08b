"""Links of the repository's pages lead to files and headings that are there, and the site has every page.

Read as GitHub reads them; `make docs` follows the links of the built site as well.
"""

from __future__ import annotations

import posixpath
import re
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

from benchmark_scripts import ROOT
from consistentee import __all__ as public_names

FENCE = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
)


@cache
def prose(page: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))


@cache
def anchors(page: str) -> set[str]:
    """What GitHub calls the headings of a page; of headings with the same words the later ones are numbered."""
    found: list[str] = []
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        found.append(re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-"))
    return {
        f"{name}-{found[:at].count(name)}" if name in found[:at] else name for at, name in enumerate(found)
    }


def faults(page: str, text: str) -> list[str]:
    """Links of a page's text that lead nowhere."""
    wrong: list[str] = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = posixpath.normpath(PurePosixPath(page).parent / name) if name else page
        if not (ROOT / target).exists() or target.startswith(("/", "..")):
            wrong.append(f"{link}: there is no {target}")
        elif anchor and (not target.endswith(".md") or anchor not in anchors(target)):
            wrong.append(f"{link}: {target} has no such heading")
    return wrong


def test_faults_are_found() -> None:
    wrong = (
        "[a](nowhere.md) [b](results.md#nothing) [c](#nor-here) [d](../../outside.md) ![e](images/none.png)"
    )
    right = "[a](results.md) [b](../README.md#your-own-model) [c](https://nowhere) `[x](y.md)` ![p](images/sst2.png)"
    assert len(faults("docs/install.md", wrong)) == 5
    assert faults("docs/install.md", right) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert faults(page, prose(page)) == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"[\w./-]+\.md", text)
    of_root = {"contributing.md", "changelog.md", "security.md"}
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) - of_root == there, "a page of docs/ belongs into `nav` of mkdocs.yml"


def test_the_reference_has_every_public_name_and_formula() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: consistentee\.([\w.]+)$", text, re.MULTILINE)
    modules = {
        f"functional.{path.stem}" for path in Path(ROOT, "src/consistentee/functional").glob("*.py")
    } - {"functional.__init__"}
    assert sorted(named) == sorted({*public_names, *modules} - {"__version__"})
    index = (ROOT / "docs" / "api" / "README.md").read_text(encoding="utf-8")
    assert [name for name in public_names if f"`{name}`" not in index and name != "__version__"] == []
