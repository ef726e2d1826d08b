"""The command `calibrate`, and operating points and texts without labels in the others."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee.cli.main import main
from consistentee.cli.terminal import check_json_file
from saved_generators import generator_folder
from tiny import tiny_backbone, tiny_dataset, tiny_full_depth_model, tiny_model, write_csv

COLUMNS = ("--text-columns", "text", "--label-column", "label")


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process."""

    def run(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("calibrate")
    torch.manual_seed(3)
    tiny_full_depth_model(root / "plain", tiny_backbone(root / "backbone"))
    tiny_model(root / "model", root / "backbone", initial_exit_bias=0.0)
    write_csv(root / "rows.csv", tiny_dataset(400, seed=2))
    rows = tiny_dataset(400, seed=2)
    (root / "rows.txt").write_text("".join(f"{texts[0]}\n" for texts in rows.texts), encoding="utf-8")
    (root / "few.txt").write_text("".join(f"{texts[0]}\n" for texts in rows.texts[:244]), encoding="utf-8")
    return root


@pytest.fixture
def model(shared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shared / "model", tmp_path / "a model")


def points(model: Path) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text(encoding="utf-8")).get("operating_points") or {}


def test_from_calibrate_to_everything_else(call: Call, shared: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    outcome = call(
        "calibrate",
        model,
        "--file",
        shared / "rows.txt",
        "--max-disagreement",
        0.2,
        "--json",
        file,
        "--name",
        "bold",
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["certified"] is True
    assert found["name"] == "bold"
    assert found["num_rows"] == 400
    assert found["losses"] <= found["losses_allowed"]
    assert 0 < found["bound"] <= 0.2
    assert "certified: at most 20 points of disagreement with full depth, confidence 95 %." in outcome.out
    assert "It promises nothing for a single input, for one class" in outcome.out
    assert f"consistentee predict {shlex.quote(str(model))} --operating-point bold" in outcome.out
    assert points(model)["bold"]["threshold"] == found["threshold"]
    assert points(model)["bold"]["certificate"]["rows_fingerprint"] == found["rows_fingerprint"]

    rule = ("--operating-point", "bold")
    given = call("predict", model, shared / "rows.txt", *rule)
    assert given.code == 0, given.err
    expected = call("predict", model, shared / "rows.txt", "--threshold", found["threshold"])
    assert given.out == expected.out
    layers = [json.loads(line)["exit_layer"] for line in given.out.splitlines()]
    assert sum(layers) / 400 == pytest.approx(found["mean_exit_layer"])

    outcome = call("evaluate", model, "--texts", shared / "rows.txt", *rule, "--json", file)
    assert outcome.code == 0, outcome.err
    evaluation = json.loads(file.read_text(encoding="utf-8"))
    assert evaluation["agreement"] == pytest.approx(found["agreement"])
    assert evaluation["threshold"] == found["threshold"]
    assert "accuracy" not in evaluation
    assert "agreement %" in outcome.out
    assert "the share of 400 inputs without labels that get the last layer's class" in outcome.out

    outcome = call("evaluate", model, "--eval-file", shared / "rows.csv", *COLUMNS, *rule, "--json", file)
    assert json.loads(file.read_text(encoding="utf-8"))["threshold"] == found["threshold"], outcome.err

    outcome = call(
        *("benchmark", model, "--data-file", shared / "rows.txt", *rule, "--json", file, "--repeats", 1),
        *("--num-rows", 8, "--batch-sizes", 1),
    )
    assert outcome.code == 0, outcome.err


def test_every_form_that_predict_reads_gives_the_same(
    call: Call, shared: Path, model: Path, tmp_path: Path
) -> None:
    rows = tiny_dataset(400, seed=2)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"sentence": texts[0]}) + "\n" for texts in rows.texts), encoding="utf-8"
    )
    found = []
    for number, file in enumerate((shared / "rows.txt", shared / "rows.csv", tmp_path / "rows.jsonl")):
        outcome = call("calibrate", model, "--file", file, "--max-disagreement", 0.2, "--name", f"n{number}")
        assert outcome.code == 0, outcome.err
        found.append(points(model)[f"n{number}"])
    for point in found:
        del point["certificate"]["rows_source"]
    assert found[0] == found[1] == found[2]


def test_standard_input(call: Call, shared: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (shared / "rows.txt").read_text(encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    outcome = call("calibrate", model, "--file", "-", "--max-disagreement", 0.2)
    assert outcome.code == 0, outcome.err
    assert points(model)["calibrated"]["certificate"]["rows_source"] == "standard input"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    outcome = call("evaluate", model, "--texts", "-", "--operating-point", "calibrated")
    assert outcome.code == 0, outcome.err


def test_too_few_rows(call: Call, shared: Path, model: Path, tmp_path: Path) -> None:
    before, file = (model / "config.json").read_bytes(), tmp_path / "found.json"
    outcome = call(
        "calibrate", model, "--file", shared / "few.txt", "--max-disagreement", 0.01, "--json", file
    )
    assert outcome.code == 1
    assert outcome.err == "consistentee: 244 rows can certify no 1 point at 95 %: 299 can.\n"
    assert (model / "config.json").read_bytes() == before
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["certified"], found["threshold"], found["num_rows"]) == (False, None, 244)


@pytest.mark.parametrize(
    "arguments",
    [
        "calibrate model --file rows.txt --max-disagreement 0.2",
        "evaluate model --texts rows.txt",
        "benchmark model --data-file rows.txt",
        "probe model --texts rows.txt",
        "retrofit model --texts rows.txt --output-dir out",
    ],
)
def test_a_file_of_figures_is_checked_before_the_work(
    call: Call, shared: Path, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared)
    for file, message in (
        ("backbone", '--json must be a file, got the folder "backbone". Give the name of a file in it.'),
        ("rows.txt/new/found.json", f'--json must lie in a folder, and "{shared / "rows.txt"}" is none.'),
    ):
        outcome = call(*arguments.split(), "--json", file)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err
    assert not (shared / "out").exists()


def test_files_of_figures_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "there.json").touch()
    for file in (tmp_path / "there.json", tmp_path / "new" / "a.json", Path(os.devnull), None):
        check_json_file(file)
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


def test_a_certificate_outlasts_its_figures(
    call: Call, shared: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("consistentee.atomic_files.write_json", full)
    goal = ("--file", shared / "rows.txt", "--max-disagreement", 0.2, "--json", tmp_path / "found.json")
    outcome = call("calibrate", model, *goal)
    assert (outcome.code, outcome.err) == (1, "consistentee: No space left on device\n")
    assert points(model)["calibrated"]["certificate"]["target"] == 0.2


def test_a_place_for_the_point_is_looked_for_before_the_work(
    call: Call, shared: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consistentee.cli.calibrate.read_all_texts", lambda *_: pytest.fail("they were read"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != model and access(path, mode))
    command = ("calibrate", model, "--file", shared / "rows.txt", "--max-disagreement", 0.2)
    outcome = call(*command)
    assert outcome.code == 2
    assert f'keep an operating point, and "{model}" is not. Give a copy of the model.' in outcome.err
    for folder, message in (
        (
            shared / "rows.txt" / "new",
            f'--output-dir must lie in a folder, and "{shared / "rows.txt"}" is none.',
        ),
        (model / "new", f'--output-dir must be writable, and "{model}" is not. Give another folder.'),
    ):
        outcome = call(*command, "--exit-layers", "1,3", "--output-dir", folder)
        assert outcome.code == 2
        assert message in outcome.err


def test_with_labels_and_for_a_budget(call: Call, shared: Path, model: Path) -> None:
    labelled = ("--eval-file", shared / "rows.csv", *COLUMNS)
    outcome = call("calibrate", model, *labelled, "--max-accuracy-loss", 0.1, "--criterion", "patience")
    assert outcome.code == 0, outcome.err
    assert "of accuracy lost against full depth" in outcome.out
    assert points(model)["calibrated"]["criterion"] == "patience"
    outcome = call("calibrate", model, "--file", shared / "rows.txt", "--min-speedup", 1.5, "--name", "fast")
    assert outcome.code == 0, outcome.err
    assert points(model)["fast"]["certificate"]["layer_speedup"] >= 1.5
    few = call(
        "calibrate", model, *labelled, "--max-disagreement", 0.2, "--max-samples", 100, "--name", "few"
    )
    assert points(model)["few"]["certificate"]["num_rows"] == 100, few.err


def test_no_point_is_replaced_unasked(call: Call, shared: Path, model: Path) -> None:
    arguments = ("calibrate", model, "--file", shared / "rows.txt", "--max-disagreement")
    assert call(*arguments, 0.2).code == 0
    before = points(model)
    outcome = call(*arguments, 0.3)
    assert outcome.code == 2
    assert 'has an operating point "calibrated"' in outcome.err
    assert points(model) == before
    assert call(*arguments, 0.3, "--overwrite").code == 0
    assert points(model)["calibrated"]["certificate"]["target"] == 0.3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--file rows.txt", "Give --max-disagreement, --max-accuracy-loss or --min-speedup: one of them"),
        ("--file rows.txt --max-disagreement 0.1 --min-speedup 2", "one of them"),
        (
            "--file rows.txt --max-disagreement 1",
            "--max-disagreement must be above 0 and below 1 (0.01 is a point)",
        ),
        (
            "--file rows.txt --max-disagreement 0.1 --confidence 95",
            "--confidence must be above 0 and below 1, got 95",
        ),
        ("--file rows.txt --min-speedup 4", "--min-speedup must be above 1 and at most 3 (layers), got 4"),
        ("--file rows.txt --max-accuracy-loss 0.1", "--max-accuracy-loss needs labels"),
        (
            "--file rows.txt --task sst2 --max-disagreement 0.1",
            "--file excludes --task, --data-dir and --eval-file",
        ),
        ("--file rows.txt --label-column label --max-disagreement 0.1", "--file reads no labels"),
        ("--max-disagreement 0.1", "Give --task with --data-dir, or --eval-file"),
        ("--file rows.txt --max-disagreement 0.1 --name ../up", "must begin with a letter or digit"),
        ("--file rows.txt --max-disagreement 0.1 --name full-depth", "which every server"),
        ("--file rows.txt --max-disagreement 0.1 --name saved", "which every server"),
        ("--file rows.txt --max-disagreement 0.1 --max-samples 0", "--max-samples must be at least 1"),
        (
            "--file rows.txt --max-disagreement 0.1 --criterion calibrated_confidence",
            'criterion "calibrated_confidence" needs temperatures',
        ),
    ],
)
def test_usage(
    call: Call, shared: Path, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared)
    outcome = call("calibrate", "model", *arguments.split())
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_other_models_are_refused(
    call: Call, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared)
    goal = ("--file", "rows.txt", "--max-disagreement", "0.1")
    outcome = call("calibrate", "plain", *goal)
    assert outcome.code == 1
    assert "has no exits" in outcome.err
    generator = generator_folder(tmp_path / "generator")
    outcome = call("calibrate", generator, *goal)
    assert outcome.code == 2
    assert "calibrate goes with classifiers, and model" in outcome.err
    for option in (("--operating-point", "a"), ("--texts", "rows.txt")):
        outcome = call("evaluate", generator, "--task", "alpaca", *option)
        assert outcome.code == 2
        assert f"{option[0]} goes with a classifier" in outcome.err
    outcome = call("benchmark", generator, "--data-file", "rows.txt", "--operating-point", "a")
    assert (outcome.code, "--operating-point goes with classifiers only" in outcome.err) == (2, True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("predict model rows.txt --operating-point a", 'no operating point "a"; it has none'),
        ("predict model rows.txt --operating-point a --threshold 0.5", "excludes criterion and threshold"),
        ("evaluate model --texts rows.txt --operating-point a", 'no operating point "a"; it has none'),
        ("evaluate model --texts rows.txt --task sst2", "--texts has no labels, so --task goes without it"),
        (
            "evaluate model --texts rows.txt --criterion policy learnt_to_exit",
            'criterion "learnt_to_exit" needs learnt_to_exit',
        ),
        (
            "report model --texts rows.txt --output r.html --criterion policy learnt_to_exit",
            'criterion "learnt_to_exit" needs learnt_to_exit',
        ),
        ("export model --output out --threshold 2", "threshold must be in [0, 1] for policy, got 2"),
        ("benchmark model --data-file rows.txt --operating-point a", 'no operating point "a"; it has none'),
        (
            "benchmark model --data-file rows.txt --operating-point a --exit-distribution even",
            "--operating-point and --exit-distribution exclude each other",
        ),
        ("benchmark --config-name bert-base --operating-point a", "--operating-point goes with a model"),
    ],
)
def test_usage_of_the_others(
    call: Call, shared: Path, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared)
    outcome = call(*arguments.split())
    assert outcome.code == 2
    assert message in outcome.err


def test_a_picture_of_agreement(call: Call, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "agreement.svg"
    criteria = ("--criterion", "policy", "confidence", "patience")
    outcome = call("evaluate", shared / "model", "--texts", shared / "rows.csv", *criteria, "--plot", picture)
    assert outcome.code == 0, outcome.err
    assert picture.stat().st_size > 1000
