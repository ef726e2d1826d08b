"""`consistentee report`: the page holds what `evaluate` finds on the same rows, and bad input gets one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee.cli.main import main
from html_pages import Element, read_page, script_data
from tiny import tiny_backbone, tiny_dataset, tiny_full_depth_model, tiny_model, write_csv
from tiny_training import tiny_decoder

COLUMNS = ("--text-columns", "text", "--label-column", "label")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    backbone = tiny_backbone(folder / "backbone")
    torch.manual_seed(3)
    tiny_model(folder / "model", backbone, initial_exit_bias=0.0)
    tiny_full_depth_model(folder / "plain", backbone)
    write_csv(folder / "rows.csv", tiny_dataset(30, seed=2))
    (folder / "texts.txt").write_text("".join(f"{text}\n" for (text,) in tiny_dataset(30, seed=2).texts))
    return folder


def page_and_figures(root: Path, tmp_path: Path, *options: str) -> tuple[Element, dict[str, Any]]:
    """The page of `report` and the figures of `evaluate` for the same options."""
    page, figures = tmp_path / "report.html", tmp_path / "figures.json"
    assert main(["report", str(root / "model"), *options, "--output", str(page)]) == 0
    assert main(["evaluate", str(root / "model"), *options, "--json", str(figures)]) == 0
    return read_page(page.read_text(encoding="utf-8")), json.loads(figures.read_text())


def check_figures(page: Element, found: dict[str, Any], quality: str) -> None:
    """Every figure that both have is the same."""
    (points, _, layers) = (page.one("section", id=name) for name in ("points", "classes", "layers"))
    (own,) = (row for row in points.one("table").all("tr", class_="own"))
    cells = [cell.text for cell in own.children if isinstance(cell, Element)]
    assert f"{100 * found[quality]:.2f}" == cells[2]
    shown = (
        f"{found['mean_exit_layer']:.2f}",
        f"{found['layer_speedup']:.2f}×",
        f"{100 * found['layers_saved']:.1f}",
    )
    assert tuple(cells[-3:]) == shown
    rows = layers.one("table").rows()[1:]
    assert [int(row[1]) for row in rows] == found["exit_histogram"]
    at_exits = ["" if share is None else f"{100 * share:.2f}" for share in found[f"exit_{quality}"]]
    assert [row[3] for row in rows] == at_exits
    assert [row[5] for row in rows] == [f"{100 * share:.2f}" for share in found[f"per_layer_{quality}"]]
    drawn = sorted((point[1], point[2]) for point in script_data(page)["points"])
    curve = sorted((round(p[quality], 6), round(p["mean_exit_layer"], 5)) for p in found["curve"])
    assert drawn == curve


def test_labelled_rows(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--eval-file", str(root / "rows.csv"), *COLUMNS)
    page, found = page_and_figures(root, tmp_path, *rows, "--reference", str(root / "plain"))
    check_figures(page, found, "accuracy")
    classes = page.one("section", id="classes").one("table").rows()[1:]
    assert [[row[0], int(row[1]), *row[4:]] for row in classes] == [
        [
            one["label"],
            one["num_examples"],
            f"{100 * one['recall']:.2f}",
            f"{100 * one['full_depth_recall']:.2f}",
        ]
        for one in found["class_recall"]
    ]
    reference = page.one("section", id="points").one("table").rows()[1]
    assert reference[0] == "plain model"
    assert reference[2] == f"{100 * found['reference']['accuracy']:.2f}"
    assert f"Report written to {tmp_path / 'report.html'}" in capsys.readouterr().out


def test_other_thresholds_and_criteria(root: Path, tmp_path: Path) -> None:
    rows = ("--eval-file", str(root / "rows.csv"), *COLUMNS, "--max-samples", "20")
    page, found = page_and_figures(root, tmp_path, *rows, "--criterion", "confidence", "--threshold", "0.55")
    check_figures(page, found, "accuracy")
    assert page.one("p", class_="lead").text.startswith("With the threshold that was asked for the exits run")
    assert "20 rows" in page.one("p", class_="lead").text


def test_texts_without_labels(root: Path, tmp_path: Path) -> None:
    page, found = page_and_figures(root, tmp_path, "--texts", str(root / "texts.txt"))
    check_figures(page, found, "agreement")


def test_texts_are_in_the_page_unless_they_are_not_wanted(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    command = ["report", str(root / "model"), "--texts", str(root / "texts.txt"), "--output", str(output)]
    known = (root / "texts.txt").read_text().splitlines()
    assert main(command) == 0
    assert any(text in output.read_text() for text in known)
    assert main([*command, "--no-texts"]) == 0  # in the place of the report before
    assert not any(text in output.read_text() for text in known if len(text) > 12)


def test_the_training_record_alone(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "model", tmp_path / "report.html"
    folder.symlink_to(root / "model")
    command = ["report", str(folder), "--output", str(output)]
    assert main(command) == 1
    assert "holds no figures by layer to report on. Give rows" in capsys.readouterr().err
    assert not output.exists()
    for option in (["--threshold", "0.3"], ["--criterion", "policy"], ["--max-samples", "3"]):
        assert main([*command, *option]) == 2
        assert f"{option[0]} needs rows: give --task, --eval-file or --texts." in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--texts", "t.txt", "--task", "rte"], 2, "--texts has no labels, so --task goes without it."),
        (
            ["--texts", "t.txt", "--reference", "x"],
            2,
            "--texts has no labels, so --reference goes without it.",
        ),
        (["--eval-file", "rows.csv"], 2, "--eval-file needs --text-columns and --label-column"),
        (["--batch-size", "0"], 2, "--batch-size must be at least 1, got 0."),
        (["--threshold", "1.5", "--texts", "t.txt"], 2, "threshold must be in [0, 1] for policy, got 1.5"),
        (["--operating-point", "x", "--texts", "t.txt"], 2, 'has no operating point "x"'),
        (["--texts", "nothing.txt"], 1, "There is no such file"),
        (["--texts", "empty.txt"], 1, "empty.txt"),
    ],
)
def test_what_makes_no_sense(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("good\n")
    (tmp_path / "empty.txt").touch()
    assert main(["report", str(root / "model"), "--output", "report.html", *options]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "report.html").exists()


def test_models_that_have_no_report(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "report.html"), "--texts", str(root / "texts.txt")]
    generator = tiny_decoder(tmp_path / "generator")
    assert main(["report", str(generator), *output]) == 2
    assert "report goes with classifiers" in capsys.readouterr().err
    assert main(["report", str(root / "plain"), *output]) == 1
    assert "has no exits" in capsys.readouterr().err


def test_a_comparison_that_is_not_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my comparison"
    (folder / "cells").mkdir(parents=True)
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 2
    said = f"no compare.json yet. Write it: consistentee compare --render --output-dir '{folder}'"
    assert said in capsys.readouterr().err


def test_other_files_are_not_overwritten(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<!doctype html><title>Thesis</title>")
    command = ["report", str(root / "model"), "--texts", str(root / "texts.txt"), "--output"]
    assert main([*command, str(thesis)]) == 2
    assert "is there and is no report of ours" in capsys.readouterr().err
    assert thesis.read_text() == "<!doctype html><title>Thesis</title>"
    assert main([*command, str(tmp_path)]) == 1
    assert "is a folder. Give the name of a file." in capsys.readouterr().err


def test_a_place_for_the_page_is_looked_for_before_the_work(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = root / "rows.csv" / "report.html"
    assert main(["report", str(root / "nowhere"), "--output", str(place)]) == 2
    assert f'--output must lie in a folder, and "{root / "rows.csv"}" is none.' in capsys.readouterr().err
