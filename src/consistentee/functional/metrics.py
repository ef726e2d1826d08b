"""Metrics of classification: accuracy, F1, macro F1 and Matthews correlation, over integer class indices."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of predictions that equal their label.

    Args:
        predictions: (rows,) integer class indices.
        labels: (rows,) integer class indices.

    Returns:
        A number in [0, 1].
    """
    predicted, actual = _class_indices(predictions, labels)
    return float((predicted == actual).mean())


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Harmonic mean of precision and recall of the class with index 1, for tasks with two classes.

    Args:
        predictions: (rows,) class indices, 0 or 1.
        labels: (rows,) class indices, 0 or 1; 1 is the positive class.

    Returns:
        A number in [0, 1]; 0 where neither a label nor a prediction is positive.

    Raises:
        ValueError: There is a class index above 1.
    """
    predicted, actual = _class_indices(predictions, labels)
    highest = int(max(predicted.max(), actual.max()))
    if highest > 1:
        raise ValueError(
            f"f1 needs a task with two classes, got class index {highest}. Use macro_f1, accuracy or matthews for more "
            "classes."
        )
    true_positives = int(np.sum((predicted == 1) & (actual == 1)))
    positives = int(np.sum(predicted == 1)) + int(np.sum(actual == 1))
    return 2.0 * true_positives / positives if positives else 0.0


def macro_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the F1 of every class that is among labels or predictions: a rare class counts as much as any.

    Args:
        predictions: (rows,) integer class indices.
        labels: (rows,) integer class indices.

    Returns:
        A number in [0, 1].
    """
    predicted, actual = _class_indices(predictions, labels)
    num_classes = int(max(predicted.max(), actual.max())) + 1
    right = np.bincount(actual[predicted == actual], minlength=num_classes)  # (classes,)
    counted = np.bincount(predicted, minlength=num_classes) + np.bincount(actual, minlength=num_classes)
    there = counted > 0
    return float((2.0 * right[there] / counted[there]).mean())


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation of predictions and labels, for any number of classes.

    Args:
        predictions: (rows,) integer class indices.
        labels: (rows,) integer class indices.

    Returns:
        A number in [-1, 1]; 0 where all predictions or all labels are one class.

    Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004
    (R_K, the covariance form). Difference: none.
    """
    predicted, actual = _class_indices(predictions, labels)
    num_classes = int(max(predicted.max(), actual.max())) + 1
    predicted_share = np.bincount(predicted, minlength=num_classes) / len(predicted)  # (classes,)
    actual_share = np.bincount(actual, minlength=num_classes) / len(actual)  # (classes,)
    covariance = accuracy(predicted, actual) - float(predicted_share @ actual_share)
    spread = float((1.0 - predicted_share @ predicted_share) * (1.0 - actual_share @ actual_share))
    if spread <= 1e-12:  # one class only; rounding leaves about 1e-16
        return 0.0
    return covariance / float(np.sqrt(spread))


MOST_KINDS = 64
"""Kinds of rows whose effect on a metric is asked for: each takes as long as the metric."""

METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
}


def check_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """The given metric names, once each is known to exist.

    Args:
        names: Metric names.

    Returns:
        The same names.

    Raises:
        ValueError: A name is not in METRICS.
    """
    checked = tuple(names)
    for name in checked:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1)
            hint = f' Did you mean "{close[0]}"?' if close else ""
            raise ValueError(f'Metric "{name}" is not known.{hint} Known metrics: {", ".join(METRICS)}.')
    return checked


def compute_metrics(names: Sequence[str], predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Several metrics of the same predictions.

    Args:
        names: Names from METRICS: "accuracy", "f1", "macro_f1", "matthews".
        predictions: (rows,) integer class indices.
        labels: (rows,) integer class indices.

    Returns:
        Name to value, in the order of `names`.

    Raises:
        ValueError: An unknown name, or arrays that are empty, of unequal length or not class indices.

    Example:
        >>> compute_metrics(["accuracy", "f1"], [1, 0, 1, 1], [1, 0, 0, 1])
        {'accuracy': 0.75, 'f1': 0.8}
    """
    return {name: METRICS[name](predictions, labels) for name in check_metrics(names)}


def effects_of_changes(
    name: str, predictions: ArrayLike, others: ArrayLike, labels: ArrayLike
) -> NDArray[np.float64]:
    """By how much each row whose class differs from that of other predictions moves a metric.

    Of more than `MOST_KINDS` kinds of such rows some stand for those that are like them in the label.

    Args:
        name: Name from METRICS.
        predictions: (rows,) integer class indices.
        others: (rows,) integer class indices.
        labels: (rows,) integer class indices.

    Returns:
        (rows that differ,), the metric of the predictions less what it were with this row's other class.

    Example:
        >>> effects_of_changes("accuracy", [1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0])
        array([-0.25, -0.25])
    """
    given, other, actual = np.asarray(predictions), np.asarray(others), np.asarray(labels)
    changed = np.flatnonzero(given != other)
    if not len(changed):
        return np.empty(0)
    whole = METRICS[name](given, actual)
    # Rows that are alike in label and both classes move it alike.
    alike = np.stack([actual, given, other])[:, changed]
    _, first, kind = np.unique(alike, axis=1, return_index=True, return_inverse=True)
    asked = np.unique(np.linspace(0, len(first) - 1, min(len(first), MOST_KINDS)).round().astype(int))
    effects: list[float] = []
    for row in changed[first[asked]]:
        without = given.copy()
        without[row] = other[row]
        effects.append(whole - METRICS[name](without, actual))
    nearest = np.searchsorted(asked, np.arange(len(first)))
    return np.array(effects)[nearest][kind.reshape(-1)]


def check_threshold_metric(name: str, num_classes: int) -> str:
    """The metric by which thresholds are to be chosen, once it fits the classes.

    Raises:
        ValueError: it needs two classes and there are others.
    """
    if name == "f1" and num_classes != 2:
        raise ValueError(
            f"threshold_metric f1 needs a task with two classes, got {num_classes}. Use macro_f1, accuracy or matthews."
        )
    return name


def _class_indices(predictions: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    predicted, actual = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != actual.shape:
        raise ValueError(
            "predictions and labels must be one-dimensional and of equal length, "
            f"got shapes {predicted.shape} and {actual.shape}."
        )
    if not len(predicted):
        raise ValueError("predictions and labels must hold at least one row, got none.")
    for name, values in (("predictions", predicted), ("labels", actual)):
        if not np.issubdtype(values.dtype, np.integer) or values.min() < 0:
            raise ValueError(f"{name} must be integer class indices from 0, got {values.dtype} {values[:5]}.")
    return predicted.astype(np.int64), actual.astype(np.int64)
