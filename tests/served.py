"""Servers in a thread of the test process, on the loopback address, and pools that wait until they may go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from consistentee.inference.encoder.layer_pool import Pool, PoolAnswer
from consistentee.serving.server import HttpServer


@contextmanager
def running(app: Any, **how: Any) -> Iterator[str]:
    """A server's URL; it ends with the block."""
    server = HttpServer(app, host="127.0.0.1", port=0, **how)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        for _ in range(500):  # listening from the start, it answers once the application has started
            if httpx.get(f"{server.url}/ready", timeout=10).status_code == 200:
                break
        yield server.url
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


class HeldPool:
    """A pool whose steps wait for `go`, so that a test decides what has been computed when.

    Args:
        pool: that computes.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.go = threading.Semaphore(0)
        self.free = threading.Event()

    def step(self) -> tuple[list[PoolAnswer], int]:
        if not self.free.is_set() and not self.go.acquire(timeout=0.05):
            return [], 0
        return self.pool.step()

    def let_go(self) -> None:
        """Never wait again."""
        self.free.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    def __len__(self) -> int:
        return len(self.pool)


def failing(pool: Callable[[], Pool], times: int) -> Callable[[], Pool]:
    """Makes pools of which the first ones raise at their first step."""
    left = [times]

    def make() -> Pool:
        made: Any = HeldPool(pool())
        made.let_go()
        if left[0]:
            left[0] -= 1

            def step() -> tuple[list[PoolAnswer], int]:
                raise RuntimeError("a layer broke")

            made.step = step
        return made

    return make
