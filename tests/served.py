"""Servers in a thread of the test process, on the loopback address, and pools that wait until they may go on."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Files; modules by their type."""

    def guess_type(self, path: Any) -> str:
        """Browsers run modules and wasm of these types only."""
        kinds = {".mjs": "text/javascript", ".wasm": "application/wasm"}
        return kinds.get(Path(path).suffix) or super().guess_type(path)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving_files(folder: Path) -> Iterator[str]:
    """The URL of a plain file server, as `python -m http.server` is one."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


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
