"""What a policy is paid for leaving at each layer. Pure functions, one formula one home."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from consistentee.config import RewardLoss

REWARD_LOSSES: tuple[str, ...] = get_args(RewardLoss)


def reward_losses(kind: str, layer_logits: Tensor, labels: Tensor) -> Tensor:
    """What a wrong or unsure exit costs at each layer: the quality half of the reward.

    Args:
        kind: `cross_entropy` (the paper's) or `error` (1 where the prediction is wrong, which is what accuracy counts).
        layer_logits: (batch, layers, classes).
        labels: (batch,), int64.

    Returns:
        (batch, layers), non-negative.

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind == "cross_entropy":
        log_probs = layer_logits.float().log_softmax(-1)
        return -log_probs.gather(2, labels[:, None, None].expand(-1, log_probs.shape[1], 1)).squeeze(2)
    if kind == "error":
        return (layer_logits.argmax(-1) != labels[:, None]).float()
    raise ValueError(f'reward_loss must be one of {", ".join(REWARD_LOSSES)}, got "{kind}".')


def rewards(losses: Tensor, layer_cost: float | Tensor, hardness: Tensor | None = None) -> Tensor:
    """Reward for leaving at each layer: `-loss_t - layer_cost * t * (1 - hardness)`.

    Args:
        losses: (batch, layers), the loss of leaving at each layer (`reward_losses`).
        layer_cost: price of one layer, >= 0; one for all, or (batch,) one for each instance.
        hardness: (batch,) in [0, 1], or None for the uniform (plain) reward. An easy instance (0) pays the full
            price per layer, a hard one (1) uses all layers for nothing.

    Returns:
        (batch, layers).

    Raises:
        ValueError: if a `layer_cost` is negative.

    Source: ConsistentEE (arXiv:2312.11882), hardness-guided reward; their alpha -> `layer_cost`, ML / L -> `hardness`.

    Example:
        >>> rewards(torch.tensor([[0.5, 0.1]]), 0.1, torch.tensor([0.5]))
        tensor([[-0.5500, -0.2000]])
    """
    costs = torch.as_tensor(layer_cost, dtype=losses.dtype, device=losses.device)
    if costs.numel() and float(costs.min()) < 0:
        raise ValueError(f"layer_cost must be >= 0, got {float(costs.min()):g}.")
    layers = torch.arange(1, losses.shape[1] + 1, device=losses.device, dtype=losses.dtype)
    price = costs.reshape(-1, 1) * layers.expand_as(losses)
    if hardness is not None:
        price = price * (1 - hardness[:, None].to(losses.dtype))
    return -losses - price
