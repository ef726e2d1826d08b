"""What a policy is rewarded for exiting at each layer, for rows and for tokens; its losses are a table at the end.

To add a loss, write its function and its row, and put its name into `config.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consistentee.functional.tables import (
    CLASSIFICATION,
    GENERATION,
    Formula,
    names_of,
    row_of,
    value_of,
)

MOST_REGRET = 10.0
"""Nats beyond which one token is as bad as another."""


def cross_entropy_losses(losses: Tensor) -> Tensor:
    """The exit's cross-entropy of the label, as it is: (instances, layers), in nats.

    Source: ConsistentEE (arXiv:2312.11882).
    """
    return losses


def error_losses(right: Tensor) -> Tensor:
    """1 where an exit is wrong, which is what accuracy counts: (instances, layers) -> the same, float32.

    Args:
        right: bool, or the share of several targets that it hits.
    """
    return 1 - right.float()


def regret_losses(regret: Tensor) -> Tensor:
    """How much likelier the last layer holds its own token than the exit's, over `MOST_REGRET` and at most 1.

    Args:
        regret: (instances, layers), in nats.
    """
    return regret.clamp_max(MOST_REGRET) / MOST_REGRET


def rewards(losses: Tensor, layer_cost: float | Tensor, hardness: Tensor | None = None) -> Tensor:
    """Reward for exiting at each layer: `-loss_t - layer_cost * t * (1 - hardness)`.

    Args:
        losses: (instances, layers), the loss of exiting at each layer (`reward_losses`).
        layer_cost: cost of one layer, >= 0; one for all, or (instances,) one for each.
        hardness: (instances,) in [0, 1], or None for the uniform (plain) reward. An easy instance (0) pays the full
            cost per layer, a hard one (1) uses all layers for nothing.

    Returns:
        (instances, layers).

    Raises:
        ValueError: if a `layer_cost` is negative.

    Source: ConsistentEE (arXiv:2312.11882), hardness-guided reward; their alpha -> `layer_cost`, ML / L -> `hardness`.

    Example:
        >>> rewards(torch.tensor([[0.5, 0.1]]), 0.1, torch.tensor([0.5]))
        tensor([[-0.5500, -0.2000]])
    """
    layer_costs = torch.as_tensor(layer_cost, dtype=losses.dtype, device=losses.device)
    if layer_costs.numel() and float(layer_costs.min()) < 0:
        raise ValueError(f"layer_cost must be >= 0, got {float(layer_costs.min()):g}.")
    layers = torch.arange(1, losses.shape[1] + 1, device=losses.device, dtype=losses.dtype)
    exit_cost = layer_costs.reshape(-1, 1) * layers.expand_as(losses)
    if hardness is not None:
        exit_cost = exit_cost * (1 - hardness[:, None].to(losses.dtype))
    return -losses - exit_cost


REWARDS: dict[str, Formula] = {
    "cross_entropy": Formula(
        function=cross_entropy_losses,
        reads=("losses",),
        source="ConsistentEE (arXiv:2312.11882)",
        relation="Also tells how sure a right exit is, and how wrong a wrong one.",
    ),
    "error": Formula(
        function=error_losses,
        reads=("right",),
        source="ours: the reward is then the accuracy that is given up for layers",
        relation="All that an exit's confidence says is left out.",
    ),
    "regret": Formula(
        function=regret_losses,
        reads=("regret",),
        tasks=(GENERATION,),
        source="ours",
        relation="As `error` against the last layer, but a token as good as the last layer's costs next to nothing.",
    ),
}
REWARD_LOSSES = names_of(REWARDS, CLASSIFICATION)
TOKEN_REWARD_LOSSES = names_of(REWARDS, GENERATION)


def reward_losses(name: str, **known: Tensor | None) -> Tensor:
    """What a wrong or unsure exit costs at each layer: the quality half of the reward, (instances, layers).

    Args:
        name: one of `REWARDS`.
        known: what the row may read, (instances, layers) each: `losses`, the cross-entropies of the labels; `right`,
            whether an exit gives the target; `regret` in nats.

    Raises:
        ValueError: the name is unknown, or what it reads is missing.
    """
    return value_of(row_of(REWARDS, name, "reward_loss"), f'reward_loss "{name}"', known)
