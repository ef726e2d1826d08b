"""What one would take instead of exits: the same inputs in every way, what is right, and what it comes to."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from consistentee.cli import main as cli
from consistentee.errors import MissingExtraError, SettingError
from consistentee.evaluation import alternatives
from consistentee.evaluation.alternatives import AlternativeRow, Way, measure_alternatives
from consistentee.evaluation.alternatives_view import alternatives_table, plot_alternatives, verdicts
from consistentee.evaluation.speed import SpeedResults
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine
from tiny import (
    LABEL_NAMES,
    tiny_backbone,
    tiny_classifier,
    tiny_dataset,
    tiny_full_depth_model,
    tiny_model,
    write_csv,
)

HAS_ONNX = find_spec("onnxruntime") is not None and find_spec("onnxscript") is not None
ROWS = tiny_dataset(41)
Report = SpeedResults[AlternativeRow]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("alternatives")
    backbone = tiny_backbone(root / "backbone", layers=4)
    half = tiny_backbone(root / "half", layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny_model(root / "model", backbone, ensemble_decay=0.0, initial_exit_bias=0.0)
    return {
        "model": model,
        "half": tiny_full_depth_model(root / "small", half),
        "foreign": tiny_classifier(root / "foreign", seed=3),
        "turned": tiny_classifier(root / "turned", seed=3, id2label=dict(enumerate(reversed(LABEL_NAMES)))),
        "alien": tiny_classifier(root / "alien", id2label={0: "no", 1: "yes"}),
    }


def opened(folder: Path) -> LoadedClassifier:
    return load_model(folder, LoadedClassifier, device="cpu")


@pytest.fixture(scope="module")
def report(folders: dict[str, Path]) -> Report:
    others = [opened(folders[name]) for name in ("half", "foreign", "turned")]
    return measure_alternatives(
        opened(folders["model"]), ROWS.texts, ROWS.labels, others=others, batch_sizes=(1, 8), repeats=2
    )


def rows_of(report: Report, size: int = 8) -> dict[str, AlternativeRow]:
    return {row.name: row for row in report.rows if row.batch_size == size}


def test_every_way_is_there(report: Report) -> None:
    ours = ["transformers", "engine-full-depth", "engine", "engine-int8-full-depth", "engine-int8"]
    others = ["small transformers", "foreign transformers", "turned transformers"]
    onnx = ["onnxruntime", "onnxruntime-int8", "onnx-graph", "onnx-graph-int8", "small onnxruntime"]
    assert set(rows_of(report)) == {*ours, *others, *(onnx if HAS_ONNX else [])}
    assert rows_of(report, 1).keys() == rows_of(report).keys()
    assert {row.rows for row in report.rows} == {41}


def test_accuracy_and_agreement_are_those_of_the_engine(folders: dict[str, Path], report: Report) -> None:
    engine, truth = Engine(opened(folders["model"])), np.array(ROWS.labels)
    tokens, _ = engine.tokenize(ROWS.texts)
    full = engine.run(tokens, batch_size=8, rule=ExitRule.full_depth())
    exits = engine.run(tokens, batch_size=8, rule=engine.rule())
    assert len(set(exits.exit_layers)) > 1
    rows = rows_of(report)
    names = ["engine", *(["onnx-graph"] if HAS_ONNX else [])]
    for row in (rows[name] for name in names):
        assert row.accuracy == pytest.approx((np.array(exits.labels) == truth).mean())
        assert row.agreement == pytest.approx((np.array(exits.labels) == np.array(full.labels)).mean())
        assert row.mean_exit_layer == pytest.approx(np.mean(exits.exit_layers))
        assert row.has_exits
    for row in (rows[name] for name in ("transformers", "engine-full-depth")):
        assert row.accuracy == pytest.approx((np.array(full.labels) == truth).mean())
        assert (row.agreement, row.mean_exit_layer, row.has_exits) == (1.0, 4.0, False)


def test_efficiency_is_of_the_rows_that_were_timed() -> None:
    """What is right, and so the layers, is of all rows; time of the first ones alone."""
    rows = [{"input_ids": [5, 6, 7]}] * 6
    layers = np.array([1, 1, 2, 4, 4, 4])
    found = {name: (np.zeros(6, np.int64), layers) for name in ("transformers", "engine")}
    way = Way("engine", "model", "torch", "float32", 4, True, rows, lambda _: found["engine"])
    seconds = {"engine-full-depth": [[3.0]], "transformers": [[6.0]], "engine": [[1.5]]}
    row = alternatives._row(way, found, None, seconds, None, size=3, count=3)
    assert (row.mean_exit_layer, row.layer_speedup) == (pytest.approx(16 / 6), pytest.approx(1.5))
    assert (row.rows, row.wall_clock_speedup) == (3, 2.0)
    assert row.efficiency == pytest.approx(2 / 3)  # 2 times faster for 3 times fewer layers


def test_differences_are_paired(folders: dict[str, Path], report: Report) -> None:
    engine = Engine(opened(folders["model"]))
    tokens, _ = engine.tokenize(ROWS.texts)
    right = [
        np.array(engine.run(tokens, batch_size=8, rule=rule).labels) == np.array(ROWS.labels)
        for rule in (engine.rule(), ExitRule.full_depth())
    ]
    difference = right[0].astype(float) - right[1]
    row = rows_of(report)["engine"]
    assert row.accuracy_difference == pytest.approx(difference.mean())
    assert row.accuracy_difference_error == pytest.approx(difference.std(ddof=1) / 41**0.5)
    assert rows_of(report)["transformers"].accuracy_difference == 0


def test_classes_go_by_name(report: Report) -> None:
    one, turned = (rows_of(report)[f"{name} transformers"] for name in ("foreign", "turned"))
    assert one.accuracy is not None
    assert turned.accuracy == pytest.approx(1 - one.accuracy)


def test_a_smaller_model_has_its_layers(report: Report) -> None:
    small = rows_of(report)["small transformers"]
    assert (small.mean_exit_layer, small.model, small.has_exits) == (2.0, "small", False)


@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra onnx")
def test_int8_of_onnxruntime_is_the_same_model(report: Report) -> None:
    rows = rows_of(report)
    assert rows["onnxruntime-int8"].agreement >= 0.9
    assert rows["onnxruntime"].agreement == 1


def test_other_classes_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(SettingError, match="must have the same classes"):
        measure_alternatives(
            opened(folders["model"]), ROWS.texts, None, others=[opened(folders["alien"])], repeats=1
        )


@pytest.mark.parametrize("module", ["onnx", "onnxruntime", "onnxscript"])
def test_others_are_not_left_out_without_a_word(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"needs {module}, which is not installed"):
        measure_alternatives(opened(folders["model"]), ROWS.texts, None, repeats=1)


def test_nothing_to_measure_with(folders: dict[str, Path]) -> None:
    with pytest.raises(SettingError, match="at least one text"):
        measure_alternatives(opened(folders["model"]), [], None)


def changed(report: Report, **milliseconds: float) -> Report:
    """The report with times of some ways, and others so slow that they never win."""
    rows = [
        dataclasses.replace(
            row,
            milliseconds=milliseconds.get(row.name.replace("-", "_"), 99.0),
            accuracy_difference=-0.5 if row.name == "engine-int8" else 0.0,
            accuracy_difference_error=0.1,
        )
        for row in report.rows
    ]
    return dataclasses.replace(report, rows=tuple(rows))


def test_what_it_comes_to(report: Report) -> None:
    worth = verdicts(changed(report, engine=2.0, engine_full_depth=4.0, engine_int8=1.0))
    assert worth[0] == (
        "Batch 1: fastest without exits: engine, all layers, 4.00 ms; with exits: engine with exits, 2.00 ms. "
        "Here exits are worth 2.00x."
    )
    lost = verdicts(changed(report, engine=4.0, engine_full_depth=4.0))
    assert lost[1].endswith("Here exits are not worth it (1.00x).")
    assert "lose at most 1 point" in lost[-1]


def test_table_and_picture(report: Report, tmp_path: Path) -> None:
    stream = io.StringIO()
    Console(file=stream, width=100).print(alternatives_table(report))
    shown = stream.getvalue()
    assert "engine int8 with exits" in shown
    assert "41 rows" in shown
    assert max(map(len, shown.splitlines())) <= 100
    pytest.importorskip("matplotlib")
    plot_alternatives(report, tmp_path / "ways.svg", title="model")
    assert (tmp_path / "ways.svg").read_text(encoding="utf-8").count("<use") > 10


def test_command(
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alternatives, "has_onnxruntime", lambda _: False)  # to export a graph takes seconds
    rows, out = write_csv(tmp_path / "rows.csv", ROWS), tmp_path / "ways.json"
    arguments = ["benchmark", str(folders["model"]), "--data-file", str(rows), "--text-columns", "text"]
    arguments += ["--batch-sizes", "4", "--repeats", "1", "--num-rows", "20", "--json", str(out)]
    assert cli.main([*arguments, "--label-column", "label", "--against", str(folders["half"])]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["workload"]["rows"] == 20
    assert {row["batch_size"] for row in figures["rows"]} == {4}
    assert {row["model"] for row in figures["rows"]} == {"model", "small"}
    assert all(0 <= row["accuracy"] <= 1 for row in figures["rows"])
    assert "lose at most 1 point against transformers" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*arguments, "--against", "usual"]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert {row["accuracy"] for row in figures["rows"]} == {None}
    assert "lose at most 1 % of the classes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--against", "usual", "--dtype", "int8"], "--dtype has no effect with --against"),
        (["--against", "usual", "--throughput"], "--throughput has no effect with --against"),
        (["--against", "usual", "--threshold", "7"], "threshold"),
        (["--label-column", "label"], "--label-column goes with --against"),
    ],
)
def test_usage_errors(
    options: list[str],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_csv(tmp_path / "rows.csv", ROWS)
    assert cli.main(["benchmark", str(folders["model"]), "--data-file", str(rows), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_plain_model_has_no_exits(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--data-file", str(write_csv(tmp_path / "rows.csv", ROWS)), "--against", "usual"]
    assert cli.main(["benchmark", str(folders["half"]), *rows]) != 0
    assert "has no exits" in capsys.readouterr().err
