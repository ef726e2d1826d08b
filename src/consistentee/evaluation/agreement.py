"""What early exits give on texts without labels: how often they agree with a model, and how deep they go.

The model is their own last layer, or another one: that which they were made to imitate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from consistentee.data.rows import Text, TextDataset, text_rows
from consistentee.evaluation.classification import predict_classes, run_layers, shares_at_exits
from consistentee.evaluation.results import (
    AgreementEvaluation,
    AgreementPoint,
    OtherAgreement,
    depth_metrics,
)
from consistentee.functional.criteria import check_threshold, exit_scores
from consistentee.functional.curves import trade_off_curve
from consistentee.functional.exits import choose_exit_layer
from consistentee.functional.standard_errors import standard_error
from consistentee.inference.timing import environment
from consistentee.models.loaded import LoadedClassifier
from consistentee.training.states import LayerStates


def agreement_of_layers(
    layer_logits: Tensor,
    exit_probs: Tensor | None,
    *,
    criterion: str = "policy",
    threshold: float = 0.5,
    other_criteria: Mapping[str, float | None] | None = None,
    signals: Mapping[str, Tensor] | None = None,
    answers: Tensor | None = None,
) -> AgreementEvaluation:
    """Agreement of an exit criterion with the last layer, or with other answers, on the outputs of all layers.

    Args:
        layer_logits: (rows, layers, classes), every layer's prediction as an exit there would give it.
        exit_probs: (rows, layers), conditional exit probabilities; read by `policy` and `quantile` only.
        criterion: one of `CRITERIA`.
        threshold: an input exits at the first layer whose exit score exceeds it.
        other_criteria: further criteria to draw, each with its threshold or None.
        signals: `LayerStates.signals`, for the criteria that read them.
        answers: (rows,), int64, the classes to agree with; None takes the last layer's.

    Raises:
        ValueError: there is no row, or a threshold does not fit its criterion.
    """
    rows, num_layers = layer_logits.shape[:2]
    if not rows:
        raise ValueError("layer_logits must hold at least one row, got none.")
    threshold = check_threshold(threshold, criterion)
    predictions = layer_logits.argmax(-1)
    answers = predictions[:, -1] if answers is None else answers
    agree = predictions == answers[:, None]  # (rows, layers)
    signals = signals or {}
    scores = exit_scores(criterion, layer_logits, exit_probs, **signals)
    exit_layer = choose_exit_layer(scores, threshold)  # (rows,)
    agree_at_exit = agree.gather(1, (exit_layer - 1)[:, None]).squeeze(1)
    exited = torch.bincount(exit_layer - 1, minlength=num_layers)  # (layers,)
    agreeing = torch.bincount(exit_layer - 1, weights=agree_at_exit.double(), minlength=num_layers)
    agreement = float(agree_at_exit.double().mean())
    others: dict[str, OtherAgreement] = {}
    for name, limit in (other_criteria or {}).items():
        if name != criterion:
            its_scores = exit_scores(name, layer_logits, exit_probs, **signals)
            point = None if limit is None else _point(its_scores, agree, check_threshold(limit, name))
            others[name] = OtherAgreement(limit, point, _curve(its_scores, agree, name))
    return AgreementEvaluation(
        num_hidden_layers=num_layers,
        num_examples=rows,
        criterion=criterion,
        threshold=threshold,
        metrics={"agreement": agreement},
        agreement=agreement,
        agreement_standard_error=standard_error(agree_at_exit),
        **depth_metrics(float(exit_layer.double().mean()), num_layers),
        exit_histogram=exited.tolist(),
        exit_agreement=[
            float(count) / int(total) if total else None
            for count, total in zip(agreeing, exited, strict=True)
        ],
        per_layer_agreement=shares_at_exits(agree, signals.get("has_exit")),
        curve=_curve(scores, agree, criterion),
        other_criteria=others,
    )


def evaluate_agreement(
    saved: LoadedClassifier,
    texts: Sequence[Text],
    *,
    criteria: Sequence[str] = (),
    threshold: float | None = None,
    operating_point: str | None = None,
    reference: LoadedClassifier | None = None,
    source: str = "texts",
    states: tuple[LayerStates, int] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> AgreementEvaluation:
    """Evaluate a saved classifier with exits on texts without labels.

    Args:
        saved: the model, from `load_model`.
        texts: strings or tuples of one text, or of two for pairs.
        criteria: exit criteria; the first is reported, the others are drawn beside it. None given: the saved one.
        threshold: of the first criterion; None takes the saved one.
        operating_point: in place of criterion and threshold, one that `consistentee calibrate` saved, by name.
        reference: the model to agree with, as it was saved, such as the original of a tuned one; None takes the last
            layer.
        source: where the texts come from, for messages.
        states: what `run_layers` gave for these texts; None runs it.
        batch_size: texts per step; does not change the result.
        progress: whether to show how far it is.

    Raises:
        ValueError: the model has no exits, there are no texts, a threshold is missing or does not fit, or the
            reference has other classes.
    """
    model = saved.early_exit_model
    criterion, threshold = saved.exit_rule(criteria[0] if criteria else None, threshold, operating_point)
    others = {name: saved.known_threshold(name) for name in criteria[1:]}
    rows = unlabelled_rows(texts, saved.label_names, source)
    if not len(rows):
        raise ValueError("There must be at least one text to evaluate on, got none.")
    outputs, num_truncated = states or run_layers(
        saved, rows, batch_size=batch_size, description="evaluating" if progress else None
    )
    answers = None
    if reference is not None:
        answers = predict_classes(reference, rows, beside=saved, batch_size=batch_size, progress=progress)
    evaluation = agreement_of_layers(
        outputs.layer_logits,
        outputs.exit_probs,
        criterion=criterion,
        threshold=threshold,
        other_criteria=others,
        signals=outputs.signals,
        answers=answers,
    )
    return replace(
        evaluation,
        agreement_with=None if reference is None else reference.name,
        num_truncated=num_truncated,
        environment=environment(model.device) | {"dtype": str(model.dtype).removeprefix("torch.")},
    )


def unlabelled_rows(
    texts: Sequence[Text], label_names: tuple[str, ...], source: str = "texts"
) -> TextDataset:
    """Texts as rows whose labels nobody reads."""
    rows = list(text_rows(texts, source))
    return TextDataset(rows, [0] * len(rows), label_names, source)


def _curve(scores: Tensor, agree: Tensor, criterion: str) -> list[AgreementPoint]:
    return [
        AgreementPoint(point.threshold, point.accuracy, point.mean_exit_layer, point.layer_speedup)
        for point in trade_off_curve(scores, agree, criterion)
    ]


def _point(scores: Tensor, agree: Tensor, threshold: float) -> AgreementPoint:
    exit_layer = choose_exit_layer(scores, threshold)
    agreement = float(agree.gather(1, (exit_layer - 1)[:, None]).double().mean())
    mean = float(exit_layer.double().mean())
    return AgreementPoint(threshold, agreement, mean, scores.shape[1] / mean)
