"""Which precision is recommended: the fastest that keeps all labels, on enough inputs, and by more than noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from consistentee.cli import main as cli
from consistentee.data.tokenization import encode_texts
from consistentee.evaluation.precision import FEWEST_ROWS, candidates, choose, recommend
from consistentee.evaluation.speed_classification import model_workload
from consistentee.inference import timing
from consistentee.inference.encoder.backend import Answers
from consistentee.pipelines.classifier import Engine
from tiny import tiny_backbone, tiny_dataset, tiny_model

REFERENCE = ("torch", "float32")
TEXTS = tiny_dataset(FEWEST_ROWS, seed=5).texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("precision")
    return tiny_model(root / "model", tiny_backbone(root / "backbone"), initial_exit_bias=0.0)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, device="cpu")


class Clock:
    """A clock that passes advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def pass_of(self, seconds: float, labels: list[int]) -> Callable[[], Answers]:
        def run() -> Answers:
            self.now += seconds
            return Answers(labels, [1.0] * len(labels), [1] * len(labels), 1, 1)

        return run


@pytest.mark.parametrize(
    "fast,labels,expected",
    [
        (0.5, [0, 1, 1, 0], "int8"),
        (0.5, [0, 1, 1, 1], "float32"),  # a label is lost
        (0.99, [0, 1, 1, 0], "float32"),  # no faster than the clock is exact
        (2.0, [0, 1, 1, 0], "float32"),
    ],
)
def test_the_fastest_that_keeps_the_labels(
    monkeypatch: pytest.MonkeyPatch, fast: float, labels: list[int], expected: str
) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    passes = {REFERENCE: clock.pass_of(1.0, [0, 1, 1, 0]), ("torch", "int8"): clock.pass_of(fast, labels)}
    choice = choose(passes, REFERENCE, 4)
    assert (choice.backend, choice.dtype) == ("torch", expected)
    reference, other = choice.trials
    assert (reference.instances_per_second, reference.labels_kept) == (4, 1)
    assert other.instances_per_second == pytest.approx(4 / fast)
    assert other.labels_kept == (1 if labels == [0, 1, 1, 0] else 0.75)
    assert f"dtype {expected}. On 4 inputs: torch float32 4/s, torch int8" in str(choice)


def test_recommendation_for_a_model(engine: Engine) -> None:
    rows = encode_texts(TEXTS, engine.saved.tokenizer, engine.saved.max_length)[0]
    choice = recommend(engine.saved, rows)
    assert choice.rows == FEWEST_ROWS
    tried = [(trial.backend, trial.dtype) for trial in choice.trials]
    assert tried == list(candidates(engine.saved.model, "auto", "auto"))
    assert tried[0] == REFERENCE
    kept = {(trial.backend, trial.dtype): trial.labels_kept for trial in choice.trials}
    assert kept[choice.backend, choice.dtype] == 1
    only = recommend(engine.saved, rows, dtype="float32", backend="torch")
    assert [(trial.backend, trial.dtype) for trial in only.trials] == [REFERENCE]


def test_too_few_rows_and_impossible_wishes(engine: Engine) -> None:
    rows = encode_texts(TEXTS, engine.saved.tokenizer, engine.saved.max_length)[0]
    with pytest.raises(
        ValueError, match=f'"auto" needs at least {FEWEST_ROWS} rows .* got {FEWEST_ROWS - 1}'
    ):
        recommend(engine.saved, rows[:-1])
    with pytest.raises(
        ValueError, match=r'does not run in dtype "auto" on backend "tensorrt" here. It runs in: torch'
    ):
        recommend(engine.saved, rows, backend="tensorrt")


def test_a_workload_runs_what_is_recommended(folder: Path) -> None:
    work = model_workload(str(folder), iter(TEXTS), rows=512, device="cpu", dtype="auto", backend="torch")
    assert work.choice is not None
    assert (work.engine.backend.name, work.engine.backend.dtype) == ("torch", work.choice.dtype)
    assert model_workload(str(folder), iter(TEXTS), rows=512, device="cpu").choice is None


def test_the_benchmark_says_what_it_recommends(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, figures = tmp_path / "texts.txt", tmp_path / "speed.json"
    texts.write_text("".join(f"{text}\n" for (text,) in TEXTS), encoding="utf-8")
    command = ["benchmark", str(folder), "--data-file", str(texts), "--device", "cpu", "--dtype", "auto"]
    assert cli.main([*command, "--batch-sizes", "64", "--repeats", "1", "--json", str(figures)]) == 0
    choice = json.loads(figures.read_text(encoding="utf-8"))["choice"]
    assert (choice["backend"], choice["rows"]) == ("torch", FEWEST_ROWS)
    assert f"Recommended: backend torch, dtype {choice['dtype']}. On 128 inputs" in capsys.readouterr().out
