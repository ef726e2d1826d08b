"""Training losses: the weighted sum of the warm-up, the consistent exit loss, the policy's gradient; those of rivals.

An episode of early exiting has only as many outcomes as there are layers, so the expected reward is a finite sum and
its gradient needs no sampling: `exact_policy_loss`. `sampled_policy_loss` is the paper's REINFORCE with a mean
baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from consistentee.functional.exits import exit_distribution, log_exit_distribution

UNLABELLED = -100
"""A label that counts for nothing, as in torch's cross-entropy."""


def flat_labels(labels: Tensor | None, batch: int) -> Tensor | None:
    """Labels of a batch as losses take them, (batch,), int64; None where there are none.

    Args:
        labels: whole numbers, (batch,) or (batch, 1).
        batch: number of inputs.

    Raises:
        ValueError: they are something else.
    """
    if labels is None:
        return None
    if labels.numel() != batch or labels.is_floating_point():
        raise ValueError(
            f"labels must be a class for each of the {batch} inputs, whole numbers of shape ({batch},) or "
            f"({batch}, 1), got {tuple(labels.shape)} of {labels.dtype}."
        )
    return labels.reshape(-1).long()


def mean_of_labelled(losses: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows whose label is not -100; NaN where there is none.

    Args:
        losses: (batch,), 0 where the label is -100.
        labels: (batch,), int64.

    Returns:
        A scalar; where all rows count, their mean to the last bit.
    """
    return losses.mean() * (len(labels) / (labels != UNLABELLED).sum())


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


def divergence_losses(layer_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of every internal classifier from a distribution that it is to give.

    Args:
        layer_logits: (batch, layers, classes).
        target_logits: (batch, classes), of the distribution.

    Returns:
        (batch, layers), in nats, 0 where both are the same.

    Source: Hinton et al. (arXiv:1503.02531) at temperature 1.

    Example:
        >>> divergence_losses(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[0.0, 2.0]]))
        tensor([[0.]])
    """
    wanted = target_logits.log_softmax(-1)[:, None]
    return (wanted.exp() * (wanted - layer_logits.log_softmax(-1))).sum(-1)


def weighted_sum_loss(losses: Tensor) -> Tensor:
    """Mean over the layers with weights proportional to the layer number: the warm-up's loss per instance.

    Args:
        losses: (batch, layers).

    Returns:
        (batch,), of the losses' precision, under autocast as well.

    Source: ConsistentEE (arXiv:2312.11882), initialisation, after PABEE (arXiv:2006.04152).
    """
    weights = torch.arange(1, losses.shape[1] + 1, device=losses.device, dtype=losses.dtype)
    with torch.autocast(losses.device.type, enabled=False):  # which would round losses and weights alike
        return losses @ (weights / weights.sum())


def scale_gradient(values: Tensor, scale: float) -> Tensor:
    """The same values, bit for bit; of their gradients a share goes on.

    Args:
        values: of any shape, finite.
        scale: 0 (as if detached) to 1.

    Returns:
        A tensor of the same shape.

    Source: Li et al. (ICCV 2019, arXiv:1908.06294), who rescale the gradients of exits for their number.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> scale_gradient(weight, 0.25).sum().backward()
        >>> weight.grad
        tensor([0.2500])
    """
    fixed = values.detach()
    return fixed + scale * (values - fixed)


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
        num_rollouts: K exit layers are drawn per instance from the policy; their mean reward is the baseline, of a
            single one there is none.
        generator: source of randomness.

    Returns:
        (batch,). Its value is not a loss to read; its gradient is. With the mean of all K as baseline the estimate
        is shrunk by (K - 1) / K, which the factor K / (K - 1) undoes: the estimate is unbiased.

    Raises:
        ValueError: if `num_rollouts` is below 1.

    Source: ConsistentEE (arXiv:2312.11882): K = 8 for classification. Difference: drawn from the policy itself, where
    the release thresholds it.
    """
    if num_rollouts < 1:
        raise ValueError(f"num_rollouts must be at least 1, got {num_rollouts}.")
    log_probs = log_exit_distribution(exit_logits)  # (batch, layers)
    drawn = torch.multinomial(log_probs.detach().exp(), num_rollouts, replacement=True, generator=generator)
    reward = layer_rewards.gather(1, drawn)  # (batch, rollouts)
    advantages = reward
    if num_rollouts > 1:
        advantages = (reward - reward.mean(1, keepdim=True)) * (num_rollouts / (num_rollouts - 1))
    return -(advantages.detach() * log_probs.gather(1, drawn)).mean(1)


def policy_entropy(exit_logits: Tensor) -> Tensor:
    """Entropy of the exit distribution in nats, (batch,). A bonus on it keeps a young policy from collapsing."""
    log_probs = log_exit_distribution(exit_logits)
    return -(log_probs.exp() * log_probs).sum(1)


# --- Of the methods that ours is compared with ----------------------------------------------------


def distillation_loss(exit_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """How far each exit's distribution is from the teacher's: KL(exit || teacher). No gradient to the teacher.

    Args:
        exit_logits: (batch, layers, classes), of the exits that learn.
        teacher_logits: (batch, classes), of the last layer.

    Returns:
        (batch, layers).

    Source: FastBERT (arXiv:2004.02178), self-distillation; the exit's distribution comes first there, too.

    Example:
        >>> distillation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 3))
        tensor([[0., 0.]])
    """
    exits = exit_logits.float().log_softmax(-1)
    teacher = teacher_logits.detach().float().log_softmax(-1)[:, None]
    return (exits.exp() * (exits - teacher)).sum(-1)


def geometric_prior(num_layers: int, rate: float) -> Tensor:
    """A geometric distribution over the layers, (layers,); what lies beyond the last belongs to it.

    Args:
        num_layers: at least 1.
        rate: probability of exiting at a layer that was reached, in (0, 1).

    Source: PonderNet (arXiv:2107.05407) and PALBERT (arXiv:2204.03276): their lambda_p.

    Example:
        >>> geometric_prior(3, 0.5)
        tensor([0.5000, 0.2500, 0.2500])
    """
    return exit_distribution(torch.full((1, num_layers), float(rate)))[0]


def variational_exit_loss(
    losses: Tensor, exit_logits: Tensor, log_prior: Tensor, prior_weight: float
) -> Tensor:
    """Expected loss at the exit, and how far the exit distribution is from a prior; gradients go to both.

    Args:
        losses: (batch, layers), per-layer cross-entropies.
        exit_logits: (batch, layers), logits of the conditional exit probabilities; the last column is ignored.
        log_prior: (layers,), logarithm of the prior over exit layers.
        prior_weight: weight of KL(exit distribution || prior), at least 0.

    Returns:
        (batch,), minus the evidence lower bound where the weight is 1.

    Source: PALBERT (arXiv:2204.03276); their q is the exit distribution, their beta the weight. Their release takes
    the divergence the other way round, KL(prior || q).
    """
    log_exits = log_exit_distribution(exit_logits)
    return (log_exits.exp() * (losses + prior_weight * (log_exits - log_prior))).sum(1)


def layer_weights_around(exit_layer: Tensor, num_layers: int, sharpness: float) -> Tensor:
    """What a row's loss weighs at each layer if the row exits at one: the softmax of minus the distance from it.

    Args:
        exit_layer: (batch,), int64, from 1.
        num_layers: number of layers.
        sharpness: at least 0; 0 weighs all layers alike, a high one the exit layer alone.

    Returns:
        (batch, layers), rows sum to 1.

    Source: COSEE (arXiv:2412.13236), sample weighting; their beta is the sharpness.

    Example:
        >>> layer_weights_around(torch.tensor([2]), 3, 0.0)
        tensor([[0.3333, 0.3333, 0.3333]])
    """
    layers = torch.arange(1, num_layers + 1, device=exit_layer.device)
    return (-sharpness * (layers - exit_layer[:, None]).abs().float()).softmax(-1)


def score_margin_loss(scores: Tensor, correct: Tensor, margin: float) -> Tensor:
    """By how much exits' mean scores of right rows fail to exceed those of wrong rows by a margin, mean over the exits.

    Args:
        scores: (batch, layers), exit scores, higher = surer.
        correct: (batch, layers), bool, whether the exit is right.
        margin: at least 0.

    Returns:
        A scalar; exits that got all rows right, or none, do not count, and where all are such it is 0.

    Source: COSEE (arXiv:2412.13236), online signal calibration; their signal is higher where an exit is less sure.
    """
    right = correct.to(scores.dtype)
    num_right, num_wrong = right.sum(0), (1 - right).sum(0)
    mean_right = (scores * right).sum(0) / num_right.clamp_min(1)
    mean_wrong = (scores * (1 - right)).sum(0) / num_wrong.clamp_min(1)
    counts = ((num_right > 0) & (num_wrong > 0)).to(scores.dtype)
    return ((mean_wrong - mean_right + margin).clamp_min(0) * counts).sum() / counts.sum().clamp_min(1)
