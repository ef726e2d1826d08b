"""The trade-off between token accuracy and layers over all thresholds, for any criterion that scores tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consistentee.curves import CurvePoint, choose_threshold, curve_of_thresholds

RANGES = {"state_similarity": (-1.0, 1.0)}  # of thresholds; [0, 1] for the others


def token_curve(
    scores: Tensor, right: Tensor, *, criterion: str = "policy", limit: int = 200
) -> list[CurvePoint]:
    """Token accuracy and mean exit layer at quantiles of the scores, from "all leave at once" to "none leaves early".

    Args:
        scores: (tokens, layers), exit scores.
        right: (tokens, layers), bool, whether an exit gives the right token.
        criterion: whose thresholds these are.
        limit: quantiles at most; the ends of the thresholds' range come on top.

    Example:
        >>> right = torch.tensor([[True, True], [False, True]])
        >>> points = token_curve(torch.tensor([[0.75, 1.0], [0.25, 1.0]]), right)
        >>> [(point.accuracy, point.mean_exit_layer) for point in points if point.threshold == 0.25]
        [(1.0, 1.5)]
    """
    low, high = RANGES.get(criterion, (0.0, 1.0))
    early = scores[:, :-1].flatten().double().sort().values
    thresholds = {low, high}
    if len(early):
        places = (torch.linspace(0, 1, limit, dtype=torch.double) * (len(early) - 1)).round().long()
        thresholds |= set(early[places].clamp(low, high).tolist())
    return curve_of_thresholds(scores, right, sorted(thresholds))


def static_curve(right: Tensor) -> list[CurvePoint]:
    """Token accuracy where all tokens leave at the same layer, one point a layer; `right` as in `token_curve`."""
    num_layers = right.shape[1]
    accuracies = right.float().mean(0).tolist()
    return [
        CurvePoint(float(layer), accuracy, float(layer), num_layers / layer)
        for layer, accuracy in enumerate(accuracies, start=1)
    ]


def token_threshold(points: Sequence[CurvePoint], accuracy_floor: float, *, criterion: str) -> float:
    """The threshold with the fewest layers whose token accuracy stays at or above a floor.

    Args:
        points: a curve with the point of the last layer on it.
        accuracy_floor: least accuracy.
        criterion: for `static` the first layer that is good enough is taken as it is: layers have no neighbours to be
            smoothed with.
    """
    if criterion != "static":
        return choose_threshold(points, accuracy_floor)
    enough = [point.threshold for point in points if point.accuracy >= accuracy_floor]
    return min(enough, default=points[-1].threshold)
