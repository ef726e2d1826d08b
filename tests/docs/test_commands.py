"""Commands, options and names of Python on every page exist; `test_typed_runs.py` runs those that bear no mark."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterable
from functools import cache

import pytest
from accelerate.commands.launch import launch_command_parser
from cyclopts import CycloptsError

import consistentee
from consistentee.cli.main import COMMANDS, app
from consistentee.data.recipes import load_recipe
from typed_commands import NEEDS, PAGES, ROOT, blocks, parts, prose, python_blocks, quoted


@cache
def options_of(name: str) -> set[str]:
    """Options that a command takes."""
    return {option for argument in app[name].assemble_argument_collection() for option in argument.names}


@cache
def extras() -> set[str]:
    return set(
        re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    )


def parse(arguments: tuple[str, ...]) -> None:
    """Read a command as the command line does; of an outline look at what it has."""
    assert arguments[0] in COMMANDS
    if "..." in arguments:
        assert {word for word in arguments if word.startswith("--")} <= {*options_of(arguments[0]), "--help"}
    else:
        command, _, _ = app.parse_args(list(arguments), exit_on_error=False, print_error=False)
        assert command is not None


@cache
def check(words: tuple[str, ...]) -> None:
    """Raises if there is no such program, target, option, extra or file."""
    match words:
        case ["consistentee", *arguments]:
            parse(tuple(arguments))
            if "--config" in arguments:
                load_recipe(ROOT / arguments[arguments.index("--config") + 1])
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert targets
            for target in targets:
                assert re.search(rf"^{re.escape(target)}:.* ## ", makefile, re.MULTILINE), target
        case ["pip", "install", place]:
            named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", place)  # from a checkout: it is on no index
            assert named is not None
            assert set((named[1] or "plot").split(",")) <= extras()
        case ["python", script, *options] | [script, *options] if script.startswith("benchmarks/"):
            source = (ROOT / script).read_text(encoding="utf-8")
            assert [word for word in options if word.startswith("--") and f'"{word}"' not in source] == []
        case ["python3", "-m", "venv", _] | [".", "env/bin/activate"] | ["echo", *_]:
            pass
        case ["python", "-m", module, *_]:
            assert module == "http.server"
        case ["accelerate", "launch", *options]:
            known = {name for action in launch_command_parser()._actions for name in action.option_strings}
            program = options.index("consistentee")
            assert {word for word in options[:program] if word.startswith("-")} <= known
            parse(tuple(options[program + 1 :]))
        case ["serve", "run", builder, *_]:
            module, _, name = builder.partition(":")
            source = (ROOT / "src" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            assert f"def {name}(" in source
        case ["curl", address, *_]:
            assert re.match(r"localhost:8000/\w+$", address)
        case ["docker", "build" | "run", *_]:
            assert (ROOT / "Dockerfile").is_file()
        case [".venv/bin/pre-commit", *_]:
            assert "pre-commit" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        case _:
            raise AssertionError("this test knows no such program")


def fault(words: tuple[str, ...], checking: Callable[[tuple[str, ...]], None]) -> str | None:
    """What is wrong with a command."""
    try:
        checking(words)
    except (AssertionError, CycloptsError, OSError) as error:
        return f"{shlex.join(words)}: {error}"
    return None


def faults(lines: Iterable[str], checking: Callable[[tuple[str, ...]], None]) -> list[str]:
    """What is wrong with the commands of some lines."""
    found = [fault(tuple(words), checking) for line in lines for words in parts(line)]
    return [text for text in found if text is not None]


def test_faults_are_found() -> None:
    wrong = (
        "consistentee probed M",
        "consistentee probe M --texts t --nothing",
        "consistentee compare --none ...",
        "make nothing",
        'pip install ".[nothing]"',
        "python benchmarks/nothing.py",
        "python benchmarks/stream_memory.py --nothing",
        "rm -r .",
    )
    assert len(faults(wrong, check)) == len(wrong)


def test_there_is_something_to_check() -> None:
    lines = [line for block in blocks("README.md") for line in block.lines]
    programs = [words[0] for line in lines for words in parts(line)]
    assert all(programs.count(name) >= 2 for name in ("make", "pip", "consistentee"))
    assert sum(len(block.lines) for page in PAGES for block in blocks(page)) > 100


def test_marks_say_one_of_the_reasons() -> None:
    assert {block.needs for page in PAGES for block in blocks(page)} <= {None, *NEEDS}


def test_no_command_hides_in_an_indented_block() -> None:
    """There no mark can stand above it."""
    for page in PAGES:
        assert re.findall(r"^    (?:consistentee|python|make|pip) .*", prose(page), re.MULTILINE) == [], page


@pytest.mark.parametrize("page", PAGES)
def test_what_is_typed_exists(page: str) -> None:
    assert faults((line for block in blocks(page) for line in block.lines), check) == []


@pytest.mark.parametrize("page", PAGES)
def test_what_the_text_quotes_exists(page: str) -> None:
    """A command may be named without all that it needs."""

    def mentioned(words: tuple[str, ...]) -> None:
        if words[0] == "consistentee" and words[1:] != ("--version",):
            parse((*words[1:], "..."))
        elif words[0] != "consistentee":
            check(words)

    assert faults(quoted(page), mentioned) == []


@pytest.mark.parametrize("page", [page for page in PAGES if "experiments" not in page])
def test_options_in_the_text_exist(page: str) -> None:
    known = set().union(*map(options_of, COMMANDS)) | {"--help", "--version"}
    said = re.findall(r"`([^`\n]+)`", prose(page))
    ours = " ".join(
        words
        for words in said
        if not re.match(r"python |docker |accelerate |torchrun |--build-arg|--cpu", words)
    )  # others have options of their own
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", ours)) <= known


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_of_the_page_names_what_exists(page: str) -> None:
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "consistentee":
                assert hasattr(consistentee, node.attr)
