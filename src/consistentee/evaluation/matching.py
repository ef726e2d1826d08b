"""Thresholds at which tokens leave at a wanted depth, so that exit rules can be compared at equal depth."""

from __future__ import annotations

import torch
from torch import Tensor

from consistentee.data.generation import InstructionDataset
from consistentee.data.generation_batches import TokenizedPrompts
from consistentee.evaluation.teacher_forcing import (
    ForcedTokens,
    forced_exits,
    full_depth_scores,
    reference_rows,
)
from consistentee.models.loaded_generator import SavedGenerator


def threshold_at_depth(scores: Tensor, mean_exit_layer: float, criterion: str) -> float:
    """The threshold at which tokens with these scores would leave after so many layers on average.

    Args:
        scores: (tokens, layers), of `full_depth_scores`.
        mean_exit_layer: the depth that is wanted.
        criterion: whose thresholds these are.

    Returns:
        The threshold whose mean exit layer is nearest: one of the scores, or what nobody exceeds.
    """
    num_layers = scores.shape[1]
    if criterion == "static":
        choices = [float(layer) for layer in range(1, num_layers + 1)]
    else:
        known = scores[:, :-1]
        finite = known[known.isfinite()].double().unique()
        if not len(finite):
            return highest_threshold(criterion, num_layers)
        places = torch.linspace(0, len(finite) - 1, min(len(finite), 2000)).round().long()
        choices = [*finite[places].tolist(), highest_threshold(criterion, num_layers)]
        low = -1.0 if criterion == "state_similarity" else 0.0
        choices = sorted({min(max(choice, low), 1.0) for choice in choices})
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


def highest_threshold(criterion: str, num_hidden_layers: int) -> float:
    """The threshold at which no token leaves before the last layer."""
    return float(num_hidden_layers) if criterion == "static" else 1.0


def match_threshold(
    saved: SavedGenerator,
    rows: InstructionDataset | TokenizedPrompts,
    criterion: str,
    target_mean_exit_layer: float,
    *,
    batch_size: int = 8,
    refinements: int = 2,
    seed: int = 0,
) -> float:
    """The threshold at which the references' tokens leave after a given number of layers on average.

    Rivals are to be compared at equal depth. A first threshold comes from the scores of one full-depth pass; as states
    that are copied change later scores, the depth is then measured and the threshold corrected.

    Args:
        saved: a model with exits.
        rows: prompts with references.
        criterion: exit rule.
        target_mean_exit_layer: from 1 to the number of layers.
        batch_size: rows per step.
        refinements: measurements, at most; none needs no more than the full-depth pass.
        seed: of the rows whose scores are looked at.

    Returns:
        Of the thresholds measured, the one nearest to the target. `static` knows whole layers only.

    Raises:
        ValueError: there is no such depth, or the model has no exits.
    """
    if not 1 <= target_mean_exit_layer <= saved.num_hidden_layers:
        raise ValueError(
            f"target_mean_exit_layer must be from 1 to {saved.num_hidden_layers}, got {target_mean_exit_layer}."
        )
    tokens = rows if isinstance(rows, TokenizedPrompts) else reference_rows(saved, rows)
    scores = full_depth_scores(saved, tokens, criterion, batch_size=batch_size, seed=seed)
    return matched_threshold(
        saved,
        tokens,
        scores,
        criterion,
        target_mean_exit_layer,
        batch_size=batch_size,
        refinements=refinements,
    )[0]


def matched_threshold(
    saved: SavedGenerator,
    rows: TokenizedPrompts,
    scores: Tensor,
    criterion: str,
    target_mean_exit_layer: float,
    *,
    batch_size: int,
    refinements: int = 2,
    description: str | None = None,
) -> tuple[float, dict[float, ForcedTokens]]:
    """What `match_threshold` finds, from scores at hand, and all that was measured on the way, by threshold."""
    aim = target_mean_exit_layer
    measured: dict[float, ForcedTokens] = {}
    threshold = threshold_at_depth(scores, aim, criterion)
    for _ in range(refinements):
        if threshold in measured:
            break
        measured[threshold] = forced_exits(
            saved,
            rows,
            criterion=criterion,
            threshold=threshold,
            batch_size=batch_size,
            description=description,
        )
        away = target_mean_exit_layer - measured[threshold].mean_exit_layer
        if abs(away) < 0.02 * target_mean_exit_layer:
            break
        aim = min(max(aim + away, 1.0), float(saved.num_hidden_layers))
        threshold = threshold_at_depth(scores, aim, criterion)
    if not measured:
        return threshold, measured
    return min(
        measured, key=lambda value: abs(measured[value].mean_exit_layer - target_mean_exit_layer)
    ), measured


def _depth(scores: Tensor, threshold: float) -> float:
    """Mean exit layer of tokens whose scores are given."""
    return float(((scores > threshold).int().argmax(1) + 1).double().mean())
