"""The trade-off between accuracy and layers over all thresholds: the curve, one number for it, and a point on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consistentee.functional.criteria import candidate_thresholds
from consistentee.functional.exits import choose_exit_layer
from consistentee.functional.metrics import METRICS

BUDGETS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
SMOOTHING = 9


@dataclass(frozen=True)
class CurvePoint:
    """What one threshold gives: share right, mean exit layer (1-based), and layers over mean exit layer."""

    threshold: float
    accuracy: float
    mean_exit_layer: float
    layer_speedup: float


def trade_off_curve(scores: Tensor, layer_logits: Tensor, labels: Tensor, criterion: str) -> list[CurvePoint]:
    """Accuracy and mean exit layer at every threshold worth trying, from "all leave at once" to "none leaves early".

    Args:
        scores: (rows, layers), exit scores.
        layer_logits: (rows, layers, classes).
        labels: (rows,), int64.
        criterion: one of `CRITERIA`, whose thresholds these are.
    """
    right = layer_logits.argmax(-1) == labels[:, None]
    return curve_of_thresholds(scores, right, candidate_thresholds(scores, criterion))


def curve_of_thresholds(scores: Tensor, right: Tensor, thresholds: Iterable[float]) -> list[CurvePoint]:
    """Accuracy and mean exit layer at each of some thresholds.

    Args:
        scores: (instances, layers), exit scores.
        right: (instances, layers), bool, whether an exit at a layer would be right.
        thresholds: to try.
    """
    num_layers = scores.shape[1]
    right = right.float()
    points: list[CurvePoint] = []
    for threshold in thresholds:
        exit_layer = choose_exit_layer(scores, threshold)
        mean = float(exit_layer.float().mean())
        accuracy = float(right.gather(1, exit_layer[:, None] - 1).mean())
        points.append(CurvePoint(threshold, accuracy, mean, num_layers / mean))
    return points


def curve_score(points: Sequence[CurvePoint]) -> float:
    """Mean over `BUDGETS` of the best accuracy at that layer speed-up or more: one number for a whole curve."""
    best = [max((p.accuracy for p in points if p.layer_speedup >= budget), default=0.0) for budget in BUDGETS]
    return sum(best) / len(best)


def budget_hits(scores: Tensor, layer_logits: Tensor, labels: Tensor, points: Sequence[CurvePoint]) -> Tensor:
    """At how many of the `BUDGETS` a row is right, with each budget's best threshold; their mean gives `curve_score`.

    Args:
        scores, layer_logits, labels: as in `trade_off_curve`.
        points: the curve of these scores.

    Returns:
        (rows,), int64.
    """
    return hits_at_budgets(scores, layer_logits.argmax(-1) == labels[:, None], points)


def hits_at_budgets(scores: Tensor, right: Tensor, points: Sequence[CurvePoint]) -> Tensor:
    """As `budget_hits`, from which exits would be right, (instances, layers) bool; gives (instances,), int64."""
    right = right.long()
    hits = torch.zeros_like(right[:, 0])
    for budget in BUDGETS:
        fast = [point for point in points if point.layer_speedup >= budget]
        if fast:
            best = max(fast, key=lambda point: point.accuracy)
            hits += right.gather(1, choose_exit_layer(scores, best.threshold)[:, None] - 1).squeeze(1)
    return hits


def choose_threshold(
    points: Sequence[CurvePoint], floor: float, qualities: Sequence[float] | None = None
) -> float:
    """The threshold with the fewest layers whose accuracy, or other quality, stays at or above a floor.

    The quality is smoothed over neighbouring thresholds first: on few rows the curve has lucky bumps, and the first
    one above the floor would be picked. If none reaches the floor, the threshold with the best smoothed quality.

    Args:
        points: the curve.
        floor: of the quality.
        qualities: one a point, such as another metric; None takes the points' accuracy.
    """
    qualities = [point.accuracy for point in points] if qualities is None else qualities
    ordered = sorted(zip(points, qualities, strict=True), key=lambda pair: pair[0].mean_exit_layer)
    half = min(SMOOTHING // 2, len(ordered) // 8)
    smoothed = []
    for position in range(len(ordered)):
        near = ordered[max(0, position - half) : position + half + 1]
        smoothed.append(sum(quality for _, quality in near) / len(near))
    for (point, quality), mean in zip(ordered, smoothed, strict=True):
        if mean >= floor and quality >= floor:
            return point.threshold
    return max(zip(smoothed, ordered, strict=True), key=lambda pair: pair[0])[1][0].threshold


def threshold_by_metric(
    points: Sequence[CurvePoint],
    scores: Tensor,
    layer_logits: Tensor,
    labels: Tensor,
    *,
    metric: str,
    max_loss: float,
) -> float:
    """The threshold with the fewest layers that loses no more of a metric than allowed against the last layer.

    Args:
        points: the curve of these scores.
        scores, layer_logits, labels: as in `trade_off_curve`.
        metric: one of `metrics.METRICS`.
        max_loss: what may be lost of it, 0.01 for a point.
    """
    predictions = layer_logits.argmax(-1)  # (rows, layers)
    if metric == "accuracy":
        full = float((predictions[:, -1] == labels).float().mean())
        return choose_threshold(points, full - max_loss)
    measure, actual = METRICS[metric], labels.numpy()
    qualities = [
        measure(
            predictions.gather(1, choose_exit_layer(scores, point.threshold)[:, None] - 1).squeeze(1).numpy(),
            actual,
        )
        for point in points
    ]
    return choose_threshold(points, measure(predictions[:, -1].numpy(), actual) - max_loss, qualities)
