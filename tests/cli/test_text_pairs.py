"""A model remembers whether it takes one text or two: everywhere that texts come in, and on its card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from consistentee.backbones.loading import read_config
from consistentee.cli.main import main
from consistentee.data.files import read_texts
from consistentee.data.rows import TextDataset
from consistentee.errors import DataError
from consistentee.evaluation.classification import evaluate_model, predict_classes
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine
from consistentee.training.train import finetune, train
from quick import quick_config
from tiny import tiny_backbone, tiny_dataset, tiny_model


def rows_of(pairs: bool) -> TextDataset:
    rows = tiny_dataset(50)
    texts = [(text, "and it was") if pairs else (text,) for (text,) in rows.texts]
    return TextDataset(texts, rows.labels, rows.label_names, "here")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool | None, Path]:
    """Models of single texts, of pairs, and one that does not say."""
    root = tmp_path_factory.mktemp("pairs")
    backbone = tiny_backbone(root / "backbone", layers=2)
    config = quick_config()
    return {
        False: train(backbone=backbone, train_data=rows_of(False), output_dir=root / "one", config=config),
        True: finetune(backbone=backbone, train_data=rows_of(True), output_dir=root / "two", config=config),
        None: tiny_model(root / "old", backbone),
    }


def test_the_folder_says_so(folders: dict[bool | None, Path]) -> None:
    for pairs, folder in folders.items():
        assert load_model(folder).text_pairs is pairs
        assert read_config(folder)["text_pairs"] is pairs
    assert 'engine.predict(["some text"]' in (folders[False] / "README.md").read_text()
    card = (folders[True] / "README.md").read_text()
    assert 'engine.predict([("some text", "the other text")])' in card
    assert "a pair of texts; `texts.txt` has one a line, separated by a tab." in card


def test_engine(folders: dict[bool | None, Path]) -> None:
    one, two, old = (Engine.from_pretrained(folders[pairs], device="cpu") for pairs in (False, True, None))
    assert len(one.predict(["a\tb", ("a",)])) == 2
    assert len(two.predict([("a", "b")])) == 1
    with pytest.raises(ValueError, match=r'one" takes single texts, and text 2 is a pair\. Give one text'):
        one.predict(["a", ("a", "b")])
    with pytest.raises(
        ValueError, match=r'two" takes pairs of texts, and text 1 is a single text\. Give two'
    ):
        two.predict(["a"])
    assert [answer.label for answer in old.predict(["a"])]
    assert [answer.label for answer in old.predict([("a", "b")])]


def test_evaluation(folders: dict[bool | None, Path]) -> None:
    one, two = (
        load_model(folders[False], LoadedClassifier, device="cpu"),
        load_model(folders[True], LoadedClassifier, device="cpu"),
    )
    with pytest.raises(ValueError, match="takes single texts, and each row of here is a pair"):
        evaluate_model(one, rows_of(True))
    with pytest.raises(ValueError, match="takes pairs of texts, and each row of here is a single text"):
        predict_classes(two, rows_of(False))
    with pytest.raises(ValueError, match="takes pairs of texts"):
        evaluate_model(one, rows_of(False), reference=two)


def test_a_tab_in_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("a\tb\nc\n")
    assert list(read_texts(path, pairs=False)) == [("a\tb",), ("c",)]
    with pytest.raises(
        DataError, match=r"line 2: There is 1 text, but the model takes pairs\. Give two texts"
    ):
        list(read_texts(path, pairs=True))
    with pytest.raises(DataError, match="line 2: There is 1 text, but the first line has 2"):
        list(read_texts(path))
    path.write_text("a\tb\tc\n")
    assert list(read_texts(path, pairs=False)) == [("a\tb\tc",)]
    with pytest.raises(DataError, match="There are 3 texts separated by tabs, but the model takes pairs"):
        list(read_texts(path, pairs=True))


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    wanted = {None: [("q", "s")], True: [("q", "s")], False: [("s",)]}
    path.write_text("question,sentence\nq,s\n")
    assert {pairs: list(read_texts(path, pairs=pairs)) for pairs in wanted} == wanted
    path.write_text("text,n\nt,1\n")
    with pytest.raises(
        DataError, match=r'None .* known to hold the pair of texts; it has "text", "n"\. Name the two'
    ):
        list(read_texts(path, pairs=True))
    with pytest.raises(ValueError, match="text_columns must be two columns for pairs of texts, got 1"):
        read_texts(path, ["text"], pairs=True)


def test_predict(
    folders: dict[bool | None, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("a good\tfilm\ndull\n")

    def run(pairs: bool, *options: str) -> tuple[int, str, str]:
        code = main(["predict", str(folders[pairs]), str(path), *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, _ = run(False)
    assert code == 0
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["a good\tfilm", "dull"]
    code, _, err = run(True)
    assert code == 1
    assert "line 2: There is 1 text, but the model takes pairs" in err
    code, _, err = run(False, "--text-columns", "a", "b")
    assert code == 2
    assert "takes one text, and --text-columns names 2" in err


def test_benchmark(
    folders: dict[bool | None, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("a good\tfilm\ndull\n")
    common = ["--data-file", str(path), "--batch-sizes", "1", "--num-rows", "2", "--repeats", "1"]
    assert main(["benchmark", str(folders[False]), *common]) == 0
    assert main(["benchmark", str(folders[True]), *common]) == 1
    assert "the model takes pairs" in capsys.readouterr().err
