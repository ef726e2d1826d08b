"""`consistentee ablate` from end to end on a tiny model: cells, studies, a second run, and answers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from consistentee.cli.main import main
from consistentee.evaluation.comparison import claims
from quick import QUICK
from tiny import tiny_backbone, tiny_dataset, write_csv


def test_questions_are_asked_and_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--output-dir", str(tmp_path / "out"), "--questions", "policy_rows", "--resamples", "20"]
    data = ["--backbone", str(tiny_backbone(tmp_path / "small", layers=3)), "--seeds", "1"]
    data += ["--train-file", str(write_csv(tmp_path / "rows.csv", tiny_dataset(40)))]
    data += ["--eval-file", str(write_csv(tmp_path / "eval.csv", tiny_dataset(30, seed=9)))]
    data += ["--text-columns", "text", "--label-column", "label", "--policy-input", "state"]
    for name, value in QUICK.items():
        if name not in ("layer_costs", "policy_input"):
            data += [f"--{name.replace('_', '-')}", str(value)]

    assert main(["ablate", *options[:-1], "1", *data]) == 2
    assert "resamples must be at least 2, got 1." in capsys.readouterr().err
    assert main(["ablate", *options, *data, "--dry-run"]) == 0
    assert "1 studies, 0 of them finished" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(["ablate", *options, *data, "--discard-models"]) == 0
    names = {path.stem for path in (tmp_path / "out" / "cells").iterdir()}
    assert names == {"small_rows_consistent_1", "small_rows_plain_1", "small_rows_consistent-seen_rows_1"}
    assert {path.name for path in (tmp_path / "out" / "runs").iterdir()} == set()  # they were discarded
    assert not (tmp_path / "out" / "warm-ups").exists()
    assert not list((tmp_path / "out").glob("compare.*"))  # which are for `compare` to write
    warmed_up = capsys.readouterr().out.count("steps are those of a training that began alike")
    assert warmed_up == 1  # `consistent` warms up for both
    alone = ["--methods", "consistent:seen_rows", "--settings", str(tmp_path / "seen.yaml")]
    (tmp_path / "seen.yaml").write_text("consistent:seen_rows: {policy_data: seen}\n")
    assert main(["compare", *alone, *data, "--output-dir", str(tmp_path / "alone")]) == 0
    cells = [
        json.loads((tmp_path / out / "cells" / "small_rows_consistent-seen_rows_1.json").read_text())
        for out in ("out", "alone")
    ]
    for cell in cells:
        assert cell.pop("seconds") > 0
    assert cells[0] == cells[1]
    summary = json.loads((tmp_path / "out" / "ablate.json").read_text())["questions"]["policy_rows"]
    (entry,) = summary["differences"]
    assert (entry["variant"], entry["baseline"]) == ("consistent:seen_rows", "consistent")
    assert [point["rows"] for point in summary["policy_rows"][0]["areas"]] == [5, 10, 20]
    assert (tmp_path / "out" / "ablate.png").stat().st_size > 10_000

    assert main(["compare", "--render", "--output-dir", str(tmp_path / "out"), "--criteria", "all"]) == 0
    compared = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("compare.*")}
    assert compared.keys() == {"compare.json", "compare.md", "compare.png"}
    capsys.readouterr()
    assert main(["ablate", *options, *data]) == 0  # all is there
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("compare.*")} == compared
    printed = capsys.readouterr().out
    assert "1 studies, 1 of them finished" in printed
    assert "3 of them finished" in printed

    study = tmp_path / "out" / "studies" / "small_rows_consistent_1_policy_rows.json"
    found = study.read_text()
    study.unlink()
    other = FileLock(tmp_path / "out" / ".locks" / f"{study.stem}.lock")  # another command makes it
    other.acquire()

    def finish(seconds: float) -> None:
        study.write_text(found)
        other.release()

    monkeypatch.setattr(claims.time, "sleep", finish)
    assert main(["ablate", *options, *data]) == 0
    printed = capsys.readouterr().out
    assert "Waiting for other commands, which make small_rows_consistent_1_policy_rows." in printed
    assert "== study" not in printed

    study.unlink()
    assert main(["ablate", *options, *data]) == 1  # its model is gone
    assert "Remove its cell, so that it is trained anew" in capsys.readouterr().err
    assert main(["ablate", *options, "--render"]) == 0
    assert main(["ablate", *options, *data, "--render"]) == 2

    study.write_text(found)  # of a model whose cell is gone, and that would be trained with other settings
    (tmp_path / "out" / "cells" / "small_rows_consistent_1.json").unlink()
    capsys.readouterr()
    assert main(["ablate", *options, *data, "--weight-decay", "0.5"]) == 2
    said = capsys.readouterr().err
    assert f"The model of the study {study} has weight_decay = 0.01, this one 0.5." in said


@pytest.mark.parametrize("more", [["--seeds", "1"], ["--dry-run"], ["--discard-models"], ["--data-dir", "."]])
def test_answers_alone_take_nothing_that_only_training_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert main(["ablate", "--output-dir", str(tmp_path / "out"), "--render", *more]) == 2
    assert f"and {more[0]} goes without it." in capsys.readouterr().err
