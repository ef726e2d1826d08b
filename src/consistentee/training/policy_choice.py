"""The choice of phase 2: policies at several layer costs, judged on instances they have not seen, and thresholds.

On held-out instances a policy is cross-fitted: each fold is judged by policies that have not seen it, so one held-out
part serves both to train the policy and to choose its layer cost and threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.functional.curves import (
    TOLERANCES,
    CurvePoint,
    budget_hits,
    curve_score,
    thresholds_within,
    trade_off_curve,
)
from consistentee.functional.exits import choose_exit_layer, exit_distribution
from consistentee.functional.rewards import rewards
from consistentee.heads.policy import PolicyNetwork
from consistentee.training.criterion_fits import CriterionFits
from consistentee.training.instances import Instances, group_folds
from consistentee.training.policy import generators_of, policy_exit_probs

Fold = tuple[Tensor | None, Tensor]
"""Indices of the instances to fit on, None for all, and of those to judge."""


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
        fitted: by criterion, what else was fitted: a network, or temperatures.
        layer_cost: the policy's.
        at_thresholds: by criterion, its threshold (the fewest layers within the allowed loss) and what that gives.
        at_tolerances: by criterion, what the threshold within each of the `TOLERANCES` gives.
        scores: by criterion, one number for the whole curve (`curves.curve_score`).
        reports: how the policies of all costs did.
        hits: (groups,), at how many budgets the policy is right, summed over a group's judged instances.
        counts: (groups,), how many of them there are.
        exit_probs: (instances, layers), conditional exit probabilities of the judged instances, cross-fitted.
        exit_scores: by criterion, (instances, layers), of the judged instances, cross-fitted where something is fitted,
            the lowest threshold where none may exit.
    """

    policy: PolicyNetwork
    fitted: Mapping[str, Any]
    layer_cost: float
    at_thresholds: Mapping[str, CurvePoint]
    at_tolerances: Mapping[str, tuple[CurvePoint, ...]]
    scores: Mapping[str, float]
    reports: tuple[PolicyReport, ...]
    hits: Tensor
    counts: Tensor
    exit_probs: Tensor
    exit_scores: Mapping[str, Tensor]

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
        margin: standard errors of the loss that a threshold keeps clear of that.
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
    margin: float = 0.0
    min_exit_layer: int = 1
    device: torch.device | str = "cpu"

    @property
    def foretell(self) -> Callable[..., nn.Module]:
        """`fit_foretelling` with all its settings but the rows."""
        return partial(self.fit_network, seed=self.seed, device=self.device)

    @property
    def layer_cost_range(self) -> tuple[float, float] | None:
        """Lowest and highest cost of one policy, or None."""
        low, high = min(self.layer_costs), max(self.layer_costs)
        return (low, high) if self.as_range and low < high else None

    @property
    def fitted_costs(self) -> tuple[float, ...]:
        """Layer costs of which each has a policy of its own."""
        return (math.sqrt(math.prod(self.layer_cost_range)),) if self.layer_cost_range else self.layer_costs

    def number_of_fits(self, *, cross_fitted: bool) -> int:
        """How many policies `choose_policy` will fit."""
        return len(self.fitted_costs) * self.folds + 1 if cross_fitted else len(self.fitted_costs)


def judging_folds(
    instances: Instances,
    search: PolicySearch,
    *,
    judged: Instances | None = None,
    judged_groups: int | None = None,
) -> list[Fold]:
    """Instances to fit on and to judge, in turn; arguments as of `choose_policy`.

    With judged instances of their own there is one fold, and its indices to judge are theirs.
    """
    if judged is not None:
        return [(None, torch.arange(len(judged)))]
    count = None if judged_groups is None else len(instances.first_groups(judged_groups))
    return [*group_folds(instances.group, search.folds, search.seed, count)]


def choose_policy(
    instances: Instances,
    search: PolicySearch,
    *,
    new_policy: Callable[[], PolicyNetwork],
    fits: CriterionFits | None = None,
    judged: Instances | None = None,
    judged_groups: int | None = None,
    quality: Callable[[Tensor], float] | None = None,
    effects: Callable[[Tensor], Tensor] | None = None,
    on_fit: Callable[[], object] = lambda: None,
) -> PolicyChoice:
    """Fit a policy for the range of costs or one at each, judge it on instances it has not seen, and choose.

    Args:
        instances: what is learnt from.
        search: what is tried.
        new_policy: makes an untrained policy network.
        fits: what is fitted for other criteria, which has not seen what it scores; None for nothing.
        judged: other instances to judge by; None cross-fits on `instances`.
        judged_groups: in cross-fitting, so many of the first groups are judged, the others are only learnt from.
        quality, effects: what exit layers of the judged instances are worth (`curves.thresholds_within`).
        on_fit: called after each fit, to move a progress bar.
    """
    fits, device = fits or CriterionFits(), search.device
    source = instances if judged is None else judged
    folds = judging_folds(instances, search, judged=judged, judged_groups=judged_groups)
    if judged is None:
        judged = instances if judged_groups is None else instances.first_groups(judged_groups)

    def fit(rows: Tensor | None, layer_cost: float) -> PolicyNetwork:
        with torch.random.fork_rng(devices=generators_of(device)):
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

    known = {**judged.scores, **fits.scores}
    for criterion in search.criteria:
        if EXIT_CRITERIA[criterion].reads_policy:
            known[criterion] = EXIT_CRITERIA[criterion].function(probs[best])
    policy = whole[best] if best in whole else fit(None, best)

    at_thresholds: dict[str, CurvePoint] = {}
    at_tolerances: dict[str, tuple[CurvePoint, ...]] = {}
    scores: dict[str, float] = {}
    hits = torch.zeros(len(judged), dtype=torch.int64)
    for criterion in search.criteria:
        row = EXIT_CRITERIA[criterion]
        values = known[criterion] = known[criterion].clone()
        values[:, : row.first_exit_layer(search.min_exit_layer) - 1] = row.thresholds.low
        points = trade_off_curve(values, judged.correct, criterion)
        thresholds = thresholds_within(
            points,
            values,
            judged.correct,
            criterion,
            max_losses=(search.max_loss, *TOLERANCES),
            margin=search.margin,
            quality=quality,
            effects=effects,
        )
        by_threshold = {point.threshold: point for point in points}
        at_thresholds[criterion], *at_others = (by_threshold[threshold] for threshold in thresholds)
        at_tolerances[criterion] = tuple(at_others)
        scores[criterion] = curve_score(points)
        if criterion == "policy":
            hits = budget_hits(values, judged.correct, points)
    counts = torch.bincount(judged.group)
    hits = torch.zeros_like(counts).index_add(0, judged.group, hits)
    return PolicyChoice(
        policy=policy,
        fitted=fits.fitted,
        layer_cost=best,
        at_thresholds=at_thresholds,
        at_tolerances=at_tolerances,
        scores=scores,
        reports=tuple(reports),
        hits=hits,
        counts=counts,
        exit_probs=probs[best],
        exit_scores=known,
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
