"""What a report shows beside an evaluation, against counting row by row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats

from consistentee.data.rows import TextDataset
from consistentee.evaluation import exit_report
from consistentee.evaluation.classification import evaluate_model, run_layers
from consistentee.evaluation.exit_report import ExitReport, report_exits, score_range
from consistentee.evaluation.report_figures import (
    RowOutcomes,
    choose_examples,
    hardness_table,
    layer_figures,
    recorded_point,
)
from consistentee.evaluation.retrofit import find_disagreements
from consistentee.functional.bounds import binomial_interval
from consistentee.functional.criteria import exit_scores
from consistentee.functional.exits import choose_exit_layer
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.training.states import LayerStates
from tiny import LABEL_NAMES, tiny_backbone, tiny_dataset, tiny_model

ROWS = tiny_dataset(60, seed=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> LoadedClassifier:
    root = tmp_path_factory.mktemp("report")
    torch.manual_seed(3)
    points = {
        "careful": {"criterion": "confidence", "threshold": 0.6, "certificate": {"goal": "max_disagreement"}}
    }
    model = tiny_model(
        root / "model", tiny_backbone(root / "backbone"), initial_exit_bias=0.0, operating_points=points
    )
    return load_model(model, LoadedClassifier)


@pytest.fixture(scope="module")
def report(saved: LoadedClassifier) -> ExitReport:
    return report_exits(saved, ROWS, criteria=["policy", "confidence"])


@pytest.fixture(scope="module")
def outcomes(saved: LoadedClassifier) -> RowOutcomes:
    states, _ = run_layers(saved, ROWS)
    certain = states.layer_logits.softmax(-1).max(-1)
    scores = exit_scores("policy", states.layer_logits, states.exit_probs)
    exit_layer = choose_exit_layer(scores, 0.5)
    return RowOutcomes(certain.indices, certain.values, scores, states.labels, exit_layer)


def test_the_evaluation_is_that_of_evaluate(saved: LoadedClassifier, report: ExitReport) -> None:
    alone = evaluate_model(saved, ROWS, criteria=["policy", "confidence"]).to_dict()
    assert report.evaluation.to_dict() == alone
    assert report.point.quality == alone["accuracy"]
    assert report.point.mean_exit_layer == alone["mean_exit_layer"]


def test_exits_by_class_and_lost_rows(report: ExitReport, outcomes: RowOutcomes) -> None:
    rows = list(zip(ROWS.labels, outcomes.exit_layer.tolist(), outcomes.predictions.tolist(), strict=True))
    assert len({layer for _, layer, _ in rows}) > 1
    for index, found in enumerate(report.classes):
        of_class = [(layer, said) for label, layer, said in rows if label == index]
        assert found.label == LABEL_NAMES[index]
        assert found.exit_histogram == [sum(layer == at for layer, _ in of_class) for at in (1, 2, 3)]
        right = [said[layer - 1] == index for layer, said in of_class]
        assert found.recall == pytest.approx(sum(right) / len(of_class))
        assert found.mean_exit_layer == pytest.approx(sum(layer for layer, _ in of_class) / len(of_class))
    lost = sum(said[-1] == label != said[layer - 1] for label, layer, said in rows)
    won = sum(said[layer - 1] == label != said[-1] for label, layer, said in rows)
    assert (report.num_lost, report.num_won) == (lost, won)
    assert report.point.difference == pytest.approx((won - lost) / 60)
    assert report.point.difference_interval[0] < report.point.difference < report.point.difference_interval[1]


def test_histograms_and_intervals_along_the_curve(report: ExitReport) -> None:
    curve = report.evaluation.curve
    assert len(report.histograms) == len(report.intervals) == len(curve) > 10
    for point, histogram, (low, high) in zip(curve, report.histograms, report.intervals, strict=True):
        assert sum(histogram) == 60
        mean = sum(layer * count for layer, count in enumerate(histogram, start=1)) / 60
        assert mean == pytest.approx(point.mean_exit_layer, abs=1e-5)
        exact = stats.binomtest(round(60 * point.accuracy), 60).proportion_ci(method="exact")
        assert (low, high) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("count, rows", [(0, 7), (7, 7), (3, 10), (872, 1000)])
def test_exact_intervals_are_those_of_scipy(count: int, rows: int) -> None:
    exact = stats.binomtest(count, rows).proportion_ci(0.9, method="exact")
    assert binomial_interval(count, rows, 0.9) == pytest.approx((exact.low, exact.high))


def test_operating_points(saved: LoadedClassifier, report: ExitReport) -> None:
    named = {(point.criterion, point.threshold): point for point in report.points}
    assert report.points[0].threshold is None
    assert report.points[0].agreement == 1.0
    assert report.points[0].quality == report.evaluation.per_layer_accuracy[-1]
    assert report.points[1] is report.point
    assert report.point.names == ("default",)
    careful = named["confidence", 0.6]
    assert careful.names == ("careful",)
    assert careful.certificates == (("careful", {"goal": "max_disagreement"}),)
    again = report_exits(saved, ROWS, operating_point="careful")
    assert again.point == careful
    assert again.evaluation.criterion == "confidence"
    assert again.points[2].names == ("default",)


def test_without_labels_agreement_takes_the_place_of_accuracy(saved: LoadedClassifier) -> None:
    found = report_exits(saved, ROWS.texts)
    assert found.quality == "agreement"
    assert found.point.quality == found.point.agreement == found.evaluation.agreement
    assert found.num_won == 0
    assert found.num_lost == round((1 - found.point.quality) * 60)
    for point in found.points[
        1:
    ]:  # a difference to full depth is what is lost of its 100 %, by the same interval
        assert point.difference_interval == pytest.approx([end - 1 for end in point.interval], abs=1e-12)
    assert not any(found.hardness.never)
    assert all(example.label is None for example in (*found.early, *found.deep, *found.changed))
    assert {one.full_depth_recall for one in found.classes if one.num_examples} == {1.0}


def test_hardness_against_exit_layer_is_counted(outcomes: RowOutcomes) -> None:
    table = hardness_table(outcomes.right, outcomes.exit_layer)
    counts, never = [[0] * 3 for _ in range(3)], [0] * 3
    pairs = []
    for right, layer in zip(outcomes.right.tolist(), outcomes.exit_layer.tolist(), strict=True):
        if not right[-1]:
            never[layer - 1] += 1
            continue
        memorized = min(at for at in (1, 2, 3) if all(right[at - 1 :]))
        counts[memorized - 1][layer - 1] += 1
        pairs.append((memorized, layer))
    assert (table.counts, table.never) == (counts, never)
    assert table.rank_correlation == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)


def test_no_correlation_where_nothing_varies() -> None:
    table = hardness_table(torch.ones(4, 3, dtype=torch.bool), torch.ones(4, dtype=torch.int64))
    assert table.rank_correlation is None
    assert table.counts == [[4, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_examples_are_what_they_are_said_to_be(outcomes: RowOutcomes) -> None:
    found = choose_examples(outcomes, ROWS, labelled=True)
    rows = {texts: row for row, texts in enumerate(ROWS.texts)}
    shown = [example.texts for examples in found.values() for example in examples]
    assert len(shown) == len(set(shown)) > 6
    for sort, examples in found.items():
        for example in examples:
            row = rows[example.texts]
            said = [LABEL_NAMES[index] for index in outcomes.predictions[row].tolist()]
            assert example.exit_layer == outcomes.exit_layer[row]
            assert (example.exit_label, example.full_label) == (said[example.exit_layer - 1], said[-1])
            assert example.label == LABEL_NAMES[ROWS.labels[row]]
            assert (example.exit_label != example.full_label) == (sort == "changed")
            assert sort == "changed" or example.exit_label == example.label
            assert sort != "early" or example.exit_layer < 3
    earliest = min(int(layer) for layer in outcomes.exit_layer)
    assert found["early"][0].exit_layer == earliest
    latest = [int(at) for at, ok in zip(outcomes.exit_layer, outcomes.right[:, -1], strict=True) if ok]
    assert found["deep"][0].exit_layer == max(latest)


def test_no_texts_where_none_are_asked_for(saved: LoadedClassifier) -> None:
    found = report_exits(saved, ROWS, with_texts=False)
    assert [found.early, found.deep, found.changed] == [[], [], []]


def test_a_record_gives_the_same_point(report: ExitReport) -> None:
    quality, point = recorded_point(report.evaluation.summary())
    assert quality == "accuracy"
    for name in ("quality", "interval", "difference", "difference_interval", "layers_saved", "threshold"):
        assert getattr(point, name) == pytest.approx(getattr(report.point, name))
    assert layer_figures(report.evaluation.summary(), quality) == report.layers


def test_bars_reach_from_the_lowest_score_to_the_highest() -> None:
    assert score_range("policy", 12) == (0.0, 1.0)
    assert score_range("patience", 12) == (0.0, 12.0)


def barely_the_second(rows: int, layers: int) -> torch.Tensor:
    """Logits of two classes whose probabilities are equal in float32, (rows, layers, 2)."""
    low = torch.tensor(0.1)
    logits = torch.stack([low, torch.nextafter(low, torch.tensor(1.0))])
    assert logits.softmax(-1).unique().numel() == 1
    return logits.expand(rows, layers, 2)


def test_answers_are_those_of_the_evaluation_where_probabilities_are_equal(
    saved: LoadedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = barely_the_second(4, 3)
    states = LayerStates(logits, logits, torch.zeros(4, 3), torch.ones(4, dtype=torch.int64))
    monkeypatch.setattr(exit_report, "run_layers", lambda *_, **__: (states, 0))
    rows = TextDataset([("good",)] * 4, [1] * 4, LABEL_NAMES, "rows")
    found = report_exits(saved, rows, criteria=["policy"])
    assert found.point.quality == found.evaluation.to_dict()["accuracy"] == 1.0


def test_disagreements_are_counted_where_probabilities_are_equal(saved: LoadedClassifier) -> None:
    logits = barely_the_second(1, 3)
    states = LayerStates(logits, logits, torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    rows: Any = SimpleNamespace(text=lambda row: ("good",))
    answers = torch.tensor([[5.0, -5.0]])
    (found,) = find_disagreements(saved, states, rows, "policy", 0.5, answers)
    assert (found.label, found.exit_label) == LABEL_NAMES


def test_there_must_be_rows(saved: LoadedClassifier) -> None:
    with pytest.raises(ValueError, match="There must be at least one row to report on, got none"):
        report_exits(saved, [])
    with pytest.raises(ValueError, match="no operating point"):
        report_exits(saved, ROWS, operating_point="nothing")
