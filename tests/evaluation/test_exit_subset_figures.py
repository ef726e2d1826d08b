"""Figures of a model with exits on some of its layers: none is shown for a layer that has no exit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from rich.console import Console

from consistentee.evaluation.agreement import evaluate_agreement
from consistentee.evaluation.classification import evaluate_model
from consistentee.evaluation.exit_report import report_exits
from consistentee.evaluation.html_report import model_page
from consistentee.evaluation.plots import plot_evaluation
from consistentee.evaluation.report_figures import layer_figures
from consistentee.evaluation.reports import evaluation_tables
from consistentee.evaluation.results import AgreementEvaluation, Evaluation
from consistentee.evaluation.svg_charts import layer_chart
from consistentee.models.card import CARD_FILE
from consistentee.models.exit_subsets import with_exit_layers
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.record import record_evaluation
from tiny import tiny_backbone, tiny_dataset, tiny_model

ROWS = tiny_dataset(80, seed=5)
EXITS = (2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("subset")
    torch.manual_seed(3)
    backbone = tiny_backbone(root / "backbone", layers=4)
    return tiny_model(root / "model", backbone, initial_exit_bias=0.0, exit_layers=list(EXITS))


@pytest.fixture(scope="module")
def saved(folder: Path) -> LoadedClassifier:
    return load_model(folder, LoadedClassifier)


@pytest.fixture(scope="module")
def evaluation(saved: LoadedClassifier) -> Evaluation:
    return evaluate_model(saved, ROWS, threshold=0.5)


@pytest.fixture(scope="module")
def agreement(saved: LoadedClassifier) -> AgreementEvaluation:
    return evaluate_agreement(saved, ROWS.texts, threshold=0.5)


def shown(rendered: Any) -> str:
    console = Console(width=150, color_system=None)
    with console.capture() as captured:
        console.print(rendered)
    return captured.get()


def test_figures_are_those_of_the_layers_with_exits(
    saved: LoadedClassifier, evaluation: Evaluation, agreement: AgreementEvaluation
) -> None:
    for figures in (
        evaluation.per_layer_accuracy,
        evaluation.classifier_accuracy,
        agreement.per_layer_agreement,
    ):
        assert [layer for layer, share in enumerate(figures, start=1) if share is not None] == list(EXITS)
    alone = evaluate_model(with_exit_layers(saved, [4]), ROWS, threshold=0.5)
    assert alone.per_layer_accuracy == [None, None, None, alone.full_depth_accuracy]
    whole = evaluate_model(with_exit_layers(saved, None), ROWS, threshold=0.5)
    assert None not in whole.per_layer_accuracy
    assert [evaluation.classifier_accuracy[layer - 1] for layer in EXITS] == [
        whole.classifier_accuracy[layer - 1] for layer in EXITS
    ]
    assert evaluation.full_depth_accuracy == evaluation.per_layer_accuracy[-1]
    assert agreement.full_depth_agreement == agreement.per_layer_agreement[-1] == 1


def test_tables(evaluation: Evaluation, agreement: AgreementEvaluation) -> None:
    for found, without in ((evaluation, 3), (agreement, 3)):
        lines = shown(evaluation_tables(found)).splitlines()
        for layer in range(1, 5):
            cells = next(line.split() for line in lines if re.match(rf"\s*{layer}\s+\d+\s", line))
            assert (len(cells) > without) == (layer in EXITS), cells  # layer, rows, their share


def test_the_card(folder: Path, evaluation: Evaluation) -> None:
    record_evaluation(folder, evaluation.summary())
    rows = re.findall(
        r"^\| (\d) \|.*\| *([\d.]+ %|) *\|$", (folder / CARD_FILE).read_text(encoding="utf-8"), re.M
    )
    assert [int(layer) for layer, share in rows if share] == list(EXITS)
    assert len(rows) == 4


def test_the_page(saved: LoadedClassifier) -> None:
    report = report_exits(saved, ROWS)
    page = model_page(saved, report)
    table = page[page.index("if all exited here %") :]
    rows = re.findall(r'<tr><th scope="row" class="n">(\d)</th>(.*?)</tr>', table)[:4]
    columns = {int(layer): re.findall(r">([^<]*)</td>", cells) for layer, cells in rows}
    for if_all_or_alone in (4, 5):
        assert [layer for layer, cells in columns.items() if cells[if_all_or_alone]] == list(EXITS)
    spoken = re.search(r"If all exited at the layer: ([^<\"]*?)\. The table", page)
    assert spoken is not None
    assert re.findall(r"layer (\d)", spoken[1]) == [str(layer) for layer in EXITS]


def test_pictures(saved: LoadedClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = evaluate_model(saved, ROWS, threshold=0.5)
    chart = layer_chart(layer_figures(evaluation.to_dict(), "accuracy"), "accuracy", narrow=False)
    assert chart.parts["if_all"].count(" ") == len(EXITS)

    drawn: dict[str, list[float]] = {}
    plot = Axes.plot

    def noting(axes: Axes, *args: Any, **options: Any) -> Any:
        drawn[options.get("label", "")] = list(args[0])
        return plot(axes, *args, **options)

    monkeypatch.setattr(Axes, "plot", noting)
    plot_evaluation(evaluation, tmp_path / "plot.png")
    assert drawn["accuracy if all exited here"] == list(EXITS)
