"""Folders with files that are cut off or of the wrong kind: one line that names the model, from every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from consistentee.cli.main import main
from saved_generators import generator_folder
from tiny import tiny_backbone, tiny_dataset, tiny_model, write_csv

Break = Callable[[Path], object]


@dataclass
class Files:
    """What the commands work on."""

    root: Path
    rows: Path
    prompts: Path
    references: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("whole")
    tiny_model(root / "classifier", tiny_backbone(root / "backbone"))
    generator_folder(root / "generator", thresholds={"static": 2.0})
    for name in ("classifier", "generator"):
        record = {"kind": "early_exit", "thresholds": {"entropy": 0.3, "static": 2.0}}
        (root / name / "training_record.json").write_text(json.dumps(record), encoding="utf-8")
    prompts, references = root / "prompts.txt", root / "references.jsonl"
    prompts.write_text("one\ntwo\n", encoding="utf-8")
    lines = [json.dumps({"instruction": f"do {row}", "output": f"done {row}"}) + "\n" for row in range(6)]
    references.write_text("".join(lines), encoding="utf-8")
    return Files(root, write_csv(root / "rows.csv", tiny_dataset(20)), prompts, references)


def cut(name: str, share: float = 0.6) -> Break:
    """The file as an interrupted copy leaves it."""

    def run(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return run


def text(name: str, content: str) -> Break:
    """Another content."""
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def values(name: str, **more: Any) -> Break:
    """Other values of a JSON file."""

    def run(folder: Path) -> None:
        known = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**known, **more}), encoding="utf-8")

    return run


BREAKS: dict[str, tuple[Break, str]] = {
    "weights cut": (cut("model.safetensors"), "model.safetensors is incomplete or damaged"),
    "weights empty": (cut("model.safetensors", 0), "Copy it again."),
    "weights of another": (
        values("config.json", policy_hidden_size=7),
        "does not fit its config.json",
    ),
    "record a list": (text("training_record.json", "[1]"), "must hold a JSON object. Restore it"),
    "record cut": (cut("training_record.json"), "is not valid JSON"),
    "record's thresholds": (
        values("training_record.json", thresholds=[1]),
        "thresholds must be numbers by the name",
    ),
    "record's threshold": (
        values("training_record.json", thresholds={"static": "two"}),
        "thresholds.static must be a",
    ),
    "record's settings": (
        values("training_record.json", config=[1]),
        "config must be settings by name, got [1]",
    ),
    "config a list": (text("config.json", "[1]"), "config.json"),
    "config null": (text("config.json", "null"), "config.json"),
    "config cut": (cut("config.json"), "config.json"),
    "threshold a text": (values("config.json", threshold="high"), "threshold must be a number, got 'high'"),
    "threshold a list": (values("config.json", threshold=[0.5]), "threshold must be a number, got [0.5]"),
    "length a text": (
        values("config.json", max_length="x", max_sequence_length="x"),
        "length must be a whole number",
    ),
    "part a list": (
        values("config.json", encoder_config=[1], decoder_config=[1]),
        "holds a value of the wrong kind",
    ),
    "labels a list": (values("config.json", id2label=[1]), "holds a value of the wrong kind"),
    "tokenizer cut": (cut("tokenizer.json"), "one of its JSON files is incomplete or damaged"),
    "tokenizer a list": (text("tokenizer.json", "[]"), "holds a value of the wrong kind"),
}
COMMANDS = {
    "classifier": (
        "predict {broken} {prompts}",
        "evaluate {broken} --eval-file {rows} --text-columns text --label-column label",
        "evaluate {whole} --eval-file {rows} --text-columns text --label-column label --reference {broken}",
        "benchmark {broken} --data-file {prompts} --repeats 1 --batch-sizes 1",
    ),
    "generator": (
        "generate {broken} --prompt p --max-new-tokens 2",
        "evaluate {broken} --eval-file {references} --max-new-tokens 2 --criterion static",
        "evaluate {whole} --eval-file {references} --max-new-tokens 2 --reference {broken}",
    ),
}


@pytest.mark.parametrize("kind", list(COMMANDS))
@pytest.mark.parametrize("name", list(BREAKS))
def test_are_told_on_one_line(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    broken = Path(shutil.copytree(files.root / kind, tmp_path / "broken-model"))
    change, message = BREAKS[name]
    change(broken)
    for command in COMMANDS[kind]:
        places = {**vars(files), "broken": broken, "whole": files.root / kind}
        code = main(command.format(**places).split())
        told = capsys.readouterr().err
        assert code == 1, told
        assert told.count("\n") == 1, told
        assert "broken-model" in told
        assert message in told
        assert "--debug" not in told


def test_saved_prompt_templates(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Path(shutil.copytree(files.root / "generator", tmp_path / "broken-model"))
    values("config.json", prompt_template={"name": 3})(broken)
    assert main(["generate", str(broken), "--prompt", "p"]) == 1
    told = capsys.readouterr().err
    assert f'Model "{broken}": A saved prompt template must be of kind chat' in told


@pytest.mark.parametrize(
    "change, message",
    [
        (cut("model.safetensors"), "model.safetensors is incomplete or damaged"),
        (text("config.json", "null"), "holds a value of the wrong kind"),
        (cut("tokenizer.json"), "one of its JSON files is incomplete or damaged"),
    ],
)
def test_backbones_too(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Break, message: str
) -> None:
    broken = Path(shutil.copytree(files.root / "backbone", tmp_path / "broken-model"))
    change(broken)
    columns = ["--text-columns", "text", "--label-column", "label", "--output-dir", str(tmp_path / "o")]
    assert main(["train", "--backbone", str(broken), "--train-file", str(files.rows), *columns]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told
    assert "broken-model" in told
    assert message in told
