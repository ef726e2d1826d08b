"""When a token leaves: exit scores of a state at a layer, for the policy and for its rivals.

Pure functions of tensors, higher = readier to leave; a token leaves at the first layer whose score exceeds the
threshold, and at the last layer in any case.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from consistentee.config import GenerationCriterion

GENERATION_CRITERIA: tuple[str, ...] = get_args(GenerationCriterion)


def softmax_margin_scores(logits: Tensor) -> Tensor:
    """Difference of the two largest probabilities: (..., vocabulary) -> (...), in [0, 1].

    Needs the LM head at every layer, which in a small model costs as much as several layers.

    Source: CALM (arXiv:2207.07061), "softmax response".

    Example:
        >>> softmax_margin_scores(torch.tensor([[0.0, 0.0, -100.0]]))
        tensor([0.])
    """
    top = logits.float().topk(2, dim=-1).values
    normaliser = logits.float().logsumexp(-1)
    return (top[..., 0] - normaliser).exp() - (top[..., 1] - normaliser).exp()


def state_similarity_scores(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of the states before and after a layer: (..., hidden) twice -> (...), in [-1, 1].

    Source: CALM (arXiv:2207.07061), "hidden-state saturation"; the ConsistentEE release uses 0.975 as its threshold.
    """
    return torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)


def static_scores(layer_index: int, like: Tensor) -> Tensor:
    """The number of the layer, 1-based, for every token: static depth leaves where it reaches the threshold.

    Args:
        layer_index: 0-based.
        like: (tokens, hidden).

    Returns:
        (tokens,), half a layer more than the number, so that `>` means "at least".
    """
    return torch.full((len(like),), layer_index + 1.5, device=like.device)


def check_generation_threshold(threshold: float, criterion: str) -> float:
    """Return the threshold as a float, or raise if the criterion cannot use it.

    Raises:
        ValueError: an unknown criterion; `policy`, `softmax_margin` and `confidence_classifier` take [0, 1],
            `state_similarity` takes [-1, 1], `static` takes a number of layers >= 1.
    """
    if criterion not in GENERATION_CRITERIA:
        raise ValueError(f'criterion must be one of {", ".join(GENERATION_CRITERIA)}, got "{criterion}".')
    value = float(threshold)
    if criterion == "static":
        if not value >= 1:
            raise ValueError(f"threshold must be at least 1 for static (layers to run), got {threshold}.")
        return value
    low = -1.0 if criterion == "state_similarity" else 0.0
    if not low <= value <= 1:
        raise ValueError(f"threshold must be in [{low:g}, 1] for {criterion}, got {threshold}.")
    return value
