"""A run that was killed, in whatever phase, ends where one that was not does: the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import interrupted_runs
from quick import read_record, weight_bytes
from tiny import tiny_backbone

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2, hidden_dropout_prob=0.1)


@pytest.fixture(scope="module")
def folder(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all the runs of `interrupted_runs` have left their models."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(TESTS / "interrupted_runs.py"), str(backbone), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((folder / "outcomes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", interrupted_runs.CASES)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    name: str, folder: Path, outcomes: dict[str, list[dict[str, Any]]]
) -> None:
    case = interrupted_runs.CASES[name]
    killed, resumed = outcomes[name]
    assert killed["exit"] == (
        -signal.SIGKILL if case.signal == signal.SIGKILL else interrupted_runs.INTERRUPTED
    )
    assert resumed["exit"] == 0
    assert resumed["checkpoints"] == []
    reference = folder / ("finetune" if case.how is interrupted_runs.finetune else "train")
    assert weight_bytes(folder / name) == weight_bytes(reference)
    assert read_record(folder / name) == read_record(reference)
    assert (folder / name / "config.json").read_text() == (reference / "config.json").read_text()


@pytest.mark.parametrize(
    "name,step",
    [
        ("warm-up", 3),
        ("warm-up, Ctrl-C", 3),
        ("policy", 4),
        ("best weights kept, not yet a checkpoint", 4),
        ("policy fitted", 4),
        ("consistent phase", 6),
        ("final policy", 8),
        ("writing the model", 8),
        ("fine-tuning", 4),
    ],
)
def test_it_goes_on_from_the_last_checkpoint(
    name: str, step: int, outcomes: dict[str, list[dict[str, Any]]]
) -> None:
    assert f"Resumed at step {step} of 8." in outcomes[name][1]["said"].splitlines()


def test_what_was_left_of_unfinished_writing(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """Proof that the kills came where they were meant to."""
    assert any(name.endswith(".partial") for name in outcomes["writing a checkpoint"][0]["checkpoints"])
    assert "model" in outcomes["writing the model"][0]["checkpoints"]
    assert "holds a finished model: nothing to resume." in outcomes["model in place"][1]["said"]


def test_the_runs_were_of_all_phases(folder: Path, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    assert [run["exit"] for name in interrupted_runs.UNINTERRUPTED for run in outcomes[name]] == [0, 0]
    assert [entry["step"] for entry in read_record(folder / "train")["history"]] == [4, 8]
