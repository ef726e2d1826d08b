"""Which layers keep an exit: what they cost decides, and what is left behaves as was promised."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee.cli.main import main
from consistentee.data.rows import TextDataset
from consistentee.errors import SettingError
from consistentee.evaluation import exit_choice, layer_times
from consistentee.evaluation.calibration import calibrate_layers, calibrate_model
from consistentee.evaluation.classification import evaluate_model, run_layers
from consistentee.evaluation.exit_choice import choose_exit_layers, time_choice
from consistentee.evaluation.layer_times import LayerTimes, clock_of, measure_layer_times, times_on
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.models.card import CARD_FILE
from consistentee.models.exit_subsets import save_with_exit_layers, with_exit_layers
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.record import RECORD_FILE, read_record, record_evaluation
from consistentee.pipelines.classifier import Engine
from tiny import save, tiny_backbone, tiny_dataset, tiny_model

GOAL: dict[str, Any] = {"goal": "max_disagreement", "target": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exits")
    torch.manual_seed(3)
    backbone = tiny_backbone(root / "backbone", layers=4)
    path = tiny_model(root / "model", backbone, initial_exit_bias=0.0, ensemble_decay=0.0)
    opened = load_model(path, LoadedClassifier)
    model: Any = opened.model
    with torch.no_grad():  # both classes at every layer, which disagree with the last one ever less
        states, _ = run_layers(opened, tiny_dataset(200, seed=5))
        for index, layer in enumerate(model.classifiers.layers):
            layer.output.weight.mul_(30)
            own = states.classifier_logits[:, index] - layer.output.bias
            layer.output.bias.copy_(-30 * own.mean(0))
    save(model, opened.tokenizer, path)
    return path


@pytest.fixture(scope="module")
def saved(folder: Path) -> LoadedClassifier:
    return load_model(folder, LoadedClassifier)


@pytest.fixture(scope="module")
def rows() -> TextDataset:
    return tiny_dataset(200, seed=5)


def with_times(monkeypatch: pytest.MonkeyPatch, *, layer_ms: float, exit_ms: float) -> LayerTimes:
    times = LayerTimes(1, 0.5, layer_ms, exit_ms, 4)
    monkeypatch.setattr(exit_choice, "times_on", lambda *_, **__: times)
    return times


def test_what_an_input_costs() -> None:
    times = LayerTimes(1, 0.5, 2.0, 0.25, 4)
    assert times.at_layers().tolist() == [2.75, 5.0, 7.25, 9.5]
    assert times.at_layers([False, True, False, True]).tolist() == [2.5, 4.75, 6.75, 9.0]
    assert times.full_depth_ms == 8.75
    assert times.to_dict()["full_depth_ms"] == 8.75


def test_costs_follow_from_three_runs(
    saved: LoadedClassifier, rows: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by what was computed: 3 a layer, 1 an exit, 5 for a call."""
    engine = Engine(saved)
    now = [0.0]

    def run(batch: Any, *, batch_size: int, rule: Any) -> None:
        assert len(batch) == batch_size
        depth = 4 if rule.exit_layers is None else rule.exit_layers[0]
        exits = 1 if rule.exit_layers is None else depth
        now[0] += len(batch) * (5 + 3 * depth + exits)

    def in_turn(work: Any, device: Any, repeats: int, tick: Any) -> Any:
        found: dict[str, Any] = {}
        for name, steps in work.items():
            found[name] = []
            for _ in range(repeats):
                before = now[0]
                for step in steps:
                    step()
                found[name].append([(now[0] - before) / 1000])
        return found

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(layer_times, "time_in_turn", in_turn)
    encoded, _ = engine.tokenize(rows.texts[:10])
    times = measure_layer_times(engine, encoded, batch_size=4, repeats=2)
    assert (times.layer_ms, times.exit_ms, times.start_ms) == pytest.approx((3, 1, 5))
    with pytest.raises(
        ValueError, match="at least one batch of 32 rows and two layers to measure, got 10 rows"
    ):
        measure_layer_times(engine, encoded, batch_size=32)


def test_real_times(saved: LoadedClassifier, rows: TextDataset) -> None:
    engine = Engine(saved)
    times = measure_layer_times(engine, engine.tokenize(rows.texts[:4])[0], batch_size=2, repeats=1)
    assert times.layer_ms >= 0
    assert times.exit_ms >= 0
    assert times.full_depth_ms > 0


def test_an_exit_costs_what_its_criterion_does(
    saved: LoadedClassifier, rows: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some read the state, some nothing but logits: what is timed is the criterion that decides."""
    asked: list[str | None] = []
    run = Engine.run

    def noting(engine: Engine, batch: Any, *, batch_size: int, rule: ExitRule) -> Any:
        asked.append(rule.criterion)
        return run(engine, batch, batch_size=batch_size, rule=rule)

    monkeypatch.setattr(Engine, "run", noting)
    monkeypatch.setattr(layer_times, "TIMED_ROWS", 4)
    choose_exit_layers(saved, rows, criterion="cap", **GOAL)
    assert set(asked) == {"cap", None}
    asked.clear()
    how: dict[str, Any] = {"goal": "min_speedup", "target": 1.5, "clock_batch_size": 2}
    calibrate_model(saved, rows, criterion="energy", **how)
    assert set(asked) == {"energy", None}
    asked.clear()
    times_on(saved, rows.texts, batch_size=2)
    assert set(asked) == {saved.early_exit_model.config.criterion, None}


def test_exits_that_cost_nothing_stay(
    saved: LoadedClassifier, rows: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_times(monkeypatch, layer_ms=2.0, exit_ms=0.0)
    choice = choose_exit_layers(saved, rows, **GOAL)
    assert choice.steps[0].exit_layers == (1, 2, 3, 4)
    assert choice.steps[0].milliseconds == pytest.approx(0.5 + 2 * choice.steps[0].mean_exit_layer)
    gains = [one.milliseconds - other.milliseconds for one, other in itertools.pairwise(choice.steps)]
    assert all(gain > 0 for gain in gains)


def test_exits_that_cost_more_than_they_save_go(
    saved: LoadedClassifier, rows: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = with_times(monkeypatch, layer_ms=1.0, exit_ms=50.0)
    choice = choose_exit_layers(saved, rows, **GOAL)
    assert choice.exit_layers == [4]
    assert choice.steps[-1].milliseconds == pytest.approx(times.full_depth_ms)
    assert [len(step.exit_layers) for step in choice.steps] == [4, 3, 2, 1]


def test_every_step_is_the_best_of_its_kind(
    saved: LoadedClassifier, rows: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's figures are what a model with these exits gives, and no other removal would be faster."""
    times = with_times(monkeypatch, layer_ms=1.0, exit_ms=1.5)
    saved = with_exit_layers(saved, None)
    saved.early_exit_model.config.ensemble_decay = 0.3
    choice = choose_exit_layers(saved, rows, criterion="confidence", **GOAL)
    assert len(choice.steps) > 1
    for point in choice.steps:
        engine = Engine(with_exit_layers(saved, point.exit_layers))
        full = Engine(saved).predict(rows.texts, criterion="confidence", threshold=1.0)
        assert point.threshold is not None
        found = engine.predict(rows.texts, criterion="confidence", threshold=point.threshold)
        layers = [prediction.exit_layer for prediction in found]
        assert sum(layers) / len(layers) == pytest.approx(point.mean_exit_layer)
        assert sum(a.label != b.label for a, b in zip(found, full, strict=True)) == point.losses
        has_exit = [layer in point.exit_layers for layer in range(1, 5)]
        spent = times.at_layers(has_exit)
        assert float(spent[[layer - 1 for layer in layers]].mean()) == pytest.approx(point.milliseconds)


def test_timed_on_other_rows(
    saved: LoadedClassifier, rows: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_times(monkeypatch, layer_ms=1.0, exit_ms=0.4)
    choice = choose_exit_layers(saved, rows, criterion="confidence", **GOAL)
    judges = tiny_dataset(60, seed=9)
    timed = time_choice(
        saved, choice, judges, criterion="confidence", batch_sizes=(1, 8), labelled=True, repeats=1
    ).timed
    assert [(point.name, point.batch_size) for point in timed] == list(
        itertools.product(["full depth", "all exits", "chosen exits"], [1])
    ) + list(itertools.product(["full depth", "all exits", "chosen exits"], [8]))
    assert timed[0].agreement == 1.0
    assert timed[0].mean_exit_layer == 4
    engine = Engine(with_exit_layers(saved, choice.exit_layers))
    found = engine.predict(judges.texts, criterion="confidence", threshold=choice.steps[-1].threshold)
    right = [p.label == judges.label_names[label] for p, label in zip(found, judges.labels, strict=True)]
    assert timed[2].accuracy == pytest.approx(sum(right) / 60)
    assert all(point.milliseconds > 0 for point in timed)


def test_exits_that_the_last_layer_needs_stay(
    saved: LoadedClassifier, rows: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last layer's answer leans on the exits before it, no set is chosen that changes it too often."""
    with_times(monkeypatch, layer_ms=1.0, exit_ms=50.0)
    leaning = with_exit_layers(saved, None)
    leaning.early_exit_model.config.ensemble_decay = 0.9
    choice = choose_exit_layers(leaning, rows, **GOAL)
    assert len(choice.exit_layers) > 1
    alone = Engine(with_exit_layers(leaning, [4])).predict(rows.texts)
    full = Engine(leaning).predict(rows.texts, threshold=1.0)
    assert sum(one.label != other.label for one, other in zip(alone, full, strict=True)) > 0.2 * len(rows)


def test_an_evaluation_on_the_clock(saved: LoadedClassifier, rows: TextDataset) -> None:
    """Milliseconds of a point are those of the layers that its rows exit at."""
    times = LayerTimes(1, 0.5, 2.0, 0.25, 4)
    for layers in (None, [2, 4]):
        model = with_exit_layers(saved, layers)
        states = run_layers(model, rows)
        has_exit = model.early_exit_model.config.has_exit
        evaluation = evaluate_model(
            model, rows, criteria=["confidence", "patience"], threshold=0.8, states=states
        )
        clock = clock_of(evaluation, times, states[0].exit_scores, has_exit)
        found = Engine(model).predict(rows.texts, criterion="confidence", threshold=0.8)
        expected = [float(times.at_layers(has_exit)[prediction.exit_layer - 1]) for prediction in found]
        assert clock.milliseconds == pytest.approx(sum(expected) / len(expected))
        assert len(clock.curves["confidence"]) == len(evaluation.curve)
        assert clock.curves["confidence"][0] == pytest.approx(
            float(times.at_layers(has_exit)[0 if layers is None else 1])
        )
        assert clock.curves["confidence"][-1] == pytest.approx(float(times.at_layers(has_exit)[-1]))
        assert len(clock.curves["patience"]) == len(evaluation.other_criteria["patience"].curve)
        assert "clock" not in evaluation.to_dict()
        assert replace(evaluation, clock=clock).to_dict()["clock"]["full_depth_ms"] == times.full_depth_ms


def test_evaluate_in_time(
    folder: Path,
    rows: TextDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_times, "TIMED_ROWS", 8)
    measure, timed = layer_times.measure_layer_times, list[str]()

    def noting(*args: Any, criterion: str, **options: Any) -> LayerTimes:
        timed.append(criterion)
        return measure(*args, criterion=criterion, **options)

    monkeypatch.setattr(layer_times, "measure_layer_times", noting)
    texts = tmp_path / "rows.txt"
    texts.write_text("".join(f"{parts[0]}\n" for parts in rows.texts[:60]), encoding="utf-8")
    file, plot = tmp_path / "found.json", tmp_path / "found.svg"
    common = [
        "evaluate",
        str(folder),
        "--texts",
        str(texts),
        "--criterion",
        "confidence",
        "--threshold",
        "0.8",
    ]
    assert main([*common, "--clock", "2", "--json", str(file), "--plot", str(plot)]) == 0
    clock = json.loads(file.read_text(encoding="utf-8"))["clock"]
    assert clock["batch_size"] == 2
    assert clock["full_depth_ms"] > 0
    assert timed == ["confidence"]
    out = capsys.readouterr().out
    assert f"{clock['milliseconds']:.3f}" in out
    assert "On this machine, batches of 2:" in out
    assert plot.stat().st_size


def test_a_budget_in_time(saved: LoadedClassifier, rows: TextDataset) -> None:
    """An exit that costs as much as a layer: twice the layers saved are needed for the same time."""
    states, _ = run_layers(saved, rows)
    free, dear = LayerTimes(1, 0.0, 1.0, 0.0, 4), LayerTimes(1, 0.0, 1.0, 1.0, 4)
    common: dict[str, Any] = {"goal": "min_speedup", "target": 1.5, "criterion": "confidence"}
    found = [
        calibrate_layers(
            states.layer_logits, states.exit_probs, signals=states.signals, times=times, **common
        )
        for times in (None, free, dear)
    ]
    assert found[0].clock is None
    assert found[0].threshold == found[1].threshold
    assert found[1].clock is not None
    assert found[1].clock["speedup"] == pytest.approx(found[1].layer_speedup)
    assert found[2].clock is not None
    assert found[2].mean_exit_layer is not None
    assert found[2].clock["milliseconds"] == pytest.approx(2 * found[2].mean_exit_layer)
    assert found[2].clock["full_depth_ms"] == 5
    assert (found[2].threshold or 1) < (found[0].threshold or 0)


def test_agreement_is_with_what_full_depth_says(
    saved: LoadedClassifier, rows: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model whose last prediction leans on the exits before it that is not its last classifier alone."""
    with_times(monkeypatch, layer_ms=1.0, exit_ms=0.0)
    leaning = with_exit_layers(saved, None)
    leaning.early_exit_model.config.ensemble_decay = 0.9
    choice = choose_exit_layers(leaning, rows, criterion="confidence", **GOAL)
    timed = time_choice(leaning, choice, rows, criterion="confidence", batch_sizes=(8,), repeats=1).timed
    engine = Engine(leaning)
    full = [found.label for found in engine.predict(rows.texts, criterion="confidence", threshold=1.0)]
    early = engine.predict(rows.texts, criterion="confidence", threshold=choice.steps[0].threshold)
    same = [found.label == label for found, label in zip(early, full, strict=True)]
    assert timed[1].agreement == pytest.approx(sum(same) / len(same))
    alone = Engine(with_exit_layers(leaning, [4])).predict(rows.texts)
    assert [found.label for found in alone] != full


def test_goals_without_a_loss_allowed(saved: LoadedClassifier, rows: TextDataset) -> None:
    with pytest.raises(
        ValueError, match="goal must be max_disagreement or max_accuracy_loss to choose exits"
    ):
        choose_exit_layers(saved, rows, goal="min_speedup", target=2.0)


def test_the_folder_of_a_subset(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "consistentee-checkpoints").mkdir()
    point = {"criterion": "confidence", "threshold": 0.6, "certificate": {}}
    copied = tmp_path / "copy"
    save_with_exit_layers(source, copied, [2, 4], "fast", point)
    opened = load_model(copied, LoadedClassifier)
    assert opened.early_exit_model.config.exit_layers == [2, 4]
    assert opened.exit_rule() == opened.exit_rule(operating_point="fast") == ("confidence", 0.6)
    assert not (copied / "consistentee-checkpoints").exists()
    layers = {prediction.exit_layer for prediction in Engine(opened).predict(tiny_dataset(30).texts)}
    assert layers <= {2, 4}
    with pytest.raises(SettingError, match="must be new or empty"):
        save_with_exit_layers(source, copied, [4], "fast", point)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_with_exit_layers(source, tmp_path / "link", [4], "fast", point)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_with_exit_layers(source, Path("."), [4], "fast", point)
    assert (tmp_path / "link").is_symlink()
    for name in ("real", "here"):
        assert sorted(os.listdir(tmp_path / name)) == sorted(os.listdir(copied))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_folder_of_a_subset_has_no_figures_of_all_exits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in the record nor in the card: they were measured with exits that are no longer there."""
    source, copied = shutil.copytree(folder, tmp_path / "source"), tmp_path / "copy"
    layers = {
        "exit_histogram": [9, 1, 0, 0],
        "exit_accuracy": [0.5, 1, None, None],
        "per_layer_accuracy": [0.5] * 4,
    }
    figures = {"num_examples": 10, "accuracy": 0.5, "mean_exit_layer": 1.1, "layer_speedup": 3.6}
    validation = {"num_examples": 40, "accuracy": 0.6, "tolerances": {"policy": []}}
    evaluation = {**layers, **figures, "num_hidden_layers": 4, "criterion": "policy", "threshold": 0.0}
    record = {"kind": "early_exit", "method": "consistent", "thresholds": {"policy": 0.1, "patience": 2.5}}
    record |= {"validation": validation, "data": {"text_sketch": "ab"}}
    (source / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")
    record_evaluation(source, evaluation)
    assert "layer_speedup" in (source / CARD_FILE).read_text(encoding="utf-8")
    save_with_exit_layers(source, copied, [2, 4], "fast", {"criterion": "confidence", "threshold": 0.6})
    known = read_record(copied)
    assert known["thresholds"] == {"confidence": 0.6}
    assert known["exit_layers"] == [2, 4]
    assert not known["evaluation"]
    assert not known["validation"]
    assert known["data"] == {"text_sketch": "ab"}
    card = (copied / CARD_FILE).read_text(encoding="utf-8")
    assert "layer_speedup" not in card
    assert "Not evaluated on unseen rows yet" in card
    assert "after layers 2 and 4" in card
    assert "after every layer" not in card
    assert "Thresholds chosen on validation rows" not in card
    assert "| fast | confidence > 0.6 |" in card
    assert main(["report", str(copied), "--output", str(tmp_path / "page.html")]) == 1
    assert "holds no figures by layer to report on. Give rows" in capsys.readouterr().err
    assert load_model(copied, LoadedClassifier).known_threshold("policy") is None


def test_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (exit_choice, layer_times):
        monkeypatch.setattr(module, "TIMED_ROWS", 8)
    model = shutil.copytree(folder, tmp_path / "model")
    before = (model / "config.json").read_text(encoding="utf-8")
    texts = tmp_path / "rows.txt"
    texts.write_text("".join(f"{parts[0]}\n" for parts in tiny_dataset(120, seed=2).texts), encoding="utf-8")
    common = ["calibrate", str(model), "--file", str(texts), "--max-disagreement", "0.3"]
    file = tmp_path / "found.json"
    fast = tmp_path / "fast"
    code = main([*common, "--exit-layers", "auto", "--output-dir", str(fast), "--json", str(file)])
    said = capsys.readouterr()
    assert code == 0, said.err
    found = json.loads(file.read_text(encoding="utf-8"))
    config = json.loads((fast / "config.json").read_text(encoding="utf-8"))
    assert config["exit_layers"] == found["exit_choice"]["exit_layers"]
    assert config["threshold"] == found["threshold"]
    assert found["num_rows"] == found["exit_choice"]["num_rows"] == 60
    assert {point["batch_size"] for point in found["exit_choice"]["timed"]} == {1, 32}
    assert "Layers that keep an exit:" in said.out
    assert "| chosen exits | 32 |" in said.out
    assert "60 of the 120 rows chose the exits; what is certified is by the other 60." in said.out
    assert (model / "config.json").read_text(encoding="utf-8") == before

    assert main([*common, "--exit-layers", "2,4", "--output-dir", str(tmp_path / "named")]) == 0
    named = json.loads((tmp_path / "named" / "config.json").read_text(encoding="utf-8"))
    assert named["exit_layers"] == [2, 4]
    capsys.readouterr()

    for extra, message in (
        (["--exit-layers", "auto"], "--exit-layers and --output-dir go together"),
        (["--exit-layers", "2,3", "--output-dir", str(tmp_path / "x")], "exit_layers must be rising numbers"),
        (["--exit-layers", "some", "--output-dir", str(tmp_path / "x")], "must be auto or layers such as"),
        (["--exit-layers", "auto", "--output-dir", str(fast)], "must be new or empty"),
        (["--clock", "1"], "--clock goes with --min-speedup or --exit-layers auto"),
        (["--backend", "onnxruntime"], "--backend goes with --clock or --exit-layers auto"),
        (
            ["--overwrite", "--exit-layers", "4", "--output-dir", str(tmp_path / "x")],
            "--overwrite goes without",
        ),
    ):
        assert main([*common, *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
