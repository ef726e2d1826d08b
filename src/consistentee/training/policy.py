"""Phase 2: policies on cached states. Fitting, cross-fitting, and the choice of layer cost and thresholds.

With the backbone and the classifiers frozen, states, costs and rewards are constants: a policy is a small network on
a table, and fits in seconds. On held-out instances it is cross-fitted: each fold is judged by policies that have not
seen it, so one held-out part serves both to train the policy and to choose its layer cost and threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.functional.curves import (
    CurvePoint,
    budget_hits,
    curve_score,
    threshold_within,
    trade_off_curve,
)
from consistentee.functional.exits import choose_exit_layer, exit_distribution
from consistentee.functional.losses import exact_policy_loss, policy_entropy, sampled_policy_loss
from consistentee.functional.rewards import rewards
from consistentee.heads.policy import PolicyNetwork
from consistentee.training.instances import Instances, group_folds

COST_SLOPE = (
    2.0  # of the exit logits in the logarithm of the layer cost; 1, 2, 4 and a learned one were as good
)
CLOSED = -30.0  # exit logit of a layer that nobody may exit at


@dataclass(frozen=True)
class PolicyReport:
    """How a policy did on instances it has not seen, at one layer cost.

    Attributes:
        layer_cost: at which.
        score: mean over `BUDGETS` of the best accuracy at that layer speed-up or more.
        reward: mean over instances of the expected reward.
        accuracy, mean_exit_layer: at threshold 0.5.
        first_layer_share: share of instances that exit at the first layer they may exit at, at threshold 0.5.
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
    """The outcome of phase 2: a policy, its layer cost, thresholds by criterion, and the reports of all costs.

    Attributes:
        policy: fitted on all instances.
        networks: by criterion, the other networks that were fitted.
        layer_cost: the policy's.
        at_thresholds: by criterion, its threshold (the fewest layers within the allowed loss) and what that gives.
        scores: by criterion, one number for the whole curve (`curves.curve_score`).
        reports: how the policies of all costs did.
        hits: (groups,), at how many budgets the policy is right, summed over a group's judged instances.
        counts: (groups,), how many of them there are.
        exit_probs: (instances, layers), conditional exit probabilities of the judged instances, cross-fitted.
    """

    policy: PolicyNetwork
    networks: Mapping[str, nn.Module]
    layer_cost: float
    at_thresholds: Mapping[str, CurvePoint]
    scores: Mapping[str, float]
    reports: tuple[PolicyReport, ...]
    hits: Tensor
    counts: Tensor
    exit_probs: Tensor

    @property
    def report(self) -> PolicyReport:
        """The report of the chosen cost."""
        return next(report for report in self.reports if report.layer_cost == self.layer_cost)

    @property
    def thresholds(self) -> dict[str, float]:
        """Thresholds by criterion."""
        return {criterion: point.threshold for criterion, point in self.at_thresholds.items()}

    def to_dict(self) -> dict[str, object]:
        """Everything but the tensors, for the training record."""
        return {
            "policy_input": self.policy.policy_input,
            "layer_cost": self.layer_cost,
            "thresholds": self.thresholds,
            "scores": self.scores,
            "prices": [asdict(report) for report in self.reports],
        }


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
        ValueError: the instances have no states.
    """
    states, device = instances.kept_states, torch.device(device)
    rows = torch.arange(len(instances)) if rows is None else rows
    with torch.random.fork_rng(devices=_generators_of(device)):
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
    return network.cpu().eval()


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
def _probabilities(network: nn.Module, states: Tensor, rows: Tensor, batch_size: int = 1024) -> Tensor:
    return torch.cat([network(states[batch].float()).sigmoid() for batch in rows.split(batch_size)])


@dataclass(frozen=True)
class PolicySearch:
    """What is tried in phase 2, and how it is judged.

    Attributes:
        fit: `fit_policy` with the settings of a fit.
        fit_network: `fit_foretelling` with them.
        layer_costs: at least one.
        as_range: whether these are the ends of a range for one policy; its layer cost is their geometric mean.
        folds, seed: of cross-fitting.
        criteria: exit criteria to choose thresholds for.
        max_loss: what a threshold may lose of the quality.
        min_exit_layer: the first layer, from 1, that an instance may exit at.
    """

    fit: Callable[..., PolicyNetwork]
    fit_network: Callable[..., nn.Module]
    layer_costs: tuple[float, ...]
    as_range: bool
    folds: int
    seed: int
    criteria: tuple[str, ...]
    max_loss: float
    min_exit_layer: int = 1
    device: torch.device | str = "cpu"

    @property
    def layer_cost_range(self) -> tuple[float, float] | None:
        """Lowest and highest cost of one policy, or None."""
        low, high = min(self.layer_costs), max(self.layer_costs)
        return (low, high) if self.as_range and low < high else None

    @property
    def fitted_costs(self) -> tuple[float, ...]:
        """Layer costs of which each has a policy of its own."""
        return (math.sqrt(math.prod(self.layer_cost_range)),) if self.layer_cost_range else self.layer_costs

    def number_of_fits(self, *, cross_fitted: bool, networks: int = 0) -> int:
        """How many networks `choose_policy` will fit."""
        if not cross_fitted:
            return len(self.fitted_costs) + networks
        return len(self.fitted_costs) * self.folds + 1 + networks * (self.folds + 1)


def choose_policy(
    instances: Instances,
    search: PolicySearch,
    *,
    new_policy: Callable[[], PolicyNetwork],
    new_networks: Mapping[str, Callable[[], nn.Module]] | None = None,
    judged: Instances | None = None,
    judged_groups: int | None = None,
    quality: Callable[[Tensor], float] | None = None,
    on_fit: Callable[[], object] = lambda: None,
) -> PolicyChoice:
    """Fit a policy for the range of costs or one at each, judge it on instances it has not seen, and choose.

    Args:
        instances: what is learnt from.
        search: what is tried.
        new_policy: makes an untrained policy network.
        new_networks: make untrained networks of other criteria, which foretell `instances.targets`.
        judged: other instances to judge by; None cross-fits on `instances`.
        judged_groups: in cross-fitting, so many of the first groups are judged, the others are only learnt from.
        quality: what exit layers of the judged instances are worth (`curves.threshold_within`).
        on_fit: called after each fit, to move a progress bar.
    """
    new_networks, device = new_networks or {}, search.device
    folds: list[tuple[Tensor | None, Tensor]]
    if judged is not None:
        source = judged
        folds = [(None, torch.arange(len(judged)))]
    else:
        source = instances
        judged = instances if judged_groups is None else instances.first_groups(judged_groups)
        folds = [*group_folds(instances.group, search.folds, search.seed, len(judged))]

    def fit(rows: Tensor | None, layer_cost: float) -> PolicyNetwork:
        with torch.random.fork_rng(devices=_generators_of(device)):
            torch.manual_seed(search.seed)
            policy = new_policy()
        policy = search.fit(
            policy,
            instances,
            layer_cost=layer_cost,
            layer_cost_range=search.layer_cost_range,
            min_exit_layer=search.min_exit_layer,
            seed=search.seed,
            rows=rows,
            device=device,
        )
        on_fit()
        return policy

    def fit_network(name: str, rows: Tensor | None) -> nn.Module:
        network = search.fit_network(
            new_networks[name](),
            instances.kept_states,
            instances.targets[name],
            seed=search.seed,
            rows=rows,
            device=device,
        )
        on_fit()
        return network

    whole: dict[float, PolicyNetwork] = {}
    probs: dict[float, Tensor] = {}
    reports: list[PolicyReport] = []
    for layer_cost in search.fitted_costs:
        probs[layer_cost] = torch.empty_like(judged.exit_cost)
        for inside, outside in folds:
            policy = fit(inside, layer_cost)
            probs[layer_cost][outside] = policy_exit_probs(policy, source, outside)
            if inside is None:
                whole[layer_cost] = policy
        probs[layer_cost][:, : search.min_exit_layer - 1] = 0
        reports.append(_report(judged, probs[layer_cost], layer_cost, search))
    standing = [report for report in reports if not report.collapsed] or reports
    best = max(standing, key=lambda report: report.score).layer_cost

    networks: dict[str, nn.Module] = {}
    known = {**judged.scores, "policy": probs[best]}
    for name in new_networks:
        known[name] = torch.empty_like(judged.exit_cost)
        for inside, outside in folds:
            networks[name] = fit_network(name, inside)
            known[name][outside] = _probabilities(networks[name], source.kept_states, outside)
    policy = whole[best] if best in whole else fit(None, best)
    if folds[0][0] is not None:
        networks = {name: fit_network(name, None) for name in new_networks}

    at_thresholds: dict[str, CurvePoint] = {}
    scores: dict[str, float] = {}
    hits = torch.zeros(len(judged), dtype=torch.int64)
    for criterion in search.criteria:
        row = EXIT_CRITERIA[criterion]
        values = known[criterion].clone()
        values[:, : row.first_exit_layer(search.min_exit_layer) - 1] = row.thresholds.low
        points = trade_off_curve(values, judged.correct, criterion)
        threshold = threshold_within(
            points, values, judged.correct, criterion, max_loss=search.max_loss, quality=quality
        )
        at_thresholds[criterion] = next(point for point in points if point.threshold == threshold)
        scores[criterion] = curve_score(points)
        if criterion == "policy":
            hits = budget_hits(values, judged.correct, points)
    counts = torch.bincount(judged.group)
    hits = torch.zeros_like(counts).index_add(0, judged.group, hits)
    return PolicyChoice(
        policy, networks, best, at_thresholds, scores, tuple(reports), hits, counts, probs[best]
    )


def _report(judged: Instances, probs: Tensor, layer_cost: float, search: PolicySearch) -> PolicyReport:
    """How a policy does on instances it has not seen, by their conditional exit probabilities."""
    correct = judged.correct.float()
    reward = rewards(judged.exit_cost, layer_cost, judged.hardness)
    exit_layer = choose_exit_layer(probs, 0.5)
    accuracy = float(correct.gather(1, exit_layer[:, None] - 1).mean())
    first_share = float((exit_layer == search.min_exit_layer).float().mean())
    return PolicyReport(
        layer_cost=layer_cost,
        score=curve_score(trade_off_curve(probs, judged.correct)),
        reward=float((exit_distribution(probs) * reward).sum(1).mean()),
        accuracy=accuracy,
        mean_exit_layer=float(exit_layer.float().mean()),
        first_layer_share=first_share,
        collapsed=first_share > 0.95 and accuracy < float(correct[:, -1].mean()) - 0.01,
    )


def _generators_of(device: torch.device | str) -> list[torch.device]:
    """Devices beside the CPU whose random state seeding would touch."""
    device = torch.device(device)
    return [device] if device.type == "cuda" else []
