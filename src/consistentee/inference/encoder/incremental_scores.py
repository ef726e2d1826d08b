"""Exit scores at inference: what `criteria.py` says about all layers at once, layer by layer.

It happens on the host: the host must know who exits anyway. What every layer of every model needs is written in numpy
and stays on the calling thread; what a criterion or the signals of old policies need are the functions that training
uses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.heads.exit_signals import ExitSignals
from consistentee.heads.policy import PolicyNetwork

Floats = NDArray[np.float32]

PRODUCT_ROWS = 32
"""A product takes so many rows at a time: for more, numpy's BLAS would start threads of its own, which fight with the
backend's for the processor (12 layers of 384, batches of 128 on 2 cores: every layer half as slow again)."""

ERF_VALUES = 2048
"""Up to so many values torch's error function stays on the calling thread; its threads would do the same."""

SMALLEST = np.float32(1e-7)
"""Below it the share of all other classes does not count: float32 tells none from this next to 1."""


@dataclass
class ExitHistory:
    """What rows bring along from the layers they have passed.

    Args:
        layers: how many layers that is, those without an exit among them.
        prediction_logits: (rows, classes), the running prediction.
        layer_logits: (rows, layers, classes), those of all exits, for what reads them; else of none.
        layer_exit_probs: (rows, layers), the policy's, likewise.
    """

    layers: int
    prediction_logits: Floats
    layer_logits: Floats
    layer_exit_probs: Floats
    has_prediction: bool = False

    @classmethod
    def none_passed(cls, rows: int, classes: int) -> ExitHistory:
        """Rows before the first layer."""
        return cls(
            0,
            np.zeros((rows, classes), np.float32),
            np.zeros((rows, 0, classes), np.float32),
            np.zeros((rows, 0), np.float32),
        )

    def select(self, rows: Sequence[int]) -> ExitHistory:
        """The history of some rows."""
        return ExitHistory(
            self.layers,
            self.prediction_logits[rows],
            self.layer_logits[rows],
            self.layer_exit_probs[rows],
            self.has_prediction,
        )

    @staticmethod
    def merge(parts: Sequence[ExitHistory]) -> ExitHistory:
        """The history of several sets of rows that have passed the same layers."""
        if len(parts) == 1:
            return parts[0]
        return ExitHistory(
            parts[0].layers,
            np.concatenate([part.prediction_logits for part in parts]),
            np.concatenate([part.layer_logits for part in parts]),
            np.concatenate([part.layer_exit_probs for part in parts]),
            parts[0].has_prediction,
        )


class IncrementalExitScores:
    """Exit scores of one layer after another under one criterion.

    Args:
        criterion: one of `criteria.CRITERIA`; None: the running prediction alone, and scores of 0.
        policy: the policy network; copied.
        signals: what else the criterion reads; copied. None for a criterion that reads nothing else.
        num_classes: of the model.
        ensemble_decay: share of the layers before in the running prediction, see `ensemble_step`.
        alone: 0-based layer, the last, that speaks for itself alone and has no features but logits; None: none does.
        has_exit: (layers,), which layers have an exit; None: all.
    """

    def __init__(
        self,
        criterion: str | None,
        policy: PolicyNetwork,
        *,
        num_classes: int,
        ensemble_decay: float,
        signals: ExitSignals | None = None,
        alone: int | None = None,
        has_exit: Sequence[bool] | None = None,
    ) -> None:
        self._alone, self._has_exit = alone, has_exit
        self._row = None if criterion is None else EXIT_CRITERIA[criterion]
        self._classes, self._decay = num_classes, float(ensemble_decay)
        self._reads = () if self._row is None else self._row.reads
        self._reads_policy = self._row is not None and self._row.reads_policy
        self._keeps_layers = "layer_logits" in self._reads or (self._reads_policy and policy.reads_signals)
        self._signals = signals.on_host() if signals is not None and signals.reads else None
        self._policy = copy.deepcopy(policy).float().cpu().eval().requires_grad_(False)
        self._bias = _host(policy.exit_bias)
        self._output = _host(policy.state_output) if policy.reads_state else None
        self._policy_width = 0 if self._output is None else self._output.shape[1]
        # One weight for all layers; policies that read nine signals have functions of their own for them.
        no_signals = policy.reads_log_odds and not policy.reads_signals
        self._confidence = np.float32(policy.confidence_weight.item()) if no_signals else None

    @property
    def reads_pooled(self) -> bool:
        """Whether a step needs the pooled states."""
        return self._signals is not None and self._signals.reads_pooled

    def has_exit(self, layer_index: int) -> bool:
        """Whether a layer, from 0, has an exit; else nothing is asked of it, and rows `skip` it."""
        return self._has_exit is None or self._has_exit[layer_index]

    @staticmethod
    def skip(history: ExitHistory) -> None:
        """Take the rows past a layer that has no exit."""
        history.layers += 1

    def begin(self, rows: int) -> ExitHistory:
        """The history of rows that have passed no layer."""
        return ExitHistory.none_passed(rows, self._classes)

    def step(self, history: ExitHistory, exit_features: Floats) -> Floats:
        """Take the rows past one more layer.

        Args:
            history: of the rows; brought up to date.
            exit_features: (rows, classes + width), float32: what `heads.policy.exit_feature_map` makes of this layer;
                behind it the pooled states, where `reads_pooled`.

        Returns:
            (rows,), the exit scores of this layer: higher means readier to exit.
        """
        if history.layers == self._alone:
            history.prediction_logits = exit_features
            history.layers += 1
            return np.zeros(len(exit_features), dtype=np.float32)
        own_logits = exit_features[:, : self._classes]
        self._predict(history, own_logits)
        logits = history.prediction_logits[:, None]
        if self._keeps_layers:
            logits = history.layer_logits = np.concatenate((history.layer_logits, logits), axis=1)
        history.layers += 1
        if self._row is None:
            return np.zeros(len(logits), dtype=np.float32)
        if self._reads_policy:
            states = exit_features[:, self._classes : self._classes + self._policy_width]
            probs = self._exit_probs(history.layers - 1, states, logits)
            if self._reads == ("exit_probs",):
                return probs
            history.layer_exit_probs = np.concatenate((history.layer_exit_probs, probs[:, None]), axis=1)
        signals: dict[str, Tensor] = {}
        if self._signals is not None:
            pooled = torch.from_numpy(exit_features[:, self._classes + self._policy_width :])[:, None]
            signals = self._signals(pooled, torch.from_numpy(own_logits)[:, None], history.layers - 1)
        known = (self._known(name, history, logits, signals) for name in self._reads)
        return self._row.function(*known)[:, -1].numpy()

    def _known(
        self, name: str, history: ExitHistory, logits: Floats, signals: Mapping[str, Tensor]
    ) -> Tensor:
        """What a criterion reads by this name, (rows, layers, ...) of this layer or of all up to it."""
        if name in signals:
            return signals[name]
        if name == "layers":
            return torch.full((len(logits), 1), float(history.layers))
        return torch.from_numpy(history.layer_exit_probs if name == "layer_exit_probs" else logits)

    def _predict(self, history: ExitHistory, logits: Floats) -> None:
        """Bring the running prediction up to date, as `exits.ensemble_step` does."""
        if self._decay:
            logits = log_softmax(logits)
            if history.has_prediction:
                logits *= np.float32(1 - self._decay)
                logits += np.float32(self._decay) * history.prediction_logits
        history.prediction_logits, history.has_prediction = logits, True

    def _exit_probs(self, index: int, states: Floats, logits: Floats) -> Floats:
        """The policy's, (rows,).

        Args:
            index: of the layer.
            states: (rows, width), inputs of the hidden units.
            logits: (rows, layers, classes), of this layer and perhaps those before.
        """
        exit_logits = self._bias[index]
        if self._output is not None:
            exit_logits = exit_logits + _product(gelu(states), self._output[index])
        if self._confidence is not None:
            exit_logits = exit_logits + self._confidence * host_log_odds(logits[:, -1])
        elif (features := self._policy.features(torch.from_numpy(logits))) is not None:
            exit_logits = exit_logits + self._policy.feature_logits(features[:, -1:])[:, 0].numpy()
        # Beyond +-80 it is 0 or 1 in float32 all the same, and exp does not overflow.
        return np.reciprocal(1 + np.exp(-exit_logits.clip(-80, 80)), dtype=np.float32)


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


def labels_and_scores(
    logits: Floats, exit_layers: Sequence[int] | NDArray[np.int64]
) -> tuple[NDArray[np.int64], Floats]:
    """The likeliest class of each row and its probability: (rows, classes) to (rows,) twice.

    Args:
        logits: of the exit that each row takes.
        exit_layers: which that is, from 1.

    Raises:
        FloatingPointError: logits that are no numbers, of which any class would be the likeliest.
    """
    broken = np.flatnonzero(~is_answer(logits))
    if len(broken):
        raise FloatingPointError(
            f"logits must be numbers, got NaN or infinity at layer {exit_layers[broken[0]]}, for {len(broken)} of "
            f"{len(logits)} texts. Check the model's weights, or load it in float32."
        )
    labels = logits.argmax(1)
    return labels, np.exp(log_softmax(logits)[np.arange(len(logits)), labels])


def is_answer(logits: Floats) -> NDArray[np.bool_]:
    """Whether logits name a class: (rows, classes) to (rows,)."""
    return np.isfinite(logits.max(1))


def host_log_odds(logits: Floats) -> Floats:
    """Log-odds of the predicted class as `exits.log_odds` has them, (rows, classes) to (rows,)."""
    probability = np.reciprocal(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
    rest = np.maximum(1 - probability, SMALLEST)
    return np.log(probability / rest).clip(-10, 10)  # a probability is at least 1 / classes


def _host(parameter: Tensor) -> Floats:
    return parameter.detach().float().cpu().numpy().copy()
