"""Bootstrap intervals, paired: what is compared is drawn together, the same rows and the same seeds for all.

The rows of an evaluation set are drawn with replacement. Of the seeds of a training there are too few for that: what
others would give is added by Student's t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

Draws = NDArray[np.float64]
"""What draws of rows give, (draws, ...), or the same of one sample."""


def row_weights(rows: int, draws: int, seed: int) -> NDArray[np.float32]:
    """How often each row is in each draw of as many rows with replacement, (draws, rows).

    Args:
        rows: how many there are.
        draws: how many samples.
        seed: same seed, same samples: what is compared shares them.

    Example:
        >>> row_weights(4, 2, seed=0).sum(1)
        array([4., 4.], dtype=float32)
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(rows, np.full(rows, 1 / rows), size=draws).astype(np.float32)


@dataclass(frozen=True)
class Means:
    """Means over trainings on each draw of rows, and what is known of how far others would move them.

    That is Student's t of n - 1 degrees times the standard error of the mean over the n trainings, s / sqrt(n): a few
    trainings drawn with replacement would vary too little, 60 % in place of 95 % of two. Where rows change nothing the
    percentile interval of the sum is the t interval over trainings; where trainings agree, the bootstrap's over rows.
    Noise that a training has on its own rows is in both parts, so that intervals are rather too wide than too narrow.

    Attributes:
        draws: (draws, ...), the means on each draw of rows.
        variance: (...), of the mean over trainings, s^2 / n; 0 of one training, which says nothing of others.
        degrees: (...), of freedom of that variance.

    Source: Student, "The probable error of a mean", Biometrika 6 (1908), for trainings; Efron and Tibshirani, 1993, for
    rows. Difference: their sum; t at equally spaced probabilities, not at random ones.

    Example:
        >>> Means.over_trainings(np.ones((1, 2))).with_trainings(seed=0)
        array([1., 1.])
    """

    draws: Draws
    variance: Draws
    degrees: Draws

    @classmethod
    def over_trainings(cls, draws: Draws) -> Means:
        """Of (trainings, draws, ...), what each training gives on each draw of rows."""
        count, means = len(draws), draws.mean(1)
        variance = np.zeros(means.shape[1:]) if count == 1 else means.var(0, ddof=1) / count
        return cls(draws.mean(0), variance, np.full(variance.shape, max(count - 1, 1)))

    @classmethod
    def over_sets(cls, means: Sequence[Means]) -> Means:
        """Of several sets: the mean over them, whose variance is the sum of theirs over the square of their number.

        Its degrees of freedom are Welch's and Satterthwaite's. Sets of equal size share their draws of rows, so each is
        put in another order: every set's rows are drawn on their own.

        Source: Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics 2 (1946).
        """
        draws = [
            np.random.default_rng(place).permutation(one.draws, axis=0) for place, one in enumerate(means)
        ]
        variances = np.stack([one.variance for one in means])
        of_degrees = (variances**2 / np.stack([one.degrees for one in means])).sum(0)
        total = variances.sum(0)
        degrees = np.divide(total**2, of_degrees, out=np.ones_like(total), where=of_degrees > 0)
        return cls(np.mean(draws, axis=0), total / len(means) ** 2, degrees)

    def with_trainings(self, seed: int) -> Draws:
        """The draws with what other trainings would have added, (draws, ...).

        Args:
            seed: of the order in which t's quantiles are added; same seed and degrees, same order.
        """
        samples = len(self.draws)
        shares = (np.random.default_rng(seed).permutation(samples) + 0.5) / samples
        degrees, place = np.unique(self.degrees, return_inverse=True)  # seldom more than one
        t = special.stdtrit(degrees, shares[:, None])[:, place.reshape(self.degrees.shape)]
        return self.draws + t * np.sqrt(self.variance)


def percentile_interval(draws: Draws, confidence: float = 0.95) -> tuple[Draws, Draws]:
    """The ends of the interval that holds the middle of the draws, NaN where a draw is: (draws, ...) -> (...), (...).

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, the percentile interval. Difference: none.

    Example:
        >>> [round(float(end), 6) for end in percentile_interval(np.arange(101.0), 0.9)]
        [5.0, 95.0]
    """
    outside = 50 * (1 - confidence)
    low, high = np.percentile(draws, [outside, 100 - outside], axis=0)
    return low, high
