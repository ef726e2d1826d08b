"""Progress without a terminal: lines at their pace, what they say, and that all long work has them."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from consistentee import progress as module
from consistentee.cli.main import main
from consistentee.progress import Bar, Lines, Pace, Progress, TimedLines, rows_about, show_progress, track
from consistentee.training.train import finetune, train
from quick import quick_config
from tiny import tiny_backbone, tiny_dataset, tiny_full_depth_model, tiny_model, write_csv


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(30.0, clock)


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_every_thirty_seconds(clock: Clock, pace: Pace, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("warm-up", 200, "step", 20, pace, watch=False)
    for step in range(100):
        clock.now += 1.0
        lines.update(figures={"loss": 1 / (step + 1), "accuracy": 0.5})
    assert written(capsys) == [
        "warm-up: 50 of 200 steps, loss 0.033, accuracy 0.500, about 3 min left",
        "warm-up: 80 of 200 steps, loss 0.017, accuracy 0.500, about 2 min left",
        "warm-up: 110 of 200 steps, loss 0.011, accuracy 0.500, about 2 min left",
    ]


def test_many_short_loops_say_as_much_as_a_long_one(
    clock: Clock, pace: Pace, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):  # of 12 seconds each
        lines = Lines(f"pass {number}", 3, "batch", 0, pace, watch=False)
        for _ in range(3):
            clock.now += 4.0
            lines.update()
        lines.close()
    assert [line.split(":")[0] for line in written(capsys)] == ["pass 2", "pass 5", "pass 7"]
    clock.now += 3600  # a pause: nothing was going on
    lines = Lines("later", 3, "batch", 0, pace, watch=False)
    clock.now += 29
    lines.update()
    assert written(capsys) == []
    clock.now += 1
    lines.look()
    assert written(capsys) == ["later: 1 of 3 batches, about 60 s left"]


def test_a_step_that_takes_long_is_looked_after(
    pace: Pace, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, stream = threading.Event(), io.StringIO()

    class Noting(io.StringIO):
        def write(self, text: str) -> int:
            said.set()
            return stream.write(text)

    monkeypatch.setattr(sys, "stderr", Noting())
    lines = Lines("a step", None, "step", 0, pace)
    clock.now += 31
    assert said.wait(60)
    lines.close()
    assert stream.getvalue() == "a step: 0 steps\n"


def test_work_that_is_known_by_its_time(clock: Clock, pace: Pace, capsys: pytest.CaptureFixture[str]) -> None:
    lines = TimedLines("benchmark", 75.0, pace, watch=False)
    for title in ("batch size 1", "batch size 1", "batch size 8", "throughput mode"):
        clock.now += 20.0
        lines.now_doing(title)
    assert written(capsys) == [
        "benchmark, batch size 1: 40 s of about 75 s, 35 s left",
        "benchmark, throughput mode: 80 s of about 75 s, 0 s left",
    ]


def test_a_total_that_nobody_knows_or_that_was_too_low(clock: Clock, pace: Pace) -> None:
    for total in (None, 5):
        lines = Lines("predictions", total, "text", 0, pace, watch=False)
        clock.now += 4
        lines.update(1200)
        assert lines.line() == "predictions: 1,200 texts, 300.0 a second"


def test_a_terminal_has_bars_and_nobody_has_to_have_either(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    kinds: list[type[Progress]] = []
    for stream, disabled in ((Terminal(), "0"), (io.StringIO(), "0"), (Terminal(), "1"), (None, "0")):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TQDM_DISABLE", disabled)
        with show_progress("work", 3) as shower:
            shower.update()
            kinds.append(type(shower))
    assert kinds == [Bar, Lines, Progress, Lines]
    with show_progress("work", 3, shown=False) as shower:
        assert type(shower) is Progress


def test_work_goes_on_where_lines_cannot_be_written(
    pace: Pace, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    lines = Lines("work", 3, "step", 0, pace, watch=False)
    clock.now += 31
    lines.update()


@pytest.mark.parametrize(
    "name, content, rows",
    [("a.txt", "a\nb\n", 2), ("a.csv", "text\na\nb\n", 2), ("a.jsonl", "{}\n", 1), ("a.json", "[]", None)],
)
def test_rows_of_a_file(name: str, content: str, rows: int | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert rows_about(str(tmp_path / name)) == rows
    assert rows_about("-") is None


# All long work has lines: with no pause between them, every step says one.


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(module, "PACE", Pace(0.0))
    yield
    assert not [thread for thread in threading.enumerate() if "_watch" in thread.name and not thread.daemon]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2)


def titles(capsys: pytest.CaptureFixture[str]) -> set[str]:
    return {
        line.split(":")[0].split(" >")[0] for line in written(capsys) if " of " in line or " texts" in line
    }


@pytest.mark.parametrize(
    "how, wanted",
    [
        (train, {"warm-up", "round 0 policy", "round 1 consistent", "round 1 policy"}),
        (finetune, {"epoch 1", "epoch 2", "validation"}),
    ],
)
def test_training(
    how: Callable[..., Path],
    wanted: set[str],
    talkative: None,
    backbone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    how(backbone=backbone, train_data=tiny_dataset(50), output_dir=tmp_path / "m", config=quick_config())
    assert wanted <= titles(capsys)


def test_evaluation_and_prediction(
    talkative: None, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plain = tiny_model(tmp_path / "m", backbone), tiny_full_depth_model(tmp_path / "p", backbone)
    rows = write_csv(tmp_path / "e.csv", tiny_dataset(30))
    arguments: list[Any] = [
        "evaluate",
        model,
        "--eval-file",
        rows,
        "--text-columns",
        "text",
        "--label-column",
        "label",
    ]
    assert main([str(word) for word in (*arguments, "--reference", plain)]) == 0
    assert {"evaluating", "reference"} <= titles(capsys)
    assert main(["predict", str(model), str(rows), "--output", str(tmp_path / "p.jsonl")]) == 0
    assert written(capsys)[-1].startswith("predictions: 30 of 30 texts, about 0 s left")
    assert main(["predict", str(model), str(rows)]) == 0
    assert written(capsys) == []


def test_items_are_counted_when_they_are_done(talkative: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(2), "loop")) == [0, 1]
    assert [line.split(",")[0] for line in written(capsys)] == [
        "loop: 1 of 2 batches",
        "loop: 2 of 2 batches",
    ]
