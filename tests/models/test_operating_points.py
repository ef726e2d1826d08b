"""Operating points: kept in the configuration, taken by name by everything that exits."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from consistentee.models import operating_points
from consistentee.models.card import CARD_FILE, enter_operating_points, model_card, write_model_card
from consistentee.models.configuration import EarlyExitConfig
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.operating_points import read_operating_points, rule_at, save_operating_point
from consistentee.pipelines.classifier import Engine
from tiny import tiny_backbone, tiny_dataset, tiny_full_depth_model, tiny_model

POINT: dict[str, Any] = {
    "criterion": "confidence",
    "threshold": 0.62,
    "certificate": {
        "goal": "max_disagreement",
        "target": 0.01,
        "num_rows": 2000,
        "confidence": 0.95,
        "bound": 0.0066,
    }
    | {"layer_speedup": 2.41, "date": "2026-01-01"},
}
TEXTS = [texts[0] for texts in tiny_dataset(24).texts]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("points")
    torch.manual_seed(3)
    tiny_full_depth_model(root / "plain", tiny_backbone(root / "backbone"))
    tiny_model(root / "model", root / "backbone", initial_exit_bias=0.0)
    return root


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """A model with the operating point "careful"."""
    copy = shutil.copytree(shared / "model", tmp_path / "model")
    save_operating_point(copy, "careful", POINT)
    return copy


def test_the_rest_of_the_configuration_stays(shared: Path, folder: Path) -> None:
    before = json.loads((shared / "model" / "config.json").read_text(encoding="utf-8"))
    after = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert after == {**before, "operating_points": {"careful": POINT}}


def test_nothing_is_replaced_unasked(folder: Path) -> None:
    content = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r'has an operating point "careful" \(confidence > 0.62\)'):
        save_operating_point(folder, "careful", {**POINT, "threshold": 0.9})
    assert (folder / "config.json").read_bytes() == content
    save_operating_point(folder, "careful", {**POINT, "threshold": 0.9}, overwrite=True)
    save_operating_point(folder, "bold", POINT)
    points = read_operating_points(folder)
    assert {name: point["threshold"] for name, point in points.items()} == {"bold": 0.62, "careful": 0.9}


@pytest.mark.skipif(os.name == "nt", reason="folders are not locked there")
def test_two_that_are_kept_at_once_are_both_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    write, both_have_read = operating_points.write_text, threading.Barrier(2)

    def late(path: Path, text: str) -> None:
        with suppress(threading.BrokenBarrierError):  # the other has not, and waits
            both_have_read.wait(timeout=1)
        write(path, text)

    monkeypatch.setattr(operating_points, "write_text", late)
    threads = [
        threading.Thread(target=save_operating_point, args=(tmp_path, name, POINT))
        for name in ("one", "other")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_operating_points(tmp_path)) == {"one", "other"}


@pytest.mark.parametrize("name", ["", "-fast", "a b", "../x", "ü"])
def test_names_can_be_typed(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="must begin with a letter or digit"):
        save_operating_point(folder, name, POINT)


@pytest.mark.parametrize(
    "points, message",
    [
        ([1], "operating_points must be entries by name"),
        ({"a": {"criterion": "policy"}}, "operating_points.a must have a criterion and a threshold"),
        ({"a": {"criterion": "policy", "threshold": "0.5"}}, "operating_points.a.threshold must be a number"),
        ({"a": {"criterion": "policy", "threshold": 1.5}}, r"threshold must be in \[0, 1\] for policy"),
        (
            {"a": {"criterion": "softmax_margin", "threshold": 0.5}},
            "criterion must be one of policy, confidence",
        ),
    ],
)
def test_broken_entries_are_called_so(points: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyExitConfig(operating_points=points)


def test_what_saves_a_model_takes_them_along(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert read_operating_points(tmp_path / "again") == {"careful": POINT}
    engine = pickle.loads(pickle.dumps(Engine(load_model(folder, LoadedClassifier))))  # noqa: S301
    assert engine.rule(operating_point="careful").threshold == 0.62


def test_a_folder_without_any(shared: Path) -> None:
    assert read_operating_points(shared / "model") == {}
    assert read_operating_points(shared / "nowhere") == {}
    saved = load_model(shared / "model", LoadedClassifier)
    assert saved.exit_rule() == ("policy", 0.5)
    with pytest.raises(
        ValueError, match='no operating point "careful"; it has none; `consistentee calibrate` makes'
    ):
        saved.exit_rule(operating_point="careful")


def test_unknown_names_and_second_rules(folder: Path) -> None:
    saved = load_model(folder, LoadedClassifier)
    assert saved.exit_rule(operating_point="careful") == ("confidence", 0.62)
    with pytest.raises(ValueError, match='no operating point "bold"; it has: careful'):
        saved.exit_rule(operating_point="bold")
    for rule in ({"criterion": "policy"}, {"threshold": 0.5}):
        with pytest.raises(ValueError, match="An operating point excludes criterion and threshold"):
            saved.exit_rule(operating_point="careful", **rule)
    assert rule_at({"a": POINT}, "a", "model") == ("confidence", 0.62)


def test_the_engine_takes_them(folder: Path) -> None:
    engine = Engine(load_model(folder, LoadedClassifier))
    expected = engine.predict(TEXTS, criterion="confidence", threshold=0.62)
    assert engine.predict(TEXTS, operating_point="careful") == expected
    assert list(engine.stream(TEXTS, operating_point="careful")) == expected
    windows = engine.windows(TEXTS, operating_point="careful")
    assert [prediction for _, found in windows for prediction in found] == expected
    assert engine.predict(TEXTS) != expected


def test_a_model_without_exits_refuses(shared: Path) -> None:
    engine = Engine(load_model(shared / "plain", LoadedClassifier))
    with pytest.raises(ValueError, match="threshold, criterion and operating point must not be given"):
        engine.predict(TEXTS, operating_point="careful")
    classify: Any = pipeline("text-classification", model=str(shared / "plain"), device="cpu")
    with pytest.raises(ValueError, match="has no exits"):
        classify(TEXTS[0], operating_point="careful")


def test_transformers_pipeline_takes_them(folder: Path) -> None:
    engine = Engine(load_model(folder, LoadedClassifier))
    rules: list[dict[str, Any]] = [
        {},
        {"operating_point": "careful"},
        {"criterion": "entropy", "threshold": 0.1},
    ]
    for rule in rules:
        expected = [
            (found.label, pytest.approx(found.score, abs=1e-5)) for found in engine.predict(TEXTS, **rule)
        ]
        classify: Any = pipeline("text-classification", model=str(folder), device="cpu", **rule)
        assert [(found["label"], found["score"]) for found in classify(TEXTS)] == expected
        classify = pipeline("text-classification", model=str(folder), device="cpu")
        assert [(found["label"], found["score"]) for found in classify(TEXTS, **rule)] == expected
    made: Any = pipeline(
        "text-classification", model=str(folder), device="cpu", criterion="entropy", threshold=0.1
    )
    for rule, of_both in (
        ({"threshold": 0.4}, {"criterion": "entropy", "threshold": 0.4}),
        ({"operating_point": "careful"}, {"operating_point": "careful"}),
        ({"criterion": "policy"}, {"criterion": "policy"}),  # with its saved threshold, not entropy's
    ):
        expected = [round(found.score, 4) for found in engine.predict(TEXTS, **of_both)]
        assert [round(found["score"], 4) for found in made(TEXTS, **rule)] == expected
    with pytest.raises(ValueError, match='no operating point "bold"; it has: careful'):
        pipeline("text-classification", model=str(folder), device="cpu", operating_point="bold")


def test_the_card_lists_them(folder: Path) -> None:
    record = {"kind": "early_exit", "backbone": "somebody/an-encoder", "thresholds": {"policy": 0.6}}
    path = folder / CARD_FILE
    enter_operating_points(folder)  # there is no card: none is made
    assert not path.exists()
    path.write_text(model_card(record), encoding="utf-8")
    enter_operating_points(folder)
    card = path.read_text(encoding="utf-8")
    assert (
        "| careful | confidence > 0.62 | at most 1 % of disagreement with full depth (2,000 rows, confid"
        in card
    )
    assert "| 2.41x |" in card
    assert card.index("| careful |") < card.index("## Training")
    once = write_model_card(folder, record).read_text(encoding="utf-8")
    assert [line for line in once.splitlines() if line] == [line for line in card.splitlines() if line]
    save_operating_point(folder, "bold", POINT)
    path.write_text(once.replace("## Training", "My own words.\n\n## Training"), encoding="utf-8")
    enter_operating_points(folder)
    card = path.read_text(encoding="utf-8")
    assert card.count("| careful |") == card.count("| bold |") == card.count("My own words.") == 1
    path.write_text("Mine alone.", encoding="utf-8")
    enter_operating_points(folder)
    assert path.read_text(encoding="utf-8").startswith("Mine alone.\n\n<!-- operating points -->\n")
