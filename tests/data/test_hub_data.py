"""Data sets of the hub as files: by name, with configuration and split, as a downloaded folder, and what fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from consistentee.cli.main import main
from consistentee.cli.retrofit import read_texts_of
from consistentee.cli.train import unlabelled_texts
from consistentee.data.classification import NotedLabels, load_files
from consistentee.data.files import TO_CERTIFY, TO_LEARN, open_table, read_texts
from consistentee.data.generation import load_generation_files, read_prompts
from consistentee.data.hub import HubSource, hub_source, table_of
from consistentee.data.rows import TextDataset
from consistentee.errors import DataError
from tiny import tiny_classifier

ROWS = {"text": ["a", "b", "c"], "label": [0, 1, 0]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the hub has it: a card, and a Parquet file for each split and configuration."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "y"])}
    )
    root = tmp_path / "user" / "name"
    for split, rows in (("train", 3), ("test", 2)):
        part = datasets.Dataset.from_dict(
            {name: values[:rows] for name, values in ROWS.items()}, features=features
        )
        part.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize(
    "path, source",
    [
        ("hf:user/name", HubSource("user/name")),
        ("hf:user/name:test[:10]", HubSource("user/name", None, "test[:10]")),
        ("hf:user/name/main:test", HubSource("user/name", "main", "test")),
        ("hf:imdb", HubSource("imdb")),
        ("user/name", HubSource("user/name")),
        ("user/name.v2:train", HubSource("user/name.v2", None, "train")),
        ("user/name.csv", None),
        ("user/name.txt", None),
        ("/user/name", None),
        ("./name", None),
        ("../name", None),
        ("name", None),
        ("a/b/c", None),
    ],
)
def test_names(path: str, source: HubSource | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_source(path) == hub_source(Path(path)) == source
    (tmp_path / "user").mkdir()
    if not path.startswith("hf:"):
        assert hub_source(path) is None  # a folder is nearer


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_downloaded_folder(folder: Path, prefix: str) -> None:
    train, evaluation = load_files(f"{prefix}{folder}", f"{prefix}{folder}", ["text"], "label")
    assert train is not None
    assert evaluation is not None
    assert (train.texts, train.labels, train.label_names) == ([("a",), ("b",), ("c",)], [0, 1, 0], ("n", "y"))
    assert evaluation.texts == [("a",), ("b",)]
    assert str(folder) in train.source


def test_splits(folder: Path) -> None:
    assert len(list(open_table(f"hf:{folder}:test").rows)) == 2
    assert len(list(open_table(f"hf:{folder}:train[:1]").rows)) == 1
    assert list(read_texts(f"hf:{folder}")) == [("a",), ("b",)]
    assert [row["prompt"] for row in read_prompts(f"hf:{folder}:train")] == ["a", "b", "c"]
    (folder / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r'It has only the splits "test"\. Name one of them: hf:.*name:SPLIT'):
        open_table(folder)
    with pytest.raises(DataError, match=r"It could not be loaded: Unknown split .* Give one of its files"):
        open_table(f"hf:{folder}:dev")


def test_what_learns_or_certifies_takes_its_own_splits(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = f"hf:{folder}"
    classifier = str(tiny_classifier(tmp_path / "classifier", "distilbert", layers=2))
    train = [("a",), ("b",), ("c",)]
    noted = NotedLabels(["text"], "label")
    assert list(read_texts_of(classifier, [source], ["text"], noted)) == train
    assert noted.classes_of(train, ["n", "y"]) == {("a",): 0, ("b",): 1, ("c",): 0}
    assert caplog.messages == [f'Of the splits of {source}, "train" is read.']
    labelled = TextDataset([("d",)], [0], ("n", "y"), "")
    assert list(unlabelled_texts([source], ["text"], labelled, labelled)) == train
    assert list(read_texts(f"{source}:test", splits=TO_LEARN)) == train[:2]
    assert list(read_texts(source, splits=TO_CERTIFY)) == train[:2]
    caplog.clear()
    (folder / "data" / "test-00000-of-00001.parquet").unlink()
    assert list(read_texts(source, splits=TO_LEARN)) == train
    assert caplog.messages == []
    with pytest.raises(DataError, match=r'It has only the splits "train"\. Name one of them'):
        read_texts(source, splits=TO_CERTIFY)


FORMATTED = {
    **{name: {"type": name} for name in ("torch", "numpy", "pandas", "arrow")},
    "columns": {"type": "torch", "columns": ["ids", "label"]},
}


@pytest.mark.parametrize("form", FORMATTED)
def test_a_folder_saved_with_a_format(form: str, tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["n", "y"]),
            "ids": datasets.List(datasets.Value("int64")),
        }
    )
    rows = datasets.Dataset.from_dict({**ROWS, "label": [0, 1, -1], "ids": [[1], [2], []]}, features=features)
    rows.set_format(**FORMATTED[form])
    rows.save_to_disk(tmp_path / "rows")
    assert list(open_table(tmp_path / "rows").rows) == [
        (1, {"text": "a", "label": "n", "ids": [1]}),
        (2, {"text": "b", "label": "y", "ids": [2]}),
        (3, {"text": "c", "label": None, "ids": []}),
    ]
    assert list(read_texts(tmp_path / "rows")) == [("a",), ("b",), ("c",)]


def test_recordings_beside_texts_are_not_decoded(tmp_path: Path) -> None:
    media = [{"bytes": b"none", "path": None}] * 3
    rows = datasets.Dataset.from_dict({**ROWS, "sound": media, "picture": media})
    rows = rows.cast_column("sound", datasets.Audio()).cast_column("picture", datasets.Image())
    rows.save_to_disk(tmp_path / "rows")
    train, _ = load_files(tmp_path / "rows", None, ["text"], "label")
    assert train is not None
    assert (train.texts, train.labels) == ([("a",), ("b",), ("c",)], [0, 1, 0])


def test_rows_that_are_chosen_or_streamed() -> None:
    rows = datasets.Dataset.from_dict({"text": [str(number) for number in range(3000)]})
    chosen = table_of(rows.select(range(2999, -1, -2)), "here").rows
    assert list(chosen)[-1] == (1500, {"text": "1"})
    streamed = table_of(rows.to_iterable_dataset(), "here").rows
    assert list(streamed)[-1] == (3000, {"text": "2999"})


def test_a_name_is_asked_for_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, config: str | None, *, split: str | None) -> Any:
        asked.append((path, config, split))
        rows = datasets.Dataset.from_dict({"instruction": ["a", "b"], "output": ["c", "d"]})
        return rows if split else datasets.DatasetDict({"train": rows, "validation": rows.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, evaluation = load_generation_files("hf:user/name/main", "user/name")
    assert train is not None
    assert evaluation is not None
    assert (train.references, train.source) == (["c", "d"], "hf:user/name/main train")
    assert (evaluation.references, evaluation.source) == (["c"], "user/name validation")
    load_generation_files("hf:user/name:train[:2]", None)
    assert asked == [("user/name", "main", None), ("user/name", None, None), ("user/name", None, "train[:2]")]


def _of_hub(monkeypatch: pytest.MonkeyPatch, columns: dict[str, list[Any]]) -> None:
    rows = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": rows}))


def test_a_few_broken_rows_of_the_hub_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["", *(f"text {number}" for number in range(150))]
    _of_hub(monkeypatch, {"text": texts, "label": ["yes", "no"] * 75 + ["yes"]})
    train, _ = load_files("hf:user/name", None, ["text"], "label")
    assert train is not None
    assert len(train) == 150
    assert (
        'Broken rows skipped: 1. The first: hf:user/name train, row 1: The text in column "text"'
        in caplog.text
    )
    assert len(list(read_texts("hf:user/name", splits=("train",)))) == 150
    with pytest.raises(DataError, match="is empty"):  # an answer belongs to its row
        list(read_texts("hf:user/name", splits=("train",), skip_broken=False))

    _of_hub(monkeypatch, {"instruction": ["Why?"] * 151, "output": texts})  # as 28 rows of Alpaca
    generated, _ = load_generation_files("hf:user/name", None)
    assert generated is not None
    assert len(generated) == 150

    turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in texts]
    _of_hub(monkeypatch, {"messages": turns})
    conversations, _ = load_generation_files("hf:user/name", None)
    assert conversations is not None
    assert len(conversations) == 150


def test_many_broken_rows_of_the_hub_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _of_hub(monkeypatch, {"text": ["", "", *map(str, range(100))], "label": ["yes", "no"] * 51})
    with pytest.raises(DataError, match=r"row 1.*is empty"):
        load_files("hf:user/name", None, ["text"], "label")
    with pytest.raises(DataError, match=r"row 1.*is empty"):
        list(read_texts("hf:user/name", splits=("train",)))


@pytest.mark.parametrize("name", ["user/no-such-data", "hf:user/no-such-data"])
def test_a_hub_that_cannot_be_asked(name: str) -> None:
    message = r'"user/no-such-data" is no file or folder here, and the hub\'s data set could not be loaded: .+\. Check'
    with pytest.raises(DataError, match=message):
        open_table(name)


@pytest.mark.parametrize(
    "error, said",
    [
        (ConnectionError("no route"), "could not be loaded: no route. Check the name"),
        (
            ValueError("Config name is missing.\nPick one of a, b."),
            "Config name is missing. Pick one of a, b. Check",
        ),
        (RuntimeError(), "could not be loaded: RuntimeError. Check"),
    ],
)
def test_errors_of_the_hub_are_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    arguments = ["--train-file", "hf:user/name", "--text-columns", "text", "--label-column", "label"]
    assert main(["train", "--output-dir", "out", "--backbone", "b", *arguments]) == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of older versions of pandas
def test_a_folder_of_ones_own_says_what_its_files_say(tmp_path: Path) -> None:
    """`datasets` takes "NA" and "null" for nothing, and "01" for 1; nor may rows be left out that one can correct."""
    lines = [
        "text,label",
        *(f"row {row},{label}" for row, label in enumerate(("01", "NA", "x") * 8)),
        "null,x",
    ]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = {"text_columns": ["text"], "label_column": "label"}
    of_folder, _ = load_files(tmp_path, None, **columns)
    of_file, _ = load_files(tmp_path / "train.csv", None, **columns)
    assert of_folder is not None is not of_file
    assert sorted(of_folder.label_names) == ["01", "NA", "x"]
    assert (of_folder.texts, of_folder.labels) == (of_file.texts, of_file.labels)
    (tmp_path / "train.csv").write_text("\n".join([*lines, "no label,"]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match='The label in column "label" is missing'):
        load_files(tmp_path, None, **columns)


def test_splits_of_a_configuration_are_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = datasets.DatasetDict({"other": datasets.Dataset.from_dict({"text": ["a"]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: loaded)
    with pytest.raises(DataError, match=r"Name one of them: hf:user/name/part:SPLIT\."):
        open_table("hf:user/name/part")
    with pytest.raises(DataError, match=r"Name one of them: hf:user/name:SPLIT\."):
        open_table("hf:user/name")
