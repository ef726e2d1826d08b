"""Exit scores at inference: what `criteria.py` says about all layers at once, layer by layer.

The signals of `exits.classifier_signals` look back at every layer passed. Computed anew at each layer that is more
work at each layer; here every row carries what the next layer needs, and a layer's score costs the same at any depth.
It happens on the host, in numpy: the host must know who exits anyway, and for one row a dozen numpy calls take a
quarter of the time of as many tensor operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.functional.exits import LOG_ODDS_SCALE, NUM_SIGNALS, SIGNAL_NAMES
from consistentee.heads.policy import PolicyNetwork

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
TINY = np.float32(1e-7)
LOG_ODDS = SIGNAL_NAMES.index("log_odds")
NUM_TERMS = NUM_SIGNALS + 1  # and a constant

FEW_ROWS = 6
"""Up to so many rows are quicker in plain numbers: between two layers, which sweep the caches, each of some forty calls
of numpy takes 5 us, and a loop's second row finds everything warm."""

PRODUCT_ROWS = 32
"""A product takes so many rows at a time: for more, numpy's BLAS would start threads of its own, which fight with the
backend's for the processor (12 layers of 384, batches of 128 on 2 cores: every layer half as slow again)."""

ERF_VALUES = 2048
"""Up to so many values torch's error function stays on the calling thread; its threads would do the same."""

VOTES, LAST_PROBABILITIES, PROBABILITY_SUMS = 0, 1, 2


@dataclass
class ExitHistory:
    """What rows bring along from the layers they have passed; every array has one row for each input.

    Args:
        layers: how many layers that is.
        prediction_logits: (rows, classes), the running prediction.
        layer_logits: (rows, layers, classes), those of all layers, for criteria that read them; else of none.
        passed: (rows, 3, classes): how many layers predicted the class, its probability at the last layer, and the sum
            of its probabilities.
        last_prediction: (rows,), class predicted at the last layer.
        streak: (rows,), layers in a row that predicted it.
    """

    layers: int
    prediction_logits: Floats
    layer_logits: Floats
    passed: Floats
    last_prediction: Ints
    streak: Ints

    @classmethod
    def none_passed(cls, rows: int, classes: int) -> ExitHistory:
        """Rows before the first layer."""
        logits = np.zeros((rows, classes), dtype=np.float32)
        no_layers = np.zeros((rows, 0, classes), dtype=np.float32)
        passed = np.zeros((rows, 3, classes), dtype=np.float32)
        last_prediction, streak = np.full(rows, -1, dtype=np.int64), np.zeros(rows, dtype=np.int64)
        return cls(0, logits, no_layers, passed, last_prediction, streak)

    def select(self, rows: Sequence[int]) -> ExitHistory:
        """The history of some rows."""
        return ExitHistory(self.layers, *(array[rows] for array in self._arrays()))

    @staticmethod
    def merge(parts: Sequence[ExitHistory]) -> ExitHistory:
        """The history of several sets of rows that have passed the same layers."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part._arrays() for part in parts), strict=True)
        return ExitHistory(parts[0].layers, *(np.concatenate(column) for column in columns))

    def _arrays(self) -> tuple[Any, ...]:
        return self.prediction_logits, self.layer_logits, self.passed, self.last_prediction, self.streak


class IncrementalExitScores:
    """Exit scores of one layer after another under one criterion.

    Args:
        criterion: one of `criteria.CRITERIA`; None: the running prediction alone, and scores of 0.
        policy: the policy network.
        num_layers, num_classes: of the model.
        ensemble_decay: share of the layers before in the running prediction, see `ensemble_step`.
    """

    def __init__(
        self,
        criterion: str | None,
        policy: PolicyNetwork,
        *,
        num_layers: int,
        num_classes: int,
        ensemble_decay: float,
    ) -> None:
        self.criterion = criterion
        self._row = None if criterion is None else EXIT_CRITERIA[criterion]
        self._is_policy = self._row is not None and self._row.reads == ("exit_probs",)
        self._classes = num_classes
        self._decay = float(ensemble_decay)
        self._reads_state = "state" in policy.policy_input
        self._reads_signals = policy.needs_signals
        outputs: list[Floats] = []  # of the hidden layers, (layers, width) each
        self._terms: Floats = np.zeros(
            (num_layers, NUM_TERMS), dtype=np.float32
        )  # the exit logit's linear part
        self._terms[:, NUM_SIGNALS] = _host(policy.exit_bias)
        if self._reads_state:
            outputs.append(_host(policy.state_output))
        if self._reads_signals:
            outputs.append(_host(policy.signal_output.weight).repeat(num_layers, axis=0))
            hidden = [_host(policy.signal_hidden.weight), _host(policy.signal_hidden.bias)[:, None]]
            self._hidden: Floats = np.ascontiguousarray(
                np.concatenate(hidden, axis=1).T
            )  # (NUM_TERMS, width)
            self._terms[:, LOG_ODDS] = policy.confidence_weight.item() * LOG_ODDS_SCALE
            self._terms[:, NUM_SIGNALS] += policy.signal_output.bias.item()
        self._output = np.concatenate(outputs, axis=1)

    def begin(self, rows: int) -> ExitHistory:
        """The history of rows that have passed no layer."""
        return ExitHistory.none_passed(rows, self._classes)

    def step(self, history: ExitHistory, exit_features: Floats) -> Floats:
        """Take the rows past one more layer.

        Args:
            history: of the rows; brought up to date.
            exit_features: (rows, classes + width), float32: what `heads.policy.exit_feature_map` makes of this layer.

        Returns:
            (rows,), the exit scores of this layer: higher means readier to exit.
        """
        if self._is_policy and self._reads_signals and len(exit_features) <= FEW_ROWS:
            return self._step_of_few(history, exit_features)
        self._predict(history, exit_features[:, : self._classes])
        if self._is_policy:
            return self._policy_scores(history, exit_features[:, self._classes :])
        history.layers += 1
        logits = history.prediction_logits
        if self._row is None:
            return np.zeros(len(logits), dtype=np.float32)
        if self._row.reads == ("logits",):
            return self._row.function(torch.from_numpy(logits)).numpy()
        history.layer_logits = np.concatenate((history.layer_logits, logits[:, None]), axis=1)
        return self._row.function(torch.from_numpy(history.layer_logits))[:, -1].numpy()

    def _predict(self, history: ExitHistory, logits: Floats) -> None:
        """Bring the running prediction up to date, as `model.ensemble_step` does."""
        if self._decay:
            logits = log_softmax(logits)
            if history.layers:
                logits *= np.float32(1 - self._decay)
                logits += np.float32(self._decay) * history.prediction_logits
        history.prediction_logits = logits

    def _policy_scores(self, history: ExitHistory, states: Floats) -> Floats:
        index = history.layers
        if not self._reads_signals:
            history.layers += 1
            exit_logits = _product(gelu(states), self._output[index]) + self._terms[index, NUM_SIGNALS]
        else:
            terms = _terms(history)
            hidden = _product(terms, self._hidden)
            if self._reads_state:
                hidden = np.concatenate([states, hidden], axis=1)
            exit_logits = _product(gelu(hidden), self._output[index]) + _product(terms, self._terms[index])
        # Beyond +-80 it is 0 or 1 in float32 all the same, and exp does not overflow.
        return np.reciprocal(1 + np.exp(-exit_logits.clip(-80, 80)), dtype=np.float32)

    def _step_of_few(self, history: ExitHistory, exit_features: Floats) -> Floats:
        """As `step`, row by row in plain numbers."""
        index = history.layers
        terms = _terms_of_few(history, exit_features[:, : self._classes].tolist(), self._decay)
        hidden = terms @ self._hidden
        if self._reads_state:
            hidden = np.concatenate((exit_features[:, self._classes :], hidden), axis=1)
        exit_logits = (gelu(hidden) @ self._output[index] + terms @ self._terms[index]).tolist()
        scores = [1 / (1 + math.exp(min(max(-exit_logit, -80.0), 80.0))) for exit_logit in exit_logits]
        return np.array(scores, dtype=np.float32)


def _product(rows: Floats, weight: Floats) -> Floats:
    """The matrix product, on one thread."""
    if len(rows) <= PRODUCT_ROWS:
        return rows @ weight
    return np.concatenate(
        [rows[start : start + PRODUCT_ROWS] @ weight for start in range(0, len(rows), PRODUCT_ROWS)]
    )


def gelu(values: Floats) -> Floats:
    """GELU, `x * Phi(x)`, of float32 values of any shape, on one thread."""
    scaled = values * np.float32(math.sqrt(0.5))
    if scaled.size <= ERF_VALUES:
        erf = torch.erf(torch.from_numpy(scaled)).numpy()
    else:
        parts = torch.from_numpy(scaled).flatten().split(ERF_VALUES)
        erf = torch.cat([torch.erf(part) for part in parts]).numpy().reshape(values.shape)
    erf += 1
    erf *= values
    erf *= np.float32(0.5)
    return erf


def log_softmax(logits: Floats) -> Floats:
    """(rows, classes) to (rows, classes)."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _terms(history: ExitHistory) -> Floats:
    """The last row of `exits.classifier_signals` for each input, and a constant 1; takes the rows past the layer.

    Returns:
        (rows, NUM_TERMS).
    """
    logits = history.prediction_logits
    rows, classes = logits.shape
    every = np.arange(rows)
    passed = history.layers
    prediction = logits.argmax(1)
    top_logit = logits.max(1)
    shifted = logits - top_logit[:, None]
    probabilities = np.exp(shifted)
    sums = probabilities.sum(1)
    log_sum = np.log(sums)
    probabilities /= sums[:, None]
    best = np.reciprocal(sums)
    rest = 1 - best
    second = rest if classes == 2 else np.partition(probabilities, classes - 2, axis=1)[:, classes - 2]
    log_odds = np.log(np.maximum(rest, TINY))  # of the rest; log_sum is that of the best, negative
    terms = np.ones((rows, NUM_TERMS), dtype=np.float32)
    terms[:, 0] = (-log_sum - log_odds).clip(-10, 10) / LOG_ODDS_SCALE
    terms[:, 1] = best - second
    terms[:, 2] = (log_sum - (probabilities * shifted).sum(1)) / math.log(classes)
    terms[:, 3] = (top_logit + log_sum) / 10
    if passed:
        before = history.passed[every, :, prediction]  # (rows, 3)
        terms[:, 4] = before[:, VOTES] / passed
        terms[:, 6] = before[:, LAST_PROBABILITIES]
        terms[:, 7] = before[:, PROBABILITY_SUMS] / passed
    else:
        terms[:, 6] = terms[:, 7] = best
    _count(history, prediction)
    history.passed[every, VOTES, prediction] += 1
    history.passed[:, LAST_PROBABILITIES] = probabilities
    history.passed[:, PROBABILITY_SUMS] += probabilities
    terms[:, 5] = history.streak / (passed + 1)
    terms[:, 8] = (passed + 1) / 12
    return terms


def _terms_of_few(history: ExitHistory, logits: list[list[float]], decay: float) -> Floats:
    """As `_predict` and `_terms`, given the classifier's logits, (rows, NUM_TERMS)."""
    count = history.layers
    before = history.prediction_logits.tolist() if decay and count else None
    passed, streaks, last = history.passed.tolist(), history.streak.tolist(), history.last_prediction.tolist()
    terms: list[tuple[float, ...]] = []
    tiny, scale, depth = float(TINY), math.log(len(logits[0])), (count + 1) / 12
    for row, values in enumerate(logits):
        if decay:
            top = max(values)
            log_sum = top + math.log(sum([math.exp(value - top) for value in values]))
            values = [value - log_sum for value in values]
            if before is not None:
                values = [
                    decay * old + (1 - decay) * new for old, new in zip(before[row], values, strict=True)
                ]
            logits[row] = values
        top = max(values)
        prediction = values.index(top)
        shifted = [value - top for value in values]
        powers = [math.exp(value) for value in shifted]
        total = sum(powers)
        log_sum = math.log(total)
        probabilities = [power / total for power in powers]
        best = 1 / total
        second = max(probabilities[:prediction] + probabilities[prediction + 1 :])
        entropy = log_sum - sum([p * value for p, value in zip(probabilities, shifted, strict=True)])
        # In float32 as everywhere: what is left beside a probability near 1 is coarse there, and the signal with it.
        log_odds = -log_sum - math.log(max(float(1 - np.float32(best)), tiny))
        votes, last_probabilities, sums = passed[row]
        agreement, previous, mean = 1.0, best, best
        if count:
            agreement, previous = votes[prediction] / count, last_probabilities[prediction]
            mean = sums[prediction] / count
        streaks[row] = streaks[row] + 1 if prediction == last[row] else 1
        last[row] = prediction
        votes[prediction] += 1
        passed[row] = [
            votes,
            probabilities,
            [old + new for old, new in zip(sums, probabilities, strict=True)],
        ]
        terms.append(
            (
                min(max(log_odds, -10.0), 10.0) / LOG_ODDS_SCALE,
                best - second,
                entropy / scale,
                (top + log_sum) / 10,
                agreement,
                streaks[row] / (count + 1),
                previous,
                mean,
                depth,
                1.0,
            )
        )
    history.prediction_logits = np.array(logits, dtype=np.float32)
    history.passed = np.array(passed, dtype=np.float32)
    history.streak, history.last_prediction = np.array(streaks), np.array(last)
    history.layers += 1
    return np.array(terms, dtype=np.float32)


def _count(history: ExitHistory, prediction: Ints) -> None:
    """Count a layer that predicts these classes."""
    history.streak = np.where(prediction == history.last_prediction, history.streak + 1, 1)
    history.last_prediction = prediction
    history.layers += 1


def _host(parameter: Tensor) -> Floats:
    return parameter.detach().float().cpu().numpy().copy()
