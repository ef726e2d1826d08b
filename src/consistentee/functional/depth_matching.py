"""Thresholds at which instances leave at a wanted depth, so that exit criteria can be compared at equal depth."""

from __future__ import annotations

import torch
from torch import Tensor

from consistentee.functional.criteria import EXIT_CRITERIA


def threshold_for_depth(scores: Tensor, mean_exit_layer: float, criterion: str) -> float:
    """The threshold at which instances with these scores would leave after so many layers on average.

    Args:
        scores: (instances, layers), exit scores; infinity at the last layer, minus infinity where nobody may leave.
        mean_exit_layer: the depth that is wanted.
        criterion: whose thresholds these are.

    Returns:
        The threshold whose mean exit layer is nearest: one of the scores, or what nobody exceeds.
    """
    num_layers = scores.shape[1]
    thresholds = EXIT_CRITERIA[criterion].thresholds
    if thresholds.layers:
        choices = thresholds.whole(num_layers)
    else:
        known = scores[:, :-1]
        finite = known[known.isfinite()].double().unique()
        if not len(finite):
            return thresholds.high
        places = torch.linspace(0, len(finite) - 1, min(len(finite), 2000)).round().long()
        choices = [*finite[places].tolist(), thresholds.high]
        choices = sorted({min(max(choice, thresholds.low), thresholds.high) for choice in choices})
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


def full_depth_threshold(criterion: str, num_hidden_layers: int) -> float:
    """The threshold at which no token leaves before the last layer."""
    return EXIT_CRITERIA[criterion].thresholds.highest(num_hidden_layers)


def _depth(scores: Tensor, threshold: float) -> float:
    """Mean exit layer of instances whose scores are given."""
    return float(((scores > threshold).int().argmax(1) + 1).double().mean())
