"""`consistentee compare` from end to end on tiny models: killed and resumed, refused, listed, rendered from cells."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Group
from rich.table import Table

from consistentee.cli.main import main
from consistentee.cli.terminal import show_tables
from consistentee.errors import UsageError
from consistentee.evaluation.comparison import claims
from consistentee.evaluation.comparison import compare as comparing
from consistentee.training.steps import OptimizerSteps
from quick import QUICK, stop_at
from tiny import tiny_backbone, tiny_dataset, write_csv

SETTINGS = {name: value for name, value in QUICK.items() if name not in ("layer_costs", "policy_input")}


@dataclass
class Place:
    """Options of a comparison, and where its files are."""

    options: list[str]
    root: Path

    def cells(self, out: str = "out") -> dict[str, dict[str, Any]]:
        """Kept cells by name, without what is timed."""
        found = {path.stem: json.loads(path.read_text()) for path in (self.root / out / "cells").iterdir()}
        return {
            name: {key: value for key, value in cell.items() if key not in ("seconds", "resumed")}
            for name, cell in found.items()
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("compare")
    options = ["--backbone", str(tiny_backbone(root / "small", layers=3))]
    options += ["--train-file", str(write_csv(root / "rows.csv", tiny_dataset(40)))]
    options += ["--eval-file", str(write_csv(root / "eval.csv", tiny_dataset(30, seed=9)))]
    options += ["--text-columns", "text", "--label-column", "label", "--resamples", "50"]
    options += ["--checkpoint-every", "1", "--policy-input", "log_odds", "--layer-costs", "0.02"]
    for name, value in SETTINGS.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    return Place(options, root)


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("e5 [small]")
    table.add_row("e5 [large]")
    show_tables(Group(table))
    out = capsys.readouterr().out
    assert "e5 [small]" in out
    assert "e5 [large]" in out


def run(place: Place, *more: str, method: str = "deebert", out: str = "out") -> int:
    where = ["--output-dir", str(place.root / out), "--methods", method]
    return main(["compare", *place.options, *where, *more])


@pytest.fixture(scope="module")
def interrupted(place: Place) -> int:
    """A comparison with two seeds, killed in the third of its four trainings; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, OptimizerSteps, "_step", 10)  # 4 steps a training: both of seed 1, one of seed 2
        return run(place, "--seeds", "1", "2")


def test_a_killed_comparison_goes_on_where_it_was(
    place: Place, interrupted: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interrupted == 130
    assert set(place.cells()) == {"small_rows_plain_1", "small_rows_deebert_1"}
    first = place.cells()

    assert run(place, "--seeds", "1", "2", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "4 cells, 2 of them finished. 2 left, about" in said
    assert "small_rows_plain_1: finished" in said
    assert "small_rows_plain_2: interrupted, goes on" in said
    assert "small_rows_deebert_2: to be run" in said
    assert not (place.root / "out" / "compare.json").exists()

    assert run(place, "--seeds", "1", "2", "--criteria", "all") == 0
    said = capsys.readouterr().out
    assert "Resumed at step 1 of" in said
    assert "== small_rows_deebert_2 (4 of 4)" in said
    assert "None left." in said
    assert "rows, small: accuracy along the curve, %" in said
    cells = place.cells()
    assert len(cells) == 4
    assert {name: cells[name] for name in first} == first
    summary = json.loads((place.root / "out" / "compare.json").read_text())
    assert [(r["method"], r["seed"], r["criterion"]) for r in summary["runs"]] == [
        ("plain", 1, None),
        ("plain", 2, None),
        ("deebert", 1, "entropy"),
        ("deebert", 2, "entropy"),
    ]
    run_of = summary["runs"][2]
    figures = cells["small_rows_deebert_1"]["criteria"]
    assert run_of["criteria"].keys() | {"entropy"} == figures.keys()
    for name, found in {**run_of["criteria"], "entropy": run_of}.items():
        assert ("curve" in found) == (name == "entropy")
        kept = [tuple(point) for point in figures[name]["curve"]]
        unpacked = [
            tuple(point[key] for key in ("threshold", "accuracy", "mean_exit_layer"))
            for point in found.get("curve", ())
        ]
        assert not unpacked or unpacked == [pytest.approx(point, abs=2e-5) for point in kept]
        for loss, at in found["at_tolerance"].items():
            assert at["threshold"] == pytest.approx(kept[figures[name]["at_tolerances"][loss]][0], rel=1e-5)
        chosen = figures[name]["at_validation_threshold"]
        assert found["at_validation_threshold"]["threshold"] == chosen["threshold"]
        assert found["at_validation_threshold"]["accuracy"] == pytest.approx(
            chosen["metrics"]["accuracy"], abs=1e-5
        )
    record = json.loads(
        (place.root / "out" / "runs" / "small_rows_deebert_1" / "training_record.json").read_text()
    )
    assert record["thresholds"]["entropy"] == pytest.approx(
        run_of["at_validation_threshold"]["threshold"], rel=1e-5
    )
    assert {name: points[0]["threshold"] for name, points in record["validation"]["tolerances"].items()} == (
        record["thresholds"]  # a loss of 0, which is the default
    )
    assert len(run_of["at_tolerance"]) == 5
    curve = cells["small_rows_deebert_1"]["validation"]["curve"]
    assert curve[-1][1:] == [pytest.approx(record["validation"]["full_depth_accuracy"], abs=1e-5), 3, 0]
    assert "tiny" not in json.dumps(cells)  # no texts, no paths
    assert str(place.root) not in json.dumps(cells)

    # What was interrupted is what a run in one go would have been.
    assert run(place, "--seeds", "2", method="plain", out="whole") == 0
    assert place.cells("whole")["small_rows_plain_2"] == cells["small_rows_plain_2"]


def test_what_is_finished_is_left_alone_and_other_settings_are_refused(
    place: Place, interrupted: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to train")

    before = place.cells()
    monkeypatch.setattr(comparing, "run_cell", no_training)
    assert run(place, "--seeds", "1") == 0
    assert run(place, "--seeds", "1", "--patience", "9") == 0  # which none of these methods reads
    for more, message in (
        (("--seeds", "1", "--weight-decay", "0.5"), "weight_decay = 0.01, this one 0.5. Give the same, or"),
        (("--seeds", "1", "--set", "deebert.ensemble_decay=0.25"), "deebert_1.json has ensemble_decay = 0.5"),
        (("--seeds", "1", "--max-train-samples", "30"), "plain_1.json has data fingerprint ="),
    ):
        capsys.readouterr()
        assert run(place, *more) == 2
        assert message in capsys.readouterr().err
    assert (
        run(place, "--seeds", "3", "--weight-decay", "0.5") == 1
    )  # they would be averaged with those of seed 1
    assert "(seed 1) must share weight_decay, got 0.5 and 0.01." in capsys.readouterr().err
    assert place.cells() == before


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["run", "dry_run"])
@pytest.mark.parametrize(
    "more, message",
    [
        (["--resamples", "1"], "resamples must be at least 2, got 1."),
        (["--criteria", "policy", "polcy"], "criteria must be all, or among policy, confidence, "),
        (["--baseline", "deberta"], 'baseline must be among plain, deebert, got "deberta".'),
        (["--baseline", "static"], 'baseline must be among plain, deebert, got "static".'),
        (["--baseline", "deebert/polcy"], 'got "deebert/polcy".'),
        (
            ["--baseline", "plain/policy"],
            'baseline must name a criterion of "plain", none, got "plain/policy".',
        ),
        (
            ["--also", "consistent/policy"],
            "also must name METHOD/CRITERION, with a method among deebert, and a",
        ),
        (["--also", "deebert/polcy"], 'got "deebert/polcy".'),
        (["--threshold-metric", "f1"], "three: threshold_metric f1 needs a task with two classes, got 3."),
    ],
)
def test_what_could_not_be_summed_up_is_refused_before_anything_is_trained(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
    dry_run: list[str],
) -> None:
    def no_training(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be trained")

    monkeypatch.setattr(comparing, "run_cell", no_training)
    three = ["text,label", *(f"film {number},{'abc'[number % 3]}" for number in range(60))]
    (tmp_path / "three.csv").write_text("\n".join(three))
    options = ["--methods", "deebert", "--output-dir", str(tmp_path / "out"), *place.options]
    if "--resamples" in more:
        at = options.index("--resamples")
        del options[at : at + 2]
    if "--threshold-metric" in more:
        options[options.index("--train-file") + 1] = str(tmp_path / "three.csv")
        at = options.index("--eval-file")
        del options[at : at + 2]
    assert main(["compare", *options, *more, *dry_run]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "cells" not in said.out
    assert not (tmp_path / "out").exists()


def test_a_reading_may_speak_of_kept_cells(place: Place, interrupted: int, tmp_path: Path) -> None:
    shutil.copytree(place.root / "out" / "cells", tmp_path / "out" / "cells")
    where = ["--output-dir", str(tmp_path / "out"), "--seeds", "1", "--dry-run"]
    reading = ["--baseline", "deebert/entropy", "--also", "deebert/patience", "--criteria", "energy"]
    assert main(["compare", *place.options, "--methods", "consistent", *where, *reading]) == 0
    smaller = ["--methods", "static:2", "--baseline", "static"]
    assert main(["compare", *place.options, *where, *smaller]) == 0
    assert main(["compare", *place.options, *where, *smaller[:2], "--baseline", "static:2"]) == 2


def test_a_comparison_of_smaller_models_alone_has_a_plain_one(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["compare", *place.options, "--methods", "deebert", "--num-layers", "2", "--dry-run"]
    plan += ["--output-dir", str(tmp_path / "out")]
    assert main([*plan, "--baseline", "plain"]) == 0
    assert main([*plan, "--baseline", "static"]) == 2
    assert 'baseline must be among plain, deebert, got "static".' in capsys.readouterr().err


def test_tables_come_from_cells_alone(
    place: Place, interrupted: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place.root / "out" / "cells", tmp_path / "cells")
    picture = tmp_path / "picture.pdf"
    assert main(["compare", "--render", "--output-dir", str(tmp_path), "--baseline", "consitent"]) == 2
    assert 'baseline must be among deebert, plain, got "consitent".' in capsys.readouterr().err
    assert not (tmp_path / "compare.json").exists()
    assert main(["compare", "--render", "--output-dir", str(tmp_path), "--plot", str(picture)]) == 0
    assert "rows, small: at the validation threshold, and layers saved" in capsys.readouterr().out
    assert picture.stat().st_size > 5000
    assert {path.name for path in tmp_path.iterdir()} == {
        "cells",
        "compare.json",
        "compare.md",
        "picture.pdf",
    }


def test_trained_models_may_go_once_they_are_measured(place: Place) -> None:
    for _ in range(2):
        assert run(place, "--seeds", "7", "--discard-models", method="plain", out="thin") == 0
        assert list((place.root / "thin" / "runs").iterdir()) == []


@pytest.mark.parametrize(
    "more, message",
    [
        (["--render", "--backbone", "b"], "--render shows the cells that are there, and --backbone goes"),
        (["--render", "--seeds", "1", "2"], "--render shows the cells that are there, and --seeds goes"),
        (["--render", "--dry-run"], "and --dry-run goes without it."),
        (["--render", "--discard-models"], "and --discard-models goes without it."),
        (["--render", "--learning-rate", "1e-4"], "and --learning-rate goes without it."),
        (["--render", "--settings", "s.yaml"], "and --settings goes without it."),
        (["--render", "--set", "deebert.pooling=cls"], "and --set goes without it."),
        (["--render", "--max-train-samples", "9"], "and --max-train-samples goes without it."),
        (["--backbone", "b", "--task", "rte"], "Give --methods and --backbone, or --render"),
        (["--methods", "deebert", "--backbone", "b", "--task", "rte", "--seed", "3"], "Give --seeds"),
        (["--methods", "deebert", "--backbone", "b"], "Give --task, or --train-file"),
        (["--methods", "deebert", "--backbone", "b", "--task", "alpaca"], "compare is for classifiers"),
        (["--methods", "x", "--backbone", "b", "--set", "deebert"], "--set must be METHOD.key=value"),
        (["--methods", "x", "--plot", "p.txt"], "The picture must end in"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    if "--set" in more:
        rows = write_csv(tmp_path / "rows.csv", tiny_dataset(20))
        more += ["--train-file", str(rows), "--text-columns", "text", "--label-column", "label"]
    assert main(["compare", "--output-dir", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err


def test_several_processes_are_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = [*place.options, "--output-dir", str(place.root / "two")]
    assert main(["compare", "--methods", "deebert", *options]) == 2
    assert "compare runs in one process" in capsys.readouterr().err


def test_settings_of_single_methods_come_from_a_file_and_from_options(tmp_path: Path) -> None:
    from consistentee.cli.compare import _overrides

    path = tmp_path / "settings.yaml"
    path.write_text("deebert: {head: shared_pooler, ensemble_decay: 0.0}\n")
    lines = ["deebert.ensemble_decay=0.25", "plain:half.num_layers=6"]
    assert _overrides(path, lines, ["deebert", "plain:half"]) == {
        "deebert": {"head": "shared_pooler", "ensemble_decay": 0.25},
        "plain:half": {"num_layers": 6},
    }


def test_one_file_of_settings_serves_comparisons_of_other_methods_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from consistentee.cli.compare import _overrides

    path = tmp_path / "settings.yaml"
    path.write_text(
        "plain: {dropout: 0.2}\ndeebert:small: {ensemble_decay: 0.0}\nsweet: {ensemble_decay: 0.0}\n"
    )
    assert _overrides(path, [], ["sweet"]) == {"plain": {"dropout": 0.2}, "sweet": {"ensemble_decay": 0.0}}
    assert "settings of deebert:small left aside, not compared here" in capsys.readouterr().out
    path.write_text("deebrt: {ensemble_decay: 0.0}\n")
    with pytest.raises(UsageError, match=r'which has deebrt: method must be one of .* got "deebrt"'):
        _overrides(path, [], ["deebert"])


def test_a_file_of_settings_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "methods.yaml"
    from consistentee.cli.compare import _overrides

    path.write_bytes("# f\u00fcr deebert".encode("latin-1"))
    with pytest.raises(UsageError, match=r"--settings .*methods\.yaml must be UTF-8"):
        _overrides(path, [], ["deebert"])


def test_cells_that_another_command_makes_come_last_and_are_taken_over(
    place: Place, interrupted: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place.root / "shared"
    (out / ".locks").mkdir(parents=True)
    (out / "cells").mkdir()
    other = FileLock(out / ".locks" / "small_rows_plain_1.lock")
    other.acquire()
    made = place.root / "out" / "cells" / "small_rows_plain_1.json"

    def let_go(seconds: float) -> None:  # while this command waits, the other one finishes its cell
        assert (out / "cells" / "small_rows_deebert_1.json").is_file()
        assert not (out / "runs" / "small_rows_plain_1").exists()
        shutil.copy(made, out / "cells")
        other.release()

    monkeypatch.setattr(claims.time, "sleep", let_go)
    assert run(place, "--seeds", "1", out="shared") == 0
    said = capsys.readouterr().out
    assert "== small_rows_deebert_1 (1 of 2)" in said
    assert "Waiting for other commands, which make small_rows_plain_1." in said
    assert "== small_rows_plain_1 (2 of 2) is finished, by another command." in said
    assert not (out / "runs" / "small_rows_plain_1").exists()
    assert place.cells("shared").keys() == {"small_rows_plain_1", "small_rows_deebert_1"}


def test_a_cell_that_another_command_gave_up_is_made(
    place: Place, interrupted: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place.root / "given-up"
    (out / ".locks").mkdir(parents=True)
    other = FileLock(out / ".locks" / "small_rows_deebert_1.lock")
    other.acquire()
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: other.release())
    assert run(place, "--seeds", "1", out="given-up") == 0
    assert "== small_rows_deebert_1 (2 of 2)\n" in capsys.readouterr().out
    assert place.cells("given-up").keys() == {"small_rows_plain_1", "small_rows_deebert_1"}
