"""OpenAI's `/v1/completions` and `/v1/chat/completions`: what is read of a request, and its answers, streamed or whole.

`exit_layers` beside a choice's text (in a stream: beside each piece) are the layers at which its tokens exited, and
`usage` has their mean. Greedy unless `temperature` is above 0 (below 1e-5 that is the same). `threshold` and
`mode` are ours.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from consistentee.data.conversations import joined_parts
from consistentee.data.templates import Turn
from consistentee.errors import DataError, require_extra
from consistentee.pipelines.decoding_options import LEAST_TEMPERATURE, DecodingOptions
from consistentee.pipelines.generator import TextGenerator
from consistentee.serving.app import (
    Handler,
    Receive,
    Send,
    build_app,
    error_body,
    json_bytes,
    json_page,
    send_json,
    unless_gone,
)
from consistentee.serving.descriptions import describe_generator
from consistentee.serving.generation import GeneratorService, TokenEvent
from consistentee.serving.requests import (
    NEUTRAL_FIELDS,
    RefusedRequest,
    check_names,
    read_json,
    refuse,
    shutting_down,
    take,
    take_number,
)

MOST_STOPS = 16
_SHARED = (
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "threshold",
    "mode",
    "criterion",
    "user",
)
_REASONS = {"end": "stop", "stop": "stop", "length": "length"}


@dataclass
class _Text:
    """One answer as it grows."""

    pieces: list[str] = field(default_factory=list[str])
    exit_layers: list[int] = field(default_factory=list[int])
    reason: str = "length"


@dataclass(frozen=True)
class TextRequest:
    """A request to write.

    Args:
        prompts: (prompts, tokens).
        limits: (prompts,) the most tokens of each text.
        options: how to write.
        is_chat: whether it is a conversation.
        is_stream: whether tokens are sent as they come.
        with_usage: whether a stream ends with the usage.
        accepted: when it was, of `time.perf_counter`.
    """

    prompts: list[list[int]]
    limits: list[int]
    options: DecodingOptions
    is_chat: bool
    is_stream: bool
    with_usage: bool
    accepted: float


async def read_text_request(
    values: Mapping[str, Any], service: GeneratorService, *, is_chat: bool
) -> TextRequest:
    """A request, its prompts tokenized.

    Raises:
        RefusedRequest: a field is wrong or not supported (422), there are too many prompts or tokens (413), the queue
            is full (429), or tokenizing took longer than the deadline (504).
    """
    accepted = time.perf_counter()
    own = ("messages", "max_completion_tokens") if is_chat else ("prompt",)
    check_names(values, (*own, *_SHARED, *NEUTRAL_FIELDS))
    for name, kept in NEUTRAL_FIELDS.items():
        if values.get(name) is not None and values[name] not in kept:
            refuse(f"{name} is not supported: leave it out.")
    if not is_chat and values.get("logprobs") == 0 and values["logprobs"] is not False:
        refuse("logprobs is not supported: leave it out.")  # 0 asks for those of the tokens that were taken
    generator = service.generator
    options = _options(values, generator.check(DecodingOptions()).mode)
    try:
        options = generator.check(options)
    except ValueError as error:
        told = str(error).replace(f'"{generator.saved.name}"', f'"{service.name}"')
        refuse(told.replace("--threshold", "threshold"))
    try:
        if is_chat:
            turns = _turns(values.get("messages"), service.limits.max_tokens)
            prompts = await service.encoded(
                lambda generator: [generator.encode_conversation(turns)],
                characters=[sum(len(text) for _, text in turns)],
                accepted=accepted,
            )
        else:
            texts = _prompts(values.get("prompt"), service.limits.max_batch)
            prompts = await service.encoded(
                lambda generator: [
                    _encoded_text(generator, text, place) for place, text in enumerate(texts, start=1)
                ],
                characters=[len(text) for text in texts],
                accepted=accepted,
            )
    except ValueError as error:
        refuse(str(error))
    longest = take(values, "max_tokens", int, "a whole number", None)
    if is_chat:
        longest = take(values, "max_completion_tokens", int, "a whole number", longest)
    if longest is not None and longest < 1:
        refuse(f"max_tokens must be at least 1, got {max(longest, -(10**15))}.")
    limits = [_limit(len(prompt), longest, options, service) for prompt in prompts]
    if sum(map(len, prompts)) > service.limits.max_tokens:
        refuse(f"prompts must have at most {service.limits.max_tokens} tokens together.", 413)
    is_stream = take(values, "stream", bool, "true or false", False)
    stream_options = take(values, "stream_options", dict, "an object", {})
    check_names(stream_options, ("include_usage", "include_obfuscation"))
    if take(stream_options, "include_obfuscation", bool, "true or false", False):
        refuse("include_obfuscation is not supported: leave it out.")
    with_usage = take(stream_options, "include_usage", bool, "true or false", False)
    return TextRequest(prompts, limits, options, is_chat, is_stream, with_usage, accepted)


def _encoded_text(generator: TextGenerator, text: str, place: int) -> list[int]:
    """Token ids of a text to go on with; an error names its place among the prompts."""
    try:
        return generator.encode_text(text)
    except DataError as error:
        raise DataError(error.problem, row=place, unit="prompt", remedy=error.remedy) from error


def _limit(
    prompt_tokens: int, longest: int | None, options: DecodingOptions, service: GeneratorService
) -> int:
    """The most new tokens behind a prompt."""
    room = service.generator.saved.context_length - prompt_tokens
    wanted = longest or min(options.max_new_tokens or 1, max(1, room))
    if wanted > room:
        refuse(
            f"prompt and max_tokens must fit into {service.generator.saved.context_length} tokens, got "
            f"{prompt_tokens} of the prompt and {min(wanted, 10**15)} new ones."
        )
    return wanted


def _options(values: Mapping[str, Any], saved_mode: str | None) -> DecodingOptions:
    temperature, top_p, threshold = (
        take_number(values, name) for name in ("temperature", "top_p", "threshold")
    )
    seed = take(values, "seed", int, "a whole number", None)
    stop = take(values, "stop", (str, list), "a string or a list of strings", [])
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MOST_STOPS or not all(isinstance(text, str) and text for text in stops):
        refuse(f"stop must hold at most {MOST_STOPS} strings of at least one character.")
    if temperature is None and (top_p or 1) != 1:
        refuse("top_p goes with a temperature: without one the likeliest token is taken. Give a temperature.")
    temperature = 0.0 if temperature is None else temperature
    draws = not 0 <= temperature < LEAST_TEMPERATURE
    if not draws and not 0 <= (top_p or 0) <= 1:  # else it changes nothing
        refuse("top_p must be in [0, 1].")
    mode = take(values, "mode", str, "a string", None)
    if draws and (mode or saved_mode) == "lossless":
        refuse(
            f'temperature must be 0 in mode "lossless", which verifies greedy text, got {temperature:g}. '
            "Leave it out, or take another mode."
        )
    try:
        return DecodingOptions(
            mode=mode,
            criterion=take(values, "criterion", str, "a string", None),
            threshold=threshold,
            do_sample=draws,
            temperature=temperature if draws else None,
            top_p=None if not draws or top_p == 1 else top_p,
            seed=seed if draws else None,
            stop=stops,
        )
    except ValueError as error:
        refuse(str(error))


def _prompts(prompt: object, most: int) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        refuse("prompt must be a string or a list of strings.")
    if len(prompts) > most:
        refuse(f"prompt must hold at most {most} prompts, got {len(prompts)}. Send several requests.", 413)
    return cast("list[str]", prompts)


def _turns(messages: object, most: int) -> list[Turn]:
    """The turns of a conversation, of which the last is the user's; each has a token at least."""
    if not isinstance(messages, list) or not messages:
        refuse("messages must be a list of messages, and not empty.")
    if len(cast("list[object]", messages)) > most:
        refuse(
            f"messages must be at most {most}, as many as tokens, got {len(cast('list[object]', messages))}.",
            413,
        )
    turns: list[Turn] = []
    for place, message in enumerate(cast("list[object]", messages), start=1):
        if not isinstance(message, dict):
            refuse(f"Message {place} must be an object with role and content.")
        values = cast("dict[str, Any]", message)
        check_names(values, ("role", "content", "name"))
        role = {"developer": "system"}.get(str(values.get("role")), values.get("role"))
        if role not in ("system", "user", "assistant"):
            refuse(f"The role of message {place} must be system, developer, user or assistant.")
        turns.append((str(role), _content(values.get("content"), place)))
    roles = [role for role, _ in turns if role != "system"]
    systems = sum(role == "system" for role, _ in turns)
    expected = ["user", "assistant"] * len(roles)
    in_front = all(role == "system" for role, _ in turns[:systems])
    if systems > 1 or not in_front or len(roles) % 2 == 0 or roles != expected[: len(roles)]:
        refuse(
            "messages must be of user and assistant in turn, one of system before them, the last one a user's."
        )
    return turns


def _content(content: object, place: int) -> str:
    """A message's text: a string, or OpenAI's list of parts of text, which are put together as in training."""
    text = joined_parts(content)
    if not isinstance(text, str):
        refuse(f"The content of message {place} must be text.")
    return text


def text_handler(service: GeneratorService, *, is_chat: bool) -> Handler:
    """What answers `POST /v1/completions`, or `/v1/chat/completions`."""

    async def answer(body: bytes, send: Send) -> None:
        request = await read_text_request(read_json(body), service, is_chat=is_chat)
        found = _Answer(request, service.name)
        events = service.texts(
            request.prompts,
            request.limits,
            request.options,
            accepted=request.accepted,
            go_on=not is_chat,
        )
        if request.is_stream:
            await _send_stream(found, events, send)
        else:
            await send_json(send, await _whole(found, events))

    async def handle(body: bytes, receive: Receive, send: Send) -> None:
        await unless_gone(receive, answer(body, send))

    return handle


async def _whole(answer: _Answer, events: AsyncGenerator[TokenEvent, None]) -> dict[str, Any]:
    async with aclosing(events):
        async for event in events:
            answer.take(event)
    return answer.whole()


async def _send_stream(answer: _Answer, events: AsyncGenerator[TokenEvent, None], send: Send) -> None:
    """Send tokens as they come; what fails before the first one is an error like any other."""
    began = False

    async def say(values: Any) -> None:
        nonlocal began
        if not began:
            head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            began = True
        data = values if isinstance(values, bytes) else json_bytes(values)
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    try:
        async with aclosing(events):
            async for event in events:
                answer.take(event)
                for chunk in answer.chunks(event, is_first=not began):
                    await say(chunk)
    except asyncio.CancelledError:  # the client has gone, who hears nothing of it, or the server ends
        if not began:
            raise
        await say(error_body("generator", shutting_down()))
    except RefusedRequest as error:
        if not began:
            raise
        await say(error_body("generator", error))
    else:
        if answer.request.with_usage:
            await say({**answer.head(), "choices": [], "usage": answer.usage()})
    await say(b"[DONE]")
    await send({"type": "http.response.body", "body": b""})


class _Answer:
    """What is known of an answer, in OpenAI's forms."""

    def __init__(self, request: TextRequest, model: str) -> None:
        self.request, self._model = request, model
        self._id = f"{'chatcmpl' if request.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._texts = [_Text() for _ in request.prompts]

    def take(self, event: TokenEvent) -> None:
        """Take an event in."""
        text = self._texts[event.index]
        text.pieces.append(event.piece)
        if event.exit_layer is not None:
            text.exit_layers.append(event.exit_layer)
        if event.finish_reason is not None:
            text.reason = _REASONS[event.finish_reason]

    def head(self) -> dict[str, Any]:
        """What every object begins with."""
        kind = "text_completion"
        if self.request.is_chat:
            kind = "chat.completion.chunk" if self.request.is_stream else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def usage(self) -> dict[str, Any]:
        """Tokens, and the layers that they took."""
        layers = [layer for text in self._texts for layer in text.exit_layers]
        prompt = sum(map(len, self.request.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": len(layers),
            "total_tokens": prompt + len(layers),
            "exit_layers": layers,
            "mean_exit_layer": sum(layers) / len(layers) if layers else None,
        }

    def whole(self) -> dict[str, Any]:
        """The answer at once."""
        choices: list[dict[str, Any]] = []
        for index, text in enumerate(self._texts):
            written = "".join(text.pieces)
            said: dict[str, Any] = {"text": written}
            if self.request.is_chat:
                said = {"message": {"role": "assistant", "content": written}}
            choices.append(_choice(index, said, text.exit_layers, text.reason))
        return {**self.head(), "choices": choices, "usage": self.usage()}

    def chunks(self, event: TokenEvent, *, is_first: bool) -> list[dict[str, Any]]:
        """What a stream says of an event."""
        layers = [] if event.exit_layer is None else [event.exit_layer]
        reason = None if event.finish_reason is None else _REASONS[event.finish_reason]
        said: dict[str, Any] = {"text": event.piece}
        if self.request.is_chat:
            delta = {} if reason is not None else {"content": event.piece}
            said = {"delta": {"role": "assistant", **delta} if is_first else delta}
        return [{**self.head(), "choices": [_choice(event.index, said, layers, reason)]}]


def _choice(index: int, said: dict[str, Any], layers: Sequence[int], reason: str | None) -> dict[str, Any]:
    return {"index": index, **said, "exit_layers": list(layers), "logprobs": None, "finish_reason": reason}


def generator_app(service: GeneratorService, *, more_routes: Sequence[Any] = (), **how: Any) -> Any:
    """An ASGI application for a text generator; keywords as of `build_app`."""
    listed = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "consistentee"}
    exceptions: Any = require_extra("serve", "starlette.exceptions")

    def named(model: str) -> dict[str, Any]:
        if model != service.name:
            raise exceptions.HTTPException(404, f'The model is "{service.name}", got "{model[:80]}".')
        return listed

    about = describe_generator(service.generator, name=service.name)
    handlers = {
        "/v1/completions": text_handler(service, is_chat=False),
        "/v1/chat/completions": text_handler(service, is_chat=True),
    }
    routes = [
        json_page("/v1/models", lambda: {"object": "list", "data": [listed]}),
        json_page("/v1/models/{model:path}", named),
        json_page("/layers", lambda: about),
        *more_routes,
    ]
    return build_app(service, handlers, more_routes=routes, **how)
