"""Phase 2: policies on cached states. Fitting, cross-fitting, and the choice of price and threshold by validation.

With the backbone and the classifiers frozen, states, losses and rewards are constants: a policy is a small network on
a table, and fits in seconds. On held-out rows it is cross-fitted: each fold is judged by policies that have not seen
it, so one held-out part serves both to train the policy and to choose its price and threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from consistentee.config import ClassificationTrainingConfig, TrainingConfig
from consistentee.functional.criteria import CRITERIA, exit_scores
from consistentee.functional.curves import (
    CurvePoint,
    budget_hits,
    curve_score,
    threshold_by_metric,
    trade_off_curve,
)
from consistentee.functional.exits import choose_exit_layer, exit_distribution
from consistentee.functional.hardness import hardness
from consistentee.functional.losses import exact_policy_loss, policy_entropy, sampled_policy_loss
from consistentee.functional.rewards import reward_losses, rewards
from consistentee.heads.policy import PolicyNetwork
from consistentee.training.states import LayerStates

PRICE_SLOPE = 2.0  # of the exit logits in the logarithm of the price; 1, 2, 4 and a learned one were as good
CLOSED = -30.0  # exit logit of a layer that nobody may leave at

NewPolicy = Callable[[], PolicyNetwork]


@dataclass(frozen=True)
class PolicyReport:
    """How a policy did on rows it has not seen, at one price.

    Attributes:
        layer_cost: the price.
        score: mean over `BUDGETS` of the best accuracy at that layer speed-up or more.
        reward: mean over rows of the expected reward.
        accuracy, mean_exit_layer: at threshold 0.5.
        first_layer_share: share of rows that leave at the first layer they may leave at, at threshold 0.5.
        collapsed: the policy sends (nearly) everything out at that layer although that costs accuracy.
    """

    layer_cost: float
    score: float
    reward: float
    accuracy: float
    mean_exit_layer: float
    first_layer_share: float
    collapsed: bool


@dataclass(frozen=True)
class PolicyChoice:
    """The outcome of phase 2: a policy, its price, thresholds by criterion, and the reports of all prices.

    Attributes:
        hits: (rows,), at how many budgets the policy is right about each judged row (`curves.budget_hits`).
        exit_probs: (rows, layers), its conditional exit probabilities of the judged rows.
    """

    policy: PolicyNetwork
    layer_cost: float
    thresholds: dict[str, float]
    scores: dict[str, float]
    reports: tuple[PolicyReport, ...]
    hits: Tensor
    exit_probs: Tensor

    @property
    def report(self) -> PolicyReport:
        """The report of the chosen price."""
        return next(report for report in self.reports if report.layer_cost == self.layer_cost)

    def to_dict(self) -> dict[str, object]:
        """Everything but the tensors, for the training record."""
        return {
            "policy_input": self.policy.policy_input,
            "layer_cost": self.layer_cost,
            "thresholds": self.thresholds,
            "scores": self.scores,
            "prices": [asdict(report) for report in self.reports],
        }


def layer_rewards(
    states: LayerStates, row_hardness: Tensor, config: ClassificationTrainingConfig, layer_cost: float
) -> Tensor:
    """Reward of leaving at each layer, (rows, layers), for cached states under the configured reward."""
    losses = reward_losses(config.reward_loss, **states.outcomes)
    return rewards(losses, layer_cost, row_hardness if config.reward == "hardness" else None)


def fit_policy(
    policy: PolicyNetwork,
    states: LayerStates,
    row_hardness: Tensor,
    *,
    layer_cost: float,
    price_range: tuple[float, float] | None = None,
    config: ClassificationTrainingConfig,
    seed: int,
    rows: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> PolicyNetwork:
    """Fit a policy on cached states of classification by policy gradient, see `fit_policy_on`.

    Args:
        policy: a new policy network; trained in place.
        states: with `pooled`.
        row_hardness: (rows of `states`,) in [0, 1].
        layer_cost, price_range, config, seed, rows, device: as in `fit_policy_on`.

    Returns:
        The policy, in evaluation mode, on the CPU.
    """
    if states.pooled is None:
        raise ValueError(
            "states must hold pooled states to fit a policy, got None. Run with keep_pooled=True."
        )
    return fit_policy_on(
        policy,
        states.pooled,
        reward_losses(config.reward_loss, **states.outcomes),
        row_hardness,
        policy.features(states.layer_logits),
        layer_cost=layer_cost,
        price_range=price_range,
        config=config,
        seed=seed,
        rows=rows,
        device=device,
    )


def fit_policy_on(
    policy: PolicyNetwork,
    pooled: Tensor,
    losses: Tensor,
    instance_hardness: Tensor,
    features: Tensor | None = None,
    *,
    layer_cost: float,
    price_range: tuple[float, float] | None = None,
    config: TrainingConfig,
    seed: int,
    rows: Tensor | None = None,
    min_exit_layer: int = 1,
    device: torch.device | str = "cpu",
) -> PolicyNetwork:
    """Fit a policy by policy gradient on instances, texts or tokens, whose states and losses are constants.

    With a `price_range` one policy learns every price in it. Each instance of a batch draws a price of its own, and
    its exit logits are those of the network plus `PRICE_SLOPE * log(price / layer_cost)`. A higher price thus moves
    all exit logits up alike, so moving the threshold of the finished policy is the same as setting another price: a
    threshold t stands for `layer_cost * ((1 - t) / t) ** (1 / PRICE_SLOPE)`. The exit probability orders (instance,
    layer) pairs by the price at which leaving there becomes worthwhile, the reservation price of optimal stopping.

    The price rises from zero over the first `price_warmup` of the fit (the policy first learns which layers are good,
    then to save), and the entropy bonus falls to zero over it: both keep a high price from collapsing the policy.

    Args:
        policy: a new policy network; trained in place.
        pooled: (instances, layers, hidden), their states.
        losses: (instances, layers), what leaving at each layer costs in quality.
        instance_hardness: (instances,) in [0, 1], for the `hardness` reward.
        features: (instances, layers, features), what `PolicyNetwork.features` gives.
        layer_cost: price of one layer, at which the exit probabilities are those of threshold 0.5.
        price_range: lowest and highest price to learn for, both above 0; None for `layer_cost` alone.
        config: the estimator, reward and optimisation settings are read.
        seed: of order, dropout and rollouts; the caller's random state is left untouched.
        rows: indices of the instances to fit on; all of them if missing. States are read a batch at a time.
        min_exit_layer: the first layer, from 1, that an instance may leave at.
        device: where to compute.

    Returns:
        The policy, in evaluation mode, on the CPU.
    """
    uniform = torch.zeros(len(losses))
    weights = instance_hardness if config.reward == "hardness" else uniform
    rows = torch.arange(len(losses)) if rows is None else rows
    steps_per_epoch = math.ceil(len(rows) / config.policy_batch_size)
    epochs = max(config.policy_epochs, math.ceil(config.policy_min_steps / steps_per_epoch))
    total = epochs * steps_per_epoch
    device = torch.device(device)
    with torch.random.fork_rng(devices=generators_of(device)):
        torch.manual_seed(seed)
        order_generator = torch.Generator().manual_seed(seed)
        rollout_generator = torch.Generator(device=device).manual_seed(seed)
        policy = policy.to(device).train()
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.policy_learning_rate, weight_decay=config.policy_weight_decay
        )
        step = 0
        for _ in range(epochs):
            for positions in torch.randperm(len(rows), generator=order_generator).split(
                config.policy_batch_size
            ):
                batch = rows[positions]
                progress = step / total
                for group in optimizer.param_groups:
                    group["lr"] = config.policy_learning_rate * (1 - progress)
                prices = _draw_prices(len(batch), layer_cost, price_range, order_generator)
                rise = min(1.0, progress / config.price_warmup if config.price_warmup else 1.0)
                reward = rewards(losses[batch], rise * prices, weights[batch]).to(device)
                exit_logits = policy(
                    pooled[batch].float().to(device),
                    None if features is None else features[batch].to(device),
                )
                if price_range is not None:
                    above = (prices / layer_cost).log().to(device)
                    exit_logits = exit_logits + PRICE_SLOPE * above[:, None]
                if min_exit_layer > 1:
                    exit_logits = functional.pad(
                        exit_logits[:, min_exit_layer - 1 :], (min_exit_layer - 1, 0), value=CLOSED
                    )
                if config.estimator == "exact":
                    loss = exact_policy_loss(exit_logits, reward)
                else:
                    loss = sampled_policy_loss(exit_logits, reward, config.num_rollouts, rollout_generator)
                bonus = config.entropy_bonus * (1 - progress)
                loss = (loss - bonus * policy_entropy(exit_logits)).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                optimizer.step()
                step += 1
    return policy.cpu().eval()


def _draw_prices(
    count: int, layer_cost: float, price_range: tuple[float, float] | None, generator: torch.Generator
) -> Tensor:
    """A price for every instance, (count,): log-uniform in the range, or the one price."""
    if price_range is None:
        return torch.full((count,), layer_cost)
    low, high = map(math.log, price_range)
    return (low + (high - low) * torch.rand(count, generator=generator)).exp()


@torch.no_grad()
def policy_exit_probs(
    policy: PolicyNetwork, states: LayerStates, rows: Tensor | None = None, batch_size: int = 1024
) -> Tensor:
    """Conditional exit probabilities of cached states, or of these rows of them, (rows, layers)."""
    if states.pooled is None:
        raise ValueError("states must hold pooled states, got None. Run with keep_pooled=True.")
    parts: list[Tensor] = []
    for batch in (torch.arange(len(states)) if rows is None else rows).split(batch_size):
        features = policy.features(states.layer_logits[batch])
        parts.append(policy(states.pooled[batch].float(), features).sigmoid())
    return torch.cat(parts)


def choose_policy(
    new_policy: NewPolicy,
    policy_states: LayerStates,
    validation_states: LayerStates | None,
    *,
    config: ClassificationTrainingConfig,
    layer_costs: Sequence[float],
    seed: int,
    forgetting_counts: Tensor | None = None,
    device: torch.device | str = "cpu",
    on_fit: Callable[[], object] | None = None,
) -> PolicyChoice:
    """Fit a policy for the range of prices or one at each, judge it on rows it has not seen, and choose.

    Args:
        new_policy: makes an untrained policy network.
        policy_states: rows the policy learns from.
        validation_states: other rows to judge it by; None cross-fits on `policy_states`.
        config: settings.
        layer_costs: prices, at least one: the ends of the range, or those to try, as `config.prices` says. The price
            of a policy for a range is the geometric mean of its ends.
        seed: of folds and fits.
        forgetting_counts: (rows of policy_states,), for that hardness measure.
        on_fit: called after each fit, to move a progress bar.
    """
    price_range = None
    if config.prices == "range" and min(layer_costs) < max(layer_costs):
        price_range = min(layer_costs), max(layer_costs)
        layer_costs = (math.sqrt(price_range[0] * price_range[1]),)
    measure = config.hardness
    policy_hardness = hardness(measure, **policy_states.outcomes, forgetting_counts=forgetting_counts)
    judged = policy_states if validation_states is None else validation_states
    if validation_states is None:
        judged_hardness = policy_hardness
    else:  # forgetting is counted on the policy's rows only; the judged rows are priced by their memorized layer
        other = "memorized_layer" if measure == "forgetting_events" else measure
        judged_hardness = hardness(other, **judged.outcomes)

    def fit(rows: Tensor | None, layer_cost: float, fit_seed: int) -> PolicyNetwork:
        with torch.random.fork_rng(devices=generators_of(device)):
            torch.manual_seed(fit_seed)
            policy = new_policy()
        fitted = fit_policy(
            policy,
            policy_states,
            policy_hardness,
            layer_cost=layer_cost,
            price_range=price_range,
            config=config,
            seed=fit_seed,
            rows=rows,
            device=device,
        )
        if on_fit is not None:
            on_fit()
        return fitted

    whole: dict[float, PolicyNetwork] = {}
    probs: dict[float, Tensor] = {}
    reports: list[PolicyReport] = []
    for layer_cost in layer_costs:
        if validation_states is None:
            probs[layer_cost] = torch.empty_like(policy_states.exit_probs)
            for inside, outside in cross_fitting(len(policy_states), config.policy_folds, seed):
                policy = fit(inside, layer_cost, seed)
                probs[layer_cost][outside] = policy_exit_probs(policy, policy_states, outside)
        else:
            whole[layer_cost] = fit(None, layer_cost, seed)
            probs[layer_cost] = policy_exit_probs(whole[layer_cost], judged)
        reward = layer_rewards(judged, judged_hardness, config, layer_cost)
        right = judged.layer_logits.argmax(-1) == judged.labels[:, None]
        points = trade_off_curve(probs[layer_cost], judged.layer_logits, judged.labels, "policy")
        reports.append(policy_report(right, probs[layer_cost], reward, layer_cost, points))

    standing = [report for report in reports if not report.collapsed] or reports
    best = max(standing, key=lambda report: report.score).layer_cost
    policy = whole[best] if best in whole else fit(None, best, seed)
    thresholds, scores, hits = {}, {}, torch.zeros(0)
    for criterion in CRITERIA:
        values = exit_scores(criterion, judged.layer_logits, probs[best])
        points = trade_off_curve(values, judged.layer_logits, judged.labels, criterion)
        thresholds[criterion] = threshold_by_metric(
            points,
            values,
            judged.layer_logits,
            judged.labels,
            metric=config.threshold_metric,
            max_loss=config.max_accuracy_loss,
        )
        scores[criterion] = curve_score(points)
        if criterion == "policy":
            hits = budget_hits(values, judged.layer_logits, judged.labels, points)
    return PolicyChoice(
        policy=policy,
        layer_cost=best,
        thresholds=thresholds,
        scores=scores,
        reports=tuple(reports),
        hits=hits,
        exit_probs=probs[best],
    )


def cross_fitting(count: int, folds: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each fold, the indices of the rows outside it, which fit, and of those in it, which are judged."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    fold_of = torch.empty_like(order)
    fold_of[order] = torch.arange(count) % min(folds, count)
    for fold in range(int(fold_of.max()) + 1):
        yield (fold_of != fold).nonzero().squeeze(1), (fold_of == fold).nonzero().squeeze(1)


def policy_report(
    right: Tensor,
    probs: Tensor,
    reward: Tensor,
    layer_cost: float,
    points: Sequence[CurvePoint],
    min_exit_layer: int = 1,
) -> PolicyReport:
    """How a policy does on instances it has not seen.

    Args:
        right: (instances, layers), bool, whether an exit would be right.
        probs: (instances, layers), conditional exit probabilities.
        reward: (instances, layers), at the price.
        layer_cost: the price.
        points: the trade-off curve of these probabilities.
        min_exit_layer: the first layer, from 1, that an instance may leave at.
    """
    right = right.float()
    exit_layer = choose_exit_layer(probs, 0.5)
    accuracy = float(right.gather(1, exit_layer[:, None] - 1).mean())
    first_share = float((exit_layer == min_exit_layer).float().mean())
    return PolicyReport(
        layer_cost=layer_cost,
        score=curve_score(points),
        reward=float((exit_distribution(probs) * reward).sum(1).mean()),
        accuracy=accuracy,
        mean_exit_layer=float(exit_layer.float().mean()),
        first_layer_share=first_share,
        collapsed=first_share > 0.95 and accuracy < float(right[:, -1].mean()) - 0.01,
    )


def generators_of(device: torch.device | str) -> list[torch.device]:
    """Devices beside the CPU whose random state seeding would touch."""
    device = torch.device(device)
    return [device] if device.type == "cuda" else []
