"""What goes through Ray, without Ray: batches of columns, blocks of rows, and the folder that holds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer

from consistentee.cli.main import main
from consistentee.errors import DataError, SettingError
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine, window_sizes
from consistentee.pipelines.ray_blocks import (
    RUN_FILE,
    BlockFolder,
    BlockPredictor,
    BlockWriter,
    NumberedRows,
    block_reader,
    model_fingerprint,
    predict_blocks,
    ray_session,
)
from consistentee.pipelines.ray_data import RayPredictor
from tiny import tiny_backbone, tiny_dataset, tiny_model

TEXTS = tiny_dataset(150, seed=3).texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    torch.manual_seed(4)
    return tiny_model(root / "model", tiny_backbone(root / "backbone"), initial_exit_bias=0.0)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine.from_pretrained(model, device="cpu")


# --- The class for map_batches --------------------------------------------------------------------


def test_columns_of_arrays(model: Path, engine: Engine) -> None:
    texts = [text for (text,) in TEXTS]
    batch = {"id": np.arange(len(texts)), "review": np.array(texts, dtype=object)}
    predictor = RayPredictor(model, text_columns="review", threshold=0.9, batch_size=8)
    found = predictor(batch)
    assert list(found) == ["id", "review", "label", "score", "exit_layer", "truncated"]
    expected = engine.predict(texts, threshold=0.9)
    assert found["id"].tolist() == list(range(len(texts)))
    assert found["label"].tolist() == [one.label for one in expected]
    assert found["exit_layer"].tolist() == [one.exit_layer for one in expected]
    assert len({one.exit_layer for one in expected}) > 1
    np.testing.assert_allclose(found["score"], [one.score for one in expected], atol=1e-5)
    assert [found[name].dtype for name in ("score", "exit_layer", "truncated")] == [float, int, bool]


def test_columns_of_a_table(model: Path) -> None:
    table = pa.table({"text": ["good film"] * 3, "when": pa.array([1, 2, None], pa.timestamp("s"))})
    found = RayPredictor(model, prefix="predicted_")(table)
    assert found.column_names[2:] == [
        "predicted_" + name for name in ("label", "score", "exit_layer", "truncated")
    ]
    assert found.select(["text", "when"]).equals(table)
    assert found.schema.field("predicted_label").type == pa.string()
    empty = RayPredictor(model)(table.slice(0, 0))
    assert len(empty) == 0
    assert empty.schema.field("label").type == pa.string()


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"sentence": np.array(["a"])}, 'got "text"; it has: sentence'),
        ({"text": np.array(["a"]), "score": np.array([1.0])}, 'has a column "score" already. Give a prefix'),
        ([1], 'batch_format must be "numpy" or "pyarrow", got list'),
        ({"text": np.array(["a", " "], dtype=object)}, "Text 2 is empty"),
        ({"text": np.array(["a", None], dtype=object)}, "Text 2 must be a string"),
    ],
)
def test_batches_that_do_not_fit(model: Path, batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayPredictor(model)(batch)


def test_a_batch_has_at_least_one_row(model: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, got 0\."):
        RayPredictor(model, batch_size=0)({"text": np.array(["a"])})


def test_another_model_of_the_same_name(model: Path, engine: Engine, tmp_path: Path) -> None:
    fingerprint = model_fingerprint(engine.saved)
    BlockPredictor(str(model), fingerprint=fingerprint)
    torch.manual_seed(5)
    other = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"))
    assert model_fingerprint(load_model(other, LoadedClassifier)) != fingerprint
    with pytest.raises(SettingError, match="must be the same on all nodes"):
        BlockPredictor(str(other), fingerprint=fingerprint)


def test_another_tokenizer_is_another_model(model: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        saved = load_model(folder, LoadedClassifier)
        found = model_fingerprint(saved)
        Engine(saved).predict(["good film", "bad"])
        assert model_fingerprint(saved) == found  # a call leaves its length and padding behind
        return found

    folders = [Path(shutil.copytree(model, tmp_path / str(number))) for number in range(4)]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    tokenizers[0].backend_tokenizer.normalizer = BertNormalizer(lowercase=False)
    tokenizers[1].backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizers[2].truncation_side = tokenizers[2].init_kwargs["truncation_side"] = "left"
    for folder, tokenizer in zip(folders, tokenizers, strict=True):
        tokenizer.save_pretrained(folder)
    found = [fingerprint(folder) for folder in folders]
    assert len(set(found)) == 4
    assert found[3] == fingerprint(model)  # wherever it lies


@pytest.mark.parametrize(
    "options", [["--ray-workers", "2"], ["--ray-address", "auto"], ["--ray-blocks", "b"]]
)
def test_options_of_ray(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "model", "texts.txt", *options]) == 2
    assert f"{options[0]} goes with --ray." in capsys.readouterr().err


# --- Rows and blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2])
def test_blocks_are_windows(engine: Engine, batch_size: int | None) -> None:
    rows = NumberedRows(TEXTS, batch_size)
    windows = [texts for texts, _ in engine.windows(TEXTS, batch_size=batch_size)]
    assert rows.sizes == [len(texts) for texts in windows]
    assert len(rows.sizes) > 1
    for block, texts in enumerate(windows):
        table = block_reader(rows)(pa.Table.from_pylist(rows.items([block])))
        assert table.column_names == ["block", "row", "text"]
        assert table["text"].to_pylist() == [text for (text,) in texts]
        assert table["row"].to_pylist() == list(range(len(texts)))
    rows.close()
    assert not Path(rows.path).exists()


def test_rows_of_pairs_and_of_any_characters() -> None:
    pairs = [("a\u2028b\x85c", 'tab\t"quoted"'), ("\n", "é😀")]
    rows = NumberedRows(pairs, 1)
    table = block_reader(rows)(pa.Table.from_pylist(rows.items([0])))
    assert list(zip(table["text_a"].to_pylist(), table["text_b"].to_pylist(), strict=True)) == pairs
    assert rows.sizes == [2]
    assert NumberedRows(pairs[::-1]).digest != rows.digest == NumberedRows(pairs).digest
    assert NumberedRows([]).sizes == []


def test_window_sizes() -> None:
    def first(batch_size: int | None) -> list[int]:
        sizes = window_sizes(batch_size)
        return [next(sizes) for _ in range(8)]

    assert first(None) == [64, 128, 256, 512, 1024, 1024, 1024, 1024]
    assert first(1) == [1] * 8
    assert first(3) == [3, 6, 12, 24, 48, 96, 192, 192]


def table_of(block: int, rows: range) -> pa.Table:
    number = len(rows)
    return pa.table(
        {
            "block": [block] * number,
            "row": list(rows),
            "text": [f"text {block} {row}" for row in rows],
            "label": ["positive"] * number,
            "score": [0.5] * number,
            "exit_layer": [1] * number,
            "truncated": [False] * number,
        }
    )


def test_rows_that_come_in_any_order(tmp_path: Path) -> None:
    blocks = BlockFolder(tmp_path / "blocks", {"rows": 5}, [3, 2])
    writer = BlockWriter(blocks)
    assert writer.add(pa.concat_tables([table_of(1, range(1, 2)), table_of(0, range(2, 3))])) == 0
    assert blocks.missing() == [0, 1]
    assert writer.add(table_of(1, range(1))) == 2
    assert blocks.missing() == [0]
    assert writer.add(table_of(0, range(2))) == 3
    texts = [json.loads(line)["text"] for lines in blocks.chunks() for line in lines]
    assert texts == ["text 0 0", "text 0 1", "text 0 2", "text 1 0", "text 1 1"]


@pytest.mark.parametrize("again", [table_of(0, range(3)), table_of(1, range(3)), table_of(1, range(1, 2))])
def test_rows_that_come_twice(tmp_path: Path, again: pa.Table) -> None:
    blocks = BlockFolder(tmp_path / "blocks", {"rows": 5}, [3, 2])
    writer = BlockWriter(blocks)
    writer.add(pa.concat_tables([table_of(0, range(3)), table_of(1, range(1, 2))]))
    with pytest.raises(RuntimeError, match="twice"):
        writer.add(again)


# --- The folder -----------------------------------------------------------------------------------


def test_folder_of_another_run(tmp_path: Path) -> None:
    folder = tmp_path / "blocks"
    blocks = BlockFolder(folder, {"model": "a", "threshold": 0.5}, [1])
    BlockWriter(blocks).add(table_of(0, range(1)))
    assert BlockFolder(folder, {"model": "a", "threshold": 0.5}, [1]).missing() == []
    for settings, message in (
        ({"model": "a", "threshold": 0.7}, r"its threshold is 0\.5, that of this run 0\.7"),
        ({"model": "b", "threshold": 0.5}, "its model is a, that of this run b"),
        ({"model": "a"}, "its threshold is 0.5"),
        ({"model": "a", "threshold": 0.5, "dtype": "int8"}, "its dtype is None"),
    ):
        with pytest.raises(SettingError, match=message):
            BlockFolder(folder, settings, [1])


def test_folder_that_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match="must be empty or of a run before"):
        BlockFolder(tmp_path, {}, [])
    with pytest.raises(SettingError, match=r"notes\.txt\" is a file"):
        BlockFolder(tmp_path / "notes.txt", {}, [])
    (tmp_path / RUN_FILE).write_text("[]")
    with pytest.raises(SettingError, match="must be a JSON object"):
        BlockFolder(tmp_path, {}, [])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_block_that_somebody_changed(tmp_path: Path) -> None:
    blocks = BlockFolder(tmp_path / "blocks", {}, [2])
    BlockWriter(blocks).add(table_of(0, range(2)))
    blocks.path(0).write_text("{}\n")
    with pytest.raises(DataError, match="must have 2 lines, got 1"):
        list(blocks.chunks())


def test_finished_runs_need_no_cluster(engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = predict_blocks(engine, [], tmp_path / "blocks", batch_size=2)
    assert list(done.chunks()) == []
    assert json.loads((tmp_path / "blocks" / RUN_FILE).read_text())["rows"] == 0
    with pytest.raises(SettingError, match=r'device must be auto, cpu or cuda on Ray, .* got "cuda:1"'):
        predict_blocks(engine, TEXTS, tmp_path / "other", device="cuda:1")
    with (
        pytest.raises(SettingError, match=r'got "ray://head:10001" of Ray Client'),
        ray_session("ray://head:10001"),
    ):
        pass


@pytest.mark.parametrize("columns", [[], ["a", "b", "c"], ["a", "a"]])
def test_text_columns_are_one_or_two(model: Path, columns: list[str]) -> None:
    with pytest.raises(SettingError, match=r"text_columns must be the column of the text, or the two"):
        RayPredictor(model, device="cpu", text_columns=columns)
