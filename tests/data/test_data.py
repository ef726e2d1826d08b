"""Labelled texts: tasks from the hub and from local folders, own files, splits, and the errors about wrong rows."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from consistentee.config import ClassificationTrainingConfig
from consistentee.data.classification import NotedLabels, load_files, load_task
from consistentee.data.files import read_texts
from consistentee.data.labels import match_labels
from consistentee.data.rows import TextDataset, stratified_split
from consistentee.data.tasks import get_task
from consistentee.errors import DataError


def write(path: Path, *lines: str, end: str = "\n", start: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start + "".join(line + end for line in lines)).encode())
    return path


def write_jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    return write(path, *(json.dumps(row) for row in rows))


# TextDataset


def test_text_dataset_selects_rows() -> None:
    data = TextDataset([("a",), ("b",), ("c",)], [0, 1, 0], ("n", "y"), "here")
    assert len(data) == 3
    assert data.select([2, 0]) == TextDataset([("c",), ("a",)], [0, 0], ("n", "y"), "here")
    with pytest.raises(ValueError, match="equally many, got 1 and 2"):
        TextDataset([("a",)], [0, 1], ("n", "y"), "here")


def test_text_dataset_takes_strings_and_what_is_like_a_list() -> None:
    data = TextDataset([("a",), ("b",)], [0, 1], ("n", "y"), "here")
    assert TextDataset(cast(Any, ["a", "b"]), [0, 1], ("n", "y"), "here") == data
    again = TextDataset(cast(Any, pandas.Series(["a", "b"])), cast(Any, np.array([0, 1])), ("n", "y"), "here")
    assert again == data
    assert again.fingerprint() == data.fingerprint()
    assert len(data.select([])) == 0


@pytest.mark.parametrize(
    "texts, labels, message",
    [
        ("ab", [0, 1], "texts must be a list of texts, got one text. Put it into a list."),
        (
            {"a": 1, "b": 2},
            [0, 1],
            "texts must be a list of texts, got columns by name (dict). Give a column",
        ),
        ([("a",), (None,)], [0, 1], "here, row 2: Texts must be strings or pairs of strings, got (None,)."),
        (
            [("a",), ("a", "b", "c")],
            [0, 1],
            "here, row 2: Texts must be strings or pairs of strings, got ('a',",
        ),
        (
            [("a",), ("a", "b")],
            [0, 1],
            "here, row 2: Rows must be all single texts or all pairs, got a pair where",
        ),
        ([("a",), ("b",)], [0, -1], "here, row 2: The label must be a class index from 0 to 1, got -1. Give"),
        ([("a",), ("b",)], [2, 1], "here, row 1: The label must be a class index from 0 to 1, got 2."),
        ([("a",), ("b",)], [0, "y"], "here, row 2: The label must be a class index from 0 to 1, got 'y'."),
        ([("a",), ("b",)], [0, None], "here, row 2: The label must be a class index from 0 to 1, got None."),
    ],
)
def test_rows_that_are_none(texts: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TextDataset(texts, labels, ("n", "y"), "here")


def test_class_names_in_a_list_stay_what_they_are() -> None:
    """As `features["label"].names` of `datasets` gives them."""
    data = TextDataset([("a",), ("b",), ("c",)], [0, 1, 0], cast(Any, ["n", "y"]), "here")
    assert data.label_names == data.select([0, 1, 0]).label_names == ("n", "y")
    assert data.select([2]).texts == [("c",)]


def test_max_samples_keeps_the_classes_their_shares_and_the_rows_their_order() -> None:
    labels = [0] * 60 + [1] * 30 + [2] * 9 + [3]
    data = TextDataset([(str(row),) for row in range(100)], labels, tuple("abcd"), "here")
    few = data.max_samples(20, seed=1)
    assert Counter(few.labels) == {0: 12, 1: 6, 2: 1, 3: 1}
    order = [int(text) for (text,) in few.texts]
    assert order == sorted(order)
    assert few == data.max_samples(20, seed=1) != data.max_samples(20, seed=2)
    assert [len(data.max_samples(count)) for count in (1, 2, 4, 5, 99)] == [1, 2, 4, 5, 99]
    assert data.max_samples(None) is data.max_samples(100) is data
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        data.max_samples(0)


def test_fingerprint_of_half_a_surrogate_pair() -> None:
    data = TextDataset([("a\ud83d",), ("b",)], [0, 1], ("n", "y"), "here")
    assert data.fingerprint() != data.select([1, 1]).fingerprint()


# stratified_split


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_has_every_class_in_both_parts(fraction: float, seed: int) -> None:
    labels = [0] * 100 + [1] * 37 + [2] * 2 + [3] + [5] * 10  # class 4 has no row
    kept, held = stratified_split(labels, fraction, seed)
    assert sorted(kept + held) == list(range(len(labels)))
    assert (kept, held) == (sorted(kept), sorted(held))
    assert {labels[row] for row in kept} == {0, 1, 2, 3, 5}
    assert {labels[row] for row in held} == {0, 1, 2, 5}
    assert (kept, held) == stratified_split(labels, fraction, seed)


def test_split_keeps_shares_and_size() -> None:
    labels = [index % 20 for index in range(280)]  # 14 rows of each: a tenth is 1.4 of them, 28 of all
    _, held = stratified_split(labels, 0.1, seed=0)
    assert len(held) == 28
    assert set(Counter(labels[row] for row in held).values()) == {1, 2}
    assert held != stratified_split(labels, 0.1, seed=1)[1]


def test_split_errors() -> None:
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\), got 1\.0"):
        stratified_split([0, 0], 1.0, 0)
    with pytest.raises(DataError, match="3 rows without two of one class cannot be split"):
        stratified_split([0, 1, 2], 0.5, 0)
    with pytest.raises(DataError, match="0 rows"):
        stratified_split([], 0.5, 0)


# Tasks from local folders


def glue_folder(root: Path) -> Path:
    """A folder like GLUE's download, two or three rows a file."""
    for split in ("train", "dev"):
        write(root / f"SST-2/{split}.tsv", "sentence\tlabel", f'a "{split} \t1', "b\t0")
        mrpc = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        write(root / f"MRPC/{split}.tsv", mrpc, f'1\t7\t8\t"a {split}\tb "', "0\t7\t8\tc\td", start="\ufeff")
        entailment = ("0\ta\tb\tnot_entailment", f"1\t{split}\td\tentailment")
        write(root / f"RTE/{split}.tsv", "index\tsentence1\tsentence2\tlabel", *entailment)
        write(root / f"QNLI/{split}.tsv", "index\tquestion\tsentence\tlabel", *entailment)
        qqp = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
        write(root / f"QQP/{split}.tsv", qqp, f"0\t1\t2\t{split}\tb\t1", "0\t1\t2\tc\td\t0")
        mnli = "index\tpromptID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label"
        rows = (f"0\t1\tg\t{split}\tb\tneutral\tcontradiction", "0\t1\tg\tc\td\tneutral\tentailment")
        write(root / f"MNLI/{split if split == 'train' else 'dev_matched'}.tsv", mnli, *rows)
        write(root / f"CoLA/{split}.tsv", f"gj04\t1\t\ta {split}", "gj04\t0\t*\tb")
    write(root / "MNLI/dev_mismatched.tsv", mnli, "0\t1\tg\tmismatched\tb\tneutral\tneutral")
    write(root / "SST-2/test.tsv", "index\tsentence", "0\tno label")
    return root


GLUE_EXPECTED = {
    "sst2": (('a "dev ',), ["positive", "negative"]),
    "mrpc": (('"a dev', 'b "'), ["equivalent", "not_equivalent"]),
    "rte": (("a", "b"), ["not_entailment", "entailment"]),
    "qnli": (("a", "b"), ["not_entailment", "entailment"]),
    "qqp": (("dev", "b"), ["duplicate", "not_duplicate"]),
    "mnli": (("dev", "b"), ["contradiction", "entailment"]),
    "cola": (("a dev",), ["acceptable", "unacceptable"]),
}


@pytest.mark.parametrize("name", GLUE_EXPECTED)
@pytest.mark.parametrize("given", ["parent", "itself"])
def test_glue_folders(tmp_path: Path, name: str, given: str) -> None:
    root = glue_folder(tmp_path)
    folder = next(path for path in root.iterdir() if path.name.lower().replace("-", "") == name)
    train, evaluation = load_task(name, root if given == "parent" else folder)
    first, labels = GLUE_EXPECTED[name]
    assert evaluation.texts[0] == first
    assert [evaluation.label_names[label] for label in evaluation.labels] == labels
    assert evaluation.label_names == train.label_names == get_task(name).label_names
    assert (len(train), len(evaluation)) == (2, 2)
    assert Path(evaluation.source).name == ("dev_matched.tsv" if name == "mnli" else "dev.tsv")


@pytest.mark.parametrize(
    "name, label", [("qqp", "1"), ("qnli", "not_entailment"), ("mnli", "neutral"), ("rte", 1)]
)
def test_glue_as_json_lines(tmp_path: Path, name: str, label: str | int) -> None:
    other = {"qqp": "0", "rte": 0}.get(name, "entailment")
    rows = [{"text_a": "a", "text_b": "b", "label": label}, {"text_a": "c", "text_b": "d", "label": other}]
    for split in ("train", "dev"):
        write_jsonl(tmp_path / f"{name.upper()}/{split}.jsonl", *rows)
    train, evaluation = load_task(name, tmp_path)
    assert train.texts == evaluation.texts == [("a", "b"), ("c", "d")]
    assert train.labels == [1, 0]


def test_m_cid_learns_its_labels_from_the_training_file(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "text\tlabel", "x\ttravel", "y\tdonate", "z\thi", end="\r\n")
    write(tmp_path / "dev.tsv", "text\tlabel", "x\thi", end="\r\n")
    write(tmp_path / "test.tsv", "text\tlabel", "x\ttravel", "w\tdonate", end="\r\n")
    train, evaluation = load_task("m-cid", tmp_path)
    assert train.label_names == evaluation.label_names == ("donate", "hi", "travel")
    assert (train.labels, evaluation.labels) == ([2, 0, 1], [2, 0])
    assert evaluation.source.endswith("test.tsv")
    # without the training file a model's own label names serve
    (tmp_path / "train.tsv").unlink()
    with pytest.raises(
        DataError, match=r'no training file of task "m-cid" to learn the label names from\. Put train\.tsv'
    ):
        load_task("m-cid", tmp_path)
    nothing, evaluation = load_task("m-cid", tmp_path, label_names=["travel", "hi", "donate"])
    assert nothing is None
    assert evaluation.labels == [0, 2]


def test_a_test_file_without_labels_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "text\tlabel", "x\ta", "y\tb")
    write(tmp_path / "dev.tsv", "text\tlabel", "x\ta")
    write(tmp_path / "test.tsv", "text", "x")
    assert load_task("m-cid", tmp_path)[1].source.endswith("dev.tsv")
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(
        DataError, match=r'test\.tsv, line 1: There is no column "label"|test\.tsv, line 1: .*"label"'
    ):
        load_task("m-cid", tmp_path)


def test_stackoverflow_labels_are_numbered_from_one(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"StackOverflow/{split}.tsv", "text\tlabel", "x\t1", "y\t20", "z\toracle")
    train, _ = load_task("stackoverflow", tmp_path)
    assert train.labels == [0, 19, 1]
    assert train.label_names[19] == "magento"


def test_qnli_with_the_dev_file_only(tmp_path: Path) -> None:
    (glue_folder(tmp_path) / "QNLI/train.tsv").unlink()
    train, evaluation = load_task("qnli", tmp_path)
    assert train is None
    assert len(evaluation) == 2
    with pytest.raises(
        DataError, match=r'There is no training file of task "qnli" to train on\. Put train\.tsv or'
    ):
        load_task("qnli", tmp_path, need_train=True)


@pytest.mark.parametrize("header", ["text\tlabel", "label\tsentence", "\ufeffsentence\tlabel "])
def test_cola_with_a_header_line(tmp_path: Path, header: str) -> None:
    texts_first = header.split("\t")[1].strip() == "label"
    rows = [("fine", "1"), ("odd one", "0")]
    for split in ("train", "dev"):
        write(
            tmp_path / f"{split}.tsv", header, *("\t".join(row if texts_first else row[::-1]) for row in rows)
        )
    train, evaluation = load_task("cola", tmp_path)
    assert (train.texts, train.labels) == ([("fine",), ("odd one",)], [1, 0])
    assert train.texts == evaluation.texts


def test_a_models_own_label_order(tmp_path: Path) -> None:
    _, evaluation = load_task("rte", glue_folder(tmp_path), label_names=["not_entailment", "entailment"])
    assert evaluation.labels == [0, 1]
    with pytest.raises(
        DataError, match='line 2: Label "not_entailment" is not known; known labels: "yes", "no"'
    ):
        load_task("rte", tmp_path, label_names=["yes", "no"])


def test_a_few_broken_rows_of_qqp_are_skipped_and_many_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header, good = "id\tquestion1\tquestion2\tis_duplicate", ["0\ta\tb\t0", "1\tc\td\t1"] * 150
    write(tmp_path / "train.tsv", header, *good, "2\tbroken", "3\t \tempty\t1", *good)
    write(tmp_path / "dev.tsv", header, *good)
    with caplog.at_level(logging.WARNING):
        train, _ = load_task("qqp", tmp_path)
    assert len(train) == 600
    assert "Broken rows skipped: 2. The first: " in caplog.text
    assert "train.tsv, line 302: Fields on this line: 2" in caplog.text
    write(tmp_path / "train.tsv", header, *good, *["2\tbroken"] * 10)
    with pytest.raises(DataError, match=r"train\.tsv, line 302: Fields on this line: 2"):
        load_task("qqp", tmp_path)


def test_local_task_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no such folder\. Check --data-dir"):
        load_task("sst2", tmp_path / "missing")
    with pytest.raises(
        DataError, match=r'no evaluation file of task "sst2" .* one of dev\.tsv, validation\.tsv'
    ):
        load_task("sst2", tmp_path)
    write(tmp_path / "dev.tsv", "sentence\tlabel", "fine\t1", "odd\t2")
    with pytest.raises(
        DataError, match=r'dev\.tsv, line 3: Label "2" is not known; known labels: "negative", "positive"'
    ):
        load_task("sst2", tmp_path)
    with pytest.raises(
        DataError, match=r'dev\.tsv, line 1: .*"#1 String".* Columns here: "sentence", "label"'
    ):
        load_task("mrpc", tmp_path)
    write(tmp_path / "train.tsv", "sentence\tlabel", "fine\t1", "good\t1")
    with pytest.raises(DataError, match=r'train\.tsv: There is a single class, "1", in it'):
        load_task("sst2", tmp_path)
    with pytest.raises(ValueError, match=r'Did you mean "sst2"\?'):
        load_task("sst", tmp_path)


# Tasks from the hub


def hub_splits(task_name: str) -> datasets.DatasetDict:
    task = get_task(task_name)
    features = datasets.Features(
        {
            **{column: datasets.Value("string") for column in task.text_columns},
            "label": datasets.ClassLabel(names=list(task.label_names or ())),
            "idx": datasets.Value("int32"),
        }
    )
    columns = {column: [f"{column} 0", f"{column} 1"] for column in task.text_columns}
    rows = datasets.Dataset.from_dict({**columns, "label": [1, 0], "idx": [0, 1]}, features=features)
    return datasets.DatasetDict({"train": rows, str(task.evaluation_split): rows})


@pytest.mark.parametrize("name", ["sst2", "mrpc", "rte", "qnli", "qqp", "mnli", "cola"])
def test_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(path: str, config: str) -> datasets.DatasetDict:
        asked.append((path, config))
        return hub_splits(name)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, evaluation = load_task(name)
    assert asked == [("nyu-mll/glue", name)]
    assert train.labels == evaluation.labels == [1, 0]
    assert train.texts[0] == tuple(f"{column} 0" for column in get_task(name).text_columns)
    assert evaluation.source == f"nyu-mll/glue/{name} {get_task(name).evaluation_split}"


@pytest.mark.parametrize("name", ["m-cid", "stackoverflow"])
def test_tasks_without_a_home_on_the_hub(name: str) -> None:
    with pytest.raises(
        DataError, match=r"no canonical home on the hub\. Give --data-dir with train\.tsv, dev\.tsv"
    ):
        load_task(name)


# Files of one's own


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "folder"])
@pytest.mark.parametrize("labels", [["good", "bad", "good"], [10, 9, 10]])
def test_own_files_of_every_format(tmp_path: Path, ending: str, labels: list[Any]) -> None:
    texts = ["one", "two", "three"]
    path = tmp_path / f"train.{ending}"
    if ending in ("csv", "tsv"):
        between = "," if ending == "csv" else "\t"
        rows = (f"{label}{between}{text}" for text, label in zip(texts, labels, strict=True))
        write(path, f"class{between}body", *rows)
    elif ending == "jsonl":
        write_jsonl(
            path, *({"body": text, "class": label} for text, label in zip(texts, labels, strict=True))
        )
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"body": texts, "class": labels}), path)
    else:
        datasets.Dataset.from_dict({"body": texts, "class": labels}).save_to_disk(path)
    train, evaluation = load_files(path, path, ["body"], "class")
    assert train == evaluation
    assert train.texts == [("one",), ("two",), ("three",)]
    assert train.label_names == (("bad", "good") if labels[0] == "good" else ("9", "10"))
    assert train.labels == [1, 0, 1]
    assert train.source == str(path)


def test_pairs_and_one_file_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "q,a,y", "x,y,1", "z,w,0")
    train, evaluation = load_files(path, None, ["a", "q"], "y")
    assert evaluation is None
    assert train.texts == [("y", "x"), ("w", "z")]
    assert load_files(None, path, ["a", "q"], "y") == (None, train)


def test_evaluation_takes_the_label_names_of_training_or_of_the_model(tmp_path: Path) -> None:
    train_file = write(tmp_path / "train.csv", "text,y", "a,no", "b,yes", "c,maybe")
    eval_file = write(tmp_path / "dev.csv", "text,y", "a,yes")
    _, evaluation = load_files(train_file, eval_file, ["text"], "y")
    assert (evaluation.label_names, evaluation.labels) == (("maybe", "no", "yes"), [2])
    _, evaluation = load_files(None, eval_file, ["text"], "y", label_names=["yes", "no"])
    assert (evaluation.label_names, evaluation.labels) == (("yes", "no"), [0])


@pytest.mark.parametrize("ending", ["folder", "parquet"])
def test_class_names_that_the_file_declares_keep_their_order(tmp_path: Path, ending: str) -> None:
    names = ["worse", "better", "never seen"]
    features = datasets.Features({"text": datasets.Value("string"), "y": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "y": [1, 0]}, features=features)
    path = tmp_path / f"train.{ending}"
    rows.save_to_disk(path) if ending == "folder" else pyarrow.parquet.write_table(rows.data.table, path)
    train, _ = load_files(path, None, ["text"], "y")
    assert (train.label_names, train.labels) == (tuple(names), [1, 0])


NAMELESS = ("LABEL_0", "LABEL_1")


def test_classes_of_a_model_without_names(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.csv", "text,y", "a,1", "b,0", "c,1.0", "d,LABEL_0")
    _, rows = load_files(None, path, ["text"], "y", NAMELESS)
    assert (rows.label_names, rows.labels) == (NAMELESS, [1, 0, 1, 0])
    with pytest.raises(DataError, match='Label "2" is not known; known labels: "LABEL_0", "LABEL_1"'):
        load_files(None, write(tmp_path / "two.csv", "text,y", "a,1", "b,2"), ["text"], "y", NAMELESS)
    features = datasets.Features(
        {"text": datasets.Value("string"), "y": datasets.ClassLabel(names=["worse", "better"])}
    )
    declared = datasets.Dataset.from_dict({"text": ["a", "b"], "y": [1, 0]}, features=features)
    declared.save_to_disk(tmp_path / "declared")
    for file, wanted in ((path, {("a",): 1, ("b",): 0}), (tmp_path / "declared", {("a",): 1, ("b",): 0})):
        _, rows = load_files(None, file, ["text"], "y", NAMELESS)
        assert (rows.label_names, rows.labels[:2]) == (NAMELESS, [1, 0])
        noted = NotedLabels(["text"], "y")
        texts = list(read_texts(file, ["text"], on_row=noted.note))
        assert noted.classes_of(texts[:2], NAMELESS) == wanted
    with pytest.raises(DataError, match='Label "1" is not known; known labels: "no", "yes"'):
        load_files(None, path, ["text"], "y", ("no", "yes"))


def test_a_task_and_a_model_without_names(tmp_path: Path) -> None:
    write(tmp_path / "dev.tsv", "sentence\tlabel", "a film\t1", "a plot\t0")
    write(tmp_path / "train.tsv", "sentence\tlabel", "a film\tpositive", "a plot\tnegative")
    train, rows = load_task("sst2", tmp_path, label_names=NAMELESS)
    assert train is not None
    assert (rows.labels, train.labels, rows.label_names) == ([1, 0], [1, 0], NAMELESS)


def test_a_saved_folder_with_splits(tmp_path: Path) -> None:
    def rows(prefix: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [f"{prefix} 0", f"{prefix} 1"], "y": ["a", "b"]})

    splits = datasets.DatasetDict(
        {"train": rows("train"), "test": rows("test"), "validation": rows("validation")}
    )
    splits.save_to_disk(tmp_path / "all")
    train, evaluation = load_files(tmp_path / "all", tmp_path / "all", ["text"], "y")
    assert (train.texts[0], evaluation.texts[0]) == (("train 0",), ("validation 0",))
    datasets.DatasetDict({"extra": rows("extra")}).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match=r'It has only the splits "extra"\. Save it with a split named train'):
        load_files(tmp_path / "one", None, ["text"], "y")


def test_integer_labels_however_they_are_written(tmp_path: Path) -> None:
    train_file = tmp_path / "train.parquet"  # a float column: what pandas makes of integers with a gap
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "y": [2.0, 10.0, -1.0]}), train_file)
    eval_file = write(tmp_path / "dev.csv", "text,y", "a, 10 ", "b,2")
    train, evaluation = load_files(train_file, eval_file, ["text"], "y")
    assert train.label_names == ("-1", "2", "10")
    assert (train.labels, evaluation.labels) == ([1, 2, 0], [2, 1])


def test_a_number_in_several_spellings_is_one_class(tmp_path: Path) -> None:
    train_file = write(tmp_path / "train.csv", "text,y", "a,1", "b,1.0", "c,01", "d,0")
    eval_file = write(tmp_path / "dev.csv", "text,y", "a,0.0", "b,1.0", "c,+1")
    train, evaluation = load_files(train_file, eval_file, ["text"], "y")
    assert train.label_names == ("0", "1")
    assert (train.labels, evaluation.labels) == ([1, 1, 1, 0], [0, 1, 1])
    codes = write(tmp_path / "codes.csv", "text,y", "a,01", "b,02")
    assert load_files(codes, None, ["text"], "y")[0].label_names == ("01", "02")
    mixed = write(tmp_path / "mixed.csv", "text,y", "a,1", "b,many", "c,1.0")
    message = (
        r'mixed\.csv, line 4: Labels "1" \(line 2\) and "1\.0" are the same number, and the other labels'
    )
    with pytest.raises(DataError, match=message):
        load_files(mixed, None, ["text"], "y")


@pytest.mark.parametrize("labels", [["1.2", "3.4", "5", "1.2"], ["0.5", "1e-3", "-.5", "+7."]])
def test_numbers_on_a_scale_are_no_classes(tmp_path: Path, labels: list[str]) -> None:
    lines = [f"{number},{label}" for number, label in enumerate(labels)]
    file = write(tmp_path / "rows.csv", "text,y", *lines)
    message = rf'rows\.csv, line 2: Label "{labels[0]}" is not a whole number, .* Give classes, not numbers on a scale'
    with pytest.raises(DataError, match=message):
        load_files(file, None, ["text"], "y")
    names = sorted(set(labels))
    assert load_files(file, None, ["text"], "y", names)[0].label_names == tuple(names)
    named = write(tmp_path / "named.csv", "text,y", *lines, "c,other")
    assert "other" in load_files(named, None, ["text"], "y")[0].label_names


def test_labels_that_differ_in_case_only_stay_apart(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", "text,y", "a,us", "b,US", "c,us")
    train, _ = load_files(file, None, ["text"], "y")
    assert (train.label_names, train.labels) == (("US", "us"), [1, 0, 1])
    _, evaluation = load_files(None, file, ["text"], "y", ["us", "US"])
    assert evaluation.labels == [0, 1, 0]
    with pytest.raises(DataError, match='line 3: Label "US" is not known; known labels: "us", "uk"'):
        load_files(None, file, ["text"], "y", ["us", "uk"])


def test_a_task_and_a_model_that_write_its_labels_in_other_letters(tmp_path: Path) -> None:
    _, evaluation = load_task("rte", glue_folder(tmp_path), label_names=["NOT_ENTAILMENT", "ENTAILMENT"])
    assert evaluation.labels == [0, 1]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["text,y", "a,1", "b"], r"train\.csv, line 3: Fields on this line: 1\. The header has 2"),
        (
            ["text,y", "a,1", '" ",0'],
            r'train\.csv, line 3: The text in column "text" is empty\. Fill it in or remove',
        ),
        (
            ["text,y", "a,1", "b,"],
            r'train\.csv, line 3: The label in column "y" is missing\. Fill it in or remove',
        ),
        (["body,y", "a,1"], r'train\.csv, line 1: There is no column "text"\. Columns here: "body", "y"'),
        (["text,label", "a,1"], r'There is no column "y"\. Columns here: "text", "label"'),
        (
            ["text,y", "a,1", "b,1"],
            r'train\.csv: There is a single class, "1", in it\. Give rows of at least two',
        ),
        (["text,y"], r"train\.csv: There is no row of data in it"),
        ([], r"train\.csv: There is no row of data in it"),
    ],
)
def test_errors_of_own_files(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_files(write(tmp_path / "train.csv", *lines), None, ["text"], "y")


def test_errors_of_rows_that_have_no_lines(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b", None], "y": [0.5, 1.0, 1.0]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r'row 1: The label in column "y" must be a string or an integer, got 0\.5'
    ):
        load_files(tmp_path / "a.parquet", None, ["text"], "y")
    pyarrow.parquet.write_table(table.slice(1), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r'row 2: The text in column "text" is empty\. Fill it in or remove the row'
    ):
        load_files(tmp_path / "a.parquet", None, ["text"], "y")


def test_unknown_label_in_the_evaluation_file(tmp_path: Path) -> None:
    train_file = write(tmp_path / "train.csv", "text,y", "a,no", "b,yes")
    eval_file = write(tmp_path / "dev.csv", "text,y", "a,no", '"b\nc",yes', "d,maybe")
    with pytest.raises(
        DataError, match=r'dev\.csv, line 5: Label "maybe" is not known; known labels: "no", "yes"\.'
    ):
        load_files(train_file, eval_file, ["text"], "y")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,y\na,1\nMünchen,0\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv, line 3: There are bytes that are not UTF-8 \(0xfc\)"):
        load_files(tmp_path / "a.csv", None, ["text"], "y")


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_file or eval_file must be given"):
        load_files(None, None, ["text"], "y")
    with pytest.raises(ValueError, match="a list of one column or two, got 'text'"):
        load_files("a.csv", None, "text", "y")
    with pytest.raises(ValueError, match="a list of one column or two"):
        load_files("a.csv", None, ["a", "b", "c"], "y")
    with pytest.raises(ValueError, match="Columns must differ"):
        load_files("a.csv", None, ["y"], "y")
    path = write(tmp_path / "a.csv", "text,y", "a,1", "b,0")
    with pytest.raises(ValueError, match='label_names must differ, got "1", "1"'):
        load_files(path, None, ["text"], "y", label_names=["1", "1"])


# Real data, where it lies beside the repository

REAL = {  # folder, training rows, evaluation rows, evaluation rows of the class with index 0
    "sst2": ("data/glue", 67_349, 872, 428),
    "mrpc": ("data/glue/MRPC", 3_667, 408, 129),
    "rte": ("data/glue", 2_490, 277, 146),
    "qnli": ("data/glue/QNLI", None, 5_463, 2_702),
    "qqp": ("data/glue_10k", 8_999, 1_000, 623),
    "mnli": ("data/glue_10k/MNLI", 8_999, 1_000, 347),
    "m-cid": ("data", 1_220, 349, 21),
    "stackoverflow": ("data/StackOverflow", 18_000, 1_000, 50),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data(shared_dir: Path, name: str) -> None:
    folder, train_rows, evaluation_rows, first_class = REAL[name]
    train, evaluation = load_task(name, shared_dir / folder)
    assert (None if train is None else len(train)) == train_rows
    assert len(evaluation) == evaluation_rows
    assert Counter(evaluation.labels)[0] == first_class
    assert len(evaluation.texts[0]) == len(get_task(name).text_columns)


def test_classes_with_outer_spaces_are_those_of_labels_without(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,no \nb,yes\nc, no\n", encoding="utf-8")
    _, data = load_files(None, path, ["text"], "label", ["no ", "yes"])
    assert data is not None
    assert data.labels == [0, 1, 0]
    assert match_labels(["no", "no ", " no"], {"no ": 0, "no": 1}) == {"no": 1, "no ": 0}
    with pytest.raises(DataError, match=r'Label "no" is not known; .* or train on rows of this class, too'):
        load_files(None, path, ["text"], "label", ["no ", " no"])


@pytest.mark.parametrize("value", ["no", False])
def test_no_is_a_choice_although_yaml_reads_it_as_false(value: object) -> None:
    assert ClassificationTrainingConfig.from_dict({"mixed_precision": value}).mixed_precision == "no"
    for other in (True, 0):
        with pytest.raises(ValueError, match="mixed_precision must be one of auto, no"):
            ClassificationTrainingConfig.from_dict({"mixed_precision": other})


@pytest.mark.parametrize("names", [("a", "a"), (0, 1), ("a", None)])
def test_each_class_has_a_name_of_its_own(names: Any) -> None:
    with pytest.raises(DataError, match=r"Each class must have a name of its own, and names are texts, got "):
        TextDataset([("x",), ("y",)], [0, 1], names, "here")
