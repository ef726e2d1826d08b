"""Waiting for something, but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def within(work: Awaitable[Result], seconds: float) -> Result:
    """What the work gives; it is cancelled where it takes longer, or who waits is cancelled.

    `asyncio.wait_for` loses, before Python 3.12, a cancellation that comes in the moment in which the work is done.

    Args:
        work: to be done.
        seconds: that it has.

    Raises:
        asyncio.TimeoutError: it took longer.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(_see)
    try:
        await asyncio.wait((task,), timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not task.done():
        task.cancel()
        raise asyncio.TimeoutError
    return task.result()


def _see(task: asyncio.Future[Result]) -> None:
    """Take note of an error that nobody waits for any more."""
    if not task.cancelled():
        task.exception()
