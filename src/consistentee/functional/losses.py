"""The three training losses: the weighted sum of the warm-up, the consistent exit loss and the policy's gradient.

An episode of early exiting has only as many outcomes as there are layers, so the expected reward is a finite sum and
its gradient needs no sampling: `exact_policy_loss`. `sampled_policy_loss` is the paper's REINFORCE with a mean
baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from consistentee.functional.exits import exit_distribution, log_exit_distribution


def layer_losses(layer_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every internal classifier.

    Args:
        layer_logits: (batch, layers, classes).
        labels: (batch,), int64.

    Returns:
        (batch, layers).
    """
    batch, num_layers, num_classes = layer_logits.shape
    flat = layer_logits.float().reshape(batch * num_layers, num_classes)
    return functional.cross_entropy(flat, labels.repeat_interleave(num_layers), reduction="none").view(
        batch, num_layers
    )


def weighted_sum_loss(losses: Tensor) -> Tensor:
    """Mean over the layers with weights proportional to the layer number: the warm-up's loss per instance.

    Args:
        losses: (batch, layers).

    Returns:
        (batch,).

    Source: ConsistentEE (arXiv:2312.11882), initialisation, after PABEE (arXiv:2006.04152).
    """
    weights = torch.arange(1, losses.shape[1] + 1, device=losses.device, dtype=losses.dtype)
    return losses @ (weights / weights.sum())


def consistent_loss(losses: Tensor, exit_probs: Tensor) -> Tensor:
    """Expected loss at the exit layer: an instance's loss comes from where it exits. No gradient to the policy.

    Args:
        losses: (batch, layers), per-layer cross-entropies.
        exit_probs: (batch, layers), conditional exit probabilities.

    Returns:
        (batch,).

    Source: ConsistentEE (arXiv:2312.11882), training objective; the paper samples the exit layer, this is the mean
    over all of them.
    """
    return (exit_distribution(exit_probs).detach() * losses).sum(1)


def exact_policy_loss(exit_logits: Tensor, layer_rewards: Tensor) -> Tensor:
    """Minus the expected reward, whose gradient is the exact (zero-variance) policy gradient.

    Args:
        exit_logits: (batch, layers), logits of the conditional exit probabilities.
        layer_rewards: (batch, layers), reward for exiting at each layer.

    Returns:
        (batch,).
    """
    return -(log_exit_distribution(exit_logits).exp() * layer_rewards).sum(1)


def sampled_policy_loss(
    exit_logits: Tensor, layer_rewards: Tensor, num_rollouts: int, generator: torch.Generator | None = None
) -> Tensor:
    """REINFORCE: a surrogate whose gradient estimates that of `exact_policy_loss` from sampled exit layers.

    Args:
        exit_logits: (batch, layers), logits of the conditional exit probabilities.
        layer_rewards: (batch, layers).
        num_rollouts: K >= 2 exit layers are drawn per instance from the policy; their mean reward is the baseline.
        generator: source of randomness.

    Returns:
        (batch,). Its value is not a loss to read; its gradient is. With the mean of all K as baseline the estimate
        is shrunk by (K - 1) / K, which the factor K / (K - 1) undoes: the estimate is unbiased.

    Raises:
        ValueError: if `num_rollouts` is below 2.

    Source: ConsistentEE (arXiv:2312.11882): K = 8 for classification. Difference: drawn from the policy itself, where
    the release thresholds it.
    """
    if num_rollouts < 2:
        raise ValueError(f"num_rollouts must be at least 2 (the baseline is their mean), got {num_rollouts}.")
    log_probs = log_exit_distribution(exit_logits)  # (batch, layers)
    drawn = torch.multinomial(log_probs.detach().exp(), num_rollouts, replacement=True, generator=generator)
    reward = layer_rewards.gather(1, drawn)  # (batch, rollouts)
    advantages = (reward - reward.mean(1, keepdim=True)) * (num_rollouts / (num_rollouts - 1))
    return -(advantages.detach() * log_probs.gather(1, drawn)).mean(1)


def policy_entropy(exit_logits: Tensor) -> Tensor:
    """Entropy of the exit distribution in nats, (batch,). A bonus on it keeps a young policy from collapsing."""
    log_probs = log_exit_distribution(exit_logits)
    return -(log_probs.exp() * log_probs).sum(1)
