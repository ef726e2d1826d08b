"""The application: routes, and what stands before all of them (bearer token, sizes, counting, errors as JSON)."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from consistentee.errors import SettingError, require_extra
from consistentee.serving.metrics import ServerMetrics
from consistentee.serving.openapi import openapi_description
from consistentee.serving.playground import playground_page
from consistentee.serving.requests import (
    JSON_TYPE,
    RefusedRequest,
    ServerLimits,
    check_headers,
    shutting_down,
    too_large,
)
from consistentee.serving.waiting import within

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Result = TypeVar("Result")

OPEN_PATHS = ("/", "/health", "/ready")
"""Answered without a token: what runs the server must see whether it lives, and the playground, which holds nothing of
the model, asks for the token."""

CLIENT_GONE = 499
"""What is counted where a client went away before its answer."""

SEND_SECONDS = 30.0
"""Time that a part of an answer has to go out; a client that does not read it by then counts as gone."""

GONE_SECONDS = 1.0
"""Time in which a connection that cannot be written to is known to be closed."""

UVLOOP_CLOSED = "the handler is closed"
"""What uvloop says, in a RuntimeError, of a connection that is closed; asyncio's own loop says nothing."""

LAST_WORD_SECONDS = 2.0
"""Time in which requests that the server's end has cancelled are told so."""

SHORTEST_TOKEN = 8
"""Characters of a bearer token; a shorter one is no secret."""


class Service(Protocol):
    """A model behind an application.

    Attributes:
        kind: `classifier` or `generator`.
        name: of the model.
        limits: what is taken at most.
        metrics: what is counted.
    """

    kind: str
    name: str
    limits: ServerLimits
    metrics: ServerMetrics

    def start(self) -> None:
        """Begin to compute; call it on the event loop."""
        ...

    async def stop(self) -> None:
        """End; who still waits is refused."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether requests are computed."""
        ...


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives; it is cancelled where the client goes away before, or the server cancels this.

    Args:
        receive: of the request, whose body has been read.
        work: to be done.

    Raises:
        ClientGone: it has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait((task,))  # a stream says why it ends
        raise
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _is_gone(receive: Receive) -> bool:
    """Whether a client to whom nothing could be sent has gone; the server hears of it soon."""
    try:
        await within(_disconnected(receive), GONE_SECONDS)
    except asyncio.TimeoutError:
        return False
    return True


def json_bytes(values: Any) -> bytes:
    """JSON of ASCII alone: half characters that a client sent can be told back to it."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode("ascii")


def error_body(kind: str, error: RefusedRequest) -> dict[str, Any]:
    """An error as clients of a kind of service expect it."""
    if kind == "classifier":
        return {"error": error.message, "error_type": error.kind}
    return {"error": {"message": error.message, "type": error.kind, "code": error.status}}


async def read_body(receive: Receive, headers: Sequence[tuple[bytes, bytes]], limits: ServerLimits) -> bytes:
    """The body of a request.

    Raises:
        RefusedRequest: it is too large (413), too slow (408) or not called plain JSON (415).
        ClientGone: it never ended.
    """
    check_headers(headers, limits)

    async def whole() -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limits.max_bytes:
                raise too_large(limits)
            if not message.get("more_body"):
                return b"".join(parts)

    try:
        return await within(whole(), limits.body_seconds)
    except asyncio.TimeoutError:
        message = f"The body must arrive within {limits.body_seconds:g} seconds."
        raise RefusedRequest(408, "Validation", message) from None


def read_token(path: Path, name: str) -> bytes:
    """The bearer token of a file, without the space around it.

    Args:
        path: of the file.
        name: of the option that names it, for messages.

    Raises:
        SettingError: there is none that could be sent, or it is too short to be a secret.
    """
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise SettingError(f"{name} must be a file, got {path} ({error.strerror}).") from None
    if len(token) < SHORTEST_TOKEN or not all(33 <= byte <= 126 for byte in token):
        raise SettingError(
            f"{name} must hold at least {SHORTEST_TOKEN} printable ASCII characters without spaces: {path} does not."
        )
    return token


class Gate:
    """Stands before an application: the bearer token, and counting.

    Args:
        app: behind it.
        metrics: of the service.
        kind: of the service.
        routes: of Starlette, by whose paths requests are counted; all others are "other".
        token: that requests must bear; None for none.
    """

    def __init__(
        self, app: Any, metrics: ServerMetrics, kind: str, routes: Sequence[Any], token: bytes | None
    ) -> None:
        self._app, self._metrics, self._kind, self._token = app, metrics, kind, token
        self._routes = [(route.path_regex, route.path_format) for route in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await _not_cut_off(self._app, scope, receive, send)
            return
        start, status = time.perf_counter(), CLIENT_GONE

        async def seen(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            try:
                await send(message)
            except (OSError, RuntimeError) as error:
                # Of requests that came in one go uvicorn tells the last one alone that the client is gone.
                if UVLOOP_CLOSED not in str(error) and not await _is_gone(receive):
                    raise
            else:
                if message["type"] == "http.response.start":
                    status = message["status"]

        try:
            if self._may_pass(scope):
                await self._app(scope, receive, seen)
            else:
                error = RefusedRequest(401, "Unauthorized", "The Authorization header must bear the token.")
                await send_refusal(seen, self._kind, error, [(b"www-authenticate", b"Bearer")])
        finally:
            path = route_path(scope)
            route = next((name for regex, name in self._routes if regex.match(path)), "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - start)

    def _may_pass(self, scope: Scope) -> bool:
        if self._token is None or route_path(scope) in OPEN_PATHS:
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token)


async def _not_cut_off(app: Any, scope: Scope, receive: Receive, send: Send) -> None:
    """Let an application live; where the server ends without waiting for it, that is no failure of its own."""
    is_cut_off = False

    async def heard() -> MutableMapping[str, Any]:
        nonlocal is_cut_off
        try:
            return await receive()
        except asyncio.CancelledError:
            is_cut_off = True
            raise

    async def seen(message: MutableMapping[str, Any]) -> None:
        if not is_cut_off:
            await send(message)

    try:
        await app(scope, heard, seen)
    except asyncio.CancelledError:
        if not is_cut_off:
            raise


def route_path(scope: Scope) -> str:
    """The path of a request below the prefix that the application is mounted at (`root_path` of ASGI)."""
    path, prefix = scope["path"], scope.get("root_path", "").rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


async def send_json(
    send: Send, values: Any, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with JSON."""
    body = json_bytes(values)
    head = [(b"content-type", JSON_TYPE.encode()), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def send_refusal(
    send: Send, kind: str, error: RefusedRequest, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with an error."""
    more = [] if error.retry_after is None else [(b"retry-after", str(error.retry_after).encode())]
    await send_json(send, error_body(kind, error), error.status, [*headers, *more])


Handler = Callable[[bytes, Receive, Send], Awaitable[None]]


class JsonRoute:
    """An endpoint that takes a JSON body and answers through `send`; errors become JSON.

    Whoever does not read a part of the answer within `SEND_SECONDS` counts as gone: a reader that stands still would
    hold what it asked for, and what it waits for would be computed, without an end. Where the server cancels a request,
    as at the end of its drain, the answer is 503; a stream ends with that error.

    Args:
        service: behind it.
        handle: takes the body, `receive` (to see whether the client is still there) and `send`.
        tasks: those that answer, for as long as they do.
    """

    def __init__(self, service: Service, handle: Handler, tasks: set[Any]) -> None:
        self._service, self._handle, self._tasks = service, handle, tasks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            await self._answer(scope, receive, send)
        finally:
            self._tasks.discard(task)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = is_whole = False

        async def seen(message: MutableMapping[str, Any]) -> None:
            nonlocal began, is_whole
            began = True
            try:
                await within(send(message), SEND_SECONDS)
            except asyncio.TimeoutError:
                raise ClientGone from None
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            body = await read_body(receive, scope["headers"], self._service.limits)
            await self._handle(body, receive, seen)
        except ClientGone:
            return
        except RefusedRequest as error:
            if not began:
                await send_refusal(send, self._service.kind, error)
        except asyncio.CancelledError:  # by the server, whose time for answers on their way is over
            if not began:
                with suppress(ClientGone):
                    await send_refusal(seen, self._service.kind, shutting_down())
            if not is_whole:
                raise
        except Exception:
            _log.exception("A request failed.")
            if began:
                raise
            error = RefusedRequest(500, "Backend", "The server failed. It is written to its log.")
            await send_refusal(send, self._service.kind, error)


def json_page(path: str, values: Callable[..., Any]) -> Any:
    """A route of Starlette that answers a GET with JSON, made anew every time from the parts that the path names."""
    responses: Any = require_extra("serve", "starlette.responses")
    routing: Any = require_extra("serve", "starlette.routing")

    async def page(request: Any) -> Any:
        return responses.Response(json_bytes(values(**request.path_params)), media_type=JSON_TYPE)

    return routing.Route(path, page, methods=["GET"])


def build_app(
    service: Service,
    handlers: dict[str, Handler],
    *,
    token: bytes | None = None,
    more_routes: Sequence[Any] = (),
    on_start: Callable[[], object] = lambda: None,
) -> Any:
    """An ASGI application.

    Args:
        service: of the model; started and stopped with the application.
        handlers: what answers a POST, by path.
        token: that requests must bear; None for none.
        more_routes: of Starlette, such as a page at `/`.
        on_start: called when it is ready.

    Raises:
        MissingExtraError: starlette or prometheus-client is not installed.
    """
    applications: Any = require_extra("serve", "starlette.applications")
    routing: Any = require_extra("serve", "starlette.routing")
    responses: Any = require_extra("serve", "starlette.responses")
    exceptions: Any = require_extra("serve", "starlette.exceptions")

    def said(values: Any, status: int = 200) -> Any:
        return responses.Response(json_bytes(values), status, media_type=JSON_TYPE)

    async def health(_: Any) -> Any:
        return said({"status": "ok"})

    async def ready(_: Any) -> Any:
        return said({"status": "ready"}) if service.is_ready else said({"status": "not ready"}, status=503)

    async def metrics(_: Any) -> Any:
        return responses.Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    description = openapi_description(service.kind, service.name, service.limits, has_token=token is not None)

    async def openapi(_: Any) -> Any:
        return said(description)

    async def failed(_: Any, error: Any) -> Any:
        body = error_body(service.kind, RefusedRequest(error.status_code, "Validation", str(error.detail)))
        return responses.Response(
            json_bytes(body), error.status_code, headers=error.headers, media_type=JSON_TYPE
        )

    tasks: set[Any] = set()

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        service.start()
        on_start()
        yield
        await service.stop()
        if tasks:  # they tell the last clients that the server ends
            await asyncio.wait(tasks, timeout=LAST_WORD_SECONDS)

    async def front(_: Any) -> Any:
        return responses.Response(playground, media_type="text/html", headers=playground_headers)

    playground, playground_headers = playground_page(service.kind)
    pages = {
        "/": front,
        "/health": health,
        "/ready": ready,
        "/metrics": metrics,
        "/openapi.json": openapi,
    }
    routes = [routing.Route(path, page, methods=["GET"]) for path, page in pages.items()]
    routes += [
        # A class: Starlette hands it the request as it is.
        routing.Route(path, JsonRoute(service, handle, tasks), methods=["POST"])
        for path, handle in handlers.items()
    ]
    app = applications.Starlette(
        routes=[*routes, *more_routes],
        lifespan=lifespan,
        exception_handlers={exceptions.HTTPException: failed},
    )
    return Gate(app, service.metrics, service.kind, [*routes, *more_routes], token)
