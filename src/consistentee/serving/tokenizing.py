"""Tokenizing beside the event loop, in time.

A tokenizer serves one thread at a time, and a body of allowed size may hold it for seconds. So long texts have a thread
and a tokenizer that short ones never wait for, and the event loop waits for neither.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from consistentee.serving.waiting import within

Result = TypeVar("Result")

LONG_TEXTS = 4_000
"""Characters of a request from which its texts are long ones."""

_Work = tuple["Future[Any]", Callable[[], Any]]


class TokenizingThread:
    """Tokenizes for one request after another, in their order; who gave up before its turn is left out.

    What nobody waits for any more does not keep the process from ending.
    """

    def __init__(self) -> None:
        self._waiting: SimpleQueue[_Work | None] = SimpleQueue()
        name = "consistentee-tokenizing"
        threading.Thread(target=_tokenize, args=(self._waiting,), name=name, daemon=True).start()
        weakref.finalize(self, self._waiting.put, None)

    async def run(self, tokenize: Callable[[], Result], seconds: float) -> Result:
        """What a function gives that is called on the thread.

        Args:
            tokenize: the function.
            seconds: to wait for it, its turn included.

        Raises:
            asyncio.TimeoutError: it took longer.
        """
        future: Future[Result] = Future()
        self._waiting.put((future, tokenize))
        return await within(asyncio.wrap_future(future), max(0.0, seconds))


def _tokenize(waiting: SimpleQueue[_Work | None]) -> None:
    """Do what waits, until None does."""
    while (work := waiting.get()) is not None:
        future, tokenize = work
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(tokenize())
            except BaseException as error:
                future.set_exception(error)
        del work, future, tokenize  # nothing of it is kept until the next comes
