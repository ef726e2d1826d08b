"""What README and CONTRIBUTING tell people to type exists, and the README's commands run, on tiny models."""

from __future__ import annotations

import ast
import io
import re
import shlex
import sys
from pathlib import Path

import datasets
import pytest

import consistentee
from consistentee.cli.main import COMMANDS, app, main
from tiny import tiny_backbone, tiny_classifier, tiny_dataset, tiny_model
from tiny_training import tiny_decoder, tiny_instructions

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md")
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


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
    said = re.findall(r"`([^`\n]+)`", BLOCK.sub("", TEXTS[page]))
    ours = " ".join(
        words for words in said if not words.startswith("python ")
    )  # scripts have options of their own
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", ours)) <= known


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
    places = (ROOT, ROOT / "src" / "consistentee", ROOT / "benchmarks")
    missing = [name for name in {*links, *paths} if not any((place / name).exists() for place in places)]
    assert not missing


@pytest.mark.slow
def test_the_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, one after the other: what they name on the hub are tiny folders here, and tiny data sets."""
    monkeypatch.chdir(tmp_path)
    backbone = tiny_backbone(tmp_path / "google-bert" / "bert-base-uncased", max_position_embeddings=130)
    tiny_decoder(tmp_path / "HuggingFaceTB" / "SmolLM2-135M", max_position_embeddings=640)
    tiny_model(tmp_path / "MODEL", backbone)
    tiny_classifier(tmp_path / "CLASSIFIER", layers=3)
    (tmp_path / "traffic.txt").write_text("".join(f"{text}\n" for (text,) in tiny_dataset(400).texts))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say a:"}\n{"prompt": "say b:"}\n', encoding="utf-8")

    def load_dataset(path: str, config: str | None) -> datasets.DatasetDict:
        if path == "tatsu-lab/alpaca":
            rows = tiny_instructions(40)
            columns = {"instruction": rows.instructions, "input": rows.inputs, "output": rows.references}
            return datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)})
        names = ["entailment", "not_entailment"]
        features = {name: datasets.Value("string") for name in ("sentence1", "sentence2")}
        parts = {}
        for split, count in (("train", 80), ("validation", 30)):
            rows = tiny_dataset(count, seed=count)
            first = [texts[0] for texts in rows.texts]
            columns = {"sentence1": first, "sentence2": first[::-1], "label": rows.labels}
            parts[split] = datasets.Dataset.from_dict(
                columns, features=datasets.Features({**features, "label": datasets.ClassLabel(names=names)})
            )
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("consistentee.cli.benchmark.SECONDS", 3.0)  # in place of the minute
    blocks = [block for kind, block in BLOCK.findall(TEXTS["README.md"]) if not kind]
    lines = [line for block in blocks for line in block.splitlines() if "consistentee " in line]
    assert len(lines) >= 9
    for line in lines:
        before, _, command = line.rpartition(" | ")
        said = shlex.split(before, comments=True)[1:]
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{text}\n" for text in said)))
        code = main(shlex.split(command, comments=True)[1:])
        assert code == 0, (line, capsys.readouterr().err)
    assert all((tmp_path / name).is_file() for name in ("rte.png", "rte.html", "speed.json", "speed.png"))


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
