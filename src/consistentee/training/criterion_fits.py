"""What exit criteria need that is fitted on finished exits: networks that foretell something, numbers a layer.

It is fitted on validation instances, whatever the policy learns from, and cross-fitted as a policy is: each fold is
scored by what was fitted outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from consistentee.functional.signals import calibrated_confidence_scores, expert_sum_scores
from consistentee.training.instances import Instances
from consistentee.training.policy import foretold_probabilities

TEMPERATURES = 0.05, 20.0
"""The lowest and the highest."""

NEWTON_STEPS = 31
"""An odd number: the last one is Newton's."""


@dataclass(frozen=True)
class CriterionFit:
    """How it is done for one criterion.

    Attributes:
        fit: takes instances and the indices of those to fit on, None for all.
        scores: takes what was fitted, instances and the indices of those to score; gives (indices, layers).
    """

    fit: Callable[[Instances, Tensor | None], Any]
    scores: Callable[[Any, Instances, Tensor], Tensor]


@dataclass(frozen=True)
class CriterionFits:
    """What came out.

    Attributes:
        fitted: by criterion, on all instances.
        scores: by criterion, (judged instances, layers), exit scores.
    """

    fitted: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)


def fit_criteria(
    fits: Mapping[str, CriterionFit],
    instances: Instances,
    folds: Sequence[tuple[Tensor, Tensor]],
    on_fit: Callable[[], object] = lambda: None,
) -> CriterionFits:
    """Fit for every criterion, on all instances and outside each fold, whose instances that scores.

    Args:
        fits: by criterion.
        instances: what is fitted on, those to score among them.
        folds: of `instances.group_folds`.
        on_fit: called after each fit.
    """
    fitted: dict[str, Any] = {}
    scores: dict[str, Tensor] = {}
    for name, how in fits.items():
        parts: list[tuple[Tensor, Tensor]] = []
        for inside, outside in folds:
            parts.append((outside, how.scores(how.fit(instances, inside), instances, outside)))
            on_fit()
        fitted[name] = how.fit(instances, None)
        on_fit()
        index, values = (torch.cat(part) for part in zip(*parts, strict=True))
        scores[name] = torch.empty_like(values).index_copy_(0, index, values)
    return CriterionFits(fitted, scores)


def foretelling(
    name: str, new_network: Callable[[], nn.Module], fit_network: Callable[..., nn.Module]
) -> CriterionFit:
    """A network that foretells `Instances.targets[name]` from the states.

    Args:
        name: of the criterion.
        new_network: makes an untrained one.
        fit_network: `fit_foretelling` with all of its settings but `rows`.
    """

    def fit(instances: Instances, rows: Tensor | None) -> nn.Module:
        return fit_network(new_network(), instances.kept_states, instances.targets[name], rows=rows)

    def scores(network: nn.Module, instances: Instances, rows: Tensor) -> Tensor:
        return foretold_probabilities(network, instances.kept_states, rows)

    return CriterionFit(fit, scores)


def temperature_calibration() -> CriterionFit:
    """A temperature a layer, for `calibrated_confidence`."""

    def fit(instances: Instances, rows: Tensor | None) -> Tensor:
        logits, labels = _outputs(instances)
        return fit_temperatures(*(part if rows is None else part[rows] for part in (logits, labels)))

    def scores(temperatures: Tensor, instances: Instances, rows: Tensor) -> Tensor:
        return calibrated_confidence_scores(_outputs(instances)[0][rows], temperatures)

    return CriterionFit(fit, scores)


def accuracy_weights() -> CriterionFit:
    """The accuracy of every exit, for `expert_sum`."""

    def fit(instances: Instances, rows: Tensor | None) -> Tensor:
        return (instances.correct if rows is None else instances.correct[rows]).float().mean(0)

    def scores(weights: Tensor, instances: Instances, rows: Tensor) -> Tensor:
        return expert_sum_scores(_outputs(instances)[0][rows], weights.expand(len(rows), -1))

    return CriterionFit(fit, scores)


def _outputs(instances: Instances) -> tuple[Tensor, Tensor]:
    if instances.layer_logits is None or instances.labels is None:
        raise ValueError("layer_logits and labels must be kept to fit criteria on, got None.")
    return instances.layer_logits, instances.labels


def fit_temperatures(layer_logits: Tensor, labels: Tensor) -> Tensor:
    """The temperature of every layer at which its cross-entropy is least, (layers,), within `TEMPERATURES`.

    The cross-entropy is convex in the inverse temperature. Newton's method inside a bracket; every other step, and one
    that leaves it, goes to its middle, as the method creeps where a layer is always right.

    Args:
        layer_logits: (rows, layers, classes).
        labels: (rows,), int64.

    Source: "The Right Tool" (arXiv:2004.07453); temperature scaling is Guo et al.'s (arXiv:1706.04599).

    Example:
        >>> logits = torch.tensor([[[8.0, 0.0]]]).expand(4, -1, -1)  # sure, and right in 3 of 4 cases
        >>> (fit_temperatures(logits, torch.tensor([0, 0, 0, 1])) * torch.tensor(3.0).log()).round(decimals=3)
        tensor([8.])
    """
    logits = layer_logits.double()
    right = logits.gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)
    low, high = (torch.full((logits.shape[1],), 1 / bound).double() for bound in reversed(TEMPERATURES))
    inverse = torch.ones_like(low)
    for step in range(NEWTON_STEPS):
        probabilities = (inverse[:, None] * logits).softmax(-1)
        means = (probabilities * logits).sum(-1)  # (rows, layers)
        slope = (means - right).mean(0)
        curvature = ((probabilities * logits.square()).sum(-1) - means.square()).mean(0)
        high = torch.where(slope > 0, inverse, high)
        low = torch.where(slope > 0, low, inverse)
        inverse = inverse - slope / curvature.clamp_min(1e-12)
        is_usable = (inverse > low) & (inverse < high) & (step % 2 == 0)
        inverse = torch.where(is_usable, inverse, (low * high).sqrt())
    return (1 / inverse).float()
