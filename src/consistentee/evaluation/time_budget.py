"""How much of a benchmark fits into a time: rows, repetitions, and which batch sizes, from what one row costs here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

LEAST_REPEATS = 3
"""Repetitions that are left at least, for a median and quartiles that mean something."""

OVERRUN = 1.5
"""A batch size whose least measurement takes longer than its share of the time by this is left out."""


@dataclass(frozen=True)
class TimeBudget:
    """A time to keep to, and what may be chosen for it.

    Args:
        seconds: to keep to; infinite where nothing is to be chosen.
        amount: whether fewer rows (new tokens, of text generators) than given may be measured.
        repeats: whether fewer repetitions than given may be made, `LEAST_REPEATS` at least.
        sizes: whether batch sizes may be left out that do not fit.
    """

    seconds: float
    amount: bool = True
    repeats: bool = True
    sizes: bool = True


class Planner:
    """Shares a time budget out among the batch sizes that are measured in turn.

    Args:
        budget: None measures all there is, whatever it takes.
        sizes: how many batch sizes (modes) there are.
        repeats: repetitions that are wanted.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        budget: TimeBudget | None,
        sizes: int,
        repeats: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.budget, self._left, self._repeats, self._clock = budget, sizes, repeats, clock
        self._start = clock()

    def share(self) -> float:
        """Seconds for the next batch size: an equal part of what is left."""
        if self.budget is None:
            return math.inf
        return max(0.0, self.budget.seconds - (self._clock() - self._start)) / max(1, self._left)

    def fits(self, cost: float, least: int, fixed: float = 0.0) -> bool:
        """Whether the next batch size is measured: its least amount, a few times, takes about its share or less.

        Args:
            cost: seconds of a row (token) for all competitors together, about.
            least: rows (tokens).
            fixed: seconds of a pass whatever the amount.
        """
        if self.budget is None or not self.budget.sizes:
            return True
        passes = 1 + LEAST_REPEATS if self.budget.repeats else 1 + self._repeats
        return passes * (fixed + cost * least) <= OVERRUN * self.share()

    def plan(
        self, cost: float, *, least: int, most: int, step: int = 1, fixed: float = 0.0
    ) -> tuple[int, int]:
        """What the next batch size is measured with.

        Args:
            cost, fixed: as of `fits`.
            least, most: rows (tokens).
            step: rows come in so many, as long as there are that many.

        Returns:
            Rows (tokens), and repetitions after one pass that is not timed.
        """
        amount, repeats, share = most, self._repeats, self.share()
        if self.budget is not None and math.isfinite(share):
            if self.budget.amount:
                fitting = (share / (repeats + 1) - fixed) / max(cost, 1e-9)
                amount = min(most, max(min(least, most), int(fitting) // step * step))
            one_pass = fixed + cost * amount
            if self.budget.repeats and (repeats + 1) * one_pass > share:
                repeats = min(repeats, max(LEAST_REPEATS, int(share / max(one_pass, 1e-9)) - 1))
        return amount, repeats

    def expected(self, amount: int, cost: float, passes: float = 0.0) -> float:
        """Seconds that all will take, about.

        Args:
            amount: rows (tokens) of all batch sizes together, if nothing is left out.
            cost: as of `fits`.
            passes: seconds of one pass over all batch sizes whatever the amount.
        """
        all_of_it = (self._repeats + 1) * (cost * amount + passes)
        if self.budget is None or not (self.budget.amount or self.budget.repeats):
            return all_of_it
        return min(all_of_it, self.budget.seconds)

    def next_size(self) -> None:
        """The next batch size comes; the ones before have had their time."""
        self._left -= 1
