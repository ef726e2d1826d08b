"""An application on a socket, until it is asked to end: then who waits is answered first."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from consistentee.errors import SettingError, require_extra
from consistentee.serving.connections import bounded_protocol, room_for_connections

DRAIN_SECONDS = 30
"""Time that answers on their way have after SIGTERM."""

QUIET_SECONDS = 60.0
"""Between two lines of the log that say the same of some connection or other."""

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a server to end; SIGHUP says that its terminal was closed."""

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
            http=bounded_protocol(room_for_connections()),
            ws="none",  # it has none, and old uvicorns import a deprecated part of websockets for it
            lifespan="on",
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
        self._said: dict[str, float] = {}
        self._server = uvicorn.Server(config)
        self._server.capture_signals = self._signals

    def run(self) -> None:
        """Answer until `stop` or, in the main thread, a signal of `ENDING`; not SIGHUP where that is ignored."""
        log = logging.getLogger("uvicorn.error")
        log.addFilter(self._is_news)
        try:
            self._server.run(sockets=[self._socket])
        finally:
            log.removeFilter(self._is_news)

    def stop(self, *_: Any) -> None:
        """End once who waits is answered; the second time at once."""
        self._server.force_exit = self._server.should_exit
        self._server.should_exit = True

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Whether a warning was not just logged: under overload each refused connection and broken request has one."""
        if record.levelno > logging.WARNING:
            return True
        now, text = time.monotonic(), str(record.msg)
        is_news = now - self._said.get(text, -QUIET_SECONDS) >= QUIET_SECONDS
        if is_news:
            self._said[text] = now
        return is_news

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """In place of uvicorn's, which raises the signal again once all is answered."""
        in_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in ENDING if in_main}
        hang_up: Any = getattr(signal, "SIGHUP", None)
        if before.get(hang_up) is signal.SIG_IGN:  # under nohup it outlives its terminal
            del before[hang_up]
        for number in before:
            signal.signal(number, self.stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
