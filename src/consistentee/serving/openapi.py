"""The description of the interface that `/openapi.json` gives, written by hand beside what reads the requests."""

from __future__ import annotations

from typing import Any

from consistentee.functional.criteria import GENERATION_CRITERIA
from consistentee.serving.requests import JSON_TYPE, NEUTRAL_FIELDS, ServerLimits

_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_NULL = {"type": "null"}
"""Of fields that are not known: null is as if they were missing."""

_EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {"type": "string", "description": "A piece of the answer as JSON; [DONE] at the end."}
    },
    "description": "One event of the stream (`stream`: true).",
}
_ERRORS = {
    "400": "The body is no JSON.",
    "401": "The bearer token is missing or wrong.",
    "408": "The body did not arrive in time.",
    "413": "The body, a text or the batch is too large.",
    "415": "The Content-Type is not application/json, or the body is compressed.",
    "422": "A field is wrong, or the text does not fit the model.",
    "424": "Computing failed.",
    "429": "The queue is full; Retry-After says when to try again.",
    "503": "The server is shutting down, or nothing computes just now.",
    "504": "No answer within the deadline.",
}


def openapi_description(
    kind: str, name: str, limits: ServerLimits, *, has_token: bool = False
) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server.

    Args:
        kind: `classifier` or `generator`.
        name: of the model.
        limits: of the server.
        has_token: whether requests must bear a token.
    """
    from consistentee import __version__

    paths = {
        "/": {"get": _get("The playground, a page", "200", media="text/html")},
        "/health": {"get": _get("Whether the process lives", "200")},
        "/ready": {"get": _get("Whether requests are answered", "200", "503")},
        "/metrics": {"get": _get("Counters for Prometheus", "200", media="text/plain")},
        "/openapi.json": {"get": _get("This description", "200")},
    }
    paths |= _classifier(limits) if kind == "classifier" else _generator(limits)
    if has_token:
        for path, methods in paths.items():
            for operation in methods.values() if path not in ("/", "/health", "/ready") else ():
                operation["security"] = [{"token": []}]
                operation["responses"].setdefault("401", _error("401", kind))
    return {
        "openapi": "3.1.0",
        "info": {"title": f"consistentee serve {name}", "version": __version__},
        "paths": paths,
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        if has_token
        else {},
    }


def _get(summary: str, *statuses: str, media: str = JSON_TYPE) -> dict[str, Any]:
    schema = {"type": "string"} if media != JSON_TYPE else {"type": "object"}
    content = {media: {"schema": schema}}
    return {
        "summary": summary,
        "responses": {s: {"description": summary, "content": content} for s in statuses},
    }


def _error(status: str, kind: str) -> dict[str, Any]:
    text = {"type": "string"}
    if kind == "classifier":
        schema = {"type": "object", "required": ["error"], "properties": {"error": text, "error_type": text}}
    else:
        inner = {"type": "object", "required": ["message"], "properties": {"message": text, "type": text}}
        schema = {"type": "object", "required": ["error"], "properties": {"error": inner}}
    return {"description": _ERRORS[status], "content": {JSON_TYPE: {"schema": schema}}}


def _post(summary: str, body: dict[str, Any], answer: dict[str, Any], kind: str) -> dict[str, Any]:
    content: dict[str, Any] = {JSON_TYPE: {"schema": answer}}
    if kind == "generator":
        content["text/event-stream"] = {"schema": _EVENT}
    responses: dict[str, Any] = {"200": {"description": summary, "content": content}}
    responses |= {status: _error(status, kind) for status in _ERRORS if status != "401"}
    responses["429"]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {JSON_TYPE: {"schema": body}}},
        "responses": responses,
    }


def _classifier(limits: ServerLimits) -> dict[str, Any]:
    item: dict[str, Any] = {
        "type": "object",
        "required": ["score", "label", "exit_layer"],
        "properties": {
            "score": {"type": "number"},
            "label": {"type": "string"},
            "exit_layer": {"type": "integer", "minimum": 1, "description": "Layers executed."},
            "truncated": {"type": "boolean", "description": "True where the text was too long and was cut."},
        },
    }
    items = {"type": "array", "items": item}
    texts = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 2}
    body = {
        "type": "object",
        "required": ["inputs"],
        "additionalProperties": _NULL,
        "properties": {
            "inputs": {
                "oneOf": [
                    _TEXT,
                    {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": limits.max_batch},
                    {"type": "array", "items": texts, "minItems": 1, "maxItems": limits.max_batch},
                ],
                "description": "A text, several, or lists of one text or two (a pair). Of a model for pairs a list of "
                "two texts is a pair.",
            },
            "truncate": {"type": "boolean", "default": True, "description": "Cut a text that is too long."},
            "truncation_direction": {
                "type": "string",
                "enum": ["Right", "right", "Left", "left"],
                "description": "The side that the model cuts, as clients send it; the other is refused.",
            },
            "raw_scores": {"type": "boolean", "default": False, "description": "Logits, not probabilities."},
            "operating_point": {"type": "string", "description": "By name, in place of the server's."},
            "threshold": {"type": "number", "description": "Exit score above which a text exits."},
            "parameters": {
                "type": "object",
                "additionalProperties": _NULL,
                "description": "As huggingface_hub's InferenceClient sends them; the answer is a list of lists.",
                "properties": {
                    "top_k": {"type": "integer", "minimum": 1},
                    "function_to_apply": {"type": "string", "enum": ["softmax", "none"]},
                },
            },
        },
    }
    answer = {"anyOf": [items, {"type": "array", "items": items}]}
    return {
        "/predict": {"post": _post("Classify texts", body, answer, "classifier")},
        "/layers": {
            "get": _get("Labels, layers and operating points of the model", "200"),
            "post": _post("One text at every layer", _layers_body(body), _layers_answer(), "classifier"),
        },
    }


def _layers_body(predict: dict[str, Any]) -> dict[str, Any]:
    """The fields of `/predict` that `/layers` takes, for one text or one pair."""
    known: dict[str, Any] = predict["properties"]
    pair = {"type": "array", "items": _TEXT, "minItems": 2, "maxItems": 2}
    fields = {name: known[name] for name in ("truncate", "operating_point", "threshold")}
    return {
        "type": "object",
        "required": ["inputs"],
        "additionalProperties": _NULL,
        "properties": {"inputs": {"oneOf": [_TEXT, pair], "description": "A text, or two."}, **fields},
    }


def _layers_answer() -> dict[str, Any]:
    number, text, maybe = {"type": "number"}, {"type": "string"}, {"type": ["number", "null"]}
    layer = {
        "layer": {"type": "integer", "minimum": 1},
        "label": text,
        "score": {**number, "description": "Of the label, a probability."},
        "scores": {
            "type": "array",
            "items": number,
            "description": "Of all labels, as GET /layers names them.",
        },
        "exit_score": {
            **maybe,
            "description": "The text exits at the first layer where it exceeds the threshold.",
        },
        "exit_prob": {**maybe, "description": "The policy's exit probability."},
        "elapsed_ms": {**number, "description": "Time from the first layer to here."},
    }
    fields = {
        "label": text,
        "score": number,
        "exit_layer": {"type": "integer", "minimum": 1},
        "criterion": {"type": ["string", "null"], "description": "Null: the model has no exits."},
        "threshold": maybe,
        "layers": {
            "type": "array",
            "items": {"type": "object", "required": list(layer), "properties": layer},
            "description": "All of them; of a model without exits the last.",
        },
    }
    properties = {**fields, "truncated": {"type": "boolean"}}
    return {"type": "object", "required": list(fields), "properties": properties}


def _generator(limits: ServerLimits) -> dict[str, Any]:
    common: dict[str, Any] = {
        "model": {"type": "string", "description": "Not used: one model is served."},
        "max_tokens": {"type": "integer", "minimum": 1},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2, "description": "0 (default): greedy."},
        "top_p": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "description": "Only with a temperature; of 0 it changes nothing.",
        },
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
        "stop": {
            "oneOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 16}],
            "description": "Strings before which the text ends.",
        },
        "stream": {"type": "boolean", "default": False},
        "stream_options": {
            "type": "object",
            "properties": {
                "include_usage": {"type": "boolean"},
                "include_obfuscation": {"type": "boolean", "enum": [False]},
            },
            "additionalProperties": _NULL,
        },
        "threshold": {"type": "number", "description": "Exit score above which a token exits."},
        "mode": {"type": "string", "enum": ["early-exit", "full", "lossless"]},
        "criterion": {
            "type": "string",
            "enum": list(GENERATION_CRITERIA),
            "description": "Exit rule, in place of the saved one.",
        },
        "user": {"type": "string"},
        **{name: {"enum": list(values)} for name, values in NEUTRAL_FIELDS.items()},
    }
    message = {
        "type": "object",
        "required": ["role", "content"],
        "additionalProperties": _NULL,
        "properties": {
            "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
            "content": {"type": "string"},
            "name": {"type": "string", "description": "Not used."},
        },
    }
    prompts = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": limits.max_batch}
    text = {
        "type": "object",
        "required": ["model", "prompt"],
        "additionalProperties": _NULL,
        "properties": {"prompt": {"oneOf": [_TEXT, prompts]}, **common, "logprobs": {"enum": [False]}},
    }
    chat = {
        "type": "object",
        "required": ["model", "messages"],
        "additionalProperties": _NULL,
        "properties": {
            "messages": {"type": "array", "items": message, "minItems": 1, "maxItems": limits.max_tokens},
            "max_completion_tokens": {"type": "integer", "minimum": 1},
            **common,
        },
    }
    answer = {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {"choices": {"type": "array"}, "usage": {"type": "object"}},
    }
    named = _get("The model, by its name", "200")
    named["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    unknown = _error("422", "generator") | {"description": "There is no model of this name."}
    named["responses"]["404"] = unknown
    return {
        "/v1/models": {"get": _get("The model that is served", "200")},
        "/v1/models/{model}": {"get": named},
        "/layers": {"get": _get("Layers, modes and thresholds of the model", "200")},
        "/v1/completions": {"post": _post("Go on with a text", text, answer, "generator")},
        "/v1/chat/completions": {"post": _post("Answer a conversation", chat, answer, "generator")},
    }
