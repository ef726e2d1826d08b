"""`consistentee train --unlabelled-file`: which texts go in, and where it has no place."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from accelerate.state import PartialState

from consistentee.cli.main import main
from consistentee.cli.train import unlabelled_texts
from consistentee.data.rows import TextDataset
from consistentee.errors import DataError, UsageError
from tiny import tiny_backbone, tiny_dataset, write_csv
from tiny_training import tiny_decoder

QUICK = (
    "--warmup-epochs 1 --rounds 0 --policy-epochs 1 --policy-min-steps 1 --policy-folds 2 --passes 1 "
    "--exit-min-steps 1 --policy-input log_odds --mixed-precision no --text-columns text --label-column label"
)
TRAIN, REPORTED, OTHERS = tiny_dataset(60), tiny_dataset(30, seed=1), tiny_dataset(100, seed=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_csv(folder / "train.csv", TRAIN)
    write_csv(folder / "report.csv", REPORTED)
    write_csv(folder / "others.csv", OTHERS)
    lines = [text for (text,) in [*REPORTED.texts[:4], *TRAIN.texts[:3], *tiny_dataset(20, seed=3).texts]]
    (folder / "more.txt").write_text("".join(f"{line}\n" for line in lines))
    tiny_backbone(folder / "backbone", layers=2)
    return folder


def command(files: Path, output: Path, *more: str) -> list[str]:
    return [
        *("train", "--backbone", str(files / "backbone"), "--output-dir", str(output)),
        *("--train-file", str(files / "train.csv"), "--eval-file", str(files / "report.csv"), *QUICK.split()),
        *more,
    ]


def test_a_table_and_plain_text(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ("--unlabelled-file", str(files / "others.csv"), str(files / "more.txt"))
    assert main(command(files, tmp_path / "m", *texts)) == 0
    out = capsys.readouterr().out
    known = {*TRAIN.texts, *REPORTED.texts}
    expected = set(OTHERS.texts) | set(tiny_dataset(20, seed=3).texts)
    record = json.loads((tmp_path / "m" / "training_record.json").read_text())
    assert record["unlabelled"]["num_texts"] == len(expected - known)
    assert record["unlabelled"]["num_known"] == 3 + sum(text in set(TRAIN.texts) for text in expected)
    assert "4 unlabelled texts are among the rows to report on and are left out." in out
    assert "With unlabelled texts: validation score " in out
    assert record["evaluation"]["num_examples"] == 30


def test_who_speaks_is_known_before_accelerate_sets_processes_up(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, said in (
        ("1", ""),
        ("0", "4 unlabelled texts are among the rows to report on and are left out.\n"),
    ):
        monkeypatch.setenv("RANK", rank)
        assert list(unlabelled_texts([str(files / "more.txt")], None, TRAIN, REPORTED))
        assert capsys.readouterr().out == said
        assert PartialState._shared_state == {}


def test_nothing_asks_for_processes_before_the_run_sets_them_up(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[dict[str, object]] = []

    def begin(**_: object) -> None:
        known.append(dict(PartialState._shared_state))
        raise UsageError("begun")

    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr("consistentee.training.train.train", begin)
    rows = ["--train-file", str(files / "train.csv"), "--eval-file", str(files / "report.csv")]
    rows += ["--text-columns", "text", "--label-column", "label", "--output-dir", str(tmp_path / "out")]
    assert main(["train", "--backbone", str(tiny_backbone(tmp_path / "b", "bert")), *rows]) == 2
    assert known == [{}]


def test_standard_input_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="Standard input can be read by one process only, and there are 2"):
        list(unlabelled_texts(["-"], None, TRAIN, REPORTED))


def test_columns_are_those_of_tables_alone(tmp_path: Path) -> None:
    table, lines = tmp_path / "t.tsv", tmp_path / "lines.txt"
    table.write_text("sentence\tother\none\ta\ntwo\tb\n")
    lines.write_text("three\n")
    found = unlabelled_texts([str(table), str(lines)], ["other"], TRAIN, REPORTED)
    assert list(found) == [("a",), ("b",), ("three",)]
    usual = unlabelled_texts([str(table)], None, TRAIN, REPORTED)
    assert list(usual) == [("one",), ("two",)]


@pytest.mark.parametrize(
    "content, expected",
    [
        ('id,review\n1,"one, two"\n2,three\n', ["one, two", "three"]),
        ("review\tid\none\t1\ntwo\t2\n", ["one", "two"]),
        ('{"id": 1, "review": "one"}\n{"id": 2, "review": "two"}\n', ["one", "two"]),
        ('[{"review": "one"},\n {"review": "two"}]', ["one", "two"]),
        ("a review, one\ntwo\n", ["a review, one", "two"]),
        ("one\ttwo\nthree\n", ["one\ttwo", "three"]),
        ("x" * 200_000 + "\ntwo\n", ["x" * 200_000, "two"]),
    ],
    ids=["csv", "tsv", "json lines", "json array", "plain text", "plain text with tabs", "long lines"],
)
def test_standard_input_is_a_table_where_it_has_the_columns(
    content: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    found = unlabelled_texts(["-"], ["review"], TRAIN, REPORTED)
    assert list(found) == [(text,) for text in expected]


def test_pairs_of_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = TextDataset([("a", "b")], [0], ("n", "y"), "")
    for content in ("q\ty\ta\none\t1\ttwo\n", "one\ttwo\n", "a,q\ntwo,one\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        assert list(unlabelled_texts(["-"], ["q", "a"], pairs, pairs)) == [("one", "two")]


def test_objects_of_standard_input_have_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "one"}\n')))
    with pytest.raises(DataError, match='line 1: There is no column "review"'):
        list(unlabelled_texts(["-"], ["review"], TRAIN, REPORTED))


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ("--method", "deebert", "--unlabelled-file", "F"),
            "--unlabelled-file goes with --method consistent",
        ),
        (("--unlabelled-file", "nowhere.txt"), "There is no such file"),
    ],
)
def test_what_cannot_be(
    more: tuple[str, ...],
    message: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command(files, tmp_path / "m", *more)) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_text_generators_have_none(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    values = ["--backbone", str(tiny_decoder(tmp_path / "decoder")), "--output-dir", str(tmp_path / "m")]
    values += ["--train-file", str(tmp_path / "texts.txt"), "--unlabelled-file", str(files / "more.txt")]
    assert main(["train", *values]) == 2
    assert "goes with rows to classify, and this trains a text generator." in capsys.readouterr().err
