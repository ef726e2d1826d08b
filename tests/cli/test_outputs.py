"""Files that commands write: never one that they read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from consistentee.atomic_files import atomic_path
from consistentee.cli.main import at_home, main
from consistentee.cli.options import RowOptions
from consistentee.cli.terminal import check_outputs

COMMANDS = {
    "predict": "predict MODEL FILE --output FILE",
    "generate": "generate MODEL FILE --output FILE",
    "evaluate": "evaluate MODEL --eval-file FILE --text-columns text --label-column label --json FILE",
    "evaluate texts": "evaluate MODEL --texts FILE --json FILE",
    "calibrate": "calibrate MODEL --file FILE --max-disagreement 0.1 --json FILE",
    "probe": "probe MODEL --texts FILE --json FILE",
    "retrofit": "retrofit MODEL --texts other.txt FILE --output-dir OUT --json FILE",
    "benchmark": "benchmark MODEL --data-file FILE --json FILE",
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["itself", "symbolic link", "hard link"])
def test_what_is_read_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, link: object
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\na,b\n", encoding="utf-8")
    output = file
    if callable(link):
        output = tmp_path / "linked.csv"
        link(file, output)
    command, option = COMMANDS[name].rsplit(" ", 2)[0], COMMANDS[name].split()[-2]
    words = [str(file) if word == "FILE" else word for word in command.split()]
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    assert main([*words, option, str(output)]) == 2
    said = capsys.readouterr().err
    assert f'{option} must be another file than what is read, got "{output}"' in said
    assert file.read_text(encoding="utf-8") == "text,label\na,b\n"
    assert not (tmp_path / "out").exists()


def test_nor_is_standard_input(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a\n", encoding="utf-8")
    command = [sys.executable, "-m", "consistentee", "predict", "MODEL", "-", "--output", str(file)]
    with file.open() as stdin:
        ended = subprocess.run(command, stdin=stdin, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "which is standard input" in ended.stderr
    assert file.read_text() == "a\n"


def test_what_may_be_read_and_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.touch()
    check_outputs({"texts": [str(file)], "output": tmp_path / "new.jsonl", "json_file": None})
    check_outputs({"model": str(tmp_path), "output": file})  # it is replaced, and nothing else is read
    check_outputs({"text": "no file", "output": Path(os.devnull)})


def test_the_users_folder_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert at_home(Path("~/runs")) == tmp_path / "runs"
    assert at_home(RowOptions(data_dir=Path("~/data"), task="~/x")) == RowOptions(
        data_dir=tmp_path / "data", task="~/x"
    )
    for value in (
        Path("runs/~"),
        Path("~nobody-of-that-name.csv"),
        "~/text",
        3,
        None,
        RowOptions(),
        RowOptions,
    ):
        assert at_home(value) == value
    with atomic_path("~/runs/figures.json") as path:
        path.write_text("{}", encoding="utf-8")
    assert (tmp_path / "runs" / "figures.json").read_text() == "{}"
