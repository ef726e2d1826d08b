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

from consistentee.functional.signals import (
    agreement_scores,
    calibrated_confidence_scores,
    cap_scores,
    confidence_scores,
    confident_patience_scores,
    energy_scores,
    entropy_scores,
    expert_sum_scores,
    learnt_to_exit_scores,
    patience_scores,
    policy_scores,
    quantile_scores,
    similar_patience_scores,
    softmax_margin_scores,
    state_similarity_scores,
    static_scores,
)
from consistentee.functional.tables import (
    BOTH_TASKS,
    CLASSIFICATION,
    GENERATION,
    Formula,
    names_of,
    row_of,
    value_of,
)


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
        `layer_exit_probs`: those of all layers from the first on, (instances, layers); scores of all come back.
        `logits`: of the exit, (..., classes or vocabulary).
        `layer_logits`: of all exits from the first on, (instances, layers, classes); scores of all of them come back.
        `classifier_logits`: the exit's own, before they are mixed with those of the layers before, (..., classes).
        `temperatures`: of the exit, (...), fitted.
        `layer_weights`: of all exits from the first on, (instances, layers), fitted or by depth.
        `right_probs`: that the exit is right, (...), by a fitted network.
        `null_shares`: share of the pooled state that the exit's classifier does not see, (...).
        `before`, `after`: hidden states around the layer, (..., hidden).
        `agreement_probs`: of CALM's classifier, (...).
        `layers`: how many layers were executed, (...).

    Attributes:
        thresholds: what thresholds it takes.
        first_layer: the first layer, from 1, that an instance may exit at.
        fitted: the field of a classifier's configuration that says whether there is what it reads; "" where nothing is
            fitted for it.
    """

    thresholds: Thresholds = Thresholds()
    first_layer: int = 1
    fitted: str = ""

    @property
    def reads_policy(self) -> bool:
        """Whether it reads nothing but the policy's exit probabilities."""
        return self.reads in (("exit_probs",), ("layer_exit_probs",))

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
    "calibrated_confidence": ExitCriterion(
        function=calibrated_confidence_scores,
        reads=("logits", "temperatures"),
        tasks=(CLASSIFICATION,),
        fitted="temperatures",
        source='"The Right Tool" (arXiv:2004.07453)',
        relation="`confidence` that means the same at every layer.",
    ),
    "patience": ExitCriterion(
        function=patience_scores,
        reads=("layer_logits",),
        tasks=(CLASSIFICATION,),
        thresholds=Thresholds(0.0, layers="layers in agreement", above_low=True),
        source="PABEE (arXiv:2006.04152)",
        relation="Looks at the predictions of several layers, and not at how sure they are.",
    ),
    "confident_patience": ExitCriterion(
        function=confident_patience_scores,
        reads=("layer_logits",),
        tasks=(CLASSIFICATION,),
        source="PCEE-BERT (2022.findings-naacl.25)",
        relation="`entropy` of two layers in a row; unlike `patience` it asks how sure they are, not of what.",
    ),
    "similar_patience": ExitCriterion(
        function=similar_patience_scores,
        reads=("layer_logits",),
        tasks=(CLASSIFICATION,),
        source="F-PABEE (arXiv:2305.11916)",
        relation="`patience` with a finer dial: like distributions in place of the same class.",
    ),
    "expert_sum": ExitCriterion(
        function=expert_sum_scores,
        reads=("layer_logits", "layer_weights"),
        tasks=(CLASSIFICATION,),
        source="BEEM (arXiv:2502.00745)",
        relation="`patience` that counts a layer by its accuracy and `confidence`.",
    ),
    "energy": ExitCriterion(
        function=energy_scores,
        reads=("classifier_logits",),
        tasks=(CLASSIFICATION,),
        source="COSEE (arXiv:2412.13236)",
        relation="The scale of the logits, which `confidence` forgets.",
    ),
    "cap": ExitCriterion(
        function=cap_scores,
        reads=("classifier_logits", "null_shares"),
        tasks=(CLASSIFICATION,),
        source="NSP (arXiv:2506.17249)",
        relation="`energy`, less where much of the state is none of the classifier's business.",
    ),
    "learnt_to_exit": ExitCriterion(
        function=learnt_to_exit_scores,
        reads=("right_probs",),
        tasks=(CLASSIFICATION,),
        fitted="learnt_to_exit",
        source='BERxiT (2021.eacl-main.8), "learning to exit"',
        relation="As `policy` it reads the state, but foretells whether the exit is right, whatever a layer costs.",
    ),
    "quantile": ExitCriterion(
        function=quantile_scores,
        reads=("layer_exit_probs",),
        tasks=(CLASSIFICATION,),
        source='PALBERT (arXiv:2204.03276), "Q-exit"',
        relation="`policy` summed up over the layers passed: many small exit probabilities let a row exit, too.",
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
        tasks=BOTH_TASKS,
        thresholds=Thresholds(1.0, layers="layers to run"),
        source="a smaller model",
        relation="What all others have to beat: the same depth for every instance.",
    ),
}
CRITERIA = names_of(EXIT_CRITERIA, CLASSIFICATION)
GENERATION_CRITERIA = names_of(EXIT_CRITERIA, GENERATION)


def exit_scores(
    criterion: str,
    layer_logits: Tensor,
    exit_probs: Tensor | None,
    *,
    has_exit: Tensor | None = None,
    **signals: Tensor | None,
) -> Tensor:
    """Exit score of every layer of a classifier under a criterion, (batch, layers).

    A layer without an exit counts for nothing, such as a layer of a run; its own score is below every threshold.

    Args:
        criterion: one of `CRITERIA`.
        layer_logits: (batch, layers, classes), or a prefix of the layers.
        exit_probs: (batch, layers), needed by `policy` and `quantile` only.
        has_exit: (batch, layers), bool, the same in every row: which layers have an exit; None: all.
        **signals: what else the criterion reads, by the names of `ExitCriterion`, for the same layers.

    Raises:
        ValueError: if the criterion is unknown, or something that it reads is missing.
    """
    row = row_of(EXIT_CRITERIA, criterion, "criterion", CLASSIFICATION)
    batch, num_layers = layer_logits.shape[:2]
    known = {
        "logits": layer_logits,
        "layer_logits": layer_logits,
        "exit_probs": exit_probs,
        "layer_exit_probs": exit_probs,
        "layers": torch.arange(1, num_layers + 1, device=layer_logits.device).expand(batch, -1),
        **signals,
    }
    if row.fitted and any(known.get(name) is None for name in row.reads):
        raise ValueError(_not_fitted(criterion))
    if has_exit is None or bool(has_exit.all()):
        return value_of(row, f'criterion "{criterion}"', known)
    columns = has_exit[0].nonzero().squeeze(1)
    of_exits = {
        name: value if value is None or value.shape[1] != num_layers else value[:, columns]
        for name, value in known.items()
    }
    scores = value_of(row, f'criterion "{criterion}"', of_exits)
    below = scores.new_full((batch, num_layers), row.thresholds.low - 1)
    return below.index_copy(1, columns, scores)


def is_fitted(criterion: str, config: Any) -> bool:
    """Whether a model, by its configuration, has what training fits for a criterion."""
    field = EXIT_CRITERIA[criterion].fitted
    return not field or bool(getattr(config, field, None))


def check_fitted(criterion: str, config: Any) -> None:
    """Raise unless a model has what training fits for a criterion.

    Args:
        criterion: any.
        config: the model's configuration.

    Raises:
        ValueError: it has not.
    """
    if criterion in EXIT_CRITERIA and not is_fitted(criterion, config):
        raise ValueError(_not_fitted(criterion))


def _not_fitted(criterion: str) -> str:
    return (
        f'criterion "{criterion}" needs {EXIT_CRITERIA[criterion].fitted}, which training fits and this model was '
        "saved without. Train it again, or take another criterion."
    )


def digits(threshold: float, count: int = 6) -> str:
    """A threshold as shown: with so many digits, and near 1 with as many as tell it from 1, where nobody exits early.

    Scores of an exit that is little trained lie so close that four digits would name another threshold: who reads one
    and types it is to get the exits that it was shown with.

    Example:
        >>> digits(0.83215), digits(0.690262496), digits(0.999983), digits(1 - 2**-25), digits(1.0)
        ('0.83215', '0.690262', '0.999983', '0.99999997', '1')
    """
    if 0.999 < threshold < 1:
        count = 7 if threshold < 0.9999999 else 9
    return f"{threshold:.{count}g}"


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
