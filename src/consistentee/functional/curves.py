"""The trade-off between accuracy and layers over all thresholds: the curve, one number for it, and points on it.

Instances are rows or tokens, and everything here is the same for both: `scores` are exit scores, (instances, layers),
and `correct`, (instances, layers) bool, says whether an exit at a layer would be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.functional.exits import choose_exit_layer
from consistentee.functional.standard_errors import standard_error

BUDGETS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
SMOOTHING = 9
AREA_SPEEDUPS = (1.0, 4.0)
"""Layer speed-ups between which the area under a curve is taken."""
TOLERANCES = (0.0, 0.0025, 0.005, 0.01, 0.02)
"""Losses against the last layer, as shares, whose thresholds are noted beside the one that the settings ask for."""
SUM_ERROR = 1e-9
"""What a share may miss a floor by: a sum in another order is no loss."""


@dataclass(frozen=True)
class CurvePoint:
    """What one threshold gives: share right, mean exit layer (1-based), and layers over mean exit layer."""

    threshold: float
    accuracy: float
    mean_exit_layer: float
    layer_speedup: float


def trade_off_curve(
    scores: Tensor, correct: Tensor, criterion: str = "policy", *, limit: int = 200
) -> list[CurvePoint]:
    """Accuracy and mean exit layer at equal steps of depth, from "all exit at once" to "none exits early".

    Args:
        scores, correct: of the instances.
        criterion: whose thresholds these are; where they are numbers of layers, all that make a difference are tried.
        limit: thresholds at most; the ends of their range come on top.

    Example:
        >>> correct = torch.tensor([[True, True], [False, True]])
        >>> points = trade_off_curve(torch.tensor([[0.75, 1.0], [0.25, 1.0]]), correct)
        >>> [(point.accuracy, point.mean_exit_layer) for point in points if point.threshold == 0.25]
        [(1.0, 1.5)]
    """
    known = EXIT_CRITERIA[criterion].thresholds
    if known.layers:
        return curve_of_thresholds(scores, correct, known.whole(scores.shape[1]))
    even = depth_thresholds(scores, limit).clamp(known.low, known.high).tolist()
    return curve_of_thresholds(scores, correct, sorted({known.low, known.high, *even}))


def curve_of_thresholds(scores: Tensor, correct: Tensor, thresholds: Iterable[float]) -> list[CurvePoint]:
    """Accuracy and mean exit layer at each of some thresholds."""
    num_layers, correct = scores.shape[1], correct.double()
    points: list[CurvePoint] = []
    for threshold in thresholds:
        exit_layer = choose_exit_layer(scores, threshold)
        mean = float(exit_layer.double().mean())
        accuracy = float(correct.gather(1, exit_layer[:, None] - 1).mean())
        points.append(CurvePoint(threshold, accuracy, mean, num_layers / mean))
    return points


def depth_thresholds(scores: Tensor, limit: int) -> Tensor:
    """Thresholds whose mean exit layers are as evenly spaced as the scores allow, (at most limit,) float64, rising.

    An instance moves to a deeper layer where the threshold passes the highest of its scores so far; these are the only
    thresholds at which anything changes, each with so many layers more. Quantiles of all scores would not do: in a deep
    model nearly all of them belong to layers that no useful threshold lets an instance exit at.

    Args:
        scores: of the last layer they do not count.
        limit: how many.
    """
    num_layers = scores.shape[1]
    if num_layers < 2 or not len(scores):
        return torch.empty(0, dtype=torch.float64)
    highest = scores[:, :-1].double().cummax(1).values
    is_new = torch.ones_like(highest, dtype=torch.bool)
    is_new[:, 1:] = highest[:, 1:] > highest[:, :-1]
    layers = torch.arange(1, num_layers, device=scores.device)
    # The layer of the exit once the threshold has passed this score: where the next higher one stands.
    new_layers = torch.where(is_new, layers, num_layers)
    following = torch.full_like(new_layers, num_layers)
    following[:, :-1] = new_layers[:, 1:].flip(1).cummin(1).values.flip(1)
    values, order = highest[is_new].sort()
    if len(values) <= limit:
        return values.unique()
    depth = (following - layers)[is_new][order].cumsum(0).double()
    aims = torch.linspace(0, float(depth[-1]), limit, dtype=torch.float64, device=depth.device)
    nearest = torch.searchsorted(depth, aims).clamp_max(len(values) - 1)
    return values[nearest].unique()


def curve_score(points: Sequence[CurvePoint]) -> float:
    """Mean over `BUDGETS` of the best accuracy at that layer speed-up or more: one number for a whole curve."""
    best = [max((p.accuracy for p in points if p.layer_speedup >= budget), default=0.0) for budget in BUDGETS]
    return sum(best) / len(best)


def budget_hits(scores: Tensor, correct: Tensor, points: Sequence[CurvePoint]) -> Tensor:
    """At how many of the `BUDGETS` an instance is right, at each one's best threshold; the mean gives `curve_score`.

    Args:
        scores, correct: of the instances.
        points: the curve of these scores.

    Returns:
        (instances,), int64.
    """
    correct = correct.long()
    hits = torch.zeros_like(correct[:, 0])
    for budget in BUDGETS:
        fast = [point for point in points if point.layer_speedup >= budget]
        if fast:
            best = max(fast, key=lambda point: point.accuracy)
            hits += correct.gather(1, choose_exit_layer(scores, best.threshold)[:, None] - 1).squeeze(1)
    return hits


def score_standard_error(hits: Tensor, other_hits: Tensor, counts: Tensor) -> float:
    """Of the difference between two scores on the same instances, which are not independent within a group.

    Args:
        hits, other_hits: (groups,), `budget_hits` of two models summed over each group: a row, or a text's tokens.
        counts: (groups,), instances of each.

    Example:
        >>> round(score_standard_error(torch.tensor([6, 0]), torch.tensor([0, 6]), torch.tensor([1, 1])), 3)
        1.0
    """
    differences = (hits - other_hits).double() / len(BUDGETS)
    return standard_error(differences, None if bool((counts == 1).all()) else counts)


def area_under_curve(accuracy: Tensor, layer_speedup: Tensor) -> Tensor:
    """Mean over layer speed-ups from 1 to 4, on a logarithmic axis, of the best accuracy at that speed-up or more.

    On this axis 1x to 2x weighs as much as 2x to 4x, as speed-ups are ratios. The best accuracy is a staircase, so the
    mean is exact; points that a faster one tops do not count.

    Args:
        accuracy: (..., points), of several curves at once.
        layer_speedup: (..., points), at least 1, falling along the points. What none of them reaches counts as 0.

    Returns:
        (...), in the unit of the accuracy.

    Example:
        >>> area_under_curve(torch.tensor([0.5, 1.0]), torch.tensor([4.0, 2.0]))
        tensor(0.7500)
    """
    low, high = AREA_SPEEDUPS
    best = accuracy.cummax(-1).values
    logs = layer_speedup.clamp(low, high).log()
    following = torch.cat([logs[..., 1:], torch.full_like(logs[..., :1], math.log(low))], dim=-1)
    # Between the next point's speed-up and its own, a point and the faster ones are all there is.
    return (best * (logs - following)).sum(-1) / math.log(high / low)


def best_accuracy(accuracy: Tensor, layer_speedup: Tensor, at: float) -> Tensor:
    """The best accuracy at a layer speed-up or more; NaN where no point is so fast. Shapes as of `area_under_curve`.

    Example:
        >>> best_accuracy(torch.tensor([0.5, 0.9, 0.8]), torch.tensor([4.0, 2.0, 1.0]), 1.5)
        tensor(0.9000)
    """
    fast = layer_speedup >= at - SUM_ERROR
    best = accuracy.masked_fill(~fast, -math.inf).amax(-1)
    return best.masked_fill(~fast.any(-1), math.nan)


def layers_saved(accuracy: Tensor, layer_speedup: Tensor, floor: Tensor) -> Tensor:
    """The largest share of the layers that is saved with an accuracy at or above a floor; 0 where no point is.

    Args:
        accuracy, layer_speedup: as of `area_under_curve`.
        floor: (...), the least accuracy.

    Example:
        >>> layers_saved(torch.tensor([0.5, 0.9, 0.8]), torch.tensor([4.0, 2.0, 1.0]), torch.tensor(0.85))
        tensor(0.5000)
    """
    saved = 1 - 1 / layer_speedup
    return saved.masked_fill(accuracy < floor[..., None] - SUM_ERROR, 0.0).amax(-1).clamp_min(0.0)


def choose_threshold(
    points: Sequence[CurvePoint],
    floor: float,
    qualities: Sequence[float] | None = None,
    *,
    smoothing: int = SMOOTHING,
) -> float:
    """The threshold with the fewest layers whose accuracy, or other quality, stays at or above a floor.

    The quality is smoothed over neighbouring thresholds first: on few instances the curve has lucky bumps, and the
    first one above the floor would be picked. If none reaches it so, the deepest one does by itself where the floor is
    taken from full depth: all its neighbours are shallower, and smoothed it may fall below what it is. If it does not,
    the threshold with the best smoothed quality.

    Args:
        points: the curve.
        floor: of the quality; what misses it by `SUM_ERROR` reaches it.
        qualities: one a point, such as another metric; None takes the points' accuracy.
        smoothing: over how many; 1 for points that are no neighbours.
    """
    floor -= SUM_ERROR
    qualities = [point.accuracy for point in points] if qualities is None else qualities
    ordered = sorted(zip(points, qualities, strict=True), key=lambda pair: pair[0].mean_exit_layer)
    half = min(smoothing // 2, len(ordered) // 8)
    smoothed = []
    for position in range(len(ordered)):
        near = ordered[max(0, position - half) : position + half + 1]
        smoothed.append(sum(quality for _, quality in near) / len(near))
    for (point, quality), mean in zip(ordered, smoothed, strict=True):
        if mean >= floor and quality >= floor:
            return point.threshold
    deepest, its_quality = ordered[-1]
    if its_quality >= floor:
        return deepest.threshold
    return max(zip(smoothed, ordered, strict=True), key=lambda pair: pair[0])[1][0].threshold


def threshold_within(
    points: Sequence[CurvePoint],
    scores: Tensor,
    correct: Tensor,
    criterion: str,
    *,
    max_loss: float,
    margin: float = 0.0,
    quality: Callable[[Tensor], float] | None = None,
    effects: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """The threshold with the fewest layers that loses no more quality than allowed against the last layer.

    Args:
        max_loss: what may be lost, 0.01 for a point.
        points, scores, correct, criterion, margin, quality, effects: as of `thresholds_within`.
    """
    return thresholds_within(
        points,
        scores,
        correct,
        criterion,
        max_losses=(max_loss,),
        margin=margin,
        quality=quality,
        effects=effects,
    )[0]


def thresholds_within(
    points: Sequence[CurvePoint],
    scores: Tensor,
    correct: Tensor,
    criterion: str,
    *,
    max_losses: Sequence[float],
    margin: float = 0.0,
    quality: Callable[[Tensor], float] | None = None,
    effects: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """The threshold with the fewest layers that loses no more quality than allowed, for each of some losses.

    With a `margin` the loss that instances show is taken to be higher by so many of its standard errors: the fewer
    instances, the shyer the threshold. The error (`loss_error`, of another quality `effect_error`) vanishes where exits
    change nothing, so that full depth always qualifies.

    Args:
        points: the curve of these scores.
        scores, correct: of the instances.
        criterion: whose scores; layers of a `static` one have no neighbours to be smoothed with.
        max_losses: what may be lost against the last layer, 0.01 for a point.
        margin: standard errors of the loss to keep clear of it.
        quality: what an exit layer for every instance, (instances,) int64, is worth; None takes the accuracy.
        effects: by how much each instance that exits change moves the quality, (changed,); None: one instance in all,
            as of the accuracy.
    """
    smoothing = 1 if EXIT_CRITERIA[criterion].is_static else SMOOTHING
    best = float(correct[:, -1].double().mean())
    if quality is not None:
        best = quality(torch.full((len(correct),), correct.shape[1]))
    qualities: list[float] = []
    for point in points:
        value = point.accuracy
        if quality is not None or margin:
            exit_layer = choose_exit_layer(scores, point.threshold)
            value = value if quality is None else quality(exit_layer)
            if effects is None:
                value -= margin * loss_error(changed_by_exits(exit_layer, correct), len(correct))
            elif margin:
                value -= margin * effect_error(effects(exit_layer))
        qualities.append(value)
    return [choose_threshold(points, best - loss, qualities, smoothing=smoothing) for loss in max_losses]


def changed_by_exits(exit_layer: Tensor, correct: Tensor) -> int:
    """Of how many instances just one of exit and last layer is right.

    Args:
        exit_layer: (instances,), from 1.
        correct: (instances, layers).
    """
    return int((correct.gather(1, exit_layer[:, None] - 1).squeeze(1) != correct[:, -1]).sum())


def loss_error(changed: int, instances: int) -> float:
    """Standard error of the accuracy that exits lose, from `changed_by_exits`; 0 where exits change nothing."""
    return (math.sqrt(changed + 1) - 1) / instances


def effect_error(effects: Tensor) -> float:
    """Standard error of another quality that exits lose, from what each instance that they change moves it by.

    Args:
        effects: (changed,); of the accuracy all would be one instance in all, and this is `loss_error`.

    Example:
        >>> effect_error(torch.tensor([0.25, -0.25, 0.25])), loss_error(3, 4)
        (0.25, 0.25)
    """
    moving = effects[effects != 0].double()
    if not len(moving):
        return 0.0
    return float(moving.square().mean().sqrt()) * (math.sqrt(len(moving) + 1) - 1)


def threshold_for_depth(scores: Tensor, mean_exit_layer: float, criterion: str) -> float:
    """The threshold at which instances with these scores would exit after so many layers on average.

    Args:
        scores: infinity at the last layer, minus infinity where nobody may exit.
        mean_exit_layer: the depth that is wanted.
        criterion: whose thresholds these are.

    Returns:
        The threshold whose mean exit layer is nearest: one of the scores, or what nobody exceeds.
    """
    num_layers, known = scores.shape[1], EXIT_CRITERIA[criterion].thresholds
    if known.layers:
        choices = known.whole(num_layers)
    else:
        early = scores[:, :-1]
        finite = early[early.isfinite()].double().unique()
        if not len(finite):
            return known.highest(num_layers)
        chosen = torch.linspace(0, len(finite) - 1, min(len(finite), 2000)).round().long()
        choices = sorted({known.high, *finite[chosen].clamp(known.low, known.high).tolist()})
    # Ever deeper with the threshold: bisect for the first that is deep enough, and look at the one before it.
    low_end, high_end = 0, len(choices) - 1
    while low_end < high_end:
        middle = (low_end + high_end) // 2
        if _depth(scores, choices[middle]) < mean_exit_layer:
            low_end = middle + 1
        else:
            high_end = middle
    near = choices[max(0, low_end - 1) : low_end + 1]
    return min(near, key=lambda choice: abs(_depth(scores, choice) - mean_exit_layer))


def _depth(scores: Tensor, threshold: float) -> float:
    """Mean exit layer of instances whose scores are given."""
    return float(((scores > threshold).int().argmax(1) + 1).double().mean())
