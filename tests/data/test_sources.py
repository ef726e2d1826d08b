"""Where the rows of a task come from, the same for both kinds: which folder, which file, and what fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from consistentee.data.classification import load_task
from consistentee.data.generation import load_generation_task
from consistentee.errors import DataError

CLASSIFICATION = (load_task, "rte", {"sentence1": "a", "sentence2": "b"}, "label")
GENERATION = (load_generation_task, "xsum", {"article": "a"}, "summary_gt")
KINDS = pytest.mark.parametrize(
    "load, name, asked, learned", [CLASSIFICATION, GENERATION], ids=["rte", "xsum"]
)


def write(path: Path, asked: dict[str, Any], *learned: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**asked, **values}) + "\n" for values in learned))
    return path


@pytest.fixture
def rows(learned: str) -> tuple[dict[str, str], dict[str, str]]:
    """What two rows have to be learned."""
    return {learned: "entailment"}, {learned: "not_entailment"}


@KINDS
def test_the_folder_with_the_tasks_name_comes_first(
    load: Callable[..., Any], name: str, asked: dict[str, str], rows: Any, tmp_path: Path
) -> None:
    for folder in (tmp_path, tmp_path / name.upper()):
        for split in ("train", "dev"):
            write(folder / f"{split}.jsonl", asked, *rows)
    train, evaluation = load(name, tmp_path)
    assert (train.source, evaluation.source) == tuple(
        str(tmp_path / name.upper() / f"{split}.jsonl") for split in ("train", "dev")
    )
    assert load(name, tmp_path / name.upper())[1].source == evaluation.source


@KINDS
def test_files_by_the_beginning_of_their_names(
    load: Callable[..., Any], name: str, asked: dict[str, str], rows: Any, tmp_path: Path
) -> None:
    write(tmp_path / "train-00000-of-00001.jsonl", asked, *rows)
    write(tmp_path / "validation-00000-of-00001.jsonl", asked, *rows)
    write(tmp_path / "dataset_info.json", asked, *rows)
    train, evaluation = load(name, tmp_path)
    assert [Path(data.source).name.partition("-")[0] for data in (train, evaluation)] == [
        "train",
        "validation",
    ]
    write(tmp_path / "train-1.csv", asked, *rows)
    with pytest.raises(DataError, match=r'Several files begin with train: "train-0.*", "train-1.csv"\. Keep'):
        load(name, tmp_path)


@KINDS
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_shards_are_read_one_after_the_other(
    load: Callable[..., Any], name: str, asked: dict[str, str], rows: Any, ending: str, tmp_path: Path
) -> None:
    def shard(split: str, number: int, count: int, *values: dict[str, str]) -> Path:
        path = write(tmp_path / f"{split}-{number:05}-of-{count:05}.jsonl", asked, *values)
        if ending == ".jsonl":
            return path
        table = datasets.Dataset.from_list([{**asked, **row} for row in values])
        table.to_parquet(path.with_suffix(ending))
        path.unlink()
        return path.with_suffix(ending)

    shard("dev", 0, 1, *rows)
    shards = [shard("train", number, 3, rows[number % 2]) for number in (2, 0, 1)]
    train, evaluation = load(name, tmp_path)
    learned = train.labels if name == "rte" else train.references
    expected = evaluation.labels if name == "rte" else evaluation.references
    assert learned == [expected[0], expected[1], expected[0]]
    assert train.source == str(tmp_path / f"train-*-of-00003{ending}")
    shards[2].unlink()
    message = rf'Of 3 shards there are missing "train-00001-of-00003{ending}"\. Put all of them there'
    with pytest.raises(DataError, match=message):
        load(name, tmp_path)
    shards[1].unlink()
    with pytest.raises(DataError, match=r'missing "train-00000-of.*", "train-00001-of'):
        load(name, tmp_path)


def test_a_broken_row_of_shards_is_told_by_its_place_in_all(tmp_path: Path) -> None:
    asked = {"sentence1": "a", "sentence2": "b"}
    for number, label in enumerate(("entailment", "not_entailment", "neither")):
        write(tmp_path / f"train-{number:05}-of-00003.jsonl", asked, {"label": label})
    write(tmp_path / "dev.jsonl", asked, {"label": "entailment"})
    with pytest.raises(DataError, match=r'train-\*-of-00003\.jsonl, row 3: Label "neither"'):
        load_task("rte", tmp_path)


@KINDS
def test_a_file_without_what_is_learned_is_passed_over(
    load: Callable[..., Any], name: str, asked: dict[str, str], rows: Any, tmp_path: Path
) -> None:
    files = ("dev", "validation") if name == "rte" else ("test", "dev")
    write(tmp_path / f"{files[0]}.jsonl", asked, {}, {})
    write(tmp_path / f"{files[1]}.jsonl", asked, *rows)
    assert Path(load(name, tmp_path)[1].source).stem == files[1]


@KINDS
def test_what_fails(
    load: Callable[..., Any], name: str, asked: dict[str, str], rows: Any, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"There is no such folder\. Check --data-dir"):
        load(name, tmp_path / "missing")
    with pytest.raises(
        DataError, match=rf'file of task "{name}" in it or in its folder "{name}"\. Give the folder'
    ):
        load(name, tmp_path)
    write(tmp_path / "dev.jsonl", asked, *rows)
    assert load(name, tmp_path)[0] is None
    with pytest.raises(
        DataError, match=rf'no training file of task "{name}" to train on\. Put train\.tsv or'
    ):
        load(name, tmp_path, need_train=True)


@KINDS
def test_a_hub_that_fails(
    load: Callable[..., Any], name: str, learned: str, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, config: str | None) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"(glue/rte|EdinburghNLP/xsum): .* Couldn't reach the hub\. .*--data-dir"
    ):
        load(name)
