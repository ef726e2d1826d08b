"""Exit rules of a model, ready for decoding: which tokens leave at a layer, from weights laid out once per call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from consistentee.functional.token_criteria import softmax_margin_scores, state_similarity_scores
from consistentee.inference.decoder.functional_decoder import Affine

SQRT_HALF = math.sqrt(0.5)


class ExitRule(Protocol):
    """Decides at one layer about the tokens that are still inside."""

    name: str
    """Rules of one name and model read the same maps."""
    needs_normed: bool
    """Whether `leaves` reads states behind the exit's norm; others have them computed for leaving tokens only."""

    def may_leave(self, layer_index: int) -> bool:
        """Whether any token can leave here; False saves the look."""
        ...

    def readers(self, layer_index: int) -> Affine | None:
        """The first thing that the rule does with states behind the exit's norm, where that is an affine map.

        The next layer's projection then computes it on the way, and `decide` takes its outputs in place of `leaves`.
        """
        ...

    def decide(self, layer_index: int, readings: Tensor) -> list[bool]:
        """Which tokens leave, from the outputs of `readers`, (tokens, outputs)."""
        ...

    def leaves(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Which tokens leave.

        Args:
            layer_index: 0-based.
            before, after: (tokens, hidden), around the layer.
            normed: (tokens, hidden), `after` behind the exit's norm; None unless `needs_normed`.
        """
        ...


class _WithoutReaders:
    """Rules that begin with something else than an affine map of normed states."""

    def readers(self, layer_index: int) -> Affine | None:
        """Nothing."""
        return None

    def decide(self, layer_index: int, readings: Tensor) -> list[bool]:
        """Never asked: there are no readings.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} has no readers.")


class NeverLeave(_WithoutReaders):
    """All layers for every token."""

    name = "never"
    needs_normed = False

    def may_leave(self, layer_index: int) -> bool:
        """No token leaves."""
        return False

    def leaves(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """No token leaves."""
        return [False] * len(after)


class PolicyRule:
    """Leave where the policy network's exit probability exceeds the threshold.

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
        self._plain_outputs: list[list[float]] = policy.state_output.detach().to(dtype).float().tolist()
        bias = policy.exit_bias.detach().float().tolist()
        self._limits = [self._limit - value for value in bias]

    def may_leave(self, layer_index: int) -> bool:
        """Whether the threshold lets anybody go."""
        return self._limit < math.inf

    def readers(self, layer_index: int) -> Affine:
        """The policy network's hidden layer."""
        return self._weights[layer_index], self._biases[layer_index]

    def decide(self, layer_index: int, readings: Tensor) -> list[bool]:
        """Compare exit logits with the threshold's."""
        limit = self._limits[layer_index]
        if (
            len(readings) == 1 and readings.device.type == "cpu"
        ):  # plain numbers take less than calls of torch
            values: list[float] = readings[0].tolist()
            weights = self._plain_outputs[layer_index]
            return [_plain_logit(values, weights) > limit]
        logits: list[float] = torch.mv(functional.gelu(readings), self._outputs[layer_index]).tolist()
        return [logit > limit for logit in logits]

    def leaves(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Compare exit logits with the threshold's."""
        return self.decide(layer_index, functional.linear(cast(Tensor, normed), *self.readers(layer_index)))


class MarginRule(_WithoutReaders):
    """Leave where the exit head is sure of its token: one LM head per layer and token.

    Args:
        model: the early-exit model, for its heads.
        threshold: in [0, 1].
    """

    name = "softmax_margin"
    needs_normed = True

    def __init__(self, model: Any, threshold: float) -> None:
        self._model, self._threshold = model, threshold

    def may_leave(self, layer_index: int) -> bool:
        """Whether the threshold lets anybody go."""
        return self._threshold < 1

    def leaves(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Compare the margin of the exit's logits with the threshold."""
        scores = softmax_margin_scores(self._model.exit_logits(layer_index, cast(Tensor, normed)))
        return (scores > self._threshold).tolist()


class SimilarityRule(_WithoutReaders):
    """Leave where a layer hardly turned the state.

    Args:
        threshold: in [-1, 1].
    """

    name = "state_similarity"
    needs_normed = False

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def may_leave(self, layer_index: int) -> bool:
        """From the second layer on: the first one turns an embedding into a state."""
        return self._threshold < 1 and layer_index > 0

    def leaves(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Compare cosines with the threshold."""
        return (state_similarity_scores(before, after) > self._threshold).tolist()


class ClassifierRule:
    """Leave where a linear classifier expects the last layer's token.

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

    def may_leave(self, layer_index: int) -> bool:
        """Whether the threshold lets anybody go."""
        return self._limit < math.inf

    def readers(self, layer_index: int) -> Affine:
        """The classifier itself."""
        return self._weights[layer_index], self._biases[layer_index]

    def decide(self, layer_index: int, readings: Tensor) -> list[bool]:
        """Compare logits with the threshold's."""
        return (readings[:, 0] > self._limit).tolist()

    def leaves(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Compare logits with the threshold's."""
        return self.decide(layer_index, functional.linear(cast(Tensor, normed), *self.readers(layer_index)))


class StaticRule(_WithoutReaders):
    """Leave after a fixed number of layers.

    Args:
        threshold: layers to run.
    """

    name = "static"
    needs_normed = False

    def __init__(self, threshold: float) -> None:
        self._layers = threshold

    def may_leave(self, layer_index: int) -> bool:
        """Whether enough layers have run."""
        return layer_index + 1.5 > self._layers

    def leaves(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Everybody, once enough layers have run."""
        return [self.may_leave(layer_index)] * len(after)


class FromLayer:
    """A rule that nobody asks before a given layer.

    Args:
        inner: the rule.
        first: the first layer that a token may leave at, from 1.
    """

    def __init__(self, inner: ExitRule, first: int) -> None:
        self._inner, self._first = inner, first
        self.name, self.needs_normed = inner.name, inner.needs_normed

    def may_leave(self, layer_index: int) -> bool:
        """From that layer on, as the inner rule has it."""
        return layer_index + 1 >= self._first and self._inner.may_leave(layer_index)

    def readers(self, layer_index: int) -> Affine | None:
        """The inner rule's."""
        return self._inner.readers(layer_index)

    def decide(self, layer_index: int, readings: Tensor) -> list[bool]:
        """As the inner rule."""
        return self._inner.decide(layer_index, readings)

    def leaves(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """As the inner rule."""
        return self._inner.leaves(layer_index, before, after, normed)


class ForcedRule:
    """Exits that are given in advance, for measuring speed; the rule it stands for is computed all the same.

    Args:
        inner: the rule whose cost counts.
        exit_layers: the exit layer of every token, by generated position and row of the batch, 1-based.
    """

    def __init__(self, inner: ExitRule, exit_layers: Sequence[Sequence[int]]) -> None:
        self._inner, self._exit_layers = inner, exit_layers
        self.name, self.needs_normed = inner.name, inner.needs_normed
        self._due: list[int] = []

    def begin(self, position: int, rows: Sequence[int]) -> None:
        """Take up the tokens of a step: where they stand among those generated, and which rows they belong to."""
        due = self._exit_layers[min(position, len(self._exit_layers) - 1)]
        self._due = [due[row] for row in rows]

    def may_leave(self, layer_index: int) -> bool:
        """Everywhere: layers that are given need no leave."""
        return True

    def readers(self, layer_index: int) -> Affine | None:
        """The inner rule's."""
        return self._inner.readers(layer_index)

    def decide(self, layer_index: int, readings: Tensor) -> list[bool]:
        """Those whose layer this is."""
        self._inner.decide(layer_index, readings)
        return self._due_here(layer_index)

    def leaves(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        """Those whose layer this is."""
        self._inner.leaves(layer_index, before, after, normed)
        return self._due_here(layer_index)

    def _due_here(self, layer_index: int) -> list[bool]:
        going = [due <= layer_index + 1 for due in self._due]
        self._due = [due for due, goes in zip(self._due, going, strict=True) if not goes]
        return going


def _plain_logit(values: list[float], weights: list[float]) -> float:
    """Weighted sum of GELUs."""
    erf = math.erf
    return 0.5 * sum(
        weight * value * (1.0 + erf(SQRT_HALF * value)) for value, weight in zip(values, weights, strict=True)
    )


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
