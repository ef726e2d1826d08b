"""Exit criteria ready for decoding: which tokens exit at a layer, from weights laid out once per call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.functional.signals import static_scores
from consistentee.inference.decoder.functional_decoder import Affine

SQRT_HALF = math.sqrt(0.5)


class TokenExitRule(Protocol):
    """Decides at one layer about the tokens that are still inside."""

    name: str
    """Rules of one name and model read the same maps."""
    needs_normed: bool
    """Whether `exits` reads states behind the exit's norm; others have them computed for exiting tokens only."""

    def may_exit(self, layer_index: int) -> bool:
        """Whether any token can exit here; False saves the look."""
        ...

    def feature_map(self, layer_index: int) -> Affine | None:
        """The first thing that the rule does with states behind the exit's norm, where that is an affine map.

        The next layer's projection then computes it on the way, and `decide` takes its outputs in place of `exits`.
        """
        ...

    def decide(self, layer_index: int, exit_features: Tensor) -> list[bool]:
        """Which tokens exit, from the outputs of `feature_map`, (tokens, outputs)."""
        ...

    def exits(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Which tokens exit.

        Args:
            layer_index: 0-based.
            before, after: (tokens, hidden), around the layer.
            normed: (tokens, hidden), `after` behind the exit's norm; None unless `needs_normed`.
        """
        ...


class _WithoutFeatures:
    """Rules that begin with something else than an affine map of normed states."""

    def feature_map(self, layer_index: int) -> Affine | None:
        """Nothing."""
        return None

    def decide(self, layer_index: int, exit_features: Tensor) -> list[bool]:
        """Never asked: there are no exit_features.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} has no feature map.")


class NeverExit(_WithoutFeatures):
    """All layers for every token."""

    name = "never"
    needs_normed = False

    def may_exit(self, layer_index: int) -> bool:
        """No token exits."""
        return False

    def exits(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """No token exits."""
        return [False] * len(after)


class PolicyRule:
    """Exit where the policy network's exit probability exceeds the threshold.

    Args:
        policy: a `PolicyNetwork` on the state.
        threshold: in [0, 1].
        dtype: in which it is computed, the model's.
    """

    name = "policy"
    needs_normed = True

    def __init__(self, policy: Any, threshold: float, dtype: torch.dtype) -> None:
        self._limit = _logit(threshold)
        # (layers, width, hidden): as `linear` wants them
        self._weights = list(policy.state_weight.detach().transpose(1, 2).contiguous().to(dtype).unbind(0))
        self._biases = list(policy.state_bias.detach().to(dtype).unbind(0))
        self._outputs = list(policy.state_output.detach().to(dtype).unbind(0))
        self._scalar_outputs: list[list[float]] = policy.state_output.detach().to(dtype).float().tolist()
        bias = policy.exit_bias.detach().float().tolist()
        self._limits = [self._limit - value for value in bias]

    def may_exit(self, layer_index: int) -> bool:
        """Whether the threshold lets any token exit."""
        return self._limit < math.inf

    def feature_map(self, layer_index: int) -> Affine:
        """The policy network's hidden layer."""
        return self._weights[layer_index], self._biases[layer_index]

    def decide(self, layer_index: int, exit_features: Tensor) -> list[bool]:
        """Compare exit logits with the threshold's."""
        limit = self._limits[layer_index]
        if (
            len(exit_features) == 1 and exit_features.device.type == "cpu"
        ):  # plain numbers take less than calls of torch
            values: list[float] = exit_features[0].tolist()
            weights = self._scalar_outputs[layer_index]
            return [_scalar_logit(values, weights) > limit]
        logits: list[float] = torch.mv(functional.gelu(exit_features), self._outputs[layer_index]).tolist()
        return [logit > limit for logit in logits]

    def exits(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Compare exit logits with the threshold's."""
        return self.decide(
            layer_index, functional.linear(cast(Tensor, normed), *self.feature_map(layer_index))
        )


class ScoreRule(_WithoutFeatures):
    """Exit where the score of a criterion without a network of its own exceeds the threshold.

    Args:
        criterion: one of `EXIT_CRITERIA` that reads the states around a layer or the exit's logits.
        threshold: in its range.
        exit_logits: (layer index, normed states) -> logits of the exit: one LM head per layer and token.
    """

    def __init__(
        self, criterion: str, threshold: float, exit_logits: Callable[[int, Tensor], Tensor]
    ) -> None:
        row = EXIT_CRITERIA[criterion]
        self.name, self._threshold, self._exit_logits = criterion, threshold, exit_logits
        self._scores, self._highest = row.function, row.thresholds.high
        self.needs_normed = row.reads == ("logits",)

    def may_exit(self, layer_index: int) -> bool:
        """Whether the threshold lets any token exit."""
        return self._threshold < self._highest

    def exits(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Compare scores with the threshold."""
        if self.needs_normed:
            scores = self._scores(self._exit_logits(layer_index, cast(Tensor, normed)))
        else:
            scores = self._scores(before, after)
        return (scores > self._threshold).tolist()


class ClassifierRule:
    """Exit where a linear classifier expects the last layer's token.

    Args:
        classifier: the model's `ConfidenceClassifier`.
        threshold: in [0, 1].
        dtype: in which it is computed, the model's.
    """

    name = "confidence_classifier"
    needs_normed = True

    def __init__(self, classifier: Any, threshold: float, dtype: torch.dtype) -> None:
        self._limit = _logit(threshold)
        self._weights = list(classifier.weight.detach().to(dtype)[:, None].unbind(0))  # (1, hidden) each
        self._biases = list(classifier.bias.detach().to(dtype)[:, None].unbind(0))

    def may_exit(self, layer_index: int) -> bool:
        """Whether the threshold lets any token exit."""
        return self._limit < math.inf

    def feature_map(self, layer_index: int) -> Affine:
        """The classifier itself."""
        return self._weights[layer_index], self._biases[layer_index]

    def decide(self, layer_index: int, exit_features: Tensor) -> list[bool]:
        """Compare logits with the threshold's."""
        return (exit_features[:, 0] > self._limit).tolist()

    def exits(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Compare logits with the threshold's."""
        return self.decide(
            layer_index, functional.linear(cast(Tensor, normed), *self.feature_map(layer_index))
        )


class StaticRule(_WithoutFeatures):
    """Exit after a fixed number of layers.

    Args:
        threshold: layers to run.
    """

    name = "static"
    needs_normed = False

    def __init__(self, threshold: float) -> None:
        self._layers = threshold

    def may_exit(self, layer_index: int) -> bool:
        """Whether enough layers have run."""
        return static_scores(layer_index + 1) > self._layers

    def exits(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """All tokens, once enough layers have run."""
        return [self.may_exit(layer_index)] * len(after)


class FromLayer:
    """A rule that nobody asks before a given layer.

    Args:
        inner: the rule.
        first: the first layer that a token may exit at, from 1.
    """

    def __init__(self, inner: TokenExitRule, first: int) -> None:
        self._inner, self._first = inner, first
        self.name, self.needs_normed = inner.name, inner.needs_normed

    def may_exit(self, layer_index: int) -> bool:
        """From that layer on, as the inner rule has it."""
        return layer_index + 1 >= self._first and self._inner.may_exit(layer_index)

    def feature_map(self, layer_index: int) -> Affine | None:
        """The inner rule's."""
        return self._inner.feature_map(layer_index)

    def decide(self, layer_index: int, exit_features: Tensor) -> list[bool]:
        """As the inner rule."""
        return self._inner.decide(layer_index, exit_features)

    def exits(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """As the inner rule."""
        return self._inner.exits(layer_index, before, after, normed)


class FixedExitRule:
    """Exits that are given in advance, for measuring speed; the rule it stands for is computed all the same.

    Args:
        inner: the rule whose cost counts.
        exit_layers: the exit layer of every token, by generated position and row of the batch, 1-based.
    """

    def __init__(self, inner: TokenExitRule, exit_layers: Sequence[Sequence[int]]) -> None:
        self._inner, self._exit_layers = inner, exit_layers
        self.name, self.needs_normed = inner.name, inner.needs_normed
        self._due: list[int] = []

    def begin(self, position: int, rows: Sequence[int]) -> None:
        """Take up the tokens of a step: where they stand among those generated, and which rows they belong to."""
        due = self._exit_layers[min(position, len(self._exit_layers) - 1)]
        self._due = [due[row] for row in rows]

    def may_exit(self, layer_index: int) -> bool:
        """Everywhere: layers that are given need no permission."""
        return True

    def feature_map(self, layer_index: int) -> Affine | None:
        """The inner rule's."""
        return self._inner.feature_map(layer_index)

    def decide(self, layer_index: int, exit_features: Tensor) -> list[bool]:
        """Those whose layer this is."""
        self._inner.decide(layer_index, exit_features)
        return self._due_here(layer_index)

    def exits(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Those whose layer this is."""
        self._inner.exits(layer_index, before, after, normed)
        return self._due_here(layer_index)

    def _due_here(self, layer_index: int) -> list[bool]:
        exits = [due <= layer_index + 1 for due in self._due]
        self._due = [due for due, exits_here in zip(self._due, exits, strict=True) if not exits_here]
        return exits


def exit_rule(
    criterion: str,
    threshold: float,
    *,
    min_exit_layer: int,
    policy: Any,
    confidence_classifier: Any,
    exit_logits: Callable[[int, Tensor], Tensor],
    dtype: torch.dtype,
) -> TokenExitRule:
    """A criterion's rule.

    Args:
        criterion: one of `GENERATION_CRITERIA`.
        threshold: in its range.
        min_exit_layer: the first layer, from 1, that a token may exit at; static depth does without.
        policy, confidence_classifier, exit_logits: the model's, of which each criterion reads what it reads.
        dtype: of the model.
    """
    row = EXIT_CRITERIA[criterion]
    found: TokenExitRule
    if row.is_static:
        found = StaticRule(threshold)
    elif row.reads == ("exit_probs",):
        found = PolicyRule(policy, threshold, dtype)
    elif row.reads == ("agreement_probs",):
        found = ClassifierRule(confidence_classifier, threshold, dtype)
    else:
        found = ScoreRule(criterion, threshold, exit_logits)
    first = row.first_exit_layer(min_exit_layer)
    return found if first == 1 else FromLayer(found, first)


def _scalar_logit(values: list[float], weights: list[float]) -> float:
    """Weighted sum of GELUs."""
    erf = math.erf
    return 0.5 * sum(
        weight * value * (1.0 + erf(SQRT_HALF * value)) for value, weight in zip(values, weights, strict=True)
    )


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
