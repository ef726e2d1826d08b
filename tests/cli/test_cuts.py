"""Texts that are too long are cut, counted and named: in training, evaluation, prediction and generation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from consistentee.backbones.limits import say_cuts
from consistentee.cli.main import main
from consistentee.data.rows import TextDataset
from consistentee.data.tokenization import encode_texts, tokenize
from consistentee.evaluation.classification import evaluate_model, evaluate_plain
from consistentee.evaluation.speed_classification import model_workload
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.record import read_record
from consistentee.pipelines.classifier import Engine
from consistentee.training.train import finetune, train
from quick import quick_config
from tiny import (
    LABEL_NAMES,
    tiny_backbone,
    tiny_dataset,
    tiny_full_depth_model,
    tiny_model,
    tiny_tokenizer,
    write_csv,
)


def with_long_rows(rows: int, long: int) -> TextDataset:
    """Short texts, the first few of them made long."""
    data = tiny_dataset(rows)
    texts = [(text * 20,) if row < long else (text,) for row, (text,) in enumerate(data.texts)]
    return TextDataset(texts, data.labels, LABEL_NAMES, "with long rows")


class Slow:
    """A tokenizer that gives no `Encoding`, as those written in Python."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        encoded = self._tokenizer(*texts, **options)
        encoded._encodings = None
        return encoded


@pytest.mark.parametrize("slow", [False, True])
def test_a_row_is_cut_if_something_of_it_is_left_out(slow: bool) -> None:
    fast = tiny_tokenizer()
    tokenizer: Any = Slow(fast) if slow else fast
    texts = [("good " * count,) for count in (1, 5, 6, 7, 40)]  # two special tokens
    rows, cut = encode_texts(texts, tokenizer, 8)
    assert cut == [False, False, False, True, True]
    assert [len(row["input_ids"]) for row in rows] == [3, 7, 8, 8, 8]
    assert rows == encode_texts(texts, tokenizer, 8)[0]
    pairs = [("good", "bad " * count) for count in (3, 4, 5, 50)]  # three special tokens
    assert encode_texts(pairs, tokenizer, 8)[1] == [False, False, True, True]
    assert encode_texts([("good " * 50, "bad"), ("a " * 30, "b " * 30)], tokenizer, 9)[1] == [True, True]
    assert encode_texts([], tokenizer, 8) == ([], [])


def test_data_sets_know_how_many_rows_were_cut() -> None:
    rows = tokenize(with_long_rows(2500, 3), tiny_tokenizer(), 40)
    assert (len(rows), rows.num_truncated) == (2500, 3)


@pytest.mark.parametrize("learn", [train, finetune])
def test_training_says_and_records_it(tmp_path: Path, caplog: pytest.LogCaptureFixture, learn: Any) -> None:
    given: Any = {
        "backbone": tiny_backbone(tmp_path / "backbone"),
        "config": quick_config(max_length=40, rounds=0),
    }
    learn(**given, train_data=with_long_rows(32, 3), output_dir=tmp_path / "cut")
    assert caplog.messages == [
        "3 of 32 texts to train on were longer than 40 tokens and were cut. "
        "Train with a higher --max-length to keep more of them."
    ]
    assert read_record(tmp_path / "cut")["data"]["truncated_rows"] == 3
    caplog.clear()
    learn(**given, train_data=tiny_dataset(32), output_dir=tmp_path / "whole")
    assert caplog.messages == []
    assert read_record(tmp_path / "whole")["data"]["truncated_rows"] == 0


def test_of_several_processes_one_says_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        say_cuts(1, 2, f"texts of process {rank}", "Do.")
    assert caplog.messages == ["1 of 2 texts of process 0 and were cut. Do."]


def test_evaluation_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    exits = load_model(
        tiny_model(tmp_path / "exits", backbone, max_length=40), LoadedClassifier, device="cpu"
    )
    plain = load_model(tiny_full_depth_model(tmp_path / "plain", backbone), LoadedClassifier, device="cpu")
    evaluation = evaluate_model(exits, with_long_rows(16, 2))
    assert evaluation.num_truncated == evaluation.to_dict()["num_truncated"] == 2
    assert "2 of 16 texts were longer than the 40 tokens of model" in caplog.text
    caplog.clear()
    evaluate_plain(plain, with_long_rows(16, 1))
    assert "1 of 16 texts were longer than the 64 tokens of model" in caplog.text
    caplog.clear()
    assert evaluate_model(exits, tiny_dataset(16), reference=plain).num_truncated == 0
    assert caplog.messages == []


def test_benchmarks_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_model(tmp_path / "exits", tiny_backbone(tmp_path / "backbone"), max_length=40)
    model_workload(str(folder), with_long_rows(16, 2).texts, rows=16, device="cpu")
    assert "2 of 16 texts were longer than the model's 40 tokens and were cut." in caplog.text


def test_predictions_tell(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "exits", tiny_backbone(tmp_path / "backbone"), max_length=40)
    engine = Engine.from_pretrained(folder, device="cpu")
    texts = [text for (text,) in with_long_rows(90, 2).texts]
    for batch_size in (None, 1, 4):
        found = engine.predict(texts, batch_size=batch_size)
        assert [prediction.truncated for prediction in found] == [True, True, *[False] * 88]


def test_predict_says_it_on_standard_error(tmp_path: Path) -> None:
    """In a process of its own: no handler but Python's last resort."""
    folder = tiny_model(tmp_path / "exits", tiny_backbone(tmp_path / "backbone"), max_length=40)
    data = write_csv(tmp_path / "rows.csv", with_long_rows(12, 2))
    done = subprocess.run(
        [sys.executable, "-m", "consistentee", "predict", str(folder), str(data), "--device", "cpu"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["truncated"] for line in lines] == [True, True, *[False] * 10]
    assert done.stderr.splitlines() == [
        "2 of 12 texts were longer than the model's 40 tokens and were cut. "
        "Train with a higher --max-length to keep more of them."
    ]


def test_nothing_is_said_of_texts_that_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model(tmp_path / "exits", tiny_backbone(tmp_path / "backbone"), max_length=40)
    assert main(["predict", str(folder), str(write_csv(tmp_path / "rows.csv", tiny_dataset(8)))]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["truncated"] for line in captured.out.splitlines()] == [False] * 8
    assert (captured.err, caplog.messages) == ("", [])
