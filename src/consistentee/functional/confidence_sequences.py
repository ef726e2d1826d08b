"""Bounds of an expected loss that hold at all times, so that one may look after every row: what an audit needs.

Losses `X_1, X_2, ...` are 0 or 1 and come one by one. Let `mu_t` be the expected value of `X_t` given all rows before.
A bound of `bounds.py` holds for one number of rows that was fixed beforehand; who looks again and again, and acts when
it is broken, is wrong far more often than 1 - `confidence`. These bounds are wrong at *any* time with that probability.

**Betting.** Who doubts that `mu_t <= m` for all `t` starts with a capital of 1 and bets on every row. A bet of size
`0 <= b <= 1 / m`, chosen before the row is seen, multiplies the capital by `1 + b (X_t - m)`. That is never negative,
and its expected value given the past is `1 + b (mu_t - m) <= 1`. So if the claim is true, the capital `K_t(m)` is a
nonnegative supermartingale that starts at 1, and by Ville's inequality `P(some t: K_t(m) >= 1 / a) <= a`. A capital of
`1 / a` rejects the claim, and may do so whenever it gets there.

**Which bet.** With a guess `q` of the next row's expectation the growth of the capital, `E log(1 + b (X - m))` for `X`
of expectation `q`, is largest at `b = (q - m) / (m (1 - m))`; where that is below 0 the bet is none. Then a loss
multiplies the capital by `q / m`, and a row without one by `(1 - q) / (1 - m)`. The guess may depend on earlier rows
only: `q = (PRIOR_LOSSES + losses so far) / (PRIOR_LOSSES + PRIOR_OTHERS + rows so far)`. What it is worth decides how
fast a wrong claim is rejected, never how often a true one.

**Bounds.** The lower bound is the largest `m` such that every smaller one has been rejected at some time. If
`mu_t <= m*` for all `t`, it exceeds `m*` at any time with probability 1 - `confidence` at most: for that a claim
`m >= m*`, which is true as well, must have been rejected. The upper bound is the same for claims `mu_t >= m`, with
bets of the other sign. Each bound has this probability of its own. Nothing is assumed about the rows: they may depend
on each other and drift; the lower bound is then one of the largest `mu_t`, the upper one of the smallest.

Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024),
arXiv:2010.09686, section 4; Ville (1939). Their `lambda` is the bet, `1 - alpha` is `confidence`. Difference: the bets
are those of a guess `q` (for losses of 0 or 1 exactly Kelly's), and every claim that was once rejected stays so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consistentee.functional.bounds import check_rows

PRIOR_LOSSES, PRIOR_OTHERS = 0.5, 10.0
"""What the guess begins with: a share of losses of about 5 %, weighing as much as ten rows."""


def guessed_loss(losses: Any, rows: Any) -> Any:
    """The guess `q` of the next row's expected loss, in (0, 1), from the rows before it.

    Args:
        losses: how many of them lost, a number or an array.
        rows: how many they are.

    Example:
        >>> round(guessed_loss(0, 0), 4), round(guessed_loss(3, 100), 4)
        (0.0476, 0.0317)
    """
    return (PRIOR_LOSSES + losses) / (PRIOR_LOSSES + PRIOR_OTHERS + rows)


def log_growth(loss: Any, guess: Any, means: Any, *, above: bool) -> Any:
    """By what one row multiplies the capital of who doubts a claim, as a logarithm.

    Args:
        loss: 0 or 1, a number or an array.
        guess: of the row's expected loss, made before it was seen, in (0, 1).
        means: the claims' `m`, in (0, 1); all three broadcast.
        above: whether the claim is that the expectation is at most `m`, and the bet is that it lies above; else that it
            is at least `m`.

    Source: the module's docstring.

    Example:
        >>> round(math.exp(log_growth(1, 0.05, 0.01, above=True)), 6)
        5.0
        >>> float(log_growth(1, 0.05, 0.1, above=True))
        0.0
    """
    bets = guess > means if above else guess < means
    grown = np.where(np.asarray(loss) > 0, np.log(guess / means), np.log((1 - guess) / (1 - means)))
    return np.where(bets, grown, 0.0)


def claims_grid(size: int = 800) -> NDArray[np.float64]:
    """(size,), the claims that are tested: from 1e-5 to 0.5 at equal ratios, then at equal steps to nearly 1."""
    low = np.geomspace(1e-5, 0.5, size - size // 4)
    return np.concatenate([low, np.linspace(0.5, 1 - 1e-5, size // 4 + 1)[1:]])


@dataclass
class LossBounds:
    """Lower and upper bound of an expected loss of 0 or 1, after every row and at all times.

    Args:
        confidence: of each of the two, in (0, 1).
        claims: (claims,) ascending in (0, 1), what is tested; the bounds are among them, or 0 and 1.

    Attributes:
        rows, losses: so far.
        lower, upper: the bounds.

    Raises:
        ValueError: a confidence that is none.

    Example:
        >>> bounds = LossBounds()
        >>> for _ in range(1000):
        ...     bounds.add(False)
        >>> bounds.lower, bounds.upper < 0.01
        (0.0, True)
    """

    confidence: float = 0.95
    claims: NDArray[np.float64] = field(default_factory=claims_grid)

    def __post_init__(self) -> None:
        check_rows(1, self.confidence)
        self.rows = self.losses = 0
        self.lower, self.upper = 0.0, 1.0
        self._capital_above = np.zeros(len(self.claims))  # logarithms
        self._capital_below = np.zeros(len(self.claims))
        self._too_low = np.zeros(len(self.claims), dtype=np.bool_)  # claims "at most m" that were rejected
        self._too_high = np.zeros(len(self.claims), dtype=np.bool_)

    def add(self, loss: bool) -> None:
        """Take in one more row."""
        guess = guessed_loss(self.losses, self.rows)
        limit = -math.log1p(-self.confidence)
        self._capital_above += log_growth(int(loss), guess, self.claims, above=True)
        self._capital_below += log_growth(int(loss), guess, self.claims, above=False)
        self._too_low |= self._capital_above >= limit
        self._too_high |= self._capital_below >= limit
        self.rows += 1
        self.losses += int(loss)
        # (claims + 1,) with a claim that is never rejected behind the last one: where the row of rejected ones ends.
        rejected = int(np.argmin(np.append(self._too_low, False)))
        self.lower = float(self.claims[rejected - 1]) if rejected else 0.0
        rejected = int(np.argmin(np.append(self._too_high[::-1], False)))
        self.upper = float(self.claims[len(self.claims) - rejected]) if rejected else 1.0
