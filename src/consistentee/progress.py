"""How far long work has come: a bar on a terminal, elsewhere a line on standard error about every 30 seconds.

Work that is done before the first line is due says nothing. `TQDM_DISABLE=1` silences both.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


class Pace:
    """When a line is due, over all loops of a process: many short ones in turn say as much as a long one.

    Args:
        every: seconds from one line to the next.
        clock: tells the time in seconds.
    """

    def __init__(self, every: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self.clock = every, clock
        self._lock = threading.Lock()
        self._active, self._last, self._ended = 0, 0.0, -math.inf

    def begin(self) -> None:
        """Work begins; after a pause the first line is due as late as at the start."""
        with self._lock:
            now = self.clock()
            if not self._active and now - self._ended > self.every:
                self._last = now
            self._active += 1

    def end(self) -> None:
        """Work ends."""
        with self._lock:
            self._active -= 1
            self._ended = self.clock()

    def due(self) -> bool:
        """Whether it is time for a line; who is told so writes it."""
        with self._lock:
            now = self.clock()
            if now - self._last < self.every:
                return False
            self._last = now
            return True

    def seconds_left(self) -> float:
        """Until the next line is due."""
        return max(0.0, self._last + self.every - self.clock())


PACE = Pace()


class Progress:
    """How far a piece of work is; this one shows nothing."""

    def update(self, count: int = 1, figures: Mapping[str, float] | None = None) -> None:
        """So much more is done, and these are the latest figures."""

    def close(self) -> None:
        """The work is over."""


class Bar(Progress):
    """A bar on a terminal; arguments as of `show_progress`."""

    def __init__(self, title: str, total: float | None, unit: str, initial: int) -> None:
        self._bar = tqdm(total=total, desc=title, unit=unit, initial=initial, leave=False)

    def update(self, count: int = 1, figures: Mapping[str, float] | None = None) -> None:
        """Move the bar."""
        self._bar.update(count)
        if figures:
            self._bar.set_postfix(_written(figures), refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


class Lines(Progress):
    """A line on standard error now and then, also while a single step takes long.

    Args:
        title, total, unit, initial: as of `show_progress`.
        pace: when a line is due.
        watch: whether a thread looks after steps that take long.
    """

    def __init__(
        self,
        title: str,
        total: float | None,
        unit: str,
        initial: int,
        pace: Pace | None = None,
        watch: bool = True,
    ) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._pace = pace or PACE
        self._initial = self._done = initial
        self._figures: Mapping[str, float] = {}
        self._closed = threading.Event()
        self._pace.begin()
        self._start = self._pace.clock()
        if watch:
            threading.Thread(target=self._watch, daemon=True).start()

    def update(self, count: int = 1, figures: Mapping[str, float] | None = None) -> None:
        """Count, and write a line if one is due."""
        self._done += count
        self._figures = dict(figures or {})
        self.look()

    def look(self) -> None:
        """Write a line if one is due."""
        if self._pace.due():
            with suppress(
                OSError, ValueError, AttributeError
            ):  # nobody reads it, or there is no standard error
                sys.stderr.write(self.line() + "\n")
                sys.stderr.flush()

    def line(self) -> str:
        """What there is to say now.

        Example:
            >>> Lines("warm-up", 500, "step", 0, watch=False).line()
            'warm-up: 0 of 500 steps'
        """
        units = f"{self._unit}es" if self._unit.endswith("ch") else f"{self._unit}s"
        passed, moved = self._pace.clock() - self._start, self._done - self._initial
        ends = self._total is not None and self._done <= self._total
        parts = [f"{self._title}: {self._done:,}{f' of {self._total:,.0f}' if ends else ''} {units}"]
        parts += [f"{name} {value}" for name, value in _written(self._figures).items()]
        if passed > 0 and moved > 0:
            if ends and self._total is not None:
                parts.append(f"about {duration((self._total - self._done) * passed / moved)} left")
            else:
                parts.append(f"{moved / passed:,.1f} a second")
        return ", ".join(parts)

    def close(self) -> None:
        """Say no more."""
        self._closed.set()
        self._pace.end()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, max(0.2, self._pace.seconds_left()))):
            self.look()


class TimedLines(Lines):
    """Lines about work that is known by the time it takes.

    Args:
        title: what is done.
        seconds: that it will take, about.
        pace, watch: as of `Lines`.
    """

    def __init__(self, title: str, seconds: float, pace: Pace | None = None, watch: bool = True) -> None:
        super().__init__(title, seconds, "s", 0, pace, watch)
        self._doing, self._seconds = "", seconds

    def now_doing(self, what: str) -> None:
        """What the next line is to name; write one if it is due."""
        self._doing = what
        self.look()

    def line(self) -> str:
        """What there is to say now."""
        passed = self._pace.clock() - self._start
        doing = f", {self._doing}" if self._doing else ""
        left = max(0.0, self._seconds - passed)
        return f"{self._title}{doing}: {duration(passed)} of about {duration(self._seconds)}, {duration(left)} left"


@contextmanager
def show_progress(
    title: str, total: float | None = None, *, unit: str = "step", initial: int = 0, shown: bool = True
) -> Iterator[Progress]:
    """Show how far the work in the block is.

    Args:
        title: what is done.
        total: how much there is to do, in units; None where nobody knows.
        unit: what is counted, in the singular.
        initial: what was done before.
        shown: whether to show anything.
    """
    if not shown or os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        shower = Progress()
    elif sys.stderr is not None and sys.stderr.isatty():
        shower = Bar(title, total, unit, initial)
    else:
        shower = Lines(title, total, unit, initial)
    try:
        yield shower
    finally:
        shower.close()


def track(
    items: Iterable[T], title: str, *, total: int | None = None, unit: str = "batch", shown: bool = True
) -> Iterator[T]:
    """The items, one by one, while showing how many have been worked on; arguments as of `show_progress`."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with show_progress(title, total, unit=unit, shown=shown) as shower:
        for item in items:
            yield item
            shower.update()


def duration(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> duration(8.4), duration(150), duration(7260)
        ('8 s', '3 min', '2 h 1 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def rows_about(file: str) -> int | None:
    """About how many rows a file has, by its lines; None where they cannot be counted quickly."""
    path = Path(file)
    if not path.is_file() or path.suffix.lower() not in ("", ".txt", ".csv", ".tsv", ".jsonl"):
        return None
    with path.open("rb") as stream:
        lines = sum(part.count(b"\n") for part in iter(lambda: stream.read(1 << 20), b""))
    return max(1, lines - (path.suffix.lower() in (".csv", ".tsv")))


def _written(figures: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.3f}" for name, value in figures.items()}
