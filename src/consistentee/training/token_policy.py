"""Phase 2 for tokens: policy and CALM's classifier on cached states, thresholds of all criteria on the same tokens.

Everything is cross-fitted by texts: the tokens of a text are judged by networks that have seen none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from consistentee.config import GenerationTrainingConfig
from consistentee.functional.criteria import EXIT_CRITERIA, GENERATION_CRITERIA
from consistentee.functional.curves import CurvePoint, curve_score, hits_at_budgets
from consistentee.functional.hardness import hardness
from consistentee.functional.rewards import reward_losses, rewards
from consistentee.functional.token_curves import static_curve, token_curve, token_threshold
from consistentee.heads.exit_heads import ConfidenceClassifier
from consistentee.heads.policy import PolicyNetwork
from consistentee.training.policy import (
    NewPolicy,
    PolicyReport,
    cross_fitting,
    fit_policy_on,
    generators_of,
    policy_report,
)
from consistentee.training.token_states import TokenStates


@dataclass(frozen=True)
class TokenPolicyChoice:
    """The outcome of phase 2: a policy, its price, a confidence classifier, and thresholds by criterion.

    Attributes:
        policy, classifier: fitted on all tokens.
        layer_cost: the policy's price.
        thresholds: by criterion: the fewest layers within the allowed loss of token accuracy.
        at_thresholds: by criterion, what its threshold gives.
        scores: by criterion, one number for the whole curve (`curves.curve_score`).
        reports: how the policies of all prices did.
        hits: (texts,), at how many budgets the policy is right about a text's tokens, summed over them.
        counts: (texts,), how many of its tokens were judged.
        exit_probs: (tokens, layers), the cross-fitted policy's.
    """

    policy: PolicyNetwork
    classifier: ConfidenceClassifier
    layer_cost: float
    thresholds: dict[str, float]
    at_thresholds: dict[str, CurvePoint]
    scores: dict[str, float]
    reports: tuple[PolicyReport, ...]
    hits: Tensor
    counts: Tensor
    exit_probs: Tensor

    @property
    def report(self) -> PolicyReport:
        """The report of the chosen price."""
        return next(report for report in self.reports if report.layer_cost == self.layer_cost)

    def to_dict(self) -> dict[str, object]:
        """Everything but the tensors, for the training record."""
        return {
            "layer_cost": self.layer_cost,
            "thresholds": self.thresholds,
            "scores": self.scores,
            "prices": [asdict(report) for report in self.reports],
        }


def token_losses(name: str, states: TokenStates, target: str = "reference") -> Tensor:
    """What leaving at a layer costs in quality, (tokens, layers): `rewards.reward_losses`.

    Args:
        name: of the loss.
        states: of the tokens; what is right there depends on their target.
        target: `both` takes the mean of two errors, against the reference and against the last layer.
    """
    known = states.outcomes
    if target == "both":
        known["right"] = (states.right.float() + states.agrees.float()) / 2
    return reward_losses(name, **known)


@torch.no_grad()
def token_exit_probs(
    network: Callable[[Tensor], Tensor],
    states: TokenStates,
    tokens: Tensor | None = None,
    batch_size: int = 1024,
) -> Tensor:
    """Probabilities that a network gives to cached states, or to some of them, (tokens, layers).

    Args:
        network: (tokens, layers, hidden) -> logits (tokens, layers).
        states: with `pooled`.
        tokens: indices of tokens; all if missing.
        batch_size: tokens at once.
    """
    pooled = _pooled(states)
    tokens = torch.arange(len(states)) if tokens is None else tokens
    parts = [network(pooled[batch].float()).sigmoid() for batch in tokens.split(batch_size)]
    return torch.cat(parts)


def fit_confidence_classifier(
    classifier: ConfidenceClassifier,
    states: TokenStates,
    *,
    config: GenerationTrainingConfig,
    seed: int,
    tokens: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> ConfidenceClassifier:
    """Fit CALM's classifier: at every layer, will this exit give the last layer's token?

    Binary cross-entropy as it is, without balancing the classes: one threshold serves all layers, so what the
    classifiers say has to be probabilities, and at shallow layers agreement is rare.

    Args:
        classifier: trained in place.
        states: with `pooled`.
        config: the settings of the policy's fit are read.
        seed: of the order.
        tokens: indices of the tokens to fit on; all if missing.
        device: where to compute.

    Returns:
        The classifier, in evaluation mode, on the CPU.

    Source: CALM (arXiv:2207.07061), section 3.5, trained independently per layer.
    """
    pooled = _pooled(states)
    tokens = torch.arange(len(states)) if tokens is None else tokens
    steps_per_epoch = math.ceil(len(tokens) / config.policy_batch_size)
    epochs = max(config.policy_epochs, math.ceil(config.policy_min_steps / steps_per_epoch))
    total = epochs * steps_per_epoch
    order = torch.Generator().manual_seed(seed)
    classifier = classifier.to(device).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=config.policy_learning_rate, weight_decay=config.policy_weight_decay
    )
    step = 0
    for _ in range(epochs):
        for positions in torch.randperm(len(tokens), generator=order).split(config.policy_batch_size):
            batch = tokens[positions]
            for group in optimizer.param_groups:
                group["lr"] = config.policy_learning_rate * (1 - step / total)
            logits = classifier(pooled[batch].float().to(device))
            loss = functional.binary_cross_entropy_with_logits(
                logits, states.agrees[batch].float().to(device)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
    return classifier.cpu().eval()


def choose_token_policy(
    new_policy: NewPolicy,
    new_classifier: Callable[[], ConfidenceClassifier],
    states: TokenStates,
    *,
    config: GenerationTrainingConfig,
    layer_costs: Sequence[float],
    seed: int,
    min_exit_layer: int = 1,
    judged_texts: int | None = None,
    device: torch.device | str = "cpu",
    on_fit: Callable[[], object] | None = None,
) -> TokenPolicyChoice:
    """Fit a policy for the range of prices or one at each, judge it cross-fitted, and choose; the rivals alike.

    Args:
        new_policy, new_classifier: make untrained networks.
        states: tokens of texts that the model was not trained on, and behind them perhaps of others.
        config: settings.
        layer_costs: prices, at least one, as in `policy_training.choose_policy`.
        seed: of folds and fits.
        min_exit_layer: the first layer, from 1, that a token may leave at.
        judged_texts: so many of the first texts are judged, the others are only learnt from; all if missing.
        device: where to compute.
        on_fit: called after each fit, to move a progress bar.
    """
    price_range = None
    if config.prices == "range" and min(layer_costs) < max(layer_costs):
        price_range = min(layer_costs), max(layer_costs)
        layer_costs = (math.sqrt(price_range[0] * price_range[1]),)
    pooled, losses = _pooled(states), token_losses(config.reward_loss, states, config.reward_target)
    token_hardness = hardness(config.hardness, **states.outcomes)
    judged = states if judged_texts is None else states.first_texts(judged_texts)
    folds = token_folds(states, config.policy_folds, seed, len(judged))
    done = on_fit or (lambda: None)

    def fit(tokens: Tensor | None, layer_cost: float) -> PolicyNetwork:
        with torch.random.fork_rng(devices=generators_of(device)):
            torch.manual_seed(seed)
            policy = new_policy()
        fitted = fit_policy_on(
            policy,
            pooled,
            losses,
            token_hardness,
            layer_cost=layer_cost,
            price_range=price_range,
            config=config,
            seed=seed,
            rows=tokens,
            min_exit_layer=min_exit_layer,
            device=device,
        )
        done()
        return fitted

    def fit_classifier(tokens: Tensor | None) -> ConfidenceClassifier:
        classifier = fit_confidence_classifier(
            new_classifier(), states, config=config, seed=seed, tokens=tokens, device=device
        )
        done()
        return classifier

    probs: dict[float, Tensor] = {}
    reports: list[PolicyReport] = []
    for layer_cost in layer_costs:
        probs[layer_cost] = torch.empty_like(judged.losses)
        for inside, outside in folds:
            policy = fit(inside, layer_cost)
            probs[layer_cost][outside] = token_exit_probs(
                lambda x, policy=policy: policy(x, None), states, outside
            )
        probs[layer_cost][:, : min_exit_layer - 1] = 0
        reward = rewards(
            losses[: len(judged)],
            layer_cost,
            token_hardness[: len(judged)] if config.reward == "hardness" else None,
        )
        points = token_curve(probs[layer_cost], judged.right)
        reports.append(
            policy_report(judged.right, probs[layer_cost], reward, layer_cost, points, min_exit_layer)
        )
    standing = [report for report in reports if not report.collapsed] or reports
    best = max(standing, key=lambda report: report.score).layer_cost
    confidence = torch.empty_like(judged.losses)
    for inside, outside in folds:
        confidence[outside] = token_exit_probs(fit_classifier(inside), states, outside)

    floor = float(judged.right[:, -1].float().mean()) - config.max_accuracy_loss
    thresholds, at_thresholds, scores = {}, {}, {}
    hits = torch.zeros(len(judged), dtype=torch.int64)
    for criterion in GENERATION_CRITERIA:
        if EXIT_CRITERIA[criterion].is_static:
            points = static_curve(judged.right)
        else:
            values = criterion_scores(criterion, judged, probs[best], confidence).clone()
            values[:, : min_exit_layer - 1] = EXIT_CRITERIA[criterion].thresholds.low
            points = token_curve(values, judged.right, criterion=criterion)
            if criterion == "policy":
                hits = hits_at_budgets(values, judged.right, points)
        threshold = token_threshold(points, floor, criterion=criterion)
        thresholds[criterion] = threshold
        at_thresholds[criterion] = next(point for point in points if point.threshold == threshold)
        scores[criterion] = curve_score(points)
    texts = int(judged.rows.max()) + 1
    return TokenPolicyChoice(
        policy=fit(None, best),
        classifier=fit_classifier(None),
        layer_cost=best,
        thresholds=thresholds,
        at_thresholds=at_thresholds,
        scores=scores,
        reports=tuple(reports),
        hits=torch.zeros(texts, dtype=torch.int64).index_add(0, judged.rows, hits),
        counts=torch.bincount(judged.rows, minlength=texts),
        exit_probs=probs[best],
    )


def number_of_fits(config: GenerationTrainingConfig, num_prices: int) -> int:
    """How often `choose_token_policy` will call `on_fit`."""
    return (1 if config.prices == "range" else num_prices) * config.policy_folds + config.policy_folds + 2


def criterion_scores(criterion: str, states: TokenStates, exit_probs: Tensor, confidence: Tensor) -> Tensor:
    """Exit scores of a criterion for cached tokens, (tokens, layers), higher = readier to leave.

    Args:
        criterion: `policy`, `softmax_margin`, `state_similarity` or `confidence_classifier`.
        states: of the tokens.
        exit_probs, confidence: (tokens, layers), what policy and classifier say.
    """
    if criterion == "policy":
        return exit_probs
    if criterion == "confidence_classifier":
        return confidence
    if criterion == "softmax_margin":
        return states.margin
    similarity = states.similarity.clone()
    similarity[:, 0] = -1.0  # decoding does not ask the first layer, which turns an embedding into a state
    return similarity


def token_folds(
    states: TokenStates, folds: int, seed: int, judged_tokens: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """For each fold, indices of the tokens to fit on and of those to judge; a text's tokens stay together.

    Args:
        states: of the tokens.
        folds: how many.
        seed: of the texts' order.
        judged_tokens: tokens behind so many are fitted on in every fold and never judged; none if missing.

    Raises:
        ValueError: there are tokens of one text only.
    """
    count = len(states) if judged_tokens is None else judged_tokens
    texts, text_of = states.rows[:count].unique(return_inverse=True)
    more = torch.arange(count, len(states))
    if len(texts) < 2:
        raise ValueError(
            f"validation texts with response tokens must be at least 2, got {len(texts)}. "
            "Give more rows, or a higher validation_fraction."
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    for _, judged in cross_fitting(len(texts), folds, seed):
        inside = torch.isin(text_of, judged)
        pairs.append((torch.cat([(~inside).nonzero().squeeze(1), more]), inside.nonzero().squeeze(1)))
    return pairs


def _pooled(states: TokenStates) -> Tensor:
    if states.pooled is None:
        raise ValueError("states must hold pooled states, got None. Run with keep_pooled=True.")
    return states.pooled
