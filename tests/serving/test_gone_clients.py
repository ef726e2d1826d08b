"""Clients that go away, at any moment: nothing of theirs stays, and nobody is told of an error that is none."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from consistentee.serving import app as app_module
from consistentee.serving.app import Gate, JsonRoute, Receive, Send, send_json
from consistentee.serving.metrics import ServerMetrics
from consistentee.serving.requests import JSON_TYPE, RefusedRequest, ServerLimits

CLOSED = RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
"""What uvloop says where uvicorn writes to a connection that is closed."""
BROKEN = OSError(32, "Broken pipe")


def counted(metrics: ServerMetrics) -> list[str]:
    """The statuses of the requests so far."""
    lines = metrics.text().decode().splitlines()
    return [line.split('"')[3] for line in lines if line.startswith("consistentee_requests_total{")]


def answered_to_a_closed_connection(answer: Any, error: Exception, *, tells: bool) -> ServerMetrics:
    """The counters of an application that answers a client whose connection cannot be written to any more.

    Args:
        answer: of the route, a value or an error.
        error: of what is written.
        tells: whether the server tells of its end soon.
    """
    metrics = ServerMetrics(1, "tiny")
    service: Any = SimpleNamespace(kind="classifier", limits=ServerLimits())

    async def handle(_: bytes, receive: Receive, send: Send) -> None:
        if isinstance(answer, Exception):
            raise answer
        await send_json(send, answer)

    async def work() -> None:
        told, messages = asyncio.Event(), iter([{"type": "http.request", "body": b"{}"}])

        async def receive() -> Any:
            if message := next(messages, None):
                return message
            await told.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            if told.is_set():
                return
            if tells:
                asyncio.get_running_loop().call_later(0.01, told.set)
            raise error

        scope = {"type": "http", "path": "/", "headers": [(b"content-type", JSON_TYPE.encode())]}
        await Gate(JsonRoute(service, handle, set()), metrics, "classifier", [], None)(scope, receive, send)

    asyncio.run(work())
    return metrics


@pytest.mark.parametrize("error, tells", [(CLOSED, True), (CLOSED, False), (BROKEN, True)])
@pytest.mark.parametrize("answer", ["done", RefusedRequest(422, "Validation", "It is wrong.")])
def test_an_answer_to_who_has_just_gone_is_no_error(
    answer: Any, error: Exception, tells: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        metrics = answered_to_a_closed_connection(answer, error, tells=tells)
    assert counted(metrics) == ["499"]
    assert not caplog.records


def test_an_answer_that_cannot_be_sent_to_who_is_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "GONE_SECONDS", 0.01)
    with pytest.raises(RuntimeError, match="Unexpected ASGI message"):
        answered_to_a_closed_connection("done", RuntimeError("Unexpected ASGI message"), tells=False)
