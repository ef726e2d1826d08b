"""What a request asks for, read from JSON by hand: every error names the field, the rule and the value.

A request is data and no more: no field names a file, a template or code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from consistentee.errors import SettingError

JSON_TYPE = "application/json"

NEUTRAL_FIELDS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
"""Fields of OpenAI's that are taken where they change nothing, and the values at which they do."""


@dataclass(frozen=True)
class ServerLimits:
    """What a server takes at most.

    Args:
        max_queue: texts that are accepted and not answered yet; one more is refused with 429. Prompts for generators.
        deadline_ms: a text is answered within this time or refused with 504. Generators: the first token is written.
        max_bytes: of a request's body; 413.
        max_batch: texts of one request; 413. Generators: prompts.
        max_tokens: of all texts of one request together, as far as they are read; 413.
        body_seconds: within which a body must have arrived; 408.

    Raises:
        SettingError: one of them is below what makes sense.
    """

    max_queue: int = 512
    deadline_ms: float = 10_000.0
    max_bytes: int = 2_000_000
    max_batch: int = 64
    max_tokens: int = 16_384
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0 or value != value:
                raise SettingError(f"{name} must be above 0, got {value}.")


class RefusedRequest(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        kind: the error's type, in the words of text-embeddings-inference.
        message: what is wrong and what to do about it.
        retry_after: seconds after which to try again, for the header of this name.
    """

    def __init__(self, status: int, kind: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_after = status, kind, message, retry_after


def refuse(message: str, status: int = 422, kind: str = "Validation") -> NoReturn:
    """Raise `RefusedRequest`."""
    raise RefusedRequest(status, kind, message)


def shutting_down() -> RefusedRequest:
    """What is told to whom the server's end leaves no time for."""
    return RefusedRequest(503, "Unhealthy", "The server is shutting down.")


def too_large(limits: ServerLimits) -> RefusedRequest:
    """What is told to whom sends too long a body."""
    return RefusedRequest(413, "Validation", f"The body must have at most {limits.max_bytes} bytes.")


def check_headers(headers: Sequence[tuple[bytes, bytes]], limits: ServerLimits) -> None:
    """What can be said of a request's body before it is read.

    Raises:
        RefusedRequest: it is too large (413), compressed or not called JSON (415).
    """
    named = dict(headers)
    if named.get(b"content-type", b"").split(b";")[0].strip().lower() != JSON_TYPE.encode():
        # A page of another site can send other types without asking first.
        refuse(f"The Content-Type must be {JSON_TYPE}.", 415)
    encoding = named.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"", b"identity"):
        shown = _shown(encoding.decode("latin-1"))
        refuse(f"The body must not be compressed, got Content-Encoding {shown}. Send it as it is.", 415)
    length = named.get(b"content-length", b"0")
    if length.isdigit() and int(length[:20]) > limits.max_bytes:
        raise too_large(limits)


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        RefusedRequest: it is none (400), or something else than an object (422).
    """

    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        values: object = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        refuse(f"The body must be JSON: {reason}.", 400)
    if not isinstance(values, dict):
        refuse(f"The body must be a JSON object, got {_shown(values)}.")
    return cast("dict[str, Any]", values)


def take(
    values: Mapping[str, Any], name: str, kinds: type | tuple[type, ...], what: str, default: Any
) -> Any:
    """A field of its type, or its default where it is missing or null; 3.0 is a whole number, as in JSON Schema.

    Raises:
        RefusedRequest: it is of another type.
    """
    value = values.get(name)
    if value is None:
        return default
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    if kinds is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        refuse(f"{name} must be {what}, got {_shown(value)}.")
    return value


def take_number(values: Mapping[str, Any], name: str) -> float | None:
    """A field's number as a float, or None where it is missing or null; JSON has numbers that no float holds.

    Raises:
        RefusedRequest: it is none, or too large.
    """
    value = take(values, name, (int, float), "a number", None)
    if value is None:
        return None
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if number in (float("inf"), float("-inf")):
        refuse(f"{name} must be a number that a float holds, got {_shown(value)}.")
    return number


def check_names(values: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise RefusedRequest for a field that is not known, as it would have no effect; null is as if it were missing."""
    unknown = next((name for name, value in values.items() if name not in known and value is not None), None)
    if unknown is not None:
        refuse(f"{_shown(unknown)} is no field of this request; it has: {', '.join(known)}.")


@dataclass(frozen=True)
class PredictRequest:
    """A request to classify.

    Args:
        texts: tuples of one text or two.
        is_batch: whether the answer is a list of lists, as for several texts.
        truncate: whether a text that is too long is cut; else it is refused.
        raw_scores: whether scores are logits in place of probabilities.
        operating_point, threshold: when texts exit, in place of the server's rule.
        top_k: most labels in the answer; None for all.
    """

    texts: list[tuple[str, ...]]
    is_batch: bool
    truncate: bool = True
    raw_scores: bool = False
    operating_point: str | None = None
    threshold: float | None = None
    top_k: int | None = None


PREDICT_FIELDS = (
    "inputs",
    "truncate",
    "raw_scores",
    "operating_point",
    "threshold",
    "parameters",
    "truncation_direction",
)


def read_predict(
    values: Mapping[str, Any], *, text_pairs: bool | None, max_batch: int, truncation_side: str = "right"
) -> PredictRequest:
    """A request to classify in the form of text-embeddings-inference, or of the hub's inference API.

    `inputs` is a text, a list of texts, or a list of lists of one text or two. Of a model for pairs a list of two texts
    is a pair, as in text-embeddings-inference. With `parameters`, as `InferenceClient` sends them, the answer is a list
    of lists also for one text.

    Args:
        values: of the body.
        text_pairs: whether the model takes pairs; None where it does not say.
        max_batch: texts at most.
        truncation_side: where the model's tokenizer cuts, left or right.

    Raises:
        RefusedRequest: a field is wrong (422), or there are too many texts (413).
    """
    check_names(values, PREDICT_FIELDS)
    if "inputs" not in values:
        refuse("inputs must be given: a text, a list of texts, or a list of lists of one text or two.")
    texts, is_batch = _texts(values["inputs"], bool(text_pairs), max_batch)
    parameters = take(values, "parameters", dict, "an object", None)
    check_names(parameters or {}, ("top_k", "function_to_apply"))
    direction = take(values, "truncation_direction", str, "a string", truncation_side)
    if direction.lower() != truncation_side:
        side = truncation_side.capitalize()
        refuse(f'truncation_direction must be "{side}", as this model cuts, got {_shown(direction)}.')
    return PredictRequest(
        texts,
        is_batch or parameters is not None,
        take(values, "truncate", bool, "true or false", True),
        take(values, "raw_scores", bool, "true or false", False) or _raw(parameters or {}),
        take(values, "operating_point", str, "a string", None),
        take_number(values, "threshold"),
        _top_k(parameters or {}),
    )


def _raw(parameters: Mapping[str, Any]) -> bool:
    function = take(parameters, "function_to_apply", str, "a string", "softmax")
    if function not in ("softmax", "none"):
        refuse(f'function_to_apply must be "softmax" or "none", got {_shown(function)}.')
    return function == "none"


def _top_k(parameters: Mapping[str, Any]) -> int | None:
    value = take(parameters, "top_k", int, "a whole number", None)
    if value is not None and value < 1:
        refuse(f"top_k must be at least 1, got {_shown(value)}.")
    return value


def _texts(inputs: object, is_pair_model: bool, max_batch: int) -> tuple[list[tuple[str, ...]], bool]:
    """Texts, and whether they are a batch; of too many none is looked at, as other requests wait meanwhile."""
    if isinstance(inputs, str):
        return [(inputs,)], False
    if not isinstance(inputs, list) or not inputs:
        refuse(
            "inputs must be a text, a list of texts, or a list of lists of one text or two, and not empty, got "
            f"{_shown(inputs)}."
        )
    items = cast("list[object]", inputs)
    if is_pair_model and all(isinstance(item, str) for item in items):
        if len(items) != 2:
            refuse(f"inputs must be two texts, or a list of lists of two, for this model, got {len(items)}.")
        return [tuple(cast("list[str]", items))], False
    if len(items) > max_batch:
        refuse(f"inputs must hold at most {max_batch} texts, got {len(items)}. Send several requests.", 413)
    found: list[tuple[str, ...]] = []
    for place, item in enumerate(items, start=1):
        parts = [item] if isinstance(item, str) else cast("list[object]", item)
        if not isinstance(parts, list) or len(parts) not in (1, 2):
            refuse(f"Item {place} of inputs must be a text or a list of one text or two, got {_shown(item)}.")
        if not all(isinstance(part, str) for part in parts):
            refuse(f"Item {place} of inputs must hold strings, got {_shown(item)}.")
        found.append(tuple(cast("list[str]", parts)))
    if len({len(parts) for parts in found}) > 1:
        refuse("inputs must be all single texts or all pairs, got both.")
    return found, True


def _shown(value: object) -> str:
    """A value for a message: JSON again, cut, and of ASCII alone."""
    try:
        text = (
            json.dumps(value) if not isinstance(value, int) or abs(value) < 10**40 else "a very large number"
        )
    except RecursionError:  # it is nested deeper than it was read
        text = "a value that is nested too deep"
    return text if len(text) <= 60 else text[:57] + "..."
