"""`/layers`: what a model has (GET), and one text at every layer of it (POST). The playground at `/` shows it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from consistentee.errors import require_extra
from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.inference.encoder.backend import TokenRow
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.layer_views import LayerView, view_layers
from consistentee.serving.app import Handler, Receive, Send, json_bytes, send_json, unless_gone
from consistentee.serving.classification import ClassifierService
from consistentee.serving.points import FULL_DEPTH_POINT, ServedPoint
from consistentee.serving.requests import (
    JSON_TYPE,
    PredictRequest,
    check_names,
    read_json,
    read_predict,
    refuse,
)

LAYERS_FIELDS = ("inputs", "truncate", "operating_point", "threshold")

STEPS = 100
"""Of a threshold between its least and its highest value, in what GET gives."""


def read_layers(values: Mapping[str, Any]) -> PredictRequest:
    """A request for one text, or one pair, at every layer.

    Raises:
        RefusedRequest: a field is wrong (422).
    """
    check_names(values, LAYERS_FIELDS)
    request = read_predict(values, text_pairs=True, max_batch=sys.maxsize)
    if request.is_batch:
        refuse("inputs must be one text, or a list of two for a model for pairs.")
    return request


def layers_handler(service: ClassifierService) -> Handler:
    """What answers `POST /layers`."""
    labels = service.engine.saved.label_names

    async def handle(body: bytes, receive: Receive, send: Send) -> None:
        request = read_layers(read_json(body))

        def view(row: TokenRow, point: ServedPoint) -> tuple[ExitRule, list[LayerView]]:
            rule = visible_rule(service.engine, point)
            return rule, view_layers(service.engine, row, rule.criterion or "")

        (rule, views), is_cut = await unless_gone(receive, service.look_at(request, view))
        await send_json(send, _answer(labels, rule, views, is_cut))

    return handle


def visible_rule(engine: Engine, point: ServedPoint) -> ExitRule:
    """The rule of a point, with a criterion whose scores can be shown.

    At full depth it is the saved criterion, at a threshold that no score exceeds. A model without exits has none.
    """
    if not isinstance(engine.saved.model, EarlyExitForSequenceClassification):
        return ExitRule.full_depth()
    if point.name != FULL_DEPTH_POINT and point.rule.criterion is not None:
        return point.rule
    criterion = str(engine.rule().criterion)
    return ExitRule(criterion, EXIT_CRITERIA[criterion].thresholds.highest(engine.backend.num_layers))


def exit_of(rule: ExitRule, views: list[LayerView]) -> LayerView:
    """The first layer whose exit score exceeds the threshold, both in single precision; else the last."""
    threshold = np.float32(rule.threshold)
    exits = (
        view for view in views[:-1] if view.exit_score is not None and np.float32(view.exit_score) > threshold
    )
    return next(exits, views[-1])


def _answer(labels: tuple[str, ...], rule: ExitRule, views: list[LayerView], is_cut: bool) -> dict[str, Any]:
    found = exit_of(rule, views)
    layers = [
        {
            "layer": view.layer,
            "label": labels[int(view.probs.argmax())],
            "score": float(view.probs.max()),
            "scores": view.probs.tolist(),
            "exit_score": view.exit_score,
            "exit_prob": view.exit_prob,
            "elapsed_ms": round(view.elapsed_ms, 3),
        }
        for view in views
    ]
    return {
        "label": labels[int(found.probs.argmax())],
        "score": float(found.probs.max()),
        "exit_layer": found.layer,
        "criterion": rule.criterion,
        "threshold": None if rule.criterion is None else rule.threshold,
        "layers": layers,
        **({"truncated": True} if is_cut else {}),
    }


def layers_description(service: ClassifierService) -> dict[str, Any]:
    """What `GET /layers` answers: labels, layers, and the operating points with what is known about them."""
    engine = service.engine
    saved, num_layers = engine.saved, engine.backend.num_layers
    rules = {name: visible_rule(engine, point) for name, point in service.points.items()}
    criteria = sorted({str(rule.criterion) for rule in rules.values() if rule.criterion is not None})
    return {
        "model": service.name,
        "labels": list(saved.label_names),
        "num_layers": num_layers,
        "text_pairs": saved.text_pairs,
        "max_length": saved.max_length,
        "operating_point": service.auditor.point.name,
        "operating_points": [
            {
                "name": name,
                "criterion": rules[name].criterion,
                "threshold": rules[name].threshold,
                "max_disagreement": point.max_disagreement,
                "confidence": point.confidence,
                "validation": _validation(saved.record, rules[name]),
            }
            for name, point in service.points.items()
        ],
        "criteria": {
            name: _steps(name, num_layers, [rule for rule in rules.values() if rule.criterion == name])
            for name in criteria
        },
    }


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


def layers_page(service: ClassifierService) -> Any:
    """The route of `GET /layers`."""
    responses: Any = require_extra("serve", "starlette.responses")
    routing: Any = require_extra("serve", "starlette.routing")

    async def described(_: Any) -> Any:
        return responses.Response(json_bytes(layers_description(service)), media_type=JSON_TYPE)

    return routing.Route("/layers", described, methods=["GET"])
