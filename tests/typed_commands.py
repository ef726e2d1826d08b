"""What the pages tell people to type: blocks of commands with their marks, and commands that the text quotes.

A block that no test runs says why in the line above it: `<!-- needs: hub -->`. `NEEDS` has the reasons.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
)
NEEDS = {
    "hub": "models and data sets of the hub, or a comparison of such",
    "GPU": "a CUDA device",
    "time": "minutes to days on real models; other tests run the command on tiny ones, shortened",
    "docker": "a container engine",
    "machines": "several GPUs or machines; tests of their own start two processes",
    "ray": "a Ray cluster, which tests of their own start",
    "npm": "packages of npm, which tests of their own take from `tests/js`",
    "demo": "what `make demo` leaves",
}
BLOCK = re.compile(r"^(?:<!-- needs: ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of commands.

    Args:
        page: that has it.
        needs: the mark above it.
        lines: commands, continued lines joined; of blocks that show output too, those after a `$`.
    """

    page: str
    needs: str | None
    lines: tuple[str, ...]


def text_of(page: str) -> str:
    """A page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Blocks of commands: those of no language."""
    found: list[Block] = []
    for needs, language, content in BLOCK.findall(text_of(page)):
        lines = re.sub(r"\\\n\s*", "", content).splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        if not language:
            found.append(Block(page, needs or None, tuple(line for line in lines if line.strip())))
    return found


def python_blocks(page: str) -> list[str]:
    """Blocks of Python."""
    return [content for _, language, content in BLOCK.findall(text_of(page)) if language == "python"]


def prose(page: str) -> str:
    """The rest of a page."""
    return BLOCK.sub("", text_of(page))


def quoted(page: str) -> list[str]:
    """Commands that the text quotes, but for outlines with dots or brackets."""
    found = re.findall(r"`((?:consistentee|make|HF_HUB_OFFLINE=0) [^`]+)`", prose(page))
    return [" ".join(text.split()) for text in found if not re.search(r"\.\.\.|\[-", text)]


def parts(line: str) -> list[list[str]]:
    """Commands of a line (parts of a pipe, or one after the other) as words, without assignments before them."""
    words = [shlex.split(part, comments=True) for part in re.split(r" \| | && ", line)]
    return [[word for word in part if not re.fullmatch(r"[A-Z_]+=.*", word)] for part in words if part]
