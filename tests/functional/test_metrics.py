"""Metrics against values worked out by hand and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from consistentee.functional.metrics import (
    METRICS,
    accuracy,
    check_threshold_metric,
    compute_metrics,
    effects_of_changes,
    f1,
    macro_f1,
    matthews,
)

PREDICTIONS = [1, 0, 1, 1, 0, 1]
LABELS = [1, 0, 0, 1, 1, 1]  # 3 true positives, 1 false positive, 1 false negative, 1 true negative


def test_hand_worked_values() -> None:
    assert accuracy(PREDICTIONS, LABELS) == pytest.approx(4 / 6)
    assert f1(PREDICTIONS, LABELS) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert macro_f1(PREDICTIONS, LABELS) == pytest.approx((6 / 8 + 2 / 4) / 2)
    assert matthews(PREDICTIONS, LABELS) == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))


def test_matthews_of_three_classes_by_hand() -> None:
    # 6 rows, 5 right; predicted counts 2, 2, 2; label counts 3, 2, 1
    expected = (5 * 6 - (2 * 3 + 2 * 2 + 2 * 1)) / math.sqrt((36 - 12) * (36 - 14))
    assert matthews([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 0, 2]) == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_agrees_with_scikit_learn(num_classes: int) -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(num_classes)
    labels = rng.integers(num_classes, size=200)
    predictions = np.where(rng.random(200) < 0.6, labels, rng.integers(num_classes, size=200))
    assert accuracy(predictions, labels) == pytest.approx(oracle.accuracy_score(labels, predictions))
    assert matthews(predictions, labels) == pytest.approx(oracle.matthews_corrcoef(labels, predictions))
    macro = oracle.f1_score(labels, predictions, average="macro")
    assert macro_f1(predictions, labels) == pytest.approx(macro)
    if num_classes == 2:
        assert f1(predictions, labels) == pytest.approx(oracle.f1_score(labels, predictions))


@pytest.mark.parametrize("predictions, labels", [([0, 0, 0], [0, 1, 0]), ([0, 1, 0], [1, 1, 1]), ([2], [2])])
def test_matthews_of_one_class_is_zero(predictions: list[int], labels: list[int]) -> None:
    assert matthews(predictions, labels) == 0.0


def test_matthews_at_its_ends() -> None:
    assert matthews([0, 1, 2, 1], [0, 1, 2, 1]) == pytest.approx(1.0)
    assert matthews([0, 1, 0, 1], [1, 0, 1, 0]) == pytest.approx(-1.0)


def test_f1_without_positives_is_zero() -> None:
    assert f1([0, 0], [0, 0]) == 0.0


def test_macro_f1_counts_a_rare_class_as_much_as_any() -> None:
    labels = [0] * 97 + [1] * 3
    assert accuracy([0] * 100, labels) == 0.97
    assert macro_f1([0] * 100, labels) == pytest.approx((2 * 97 / 197 + 0) / 2)
    assert macro_f1([5, 5], [5, 5]) == 1.0  # classes that are nowhere do not count


def test_the_metric_of_thresholds_must_fit_the_classes() -> None:
    with pytest.raises(
        ValueError, match=r"threshold_metric f1 needs a task with two classes, got 3\. Use macro_f1"
    ):
        check_threshold_metric("f1", 3)
    assert check_threshold_metric("f1", 2) == "f1"
    assert check_threshold_metric("macro_f1", 3) == "macro_f1"


@pytest.mark.parametrize("name", list(METRICS))
def test_effects_are_those_of_one_row_after_another(name: str) -> None:
    generator = np.random.default_rng(0)
    predictions, others, labels = generator.integers(2, size=(3, 40))
    expected = []
    for row in np.flatnonzero(predictions != others):
        without = predictions.copy()
        without[row] = others[row]
        expected.append(METRICS[name](predictions, labels) - METRICS[name](without, labels))
    assert effects_of_changes(name, predictions, others, labels) == pytest.approx(expected)
    assert len(effects_of_changes(name, labels, labels, labels)) == 0


def test_compute_metrics_keeps_the_order_and_takes_tensors() -> None:
    found = compute_metrics(["matthews", "accuracy"], torch.tensor(PREDICTIONS), torch.tensor(LABELS))
    assert list(found) == ["matthews", "accuracy"]
    assert all(type(value) is float for value in found.values())
    assert set(METRICS) == {"accuracy", "f1", "macro_f1", "matthews"}


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r'"acuracy" is not known\. Did you mean "accuracy"\?'):
        compute_metrics(["acuracy"], [1], [1])
    with pytest.raises(ValueError, match=r"equal length, got shapes \(2,\) and \(1,\)"):
        accuracy([1, 0], [1])
    with pytest.raises(ValueError, match="at least one row"):
        accuracy([], [])
    with pytest.raises(ValueError, match="two classes, got class index 2"):
        f1([2, 0], [1, 0])
    with pytest.raises(ValueError, match="labels must be integer class indices"):
        accuracy([1, 0], [0.5, 1.0])
    with pytest.raises(ValueError, match="predictions must be integer class indices"):
        accuracy([-1, 0], [0, 1])
