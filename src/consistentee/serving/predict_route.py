"""`POST /predict` in the forms of text-embeddings-inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from consistentee.serving.app import Handler, Receive, Send, build_app, send_json, unless_gone
from consistentee.serving.classification import ClassifierService, ScoredText
from consistentee.serving.layers_route import layers_handler, layers_page
from consistentee.serving.requests import PredictRequest, read_json, read_predict


def predict_handler(service: ClassifierService) -> Handler:
    """What answers `POST /predict`."""
    saved = service.engine.saved
    labels = saved.label_names
    how: dict[str, Any] = {
        "text_pairs": saved.text_pairs,
        "max_batch": service.limits.max_batch,
        "truncation_side": saved.tokenizer.truncation_side,
    }

    async def handle(body: bytes, receive: Receive, send: Send) -> None:
        request = read_predict(read_json(body), **how)
        scored = await unless_gone(receive, service.predict(request))
        answers = [_items(text, labels, request) for text in scored]
        await send_json(send, answers if request.is_batch else answers[0])

    return handle


def _items(text: ScoredText, labels: tuple[str, ...], request: PredictRequest) -> list[dict[str, Any]]:
    """Labels with scores, the highest first."""
    order = (-text.scores).argsort(kind="stable")[: request.top_k].tolist()
    cut = {"truncated": True} if text.truncated else {}
    return [
        {"score": float(text.scores[index]), "label": labels[index], "exit_layer": text.exit_layer, **cut}
        for index in order
    ]


def classifier_app(service: ClassifierService, *, more_routes: Sequence[Any] = (), **how: Any) -> Any:
    """An ASGI application for a classifier; keywords as of `build_app`."""
    handlers = {"/predict": predict_handler(service), "/layers": layers_handler(service)}
    return build_app(service, handlers, more_routes=[layers_page(service), *more_routes], **how)
