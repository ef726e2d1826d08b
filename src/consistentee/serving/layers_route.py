"""`/layers`: what a model has (GET), and one text at every layer of it (POST). The playground at `/` shows it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from consistentee.inference.encoder.incremental_scores import is_answer
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.pipelines.layer_views import LayerView
from consistentee.serving.app import Handler, Receive, Send, json_page, send_json, unless_gone
from consistentee.serving.classification import ClassifierService
from consistentee.serving.descriptions import describe_classifier, view_at_point
from consistentee.serving.requests import (
    PredictRequest,
    check_names,
    read_json,
    read_predict,
    refuse,
)

LAYERS_FIELDS = ("inputs", "truncate", "operating_point", "threshold")


def read_layers(values: Mapping[str, Any]) -> PredictRequest:
    """A request for one text, or one pair, at every layer.

    Raises:
        RefusedRequest: a field is wrong (422).
    """
    check_names(values, LAYERS_FIELDS)
    one_text = "inputs must be one text, or a list of two for a model for pairs"
    inputs = values.get("inputs")
    if isinstance(inputs, list) and len(cast("list[object]", inputs)) != 2:
        refuse(f"{one_text}, got a list of {len(cast('list[object]', inputs))}.")
    request = read_predict(values, text_pairs=True, max_batch=sys.maxsize)
    if request.is_batch:
        refuse(f"{one_text}, got a list of lists.")
    return request


def layers_handler(service: ClassifierService) -> Handler:
    """What answers `POST /layers`."""
    labels = service.engine.saved.label_names

    async def handle(body: bytes, receive: Receive, send: Send) -> None:
        request = read_layers(read_json(body))
        (rule, views), is_cut = await unless_gone(receive, service.look_at(request, view_at_point))
        for view in views:
            if not is_answer(view.probs[None])[0]:
                raise service.no_numbers(view.layer)
        await send_json(send, _answer(labels, rule, views, is_cut))

    return handle


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
            "exit_score": _number(view.exit_score),
            "exit_prob": _number(view.exit_prob),
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


def _number(score: float | None) -> float | None:
    """A score, or None where nothing decides; a score that is no number exceeds no threshold."""
    return score if score is not None and math.isfinite(score) else None


def layers_description(service: ClassifierService) -> dict[str, Any]:
    """What `GET /layers` answers: labels, layers, and the operating points with what is known about them."""
    first = service.auditor.point.name
    return describe_classifier(service.engine, service.points, name=service.name, first=first)


def layers_page(service: ClassifierService) -> Any:
    """The route of `GET /layers`."""
    return json_page("/layers", lambda: layers_description(service))
