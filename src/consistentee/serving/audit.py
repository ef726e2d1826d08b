"""Whether answers at exits still agree with full depth: a share of the traffic is looked at again.

A share of the texts, drawn at random, goes on through the layers that it skipped after its answer has gone out. Whether
the last layer says the same class is a loss of 0 or 1; `LossBounds` bounds its expectation at all times. Where the
lower bound exceeds what the operating point's certificate allows, the traffic is proven to be unlike the rows that it
was calibrated on, and the server takes the next safer point, where counting begins anew. What was promised holds there
too: whether that point has no certificate or one that allows more, it is left by the strictest one so far.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from consistentee.errors import SettingError
from consistentee.functional.confidence_sequences import LossBounds
from consistentee.serving.points import ServedPoint, safer_point

AUDIT_CONFIDENCE = 0.95
"""Of the bounds where a certificate names none."""


class Auditor:
    """Draws what is looked at, and keeps the point in force. For one thread.

    Args:
        points: of the server.
        point: to begin with.
        share: of the texts at this point, in [0, 1].
        seed: of the draws; None for one that nobody knows.

    Attributes:
        point: in force.
        allowed: disagreement by the strictest certificate of the points so far; None where none had one.
        confidence: of that certificate.
        bounds: of the disagreement at this point.
        steps_back: points that were left, with their bounds.

    Raises:
        SettingError: a share out of its range.
    """

    def __init__(
        self,
        points: Mapping[str, ServedPoint],
        point: ServedPoint,
        share: float,
        *,
        seed: int | None = None,
    ) -> None:
        if not 0 <= share <= 1:
            raise SettingError(f"audit must be a share of the texts in [0, 1], got {share:g}.")
        self._points, self._rng = points, np.random.default_rng(seed)
        self.share = share
        self.allowed: float | None = None
        self.confidence: float | None = None
        self._take(point)
        self.steps_back: list[tuple[ServedPoint, LossBounds]] = []

    @property
    def watches(self) -> bool:
        """Whether anything is looked at: at full depth there is nothing to compare."""
        return self.share > 0 and self.point.max_disagreement != 0

    def draws(self, point: ServedPoint) -> bool:
        """Whether a text that exits by this point is looked at again."""
        return point == self.point and self.watches and bool(self._rng.random() < self.share)

    def add(self, point: ServedPoint, disagrees: bool) -> bool:
        """Take in what full depth said about a text.

        Args:
            point: by which it exited; a text of a point that is no longer in force does not count.
            disagrees: whether full depth says another class.

        Returns:
            Whether the server has stepped back by it.
        """
        if point != self.point:
            return False
        self.bounds.add(disagrees)
        if self.allowed is None or self.bounds.lower <= self.allowed:
            return False
        self.steps_back.append((point, self.bounds))
        self._take(safer_point(self._points, point))
        return True

    def _take(self, point: ServedPoint) -> None:
        """Another point is in force."""
        self.point = point
        promised = point.max_disagreement
        if promised is not None and (self.allowed is None or promised <= self.allowed):
            self.allowed, self.confidence = promised, point.confidence
        confidence = self.confidence
        self.bounds = LossBounds(AUDIT_CONFIDENCE if confidence is None or confidence >= 1 else confidence)
