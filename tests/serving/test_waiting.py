"""Waiting with an end: no cancellation is lost, whatever Python's own `wait_for` does."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from consistentee.serving.app import JsonRoute, Receive, Send, unless_gone
from consistentee.serving.requests import JSON_TYPE, ServerLimits
from consistentee.serving.tokenizing import TokenizingThread
from consistentee.serving.waiting import within


def after_turns(turns: int, call: Callable[[], object]) -> None:
    """Call something on the event loop, so many of its turns later."""
    if turns:
        asyncio.get_running_loop().call_soon(after_turns, turns - 1, call)
    else:
        asyncio.get_running_loop().call_soon(call)


class _Service:
    kind = "generator"
    limits = ServerLimits()


@pytest.mark.parametrize("turns", range(5))
@pytest.mark.parametrize("part", [1, 2, 5])
def test_a_stream_that_is_cancelled_ends(part: int, turns: int) -> None:
    sent: list[Any] = []

    async def handle(_: bytes, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(50):
                await send({"type": "http.response.body", "body": b".", "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await unless_gone(receive, stream())

    async def work() -> None:
        messages = iter([{"type": "http.request", "body": b"{}"}])

        async def receive() -> Any:
            return next(messages, None) or await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == part:
                after_turns(turns, task.cancel)

        scope = {"type": "http", "headers": [(b"content-type", JSON_TYPE.encode())]}
        route: Any = JsonRoute(_Service(), handle, set())
        task = asyncio.ensure_future(route(scope, receive, send))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert part <= len(sent) <= part + 5


def test_a_cancellation_in_the_moment_in_which_the_work_is_done() -> None:
    async def work() -> None:
        done = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(within(done, 60))
        await asyncio.sleep(0)
        done.set_result("done")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())


def test_what_takes_too_long_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("endless")
            raise ConnectionError("at the end")  # nobody waits for it

    async def work() -> None:
        assert await within(asyncio.sleep(0, "done"), 60) == "done"
        with pytest.raises(asyncio.TimeoutError):
            await within(endless(), 0.01)
        with pytest.raises(asyncio.TimeoutError):
            await within(asyncio.sleep(60), 0)
        with pytest.raises(ConnectionError, match="broken"):
            await within(broken(), 60)

    async def broken() -> None:
        raise ConnectionError("broken")

    with caplog.at_level(logging.ERROR, "asyncio"):
        asyncio.run(work())
    assert ended == ["endless"]
    assert not caplog.records


def test_what_nobody_waits_for_does_not_keep_a_process() -> None:
    code = (
        "import asyncio, time\n"
        "from consistentee.serving.tokenizing import TokenizingThread\n"
        "async def work():\n"
        "    thread = TokenizingThread()\n"
        "    print(await thread.run(lambda: 7, 60))\n"
        "    try:\n"
        "        await thread.run(lambda: time.sleep(600), 0.05)\n"
        "    except asyncio.TimeoutError:\n"
        "        print('too late')\n"
        "asyncio.run(work())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["7", "too late"]), done.stderr


def test_texts_are_tokenized_in_turn_and_errors_reach_who_waits() -> None:
    ended: list[str] = []
    held = threading.Event()

    def first() -> str:
        held.wait(30)
        ended.append("first")
        return "first"

    def broken() -> str:
        raise ValueError("no such text")

    async def work() -> None:
        thread = TokenizingThread()
        waiting = asyncio.ensure_future(thread.run(first, 60))
        given_up = asyncio.ensure_future(thread.run(lambda: ended.append("given up"), 60))
        failing = asyncio.ensure_future(thread.run(broken, 60))
        await asyncio.sleep(0.05)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        await asyncio.sleep(0)
        held.set()
        with pytest.raises(ValueError, match="no such text"):
            await failing
        assert await waiting == "first"
        assert ended == ["first"]

    asyncio.run(work())
