"""Exit scores as ONNX graphs: what `functional/signals.py` says about all layers at once, layer by layer.

Each criterion's rows carry on what it must know of the layers before, their *history*. Scores are (rows, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from consistentee.errors import SettingError
from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.functional.signals import CAP_SCALE, SIMILAR_LAYERS, SURE_LAYERS
from consistentee.heads.exit_signals import ExitSignals
from consistentee.heads.policy import PolicyNetwork
from consistentee.inference.encoder.onnx_builder import Graph
from consistentee.inference.encoder.onnx_graphs import add_gelu

PREDICTION = "prediction"
"""Of a history: the running prediction, (rows, classes)."""


@dataclass
class History:
    """What rows bring along from the layers that they have passed: values and their kinds, by name."""

    values: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def keep(self, name: str, value: str, kind: str = "float") -> None:
        """Bring a value along, (rows, ...), in place of the one of this name."""
        self.values[name], self.kinds[name] = value, kind


@dataclass(frozen=True)
class _Exit:
    """One layer: its number from 0, exits before it, own logits, prediction (rows, classes), policy's input, pooled."""

    index: int
    place: int
    own: str
    prediction: str
    states: str
    pooled: str
    history: History


@dataclass(frozen=True)
class LayerExit:
    """What a layer says.

    Args:
        prediction: (rows, classes).
        answers: (rows, classes + 1): prediction and number of the layer.
        score: (rows, 1), exit scores; "" where nothing decides.
        at: what they were made of.
    """

    prediction: str
    answers: str
    score: str = ""
    at: _Exit | None = None


class OnnxExitScores:
    """Exit scores of one layer after another under one criterion; see `incremental_scores`.

    Args:
        criterion: one of `criteria.CRITERIA`.
        policy: the model's policy network.
        signals: what else the criterion reads.
        num_classes: of the model.
        ensemble_decay: share of the layers before in the running prediction.
        has_exit: (layers,), which layers have an exit; None: all.

    Raises:
        SettingError: a criterion without a row of `ONNX_SCORES`, or a policy of 0.1.0 that reads several signals.
    """

    def __init__(
        self,
        criterion: str,
        policy: PolicyNetwork,
        signals: ExitSignals,
        *,
        num_classes: int,
        ensemble_decay: float,
        has_exit: Sequence[bool] | None = None,
    ) -> None:
        self.criterion, self._policy, self._signals = criterion, policy, signals
        self._has_exit = has_exit
        self._classes, self._decay = num_classes, float(ensemble_decay)
        self._width = policy.state_output.shape[1] if policy.reads_state else 0
        if criterion not in ONNX_SCORES:
            raise SettingError(
                f'criterion "{criterion}" has no graph. Write its row of ONNX_SCORES in '
                "inference/encoder/onnx_scores.py, or take another criterion, such as confidence."
            )
        self._score = ONNX_SCORES[criterion]
        if policy.reads_signals and self._score in (_policy, _quantile):
            raise SettingError(
                f'criterion "{criterion}" of a policy that reads "{policy.policy_input}", as those of 0.1.0 did, has '
                "no graph. Take another criterion, such as confidence, or train the model again."
            )

    @classmethod
    def of(cls, model: Any, criterion: str) -> OnnxExitScores:
        """Those of a model with exits."""
        return cls(
            criterion,
            model.policy,
            model.exit_signals(EXIT_CRITERIA[criterion].reads),
            num_classes=model.config.num_classes,
            ensemble_decay=model.config.ensemble_decay,
            has_exit=model.config.has_exit,
        )

    def has_exit(self, index: int) -> bool:
        """Whether a layer, from 0, has an exit; else there is no step for it."""
        return self._has_exit is None or self._has_exit[index]

    def step(self, graph: Graph, index: int, exit_features: str, pooled: str, history: History) -> LayerExit:
        """Take the rows past one more layer.

        Args:
            graph: to add to.
            index: of the layer, from 0.
            exit_features: (rows, classes + width + 1), what `exit_feature_map` makes of the layer, and its number.
            pooled: (rows, pooled).
            history: of the rows; brought up to date.
        """
        sizes = [self._classes, self._width, 1] if self._width else [self._classes, 1]
        own, *states, number = graph.ops(
            "Split", exit_features, graph.constant(sizes), outputs=len(sizes), axis=1
        )
        prediction = self._predict(graph, own, history)
        place = sum(self.has_exit(before) for before in range(index))
        at = _Exit(index, place, own, prediction, states[0] if states else "", pooled, history)
        answers = graph.op("Concat", prediction, number, axis=1)
        return LayerExit(prediction, answers, self._score(self, graph, at), at)

    def alone(self, graph: Graph, index: int, logits: str, order: str) -> LayerExit:
        """A layer whose head speaks for itself alone.

        Args:
            graph: to add to.
            index: of the layer, from 0.
            logits: (rows, classes).
            order: (rows, 1), one entry a row.
        """
        number = graph.constant(np.array([[index + 1]], np.float32))
        number = graph.op("Expand", number, graph.op("Shape", order))
        return LayerExit(logits, graph.op("Concat", logits, number, axis=1))

    def shown(self, graph: Graph, found: LayerExit) -> str:
        """What a layer says as one row: prediction, exit score and the policy's exit probability, (rows, classes + 2).

        The last is 0 where a policy has no graph, and both are where nothing decides.
        """
        if found.at is None:
            nothing = graph.op("Expand", graph.number(0.0), graph.op("Shape", found.prediction))
            two = graph.op("Slice", nothing, *(graph.constant([place]) for place in (0, 1, 1)))
            return graph.op("Concat", found.prediction, two, two, axis=1)
        probs = found.score
        if not self.has_exit_probs:
            probs = graph.op("Mul", found.score, graph.number(0.0))
        elif self._score is not _policy:
            probs = self.exit_probs(graph, found.at)
        return graph.op("Concat", found.prediction, found.score, probs, axis=1)

    @property
    def has_exit_probs(self) -> bool:
        """Whether the policy's exit probability can be computed: not of one of 0.1.0 that reads several signals."""
        return not self._policy.reads_signals

    def _predict(self, graph: Graph, own: str, history: History) -> str:
        """The running prediction, as `exits.ensemble_step` gives it."""
        if not self._decay:
            return own
        found = graph.op("LogSoftmax", own, axis=-1)
        if PREDICTION in history.values:
            same = graph.constant(torch.eye(self._classes))
            mixed: dict[str, Any] = {"alpha": 1 - self._decay, "beta": self._decay}
            found = graph.op("Gemm", found, same, history.values[PREDICTION], **mixed)
        history.keep(PREDICTION, found)
        return found

    def exit_probs(self, graph: Graph, at: _Exit) -> str:
        """The policy's, (rows, 1)."""
        policy = self._policy
        found = graph.constant(policy.exit_bias[at.index].reshape(1))
        if policy.reads_log_odds:
            weight = graph.constant(policy.confidence_weight.reshape(1, 1))
            found = graph.op("Gemm", self._log_odds(graph, at.prediction), weight, found)
        if policy.reads_state:
            weight = graph.constant(policy.state_output[at.index][:, None])
            found = graph.op("Gemm", add_gelu(graph, at.states), weight, found)
        return graph.op("Sigmoid", found)

    def _log_odds(self, graph: Graph, logits: str) -> str:
        """`exits.log_odds`; of two classes the difference of their logits."""
        if self._classes == 2:
            difference = graph.op("Gemm", logits, graph.constant(torch.tensor([[1.0], [-1.0]])))
            return graph.op("Clip", graph.op("Abs", difference), "", graph.number(10.0))
        log_top = graph.reduce("ReduceMax", graph.op("LogSoftmax", logits, axis=-1), -1)
        rest = graph.op("Sub", graph.number(1.0), graph.op("Exp", log_top))
        rest = graph.op("Clip", rest, graph.number(1e-7))
        odds = graph.op("Sub", log_top, graph.op("Log", rest))
        return graph.op("Clip", odds, graph.number(-10.0), graph.number(10.0))

    def temperature(self, index: int) -> float:
        """Of a layer, from 0, as it was fitted."""
        if self._signals.temperatures is None:
            raise SettingError('criterion "calibrated_confidence" needs temperatures, and there are none.')
        return float(self._signals.temperatures[index])

    def layer_weight(self, index: int) -> float:
        """Of a layer, from 0."""
        return float(self._signals.layer_weights[index])

    def right_probs(self, graph: Graph, at: _Exit) -> str:
        """That the exit is right, (rows, 1)."""
        network: Any = self._signals.learnt_to_exit
        weight, bias = network.weight[:, None], network.bias.reshape(1)
        return graph.op("Sigmoid", graph.op("Gemm", at.pooled, graph.constant(weight), graph.constant(bias)))

    def null_shares(self, graph: Graph, at: _Exit) -> str:
        """See `exit_signals.NullSpace`, (rows, 1)."""
        space: Any = self._signals.null_space
        inverse, bias = space.inverse[at.index], space.bias[at.index]  # (classes, classes), (classes,)
        seen = graph.op("MatMul", at.own, graph.constant(inverse))  # z' G
        linear = graph.op("MatMul", seen, graph.constant(2 * bias[:, None]))
        constant = graph.number(float((bias @ inverse * bias).sum()))
        squared = graph.reduce("ReduceSum", graph.op("Mul", at.pooled, at.pooled), -1)
        whole = graph.op("Add", squared, graph.op("Sub", linear, constant))
        part = graph.reduce("ReduceSum", graph.op("Mul", seen, at.own), -1)
        share = graph.op("Div", part, graph.op("Clip", whole, graph.number(1e-12)))
        share = graph.op("Sub", graph.number(1.0), share)
        return graph.op("Sqrt", graph.op("Clip", share, graph.number(0.0), graph.number(1.0)))


def _policy(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    return scores.exit_probs(graph, at)


def _quantile(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    stayed = graph.op("Sub", graph.number(1.0), scores.exit_probs(graph, at))
    if at.place:
        stayed = graph.op("Mul", at.history.values["stayed"], stayed)
    at.history.keep("stayed", stayed)
    return graph.op("Sub", graph.number(1.0), stayed)


def _top_probability(graph: Graph, logits: str) -> str:
    return graph.reduce("ReduceMax", graph.op("Softmax", logits, axis=-1), -1)


def _confidence(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    return _top_probability(graph, at.prediction)


def _calibrated(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    return _top_probability(graph, graph.op("Div", at.prediction, graph.number(scores.temperature(at.index))))


def _entropy(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    log_probs = graph.op("LogSoftmax", at.prediction, axis=-1)
    total = graph.reduce("ReduceSum", graph.op("Mul", graph.op("Exp", log_probs), log_probs), -1)
    share = graph.op("Div", total, graph.number(math.log(scores._classes)))
    return graph.op("Add", share, graph.number(1.0))


def _least_of(graph: Graph, at: _Exit, score: str, layers: int) -> str:
    """The least of so many layers up to this one; 0 where there are not so many."""
    names = [f"score_{back}" for back in range(1, layers)]  # of the layers before
    before = [at.history.values[name] for name in names if name in at.history.values]
    for name, value in zip(names, [score, *before], strict=False):
        at.history.keep(name, value)
    if at.place + 1 < layers:
        return graph.op("Mul", score, graph.number(0.0))
    return graph.op("Min", score, *before) if before else score


def _confident_patience(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    return _least_of(graph, at, _entropy(scores, graph, at), SURE_LAYERS)


def _similar_patience(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    log_probs = graph.op("LogSoftmax", at.prediction, axis=-1)
    before = at.history.values.get("log_probs")
    at.history.keep("log_probs", log_probs)
    if before is None:
        zeros = graph.op("Mul", log_probs, graph.number(0.0))
        return _least_of(graph, at, graph.reduce("ReduceSum", zeros, -1), SIMILAR_LAYERS)
    probs, probs_before = graph.op("Exp", log_probs), graph.op("Exp", before)
    mean = graph.op("Mul", graph.op("Add", probs, probs_before), graph.number(0.5))
    log_mean = graph.op("Log", graph.op("Clip", mean, graph.number(1e-37)))
    parts = [
        graph.op("Mul", each, graph.op("Sub", log_each, log_mean))
        for each, log_each in ((probs, log_probs), (probs_before, before))
    ]
    total = graph.reduce("ReduceSum", graph.op("Add", *parts), -1)
    likeness = graph.op("Div", total, graph.number(-2 * math.log(2)))
    likeness = graph.op("Add", likeness, graph.number(1.0))
    likeness = graph.op("Clip", likeness, graph.number(0.0), graph.number(1.0))  # rounding goes beyond
    return _least_of(graph, at, likeness, SIMILAR_LAYERS)


def _agrees(graph: Graph, at: _Exit) -> str | None:
    """1 where this layer predicts the class of the one before, else 0, (rows, 1) float; None at the first layer."""
    predicted = graph.op("ArgMax", at.prediction, axis=-1, keepdims=1)
    before = at.history.values.get("predicted")
    at.history.keep("predicted", predicted, "int64")
    return None if before is None else graph.op("Cast", graph.op("Equal", predicted, before), to=1)


def _run(graph: Graph, at: _Exit, score: str) -> str:
    """The sum of scores of the layers in a row that agree up to this one."""
    agrees = _agrees(graph, at)
    if agrees is not None:
        score = graph.op("Add", score, graph.op("Mul", agrees, at.history.values["run"]))
    at.history.keep("run", score)
    return score


def _patience(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    return _run(graph, at, _filled(graph, at, 1.0))


def _expert_sum(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    weight = graph.number(scores.layer_weight(at.index))
    total = _run(graph, at, graph.op("Mul", _top_probability(graph, at.prediction), weight))
    return graph.op("Div", total, graph.op("Add", total, graph.number(1.0)))


def _energy(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    return graph.op("Sigmoid", graph.reduce("ReduceLogSumExp", at.own, -1))


def _cap(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    energy = graph.reduce("ReduceLogSumExp", at.own, -1)
    share = graph.op("Mul", scores.null_shares(graph, at), graph.number(CAP_SCALE))
    return graph.op("Sigmoid", graph.op("Sub", energy, share))


def _learnt_to_exit(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    return scores.right_probs(graph, at)


def _static(scores: OnnxExitScores, graph: Graph, at: _Exit) -> str:
    return _filled(graph, at, at.index + 1.5)


def _filled(graph: Graph, at: _Exit, value: float) -> str:
    """The same number for every row, (rows, 1)."""
    rows = graph.op("Slice", graph.op("Shape", at.prediction), graph.constant([0]), graph.constant([1]))
    shape = graph.op("Concat", rows, graph.constant([1]), axis=0)
    return graph.op("Expand", graph.constant(np.array([[value]], dtype=np.float32)), shape)


ONNX_SCORES: dict[str, Callable[[OnnxExitScores, Graph, _Exit], str]] = {
    "policy": _policy,
    "confidence": _confidence,
    "entropy": _entropy,
    "calibrated_confidence": _calibrated,
    "patience": _patience,
    "confident_patience": _confident_patience,
    "similar_patience": _similar_patience,
    "expert_sum": _expert_sum,
    "energy": _energy,
    "cap": _cap,
    "learnt_to_exit": _learnt_to_exit,
    "quantile": _quantile,
    "static": _static,
}
"""What adds a criterion's score of one layer to a graph, (rows, 1); one without a row runs layer by layer alone."""
