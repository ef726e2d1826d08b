"""How fast texts are answered, as the last answers tell."""

from __future__ import annotations

import time
from collections import deque

RECENT, PACE_ANSWERS = 256, 64
"""The last answers, by which the pace is told; fewer than the second number tell none."""


class AnswerPace:
    """What the last answers say about how long texts will wait.

    Only those count that were given under a similar load: a server with little to do answers as slowly as it is asked.
    """

    def __init__(self) -> None:
        self._answers: deque[tuple[float, int]] = deque(maxlen=RECENT)  # seconds since the one before, load
        self._last: float | None = None

    def answered(self, load: int) -> None:
        """Count an answer.

        Args:
            load: texts that waited for theirs, this one included.
        """
        now = time.perf_counter()
        if self._last is not None:
            self._answers.append((now - self._last, load))
        self._last = now

    def rest(self) -> None:
        """Nobody waits any more: the time until the next text comes is nobody's."""
        self._answers.clear()
        self._last = None

    def seconds(self, load: int) -> float:
        """Until so many texts are answered; 0 where too little is known of loads of half as many and more."""
        similar = [seconds for seconds, before in self._answers if 2 * before >= load]
        if self._last is None or len(similar) < PACE_ANSWERS:
            return 0.0
        return load * (sum(similar) + time.perf_counter() - self._last) / len(similar)
