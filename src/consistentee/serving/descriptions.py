"""What the playground's pages say of a model: its layers, labels and operating points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from consistentee.config import GenerationMode
from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.inference.encoder.backend import TokenRow
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.models.operating_points import FULL_DEPTH_POINT
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import TextGenerator
from consistentee.pipelines.layer_views import LayerView, view_layers
from consistentee.serving.points import ServedPoint

STEPS = 100
"""Of a threshold between its least and its highest value."""


def visible_rule(engine: Engine, point: ServedPoint, criterion: str | None = None) -> ExitRule:
    """The rule of a point, with a criterion whose scores can be shown.

    At full depth it is `criterion` (None: the saved one), at a threshold that no score exceeds. A model without exits
    has none.
    """
    if not isinstance(engine.saved.model, EarlyExitForSequenceClassification):
        return ExitRule.full_depth()
    if point.name != FULL_DEPTH_POINT and point.rule.criterion is not None:
        return point.rule
    criterion = criterion or str(engine.rule().criterion)
    return ExitRule(criterion, EXIT_CRITERIA[criterion].thresholds.highest(engine.backend.num_layers))


def view_at_point(engine: Engine, row: TokenRow, point: ServedPoint) -> tuple[ExitRule, list[LayerView]]:
    """A text at every layer, with the rule whose scores those are."""
    rule = visible_rule(engine, point)
    return rule, view_layers(engine, row, rule.criterion or "")


def describe_classifier(
    engine: Engine, points: Mapping[str, ServedPoint], *, name: str, first: str, criterion: str | None = None
) -> dict[str, Any]:
    """Labels, layers, and the operating points with what is known about them: what the playground's page reads.

    Args:
        engine: of the model.
        points: by name.
        name: of the model.
        first: name of the point that the page begins with.
        criterion: points of others are left out; None takes all.
    """
    saved, num_layers = engine.saved, engine.backend.num_layers
    rules = {point: visible_rule(engine, points[point], criterion) for point in points}
    if criterion is not None:
        rules = {point: rule for point, rule in rules.items() if rule.criterion == criterion}
    criteria = sorted({str(rule.criterion) for rule in rules.values() if rule.criterion is not None})
    return {
        "model": name,
        "labels": list(saved.label_names),
        "num_layers": num_layers,
        "exit_layers": getattr(saved.model.config, "exit_layers", None),
        "text_pairs": saved.text_pairs,
        "max_length": saved.max_length,
        "operating_point": first,
        "operating_points": [
            {
                "name": point,
                "criterion": rule.criterion,
                "threshold": rule.threshold,
                "max_disagreement": points[point].max_disagreement,
                "confidence": points[point].confidence,
                "validation": _validation(saved.record, rule),
            }
            for point, rule in rules.items()
        ],
        "criteria": {
            each: _steps(each, num_layers, [rule for rule in rules.values() if rule.criterion == each])
            for each in criteria
        },
    }


def describe_generator(generator: TextGenerator, *, name: str) -> dict[str, Any]:
    """Layers, modes and the dial of a text generator: what the playground's page reads.

    Args:
        generator: of the model.
        name: of the model.
    """
    saved, options = generator.saved, generator.check(DecodingOptions())
    about: dict[str, Any] = {
        "model": name,
        "num_layers": saved.num_hidden_layers,
        "max_tokens": options.max_new_tokens,
        "context_length": saved.context_length,
        "has_template": saved.saved_template is not None
        or bool(getattr(saved.tokenizer, "chat_template", None)),
        "modes": ["full"],
        "mode": "full",
        "criterion": None,
        "threshold": None,
        "draft_threshold": None,
        "thresholds": [],
    }
    if not saved.has_exits:
        return about
    criterion, threshold = saved.exit_rule()
    drafts = saved.exit_rule_of_mode("lossless")[1]
    steps = _steps(
        criterion, saved.num_hidden_layers, [ExitRule(criterion, at) for at in (threshold, drafts)]
    )
    rule = {
        "criterion": criterion,
        "threshold": threshold,
        "draft_threshold": drafts,
        "thresholds": steps["thresholds"],
    }
    return {**about, **rule, "modes": list(get_args(GenerationMode)), "mode": options.mode}


def _steps(criterion: str, num_layers: int, rules: list[ExitRule]) -> dict[str, Any]:
    """Thresholds to choose from, ascending, those of the points among them."""
    thresholds = EXIT_CRITERIA[criterion].thresholds
    if thresholds.layers:
        steps = thresholds.whole(num_layers)
    else:
        steps = np.linspace(thresholds.low, thresholds.high, STEPS + 1).round(6).tolist()
    highest = thresholds.highest(num_layers)
    known = [rule.threshold for rule in rules if rule.threshold <= highest]
    return {"low": thresholds.low, "high": highest, "thresholds": sorted({*steps, *known})}


def _validation(record: Mapping[str, Any], rule: ExitRule) -> dict[str, Any] | None:
    """What training measured at a rule's threshold on its validation rows; None where it did not."""
    validation: Mapping[str, Any] = record.get("validation") or {}
    criteria: Mapping[str, Mapping[str, Any]] = validation.get("criteria") or {}
    measured = criteria.get(str(rule.criterion))
    if measured is None or not math.isclose(float(measured["threshold"]), rule.threshold, rel_tol=1e-6):
        return None
    return {
        "num_examples": validation.get("num_examples"),
        "accuracy": measured.get("accuracy"),
        "full_depth_accuracy": validation.get("full_depth_accuracy"),
        "mean_exit_layer": measured.get("mean_exit_layer"),
    }
