"""A saved classifier on some rows, run once: its evaluation, and everything that a report shows beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from consistentee.data.rows import Text, TextDataset
from consistentee.evaluation.agreement import evaluate_agreement, unlabelled_rows
from consistentee.evaluation.classification import class_columns, evaluate_model, run_layers
from consistentee.evaluation.report_figures import (
    DEFAULT_POINT,
    INTERVAL_CONFIDENCE,
    ClassExits,
    Example,
    HardnessTable,
    LayerFigures,
    ReportedPoint,
    RowOutcomes,
    choose_examples,
    exit_histogram,
    exits_by_class,
    hardness_table,
    layer_figures,
    point_of,
)
from consistentee.evaluation.results import AgreementEvaluation, Evaluation
from consistentee.functional.bounds import binomial_interval
from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.functional.exits import choose_exit_layer
from consistentee.models.loaded import LoadedClassifier

MOST_BESIDE = 4
"""Curves beside the reported one where nobody says which: more cannot be told apart."""


@dataclass(frozen=True, kw_only=True)
class ExitReport:
    """All that a report on a model shows of some rows.

    Args:
        quality: `accuracy`, or `agreement` of rows without labels.
        evaluation: at the reported criterion and threshold.
        point: the same with intervals.
        points: full depth first, then that one, operating points of the model, and the other criteria.
        intervals: of the quality at each point of the evaluation's curve.
        histograms: (layers,) exits at each point of the curve.
        layers: one each.
        classes: one each.
        hardness: memorized layer against exit layer.
        early, deep, changed: texts that exit first, that need depth, and whose answer the exit changes.
        num_lost, num_won: rows that only full depth, and only the exit, gets right.
        source: where the rows come from.
        fingerprint: of the rows.
    """

    quality: str
    evaluation: Evaluation | AgreementEvaluation
    point: ReportedPoint
    points: list[ReportedPoint]
    intervals: list[tuple[float, float]]
    histograms: list[list[int]]
    layers: list[LayerFigures]
    classes: list[ClassExits]
    hardness: HardnessTable
    num_lost: int
    num_won: int
    source: str
    fingerprint: str
    early: list[Example] = field(default_factory=list[Example])
    deep: list[Example] = field(default_factory=list[Example])
    changed: list[Example] = field(default_factory=list[Example])


def report_exits(
    saved: LoadedClassifier,
    rows: TextDataset | Sequence[Text],
    *,
    criteria: Sequence[str] = (),
    threshold: float | None = None,
    operating_point: str | None = None,
    reference: LoadedClassifier | None = None,
    with_texts: bool = True,
    source: str = "texts",
    batch_size: int = 64,
    progress: bool = False,
) -> ExitReport:
    """Evaluate a saved classifier on rows, and gather what a report shows of it; the rows run through it once.

    Args:
        saved: the model, from `load_model`.
        rows: labelled rows, or texts alone.
        criteria: the first is reported, the others are drawn beside it. None given: the saved one, and beside it those
            whose thresholds training chose; all of them are among the points, the first `MOST_BESIDE` are drawn.
        threshold: of the first criterion; None takes the saved one.
        operating_point: in place of criterion and threshold, one that `consistentee calibrate` saved, by name.
        reference: another model to draw beside it; needs labelled rows.
        with_texts: whether to choose example texts.
        source: where texts without labels come from.
        batch_size: rows per step; does not change the result.
        progress: whether to show how far it is.

    Raises:
        ValueError: as of `evaluate_model` and `evaluate_agreement`.
    """
    criterion, limit = saved.exit_rule(criteria[0] if criteria else None, threshold, operating_point)
    others = list(criteria[1:])
    if not criteria:
        known = [name for name in saved.criteria if saved.known_threshold(name) is not None]
        others = [name for name in known if name != criterion]
        criteria = [criterion, *others[:MOST_BESIDE]]
    labelled = isinstance(rows, TextDataset)
    dataset = rows if isinstance(rows, TextDataset) else unlabelled_rows(rows, saved.label_names, source)
    if not len(dataset):
        raise ValueError("There must be at least one row to report on, got none.")
    columns, num_layers = class_columns(saved, dataset.label_names), saved.num_hidden_layers
    states = run_layers(saved, dataset, batch_size=batch_size, description="report" if progress else None)
    how: dict[str, Any] = {"criteria": criteria, "threshold": limit, "states": states}
    if labelled:
        evaluation = evaluate_model(saved, dataset, reference=reference, batch_size=batch_size, **how)
    else:
        evaluation = evaluate_agreement(saved, dataset.texts, **how)
    outputs = replace(
        states[0],
        layer_logits=states[0].layer_logits[..., columns],
        classifier_logits=states[0].classifier_logits[..., columns],
    )
    predictions = outputs.layer_logits.argmax(-1)  # of logits, as evaluated; probabilities may be equal
    certainty = outputs.layer_logits.softmax(-1).amax(-1)
    target = outputs.labels if labelled else predictions[:, -1]

    def outcomes_of(name: str, at: float) -> RowOutcomes:
        scores = outputs.exit_scores(name)
        exit_layer = choose_exit_layer(scores, at)
        return RowOutcomes(predictions, certainty, scores, target, exit_layer, is_agreement=not labelled)

    own = outcomes_of(criterion, limit)
    full_depth = replace(own, exit_layer=torch.full_like(own.exit_layer, num_layers))
    points = [point_of(("full depth",), "", None, full_depth)]
    for names, rule, at, certificates in _rules(saved, criterion, limit, operating_point, others):
        points.append(point_of(names, rule, at, outcomes_of(rule, at), certificates))
    right, right_at_exit = own.right, own.at_exit(own.right)
    exits = [choose_exit_layer(own.scores, point.threshold) for point in evaluation.curve]
    quality = "accuracy" if labelled else "agreement"
    counts = [round(getattr(point, quality) * len(dataset)) for point in evaluation.curve]
    examples = choose_examples(own, dataset, labelled) if with_texts else {}
    return ExitReport(
        quality=quality,
        evaluation=evaluation,
        point=points[1],
        points=points,
        intervals=[binomial_interval(count, len(dataset), INTERVAL_CONFIDENCE) for count in counts],
        histograms=[exit_histogram(exit_layer, num_layers) for exit_layer in exits],
        layers=layer_figures(evaluation.to_dict(), quality),
        classes=exits_by_class(own, dataset.label_names),
        hardness=hardness_table(right, own.exit_layer),
        num_lost=int((right[:, -1] & ~right_at_exit).sum()),
        num_won=int((right_at_exit & ~right[:, -1]).sum()),
        source=dataset.source,
        fingerprint=dataset.fingerprint(),
        **examples,
    )


def score_range(criterion: str, num_layers: int) -> tuple[float, float]:
    """Lowest and highest exit score of a criterion, for bars."""
    thresholds = EXIT_CRITERIA[criterion].thresholds
    return thresholds.low, thresholds.highest(num_layers) + (0.5 if thresholds.layers else 0)


def _rules(
    saved: LoadedClassifier,
    criterion: str,
    threshold: float,
    operating_point: str | None,
    others: Sequence[str],
) -> Iterator[tuple[tuple[str, ...], str, float, tuple[tuple[str, Mapping[str, Any]], ...]]]:
    """Names, criterion, threshold and certificates by name of what is reported, and of what the model has besides."""
    config: Any = saved.early_exit_model.config
    rules: dict[tuple[str, float], list[str]] = defaultdict(list)
    certificates: dict[tuple[str, float], list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    rules[criterion, threshold] += [] if operating_point is None else [operating_point]
    rules[config.criterion, config.threshold].append(DEFAULT_POINT)
    for name, point in (config.operating_points or {}).items():
        rule = str(point["criterion"]), float(point["threshold"])
        if name not in rules[rule]:
            rules[rule].append(name)
        if point.get("certificate"):
            certificates[rule].append((name, point["certificate"]))
    for name in others:
        known = saved.known_threshold(name)
        if known is not None:
            rules.setdefault((name, known), [])
    for (rule, at), names in rules.items():
        yield tuple(names), rule, at, tuple(certificates[rule, at])
