"""The trade-off between token accuracy and layers over all thresholds, for any criterion that scores tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.functional.curves import CurvePoint, choose_threshold, curve_of_thresholds


def token_curve(
    scores: Tensor, right: Tensor, *, criterion: str = "policy", limit: int = 200
) -> list[CurvePoint]:
    """Token accuracy and mean exit layer at equal steps of depth, from "all leave at once" to "none leaves early".

    Args:
        scores: (tokens, layers), exit scores.
        right: (tokens, layers), bool, whether an exit gives the right token.
        criterion: whose thresholds these are.
        limit: thresholds at most; the ends of their range come on top.

    Example:
        >>> right = torch.tensor([[True, True], [False, True]])
        >>> points = token_curve(torch.tensor([[0.75, 1.0], [0.25, 1.0]]), right)
        >>> [(point.accuracy, point.mean_exit_layer) for point in points if point.threshold == 0.25]
        [(1.0, 1.5)]
    """
    low, high = EXIT_CRITERIA[criterion].thresholds.low, EXIT_CRITERIA[criterion].thresholds.high
    even = depth_thresholds(scores, limit).clamp(low, high).tolist()
    return curve_of_thresholds(scores, right, sorted({low, high, *even}))


def depth_thresholds(scores: Tensor, limit: int) -> Tensor:
    """Thresholds whose mean exit layers are as evenly spaced as the scores allow, (at most limit,) float64, rising.

    A token moves to a deeper layer where the threshold passes the highest of its scores so far; these are the only
    thresholds at which anything changes, each with so many layers more. Quantiles of all scores would not do: in a deep
    model nearly all of them belong to layers that no useful threshold lets a token leave at.

    Args:
        scores: (tokens, layers), exit scores; of the last layer they do not count.
        limit: how many.
    """
    num_layers = scores.shape[1]
    if num_layers < 2 or not len(scores):
        return torch.empty(0, dtype=torch.float64)
    highest = scores[:, :-1].double().cummax(1).values
    is_new = torch.ones_like(highest, dtype=torch.bool)
    is_new[:, 1:] = highest[:, 1:] > highest[:, :-1]
    layers = torch.arange(1, num_layers, device=scores.device)
    # The layer at which a token leaves once the threshold has passed this score: where its next higher one stands.
    new_layers = torch.where(is_new, layers, num_layers)
    following = torch.full_like(new_layers, num_layers)
    following[:, :-1] = new_layers[:, 1:].flip(1).cummin(1).values.flip(1)
    values, order = highest[is_new].sort()
    if len(values) <= limit:
        return values.unique()
    depth = (following - layers)[is_new][order].cumsum(0).double()
    aims = torch.linspace(0, float(depth[-1]), limit, dtype=torch.float64, device=depth.device)
    places = torch.searchsorted(depth, aims).clamp_max(len(values) - 1)
    return values[places].unique()


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
        criterion: where its thresholds are numbers of layers, the first that is good enough is taken as it is: layers
            have no neighbours to be smoothed with.
    """
    if not EXIT_CRITERIA[criterion].thresholds.layers:
        return choose_threshold(points, accuracy_floor)
    enough = [point.threshold for point in points if point.accuracy >= accuracy_floor]
    return min(enough, default=points[-1].threshold)
