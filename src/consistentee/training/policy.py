"""Policies, and networks of other criteria, fitted on cached states.

With the backbone and the classifiers frozen, states, costs and rewards are constants: a policy is a small network on
a table, and fits in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from consistentee.functional.losses import exact_policy_loss, policy_entropy, sampled_policy_loss
from consistentee.functional.rewards import rewards
from consistentee.heads.policy import PolicyNetwork
from consistentee.training.finite import require_finite
from consistentee.training.instances import Instances

COST_SLOPE = 2.0  # of the exit logits in the logarithm of the layer cost; 1, 2, 4 and a learned one: as good
CLOSED = -30.0  # exit logit of a layer that nobody may exit at


def fit_policy(
    policy: PolicyNetwork,
    instances: Instances,
    *,
    layer_cost: float,
    layer_cost_range: tuple[float, float] | None = None,
    estimator: str = "exact",
    num_rollouts: int = 8,
    entropy_bonus: float = 0.01,
    layer_cost_warmup: float = 0.3,
    epochs: int = 40,
    min_steps: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    min_exit_layer: int = 1,
    seed: int = 0,
    rows: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> PolicyNetwork:
    """Fit a policy by policy gradient on instances whose states and costs are constants.

    With a `layer_cost_range` one policy learns every cost in it. Each instance of a batch draws a cost of its own, and
    its exit logits are those of the network plus `COST_SLOPE * log(drawn / layer_cost)`. A higher cost thus moves
    all exit logits up alike, so moving the threshold of the finished policy is the same as setting another cost: a
    threshold t stands for `layer_cost * ((1 - t) / t) ** (1 / COST_SLOPE)`. The exit probability orders (instance,
    layer) pairs by the cost at which exiting there becomes worthwhile, the reservation price of optimal stopping.

    The cost rises from zero over the first `layer_cost_warmup` of the fit (first quality, then speed), and the entropy
    bonus falls to zero over it: both keep a high cost from collapsing the policy.

    Args:
        policy: a new policy network; trained in place.
        instances: with states.
        layer_cost: of one layer, at which the exit probabilities are those of threshold 0.5.
        layer_cost_range: lowest and highest cost to learn for, both above 0; None for `layer_cost` alone.
        estimator: `exact`, or `sampled` from `num_rollouts` exit layers an instance.
        num_rollouts: of `sampled`.
        entropy_bonus: weight of the exit distribution's entropy at the start.
        layer_cost_warmup: share of the fit over which the cost rises.
        epochs: passes over the instances, or more where these are fewer than `min_steps`.
        min_steps: least number of steps.
        batch_size, learning_rate, weight_decay, max_grad_norm: of AdamW's steps; the learning rate falls to zero.
        min_exit_layer: the first layer, from 1, that an instance may exit at.
        seed: of order, dropout and rollouts; the caller's random state is left untouched.
        rows: indices of the instances to fit on; all of them if missing. States are read a batch at a time.
        device: where to compute.

    Returns:
        The policy, in evaluation mode, on the CPU.

    Raises:
        FloatingPointError: its weights are infinite or not a number at the end.
        ValueError: the instances have no states.
    """
    states, device = instances.kept_states, torch.device(device)
    rows = torch.arange(len(instances)) if rows is None else rows
    with torch.random.fork_rng(devices=generators_of(device)):
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        rollouts = torch.Generator(device=device).manual_seed(seed)
        policy = policy.to(device).train()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=weight_decay)
        for batch, progress in _batches(rows, optimizer, learning_rate, epochs, min_steps, batch_size, order):
            costs = torch.full((len(batch),), layer_cost)
            if layer_cost_range is not None:  # log-uniform
                low, high = map(math.log, layer_cost_range)
                costs = (low + (high - low) * torch.rand(len(batch), generator=order)).exp()
            rise = min(1.0, progress / layer_cost_warmup if layer_cost_warmup else 1.0)
            reward = rewards(instances.exit_cost[batch], rise * costs, instances.hardness[batch]).to(device)
            features = None if instances.features is None else instances.features[batch].to(device)
            exit_logits = policy(states[batch].float().to(device), features)
            if layer_cost_range is not None:
                exit_logits = exit_logits + COST_SLOPE * (costs / layer_cost).log().to(device)[:, None]
            if min_exit_layer > 1:
                closed = min_exit_layer - 1
                exit_logits = functional.pad(exit_logits[:, closed:], (closed, 0), value=CLOSED)
            if estimator == "exact":
                loss = exact_policy_loss(exit_logits, reward)
            else:
                loss = sampled_policy_loss(exit_logits, reward, num_rollouts, rollouts)
            loss = (loss - entropy_bonus * (1 - progress) * policy_entropy(exit_logits)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # a model's steps would count them when they clip gradients
    _check_fit(policy)
    return policy.cpu().eval()


def fit_foretelling(
    network: nn.Module,
    states: Tensor,
    target: Tensor,
    *,
    epochs: int,
    min_steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    rows: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Fit a network that foretells something of every exit, such as CALM's classifier: will it give the last's token?

    Binary cross-entropy without balancing the classes: one threshold serves all layers, so these must be probabilities.

    Args:
        network: (batch, layers, hidden) -> logits (batch, layers); trained in place.
        states: (instances, layers, hidden).
        target: (instances, layers), bool.
        epochs, min_steps, batch_size, learning_rate, weight_decay, seed, rows, device: as in `fit_policy`.

    Returns:
        The network, in evaluation mode, on the CPU.

    Raises:
        FloatingPointError: as in `fit_policy`.

    Source: CALM (arXiv:2207.07061), section 3.5, trained independently per layer.
    """
    rows = torch.arange(len(states)) if rows is None else rows
    order = torch.Generator().manual_seed(seed)
    network = network.to(device).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    for batch, _ in _batches(rows, optimizer, learning_rate, epochs, min_steps, batch_size, order):
        logits = network(states[batch].float().to(device))
        loss = functional.binary_cross_entropy_with_logits(logits, target[batch].float().to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _check_fit(network)
    return network.cpu().eval()


def _check_fit(network: nn.Module) -> None:
    remedy = "Lower policy_learning_rate, or learning_rate and head_learning_rate."
    require_finite("a policy's weights", "after its fit", network.parameters(), remedy)


def _batches(
    rows: Tensor,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    epochs: int,
    min_steps: int,
    batch_size: int,
    order: torch.Generator,
) -> Iterator[tuple[Tensor, float]]:
    """Batches of a fit with the share of it that is done; the optimizer's learning rate falls along."""
    steps_per_epoch = math.ceil(len(rows) / batch_size)
    epochs = max(epochs, math.ceil(min_steps / steps_per_epoch))
    step = 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=order).split(batch_size):
            progress = step / (epochs * steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - progress)
            yield rows[chosen], progress
            step += 1


@torch.no_grad()
def policy_exit_probs(
    policy: PolicyNetwork, instances: Instances, rows: Tensor | None = None, batch_size: int = 1024
) -> Tensor:
    """Conditional exit probabilities of instances, or of these rows of them, (rows, layers)."""
    parts: list[Tensor] = []
    for batch in (torch.arange(len(instances)) if rows is None else rows).split(batch_size):
        features = None if instances.features is None else instances.features[batch]
        parts.append(policy(instances.kept_states[batch].float(), features).sigmoid())
    return torch.cat(parts)


@torch.no_grad()
def foretold_probabilities(
    network: nn.Module, states: Tensor, rows: Tensor, batch_size: int = 1024
) -> Tensor:
    """What a network of `fit_foretelling` says of some instances, (rows, layers)."""
    return torch.cat([network(states[batch].float()).sigmoid() for batch in rows.split(batch_size)])


def generators_of(device: torch.device | str) -> list[torch.device]:
    """Devices beside the CPU whose random state seeding would touch."""
    device = torch.device(device)
    return [device] if device.type == "cuda" else []
