"""What the demo sizes, says and prints, without its downloads."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

import demo
from consistentee.cli.main import app
from consistentee.data.rows import TextDataset
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine, Prediction
from tiny import tiny_backbone, tiny_dataset, tiny_model


def test_a_dozen_sentences_from_all_layers() -> None:
    rows = TextDataset(
        [(f"Not [bold]{n}[/bold]" + " and so on" * 20,) for n in range(40)],
        [n % 2 for n in range(40)],
        ("no", "yes"),
        "x",
    )
    predictions = [Prediction("yes", 0.75, 1 if n < 37 else 2 + n % 3) for n in range(40)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo.sentence_table(rows, predictions))
    lines = console.export_text().splitlines()[1:]
    layers = [int(line.split()[0]) for line in lines]
    assert len(layers) == demo.SENTENCES
    assert layers == sorted(layers)
    assert set(layers) == {1, 2, 3, 4}
    assert "[bold]" in lines[0]


@pytest.mark.parametrize(
    "step, rows", [(0.0001, demo.TRAIN_ROWS), (0.02, 2600), (0.04, 1100), (1.0, demo.LEAST_TRAIN_ROWS)]
)
def test_rows_follow_the_machine(step: float, rows: int) -> None:
    assert demo.affordable_rows(step) == rows


def test_a_step_is_tried(tmp_path: Path) -> None:
    cost = demo.seconds_of_a_row(tiny_backbone(tmp_path / "backbone"), tiny_dataset(200))
    assert 0 < cost < 10


def test_time_is_told_beside_layers(tmp_path: Path) -> None:
    engine = Engine(
        load_model(tiny_model(tmp_path / "m", tiny_backbone(tmp_path / "b")), LoadedClassifier, device="cpu")
    )
    texts = tiny_dataset(12).texts
    told = demo.time_saved(engine, texts)
    assert told.startswith("12 sentences take ")
    layers = [prediction.exit_layer for prediction in engine.predict(texts)]
    assert f"with {engine.backend.num_layers * 12 / sum(layers):.2f}x fewer layers, float32" in told


def test_what_to_type_next_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = ["model", "plain", "backbone", "train.tsv", "evaluation.tsv"]
    folder = Path("my demo")
    for name in made:
        (folder / name).mkdir(parents=True)
    commands = demo.next_commands(folder, ".venv/bin/consistentee", 0.5)
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command.rpartition("| ")[2])
        assert words[0] == ".venv/bin/consistentee"
        app.parse_args(words[1:], exit_on_error=False, print_error=False)
        paths = [word for word in words if word.startswith("my demo/")]
        assert paths
        assert all(Path(path).exists() or path == "my demo/yours" for path in paths)


def test_a_demo_takes_no_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").touch()
    with pytest.raises(FileExistsError, match=r'holds "train\.tsv", which no run'):
        demo.claim_folder(tmp_path)
    (tmp_path / "train.tsv").unlink()
    demo.claim_folder(tmp_path)
    (tmp_path / "train.tsv").touch()
    demo.claim_folder(tmp_path)  # its own by now


@pytest.mark.parametrize(
    "words, code, message",
    [
        ("--seed -3", 2, "seed must be from 0 to 4294967295, got -3"),
        ("--output-dir full", 1, "demo: Output folder full holds"),
    ],
)
def test_failures_are_a_line(
    words: str,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [demo.__file__, *words.split()])
    for setting in ("_quieten_libraries", "limit_threads"):  # of the whole process
        monkeypatch.setattr(demo, setting, lambda: None)
    with pytest.raises(SystemExit) as ended:
        sys.exit(demo.main())
    assert ended.value.code == code
    *_, line = capsys.readouterr().err.splitlines()
    assert message in line


class TestProgram:
    @pytest.fixture
    def installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An environment below the folder that the shell stands in."""
        script = tmp_path / ".venv" / "bin" / "consistentee"
        script.parent.mkdir(parents=True)
        script.write_text("#!/bin/sh\n", encoding="utf-8")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
        monkeypatch.setenv("PATH", os.defpath)
        monkeypatch.chdir(tmp_path)
        return script

    def test_off_the_path_it_is_called_by_its_place(self, installed: Path) -> None:
        assert demo.program() == ".venv/bin/consistentee"
        os.chdir(installed.parent)
        assert demo.program() == "./consistentee"
        os.chdir("/")
        assert demo.program() == shlex.quote(str(installed.relative_to("/")))

    def test_on_the_path_by_its_name(self, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(installed.parent))
        assert demo.program() == "consistentee"

    def test_another_one_on_the_path_is_not_taken(
        self, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = tmp_path / "other"
        other.mkdir()
        shutil.copy(installed, other)
        monkeypatch.setenv("PATH", str(other))
        assert demo.program() == ".venv/bin/consistentee"

    def test_without_a_script_by_its_interpreter(self, installed: Path) -> None:
        installed.unlink()
        assert demo.program() == ".venv/bin/python -m consistentee"
