"""When an instance exits: the exit criteria of classifiers and text generators, one row each of the table at the end.

A criterion gives one *exit score* per layer, higher = readier to exit. A row or a token exits at the first layer whose
score exceeds the threshold, and at the last layer in any case. Training, engines, decoding, evaluation and the command
line know criteria by their rows only: to add one, write its function and its row, and put its name into `config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consistentee.functional.exits import prediction_streak
from consistentee.functional.tables import (
    BOTH_TASKS,
    CLASSIFICATION,
    GENERATION,
    Formula,
    names_of,
    row_of,
    value_of,
)


def policy_scores(exit_probs: Tensor) -> Tensor:
    """Exit score of the trained policy: its exit probability, (...) in [0, 1].

    Source: ConsistentEE (arXiv:2312.11882); the paper's threshold is 0.5.
    """
    return exit_probs


def confidence_scores(logits: Tensor) -> Tensor:
    """Largest class probability of an exit: (..., classes) -> (...), in [1 / classes, 1]."""
    return logits.float().softmax(-1).amax(-1)


def entropy_scores(logits: Tensor) -> Tensor:
    """One minus the normalised entropy of an exit, so that higher means surer: (..., classes) -> (...), in [0, 1].

    Source: DeeBERT (arXiv:2004.12993) and FastBERT (arXiv:2004.02178); ours is 1 - FastBERT's "speed" uncertainty.
    """
    log_probs = logits.float().log_softmax(-1)
    return 1 + (log_probs.exp() * log_probs).sum(-1) / torch.log(torch.tensor(float(logits.shape[-1])))


def patience_scores(layer_logits: Tensor) -> Tensor:
    """Length of the run of equal predictions; a threshold of p - 0.5 waits for a run of p layers.

    Args:
        layer_logits: (batch, layers, classes), from the first layer on.

    Returns:
        (batch, layers), floats from 1 to layers.

    Source: PABEE (arXiv:2006.04152). Their counter starts at 0 with the first prediction, ours at 1.
    """
    return prediction_streak(layer_logits.argmax(-1)).float()


def softmax_margin_scores(logits: Tensor) -> Tensor:
    """Difference of the two largest probabilities: (..., vocabulary) -> (...), in [0, 1].

    Needs the LM head at every layer, which in a small model costs as much as several layers.

    Source: CALM (arXiv:2207.07061), "softmax response".

    Example:
        >>> softmax_margin_scores(torch.tensor([[0.0, 0.0, -100.0]]))
        tensor([0.])
    """
    top = logits.float().topk(2, dim=-1).values
    normaliser = logits.float().logsumexp(-1)
    return (top[..., 0] - normaliser).exp() - (top[..., 1] - normaliser).exp()


def state_similarity_scores(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of the states before and after a layer: (..., hidden) twice -> (...), in [-1, 1].

    Source: CALM (arXiv:2207.07061), "hidden-state saturation"; the ConsistentEE release uses 0.975 as its threshold.
    """
    return torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)


def agreement_scores(agreement_probs: Tensor) -> Tensor:
    """What a linear classifier of its own says about whether an exit gives the last layer's token, (...) in [0, 1].

    Source: CALM (arXiv:2207.07061), "early-exit classifier".
    """
    return agreement_probs


def static_scores(layers: Any) -> Any:
    """Half a layer more than the number of layers executed, a number or (...), so that `>` means "at least"."""
    return layers + 0.5


@dataclass(frozen=True)
class Thresholds:
    """What thresholds a criterion takes.

    Attributes:
        low, high: the least and the highest; no score exceeds the highest.
        layers: what thresholds count, where they are numbers of layers; there is no highest then.
        above_low: whether `low` itself is left out.
    """

    low: float = 0.0
    high: float = 1.0
    layers: str = ""
    above_low: bool = False

    def check(self, threshold: float, criterion: str) -> float:
        """The threshold as a float.

        Raises:
            ValueError: it is out of range.
        """
        value = float(threshold)
        if self.layers:
            if not (value > self.low if self.above_low else value >= self.low):
                rule = f"{'above' if self.above_low else 'at least'} {self.low:g}"
                raise ValueError(
                    f"threshold must be {rule} for {criterion} ({self.layers}), got {threshold}."
                )
        elif not self.low <= value <= self.high:
            raise ValueError(
                f"threshold must be in [{self.low:g}, {self.high:g}] for {criterion}, got {threshold}."
            )
        return value

    def whole(self, num_layers: int) -> list[float]:
        """Numbers of layers that make a difference, ascending: from "all exit at once" to "none exits early"."""
        return [self.low + (0.5 if self.above_low else 0) + count for count in range(num_layers)]

    def highest(self, num_layers: int) -> float:
        """A threshold that no score exceeds before the last layer."""
        return self.whole(num_layers)[-1] if self.layers else self.high

    def lets_nobody_exit(self, threshold: float, num_layers: int) -> bool:
        """Whether no score can exceed a threshold before the last layer."""
        return threshold >= self.highest(num_layers) - (0.5 if self.layers else 0)


@dataclass(frozen=True, kw_only=True)
class ExitCriterion(Formula):
    """A row of `EXIT_CRITERIA`. Its function gives exit scores of one layer or of several at once.

    What `reads` may hold; shapes are (instances, ...) or (instances, layers, ...) alike:
        `exit_probs`: the policy's conditional exit probabilities, (...).
        `logits`: of the exit, (..., classes or vocabulary).
        `layer_logits`: of all exits from the first on, (instances, layers, classes); scores of all of them come back.
        `before`, `after`: hidden states around the layer, (..., hidden).
        `agreement_probs`: of CALM's classifier, (...).
        `layers`: how many layers were executed, (...).

    Attributes:
        thresholds: what thresholds it takes.
        first_layer: the first layer, from 1, that an instance may exit at.
    """

    thresholds: Thresholds = Thresholds()
    first_layer: int = 1

    @property
    def is_static(self) -> bool:
        """Whether only the number of layers counts; `min_exit_layer` is then not asked for."""
        return self.reads == ("layers",)

    def first_exit_layer(self, min_exit_layer: int) -> int:
        """The first layer, from 1, that an instance may exit at where the model has a least one."""
        return self.first_layer if self.is_static else max(self.first_layer, min_exit_layer)


EXIT_CRITERIA: dict[str, ExitCriterion] = {
    "policy": ExitCriterion(
        function=policy_scores,
        reads=("exit_probs",),
        tasks=BOTH_TASKS,
        source="ConsistentEE (arXiv:2312.11882)",
        relation="Trained to exit where it pays; an untrained one that reads the log-odds is `confidence`.",
    ),
    "confidence": ExitCriterion(
        function=confidence_scores,
        reads=("logits",),
        tasks=(CLASSIFICATION,),
        source="the simplest criterion; the baseline of most papers",
        relation="For two classes the same order as `entropy`.",
    ),
    "entropy": ExitCriterion(
        function=entropy_scores,
        reads=("logits",),
        tasks=(CLASSIFICATION,),
        source="DeeBERT (arXiv:2004.12993), FastBERT (arXiv:2004.02178)",
        relation="As `confidence`, but all classes count.",
    ),
    "patience": ExitCriterion(
        function=patience_scores,
        reads=("layer_logits",),
        tasks=(CLASSIFICATION,),
        thresholds=Thresholds(0.0, layers="layers in agreement", above_low=True),
        source="PABEE (arXiv:2006.04152)",
        relation="Looks at the predictions of several layers, and not at how sure they are.",
    ),
    "softmax_margin": ExitCriterion(
        function=softmax_margin_scores,
        reads=("logits",),
        tasks=(GENERATION,),
        source='CALM (arXiv:2207.07061), "softmax response"',
        relation="What `confidence` is for few classes; the dearest of all, it needs the LM head at every layer.",
    ),
    "state_similarity": ExitCriterion(
        function=state_similarity_scores,
        reads=("before", "after"),
        tasks=(GENERATION,),
        thresholds=Thresholds(-1.0, 1.0),
        first_layer=2,  # the first layer turns an embedding into a state
        source='CALM (arXiv:2207.07061), "hidden-state saturation"',
        relation="Nothing is trained, and no head is needed; the cheapest.",
    ),
    "confidence_classifier": ExitCriterion(
        function=agreement_scores,
        reads=("agreement_probs",),
        tasks=(GENERATION,),
        source='CALM (arXiv:2207.07061), "early-exit classifier"',
        relation="As cheap as `policy`, but trained to foretell agreement with the last layer, whatever it costs.",
    ),
    "static": ExitCriterion(
        function=static_scores,
        reads=("layers",),
        tasks=(GENERATION,),
        thresholds=Thresholds(1.0, layers="layers to run"),
        source="a smaller model",
        relation="What all others have to beat: the same depth for every token.",
    ),
}
CRITERIA = names_of(EXIT_CRITERIA, CLASSIFICATION)
GENERATION_CRITERIA = names_of(EXIT_CRITERIA, GENERATION)


def exit_scores(criterion: str, layer_logits: Tensor, exit_probs: Tensor | None) -> Tensor:
    """Exit score of every layer of a classifier under a criterion, (batch, layers).

    Args:
        criterion: one of `CRITERIA`.
        layer_logits: (batch, layers, classes), or a prefix of the layers.
        exit_probs: (batch, layers), needed by `policy` only.

    Raises:
        ValueError: if the criterion is unknown, or `policy` is asked for without `exit_probs`.
    """
    row = row_of(EXIT_CRITERIA, criterion, "criterion", CLASSIFICATION)
    known = {"logits": layer_logits, "layer_logits": layer_logits, "exit_probs": exit_probs}
    return value_of(row, f'criterion "{criterion}"', known)


def check_threshold(threshold: float, criterion: str = "policy", task: str | None = None) -> float:
    """Return the threshold as a float, or raise if the criterion cannot use it.

    Args:
        threshold: to check.
        criterion: whose threshold it is.
        task: whose criteria there are; None takes those of both tasks.

    Raises:
        ValueError: an unknown criterion, or a threshold out of its range.
    """
    return row_of(EXIT_CRITERIA, criterion, "criterion", task).thresholds.check(threshold, criterion)
