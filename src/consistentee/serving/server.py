"""An application on a socket, until it is asked to end: then who waits is answered first."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from consistentee.errors import SettingError, require_extra

DRAIN_SECONDS = 30
"""Time that answers on their way have after SIGTERM."""

MAX_CONNECTIONS = 4096
BACKLOG = 2048


class HttpServer:
    """Listens from the start, and answers while it runs.

    Args:
        app: of ASGI.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        drain_seconds: time that answers on their way have once it is to end.

    Attributes:
        url: where it listens.

    Raises:
        MissingExtraError: uvicorn is not installed.
        SettingError: the address cannot be listened on.
    """

    def __init__(self, app: Any, *, host: str, port: int, drain_seconds: int = DRAIN_SECONDS) -> None:
        uvicorn: Any = require_extra("serve", "uvicorn")
        config = uvicorn.Config(
            app,
            log_config=None,  # its own would shut down whatever handlers this process has
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=drain_seconds,
            timeout_keep_alive=30,
        )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SettingError(
                f"host and port must be free to listen on, got {host}:{port} ({reason})."
            ) from None
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(config)
        self._server.capture_signals = self._signals

    def run(self) -> None:
        """Answer until `stop` or, in the main thread, SIGTERM or SIGINT."""
        self._server.run(sockets=[self._socket])

    def stop(self, *_: Any) -> None:
        """End once who waits is answered; the second time at once."""
        self._server.force_exit = self._server.should_exit
        self._server.should_exit = True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """In place of uvicorn's, which raises the signal again once all is answered."""
        in_main = threading.current_thread() is threading.main_thread()
        caught = (signal.SIGTERM, signal.SIGINT) if in_main else ()
        before = {number: signal.getsignal(number) for number in caught}
        for number in caught:
            signal.signal(number, self.stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
