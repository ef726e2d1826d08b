"""Tokenizing beside the event loop, in time.

A tokenizer serves one thread at a time, and a body of allowed size may hold it for seconds. So long texts have a thread
and a tokenizer that short ones never wait for, and the event loop waits for neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from consistentee.serving.waiting import within

Result = TypeVar("Result")

LONG_TEXTS = 4_000
"""Characters of a request from which its texts are long ones."""


class TokenizingThread:
    """Tokenizes for one request after another, in their order; who gave up before its turn is left out."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="consistentee-tokenizing")

    async def run(self, tokenize: Callable[[], Result], seconds: float) -> Result:
        """What a function gives that is called on the thread.

        Args:
            tokenize: the function.
            seconds: to wait for it, its turn included.

        Raises:
            asyncio.TimeoutError: it took longer.
        """
        future = asyncio.get_running_loop().run_in_executor(self._thread, tokenize)
        return await within(future, max(0.0, seconds))
