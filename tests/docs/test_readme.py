"""What README and CONTRIBUTING tell people to type exists: commands, options, extras, make targets, names, files."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import consistentee
from consistentee.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md")
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = ("train", "finetune", "evaluate", "predict", "generate", "benchmark")


def typed(page: str) -> list[list[str]]:
    """Every command of a page as words: lines of its blocks, parts of pipes, and what the text quotes."""
    blocks = [line for kind, block in BLOCK.findall(TEXTS[page]) if not kind for line in block.splitlines()]
    quoted = re.findall(
        r"`(consistentee [^`]+|make [^`]+|HF_HUB_OFFLINE=0 [^`]+)`", BLOCK.sub("", TEXTS[page])
    )
    lines = [*blocks, *(" ".join(text.split()) for text in quoted)]
    parts = [part for line in lines for part in line.split(" | ")]
    words = [shlex.split(part, comments=True) for part in parts]
    return [[word for word in part if not re.match(r"\w+=", word)] for part in words if part]


TYPED = [(page, words) for page in PAGES for words in typed(page)]


def test_there_is_something_to_check() -> None:
    programs = [words[0] for _, words in TYPED]
    assert all(programs.count(name) >= 2 for name in ("make", "pip", "consistentee"))


@pytest.mark.parametrize("page, words", TYPED, ids=[" ".join(words)[:60] for _, words in TYPED])
def test_what_is_typed_exists(page: str, words: list[str]) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    match words:
        case ["consistentee", *arguments]:
            command, _, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
            assert arguments[0] in COMMANDS
            assert command is not None
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert targets
            for target in targets:
                assert re.search(rf"^{re.escape(target)}:.* ## ", makefile, re.MULTILINE), target
        case ["pip", "install", place]:
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", place)  # from a checkout: it is on no index
            assert extras is not None
            assert set((extras[1] or "plot").split(",")) <= set(project["optional-dependencies"])
        case ["echo", *_]:
            pass
        case [".venv/bin/pre-commit", *_]:
            assert "pre-commit" in " ".join(project["optional-dependencies"]["dev"])
        case _:
            pytest.fail(f"{page} says {shlex.join(words)!r}, and this test knows no such program.")


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_exist(page: str) -> None:
    known = {
        name
        for command in COMMANDS
        for argument in app[command].assemble_argument_collection()
        for name in argument.names
    } | {"--help"}
    named = set(
        re.findall(
            r"(?<![\w-])--[a-z][\w-]+", " ".join(re.findall(r"`([^`\n]+)`", BLOCK.sub("", TEXTS[page])))
        )
    )
    assert named <= known


@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_page_names_what_exists(page: str) -> None:
    for kind, block in BLOCK.findall(TEXTS[page]):
        if kind == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "consistentee":
                    assert hasattr(consistentee, node.attr)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", TEXTS[page])
    paths = re.findall(r"`((?:[\w.-]+/)+|[\w./-]+\.(?:toml|txt|md|py|yaml)|\.ci/run)`", TEXTS[page])
    missing = [name for name in {*links, *paths} if not (ROOT / name).exists()]
    assert not missing
