"""Headless Chromium for tests, driven through a pipe by its DevTools protocol; nothing beside Python is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage --disable-extensions "
    "--disable-background-networking --disable-component-update --disable-sync --remote-debugging-pipe"
)
PATIENCE = 60.0
"""Seconds to wait for an answer."""


def find_browser() -> str | None:
    """The browser's program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. What it said and asked for since it was opened is in `problems` and `requests`.

    Args:
        program: of the browser.
    """

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="consistentee-browser-")
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        to_browser, from_browser = (self._above_ten(end) for end in (to_browser, from_browser))
        null = os.open(os.devnull, os.O_RDWR)
        moves = [(null, 0), (null, 1), (null, 2), (to_browser, 3), (from_browser, 4)]
        self._pid = os.posix_spawn(
            program,
            [program, *FLAGS.split(), f"--user-data-dir={self._profile.name}", "about:blank"],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, here, there) for here, there in moves],
        )
        for end in (to_browser, from_browser, null):
            os.close(end)
        self._waiting, self._number, self._events = b"", 0, []
        self.problems: list[str] = []
        self.requests: list[str] = []
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self._ask("Target.attachToTarget", targetId=page, flatten=True)
        self._session: str | None = attached["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{part}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._out)
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)
        os.close(self._in)
        for _attempt in range(50):  # its helpers may still write to the profile
            shutil.rmtree(self._profile.name, ignore_errors=True)
            if not Path(self._profile.name).exists():
                break
            time.sleep(0.1)
        self._profile.cleanup()

    def open(
        self, page: Path | str, *, width: int, height: int = 900, dark: bool = False, script: bool = True
    ) -> None:
        """Show a file or an address.

        Args:
            page: the file, or the address.
            width, height: of the window, in pixels.
            dark: whether the reader prefers a dark page.
            script: whether scripts run.
        """
        self.problems.clear()
        self.requests.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Emulation.setScriptExecutionDisabled", value=not script)
        self._events.clear()
        url = page if isinstance(page, str) else page.resolve().as_uri()
        failure = self._ask("Page.navigate", url=url).get("errorText")
        if failure:
            raise AssertionError(f"{page}: {failure}")
        self._wait_for("Page.loadEventFired")
        self.value("1")  # what the page's script did is done

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """Press and release a key, such as ("Tab", 9)."""
        for kind in ("keyDown", "keyUp"):
            event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self._ask("Input.dispatchKeyEvent", **event, modifiers=modifiers)

    def hover(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window."""
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Save what is shown, or the whole page, as PNG."""
        clip: dict[str, Any] = {}
        if whole:
            size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        shot = self._ask("Page.captureScreenshot", captureBeyondViewport=whole, **clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    @staticmethod
    def _above_ten(end: int) -> int:
        moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
        os.close(end)
        return moved

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]

    def _wait_for(self, event: str) -> None:
        while event not in self._events:
            self._read()

    def _read(self) -> dict[str, Any]:
        """The next message of the browser; what an event says is noted."""
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._in], [], [], PATIENCE)
            if not ready:
                raise TimeoutError("The browser does not answer.")
            self._waiting += (found := os.read(self._in, 1 << 16))
            if not found:
                raise EOFError("The browser has ended.")
        first, _, self._waiting = self._waiting.partition(b"\0")
        message = json.loads(first)
        method, params = message.get("method"), message.get("params", {})
        if method is not None:
            self._events.append(method)
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.problems.append(str(params["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message
