"""Connections of clients: how many there may be, and how long one has to ask for something."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

MAX_CONNECTIONS = 4096
"""At a time, where the process may open as many files; further ones are told that the server has no room (503)."""

HEAD_SECONDS = 30.0
"""That a connection has from its beginning, or from the first byte of a later request, to send a request's head."""

REFUSED_AT_ONCE = 128
"""Connections beyond the most that are told so; further ones are closed without a word."""

OTHER_FILES = 256
"""Beside connections: the model's, the log's, pipes of workers, and connections that are refused."""

_log = logging.getLogger(__name__)


def room_for_connections() -> int:
    """How many connections this process can hold; it takes the right to as many open files as it may have."""
    try:
        import resource
    except ImportError:  # no such limit on Windows
        return MAX_CONNECTIONS
    may, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OTHER_FILES
    if may == resource.RLIM_INFINITY or may >= wanted:
        return MAX_CONNECTIONS
    raised = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    with suppress(OSError, ValueError):  # macOS has a bound of its own below the one it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, most))
        may = raised
    room = min(MAX_CONNECTIONS, may - min(OTHER_FILES, may // 2))
    if room < MAX_CONNECTIONS:
        _log.warning(
            "At most %d connections are held at a time: this process may open %d files. Raise that (ulimit -n) for up "
            "to %d.",
            room,
            may,
            MAX_CONNECTIONS,
        )
    return room


def bounded_protocol(most: int) -> Any:
    """Uvicorn's protocol, with these bounds.

    Args:
        most: connections that are answered at a time.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class BoundedProtocol(base):
        _too_late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            others = len(self.connections) - 1
            self.limit_concurrency = 0 if others >= most else None  # 0: whatever it asks is answered with 503
            if others >= most + REFUSED_AT_ONCE:
                transport.abort()
                return
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._too_late is None:
                self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait_for_head(self) -> None:
            self._too_late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._too_late is not None:
                self._too_late.cancel()
                self._too_late = None

    return BoundedProtocol
