"""Exit decisions at inference: what `exits.py` says about all layers at once, carried from layer to layer.

The signals of `exits.classifier_signals` look back at every layer passed. Computed anew at each layer that is more
work at each layer; here every row carries the figures that the next layer needs, and a layer's decision costs the same
at any depth. It happens on the host, in numpy: the host must know who leaves anyway, and for one row a dozen numpy
calls take a quarter of the time of as many tensor operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consistentee.exits import LOG_ODDS_SCALE
from consistentee.model import EarlyExitForSequenceClassification

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
TINY = np.float32(1e-7)
ERF = tuple(np.float32(c) for c in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))

PRODUCT_ROWS = 32
"""A product takes so many rows at a time: for more, numpy's BLAS would start threads of its own, which fight with the
backend's for the processor (12 layers of 384, batches of 128 on 2 cores: every layer half as slow again). torch's
threads would do the same to another backend's, so that nothing here is left to torch."""


@dataclass
class RowFigures:
    """What a row brings along from the layers it has passed; every array has one row for each input.

    Args:
        layers: how many layers that is.
        prediction_logits: (rows, classes), the running prediction.
        probability_sums: (rows, classes), sums of the layers' probabilities.
        votes: (rows, classes), how many layers predicted the class.
        last_probabilities: (rows, classes), those of the last layer.
        last_prediction: (rows,), class predicted there.
        streak: (rows,), layers in a row that predicted it.
    """

    layers: int
    prediction_logits: Floats
    probability_sums: Floats
    votes: Floats
    last_probabilities: Floats
    last_prediction: Ints
    streak: Ints

    @classmethod
    def none_passed(cls, rows: int, classes: int) -> RowFigures:
        """Rows before the first layer."""
        zeros = [np.zeros((rows, classes), dtype=np.float32) for _ in range(4)]
        no_class = np.full(rows, -1, dtype=np.int64)
        return cls(0, zeros[0], zeros[1], zeros[2], zeros[3], no_class, np.zeros(rows, dtype=np.int64))

    def select(self, rows: Sequence[int]) -> RowFigures:
        """The figures of some rows."""
        return RowFigures(self.layers, *(array[rows] for array in self._arrays()))

    @staticmethod
    def merge(parts: Sequence[RowFigures]) -> RowFigures:
        """The figures of several sets of rows that have passed the same layers."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part._arrays() for part in parts), strict=True)
        return RowFigures(parts[0].layers, *(np.concatenate(column) for column in columns))

    def _arrays(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self) if field.name != "layers"]


class ExitDecisions:
    """Exit scores of one layer after another under one criterion.

    Args:
        model: gives the ensemble's decay and the policy network.
        criterion: `policy`, `confidence`, `entropy` or `patience`.
    """

    def __init__(self, model: EarlyExitForSequenceClassification, criterion: str) -> None:
        self.criterion = criterion
        self._decay = np.float32(model.config.ensemble_decay)
        self._on_host = model.device.type == "cpu"
        policy: Any = model.policy
        self._exit_bias: Floats = _host(policy.exit_bias)
        self._reads_state = criterion == "policy" and "state" in policy.policy_input
        self._reads_signals = criterion == "policy" and policy.needs_signals
        outputs: list[Floats] = []  # of the hidden layers, (layers, width) each
        self._output_bias = np.float32(0)
        if self._reads_state:
            weights = policy.state_weight.detach().float()
            weights = _host(weights) if self._on_host else weights
            self._state: list[tuple[Any, Floats]] = list(zip(weights, _host(policy.state_bias), strict=True))
            outputs.append(_host(policy.state_output))
        if self._reads_signals:
            self._hidden: Floats = np.ascontiguousarray(_host(policy.signal_hidden.weight).T)
            self._hidden_bias = _host(policy.signal_hidden.bias)
            outputs.append(_host(policy.signal_output.weight).repeat(model.num_layers, axis=0))
            self._output_bias = np.float32(policy.signal_output.bias.item())
            self._confidence_weight = np.float32(policy.confidence_weight.item())
        self._output = np.concatenate(outputs, axis=1) if outputs else np.empty((model.num_layers, 0))

    def begin(self, rows: int, classes: int) -> RowFigures:
        """Figures of rows that have passed no layer."""
        return RowFigures.none_passed(rows, classes)

    def step(self, figures: RowFigures, pooled: Tensor, classifier_logits: Tensor) -> Floats:
        """Take the rows past one more layer.

        Args:
            figures: of the rows; brought up to date.
            pooled: (rows, hidden), float32, on the model's device.
            classifier_logits: (rows, classes), float32.

        Returns:
            (rows,), the exit scores of this layer: higher means readier to leave.
        """
        logits: Floats = classifier_logits.cpu().numpy()
        if self._decay:  # `model.ensemble_step`
            logits = log_softmax(logits)
            if figures.layers:
                logits = self._decay * figures.prediction_logits + (1 - self._decay) * logits
        figures.prediction_logits = logits
        if self.criterion == "policy":
            return self._policy_scores(figures, pooled)
        if self.criterion == "patience":
            _pass_layer(figures, None, logits.argmax(1))
            return figures.streak.astype(np.float32)
        figures.layers += 1
        log_probabilities = log_softmax(logits)
        if self.criterion == "confidence":
            return np.exp(log_probabilities.max(1))
        entropy = (np.exp(log_probabilities) * log_probabilities).sum(1)
        return (1 + entropy / math.log(logits.shape[1])).astype(np.float32)

    def _policy_scores(self, figures: RowFigures, pooled: Tensor) -> Floats:
        index = figures.layers
        signals: Floats | None = None
        if self._reads_signals:
            signals = _signals_of_one(figures) if len(figures.streak) == 1 else _signals(figures)
        else:
            figures.layers += 1
        exit_logits = self._exit_bias[index] + self._branches(index, pooled, signals)
        if signals is not None:
            exit_logits = exit_logits + self._confidence_weight * LOG_ODDS_SCALE * signals[:, 0]
        # Beyond +-80 it is 0 or 1 in float32 all the same, and exp does not overflow.
        return np.reciprocal(1 + np.exp(-exit_logits.clip(-80, 80)), dtype=np.float32)

    def _branches(self, index: int, pooled: Tensor, signals: Floats | None) -> Floats:
        """(rows,), what the policy's hidden layers on state and signals add to the exit logits, in one go."""
        hidden: list[Floats] = []
        if self._reads_state:
            weight, bias = self._state[index]
            states = (
                _product(pooled.numpy(), weight) if self._on_host else torch.mm(pooled, weight).cpu().numpy()
            )
            hidden.append(states + bias)
        if signals is not None:
            hidden.append(_product(signals, self._hidden) + self._hidden_bias)
        both = hidden[0] if len(hidden) == 1 else np.concatenate(hidden, axis=1)
        return _product(gelu(both), self._output[index]) + self._output_bias


def _product(rows: Floats, weight: Floats) -> Floats:
    """The matrix product, on one thread."""
    if len(rows) <= PRODUCT_ROWS:
        return rows @ weight
    return np.concatenate(
        [rows[start : start + PRODUCT_ROWS] @ weight for start in range(0, len(rows), PRODUCT_ROWS)]
    )


def gelu(values: Floats) -> Floats:
    """GELU, `x * Phi(x)`, to the last digits of float32.

    Source: the error function by Abramowitz and Stegun, formula 7.1.26, off by at most 1.5e-7.
    """
    scaled = np.abs(values) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * scaled)
    polynomial = t * (ERF[0] + t * (ERF[1] + t * (ERF[2] + t * (ERF[3] + t * ERF[4]))))
    tail = np.float32(0.5) * polynomial * np.exp(-scaled * scaled)  # 1 - Phi(|x|)
    return values * np.where(values < 0, tail, 1 - tail)


def log_softmax(logits: Floats) -> Floats:
    """(rows, classes) to (rows, classes)."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _signals(figures: RowFigures) -> Floats:
    """The last row of `exits.classifier_signals` for each input, (rows, NUM_SIGNALS); takes the rows past the layer."""
    logits = figures.prediction_logits
    rows, classes = logits.shape
    every = np.arange(rows)
    passed = figures.layers
    top_logit = logits.max(1)
    shifted = logits - top_logit[:, None]
    log_sum = np.log(np.exp(shifted).sum(1))
    log_probabilities = shifted - log_sum[:, None]
    probabilities = np.exp(log_probabilities)
    prediction = logits.argmax(1)
    best = probabilities[every, prediction]
    second = np.partition(probabilities, classes - 2, axis=1)[:, classes - 2]
    log_odds = np.log(np.maximum(best, TINY)) - np.log(np.maximum(1 - best, TINY))
    signals = np.empty((rows, 9), dtype=np.float32)
    signals[:, 0] = log_odds.clip(-10, 10) / LOG_ODDS_SCALE
    signals[:, 1] = best - second
    signals[:, 2] = -(probabilities * log_probabilities).sum(1) / math.log(classes)
    signals[:, 3] = (top_logit + log_sum) / 10
    if passed:
        signals[:, 4] = figures.votes[every, prediction] / passed
        signals[:, 6] = figures.last_probabilities[every, prediction]
        signals[:, 7] = figures.probability_sums[every, prediction] / passed
    else:
        signals[:, 4] = 1
        signals[:, 6] = signals[:, 7] = best
    _pass_layer(figures, probabilities, prediction)
    signals[:, 5] = figures.streak / (passed + 1)
    signals[:, 8] = (passed + 1) / 12
    return signals


def _signals_of_one(figures: RowFigures) -> Floats:
    """As `_signals` for a single row, (1, NUM_SIGNALS), in plain numbers: thirty numpy calls would take longer."""
    logits = figures.prediction_logits[0].tolist()
    top_logit = max(logits)
    prediction = logits.index(top_logit)
    powers = [math.exp(logit - top_logit) for logit in logits]
    log_sum = math.log(sum(powers))
    log_probabilities = [logit - top_logit - log_sum for logit in logits]
    probabilities = [math.exp(value) for value in log_probabilities]
    best = probabilities[prediction]
    second = max(value for label, value in enumerate(probabilities) if label != prediction)
    entropy = -sum(p * log_p for p, log_p in zip(probabilities, log_probabilities, strict=True))
    # In float32 as everywhere: what is left beside a probability near 1 is coarse there, and the signal with it.
    rest = max(float(1 - np.float32(best)), float(TINY))
    log_odds = math.log(max(best, float(TINY))) - math.log(rest)
    passed = figures.layers
    votes, sums, last = figures.votes[0], figures.probability_sums[0], figures.last_probabilities[0]
    before = (
        (votes[prediction] / passed, last[prediction], sums[prediction] / passed)
        if passed
        else (1, best, best)
    )
    streak = int(figures.streak[0]) + 1 if prediction == int(figures.last_prediction[0]) else 1
    votes[prediction] += 1
    sums += probabilities
    last[:] = probabilities
    figures.streak[0], figures.last_prediction[0] = streak, prediction
    figures.layers += 1
    agreement, previous_probability, mean_probability = before
    signals = (
        min(max(log_odds, -10), 10) / LOG_ODDS_SCALE,
        best - second,
        entropy / math.log(len(logits)),
        (top_logit + log_sum) / 10,
        agreement,
        streak / (passed + 1),
        previous_probability,
        mean_probability,
        (passed + 1) / 12,
    )
    return np.array([signals], dtype=np.float32)


def _pass_layer(figures: RowFigures, probabilities: Floats | None, prediction: Ints) -> None:
    """Count a layer that predicts these classes."""
    figures.streak = np.where(prediction == figures.last_prediction, figures.streak + 1, 1)
    figures.last_prediction = prediction
    figures.layers += 1
    if probabilities is not None:
        figures.votes[np.arange(len(prediction)), prediction] += 1
        figures.probability_sums += probabilities
        figures.last_probabilities = probabilities


def _host(parameter: Tensor) -> Floats:
    return parameter.detach().float().cpu().numpy().copy()
