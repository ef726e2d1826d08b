"""Bootstrap intervals, paired: what is compared is drawn together, the same rows and the same seeds for all.

The rows of an evaluation set are drawn with replacement. Of the seeds of a training there are too few for that: what
others would give is added by Student's t.
"""

from __future__ import annotations

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


def mean_over_seeds(draws: Draws, seed: int) -> Draws:
    """The mean over trainings on each draw of rows, with what other trainings would have added to it.

    That is Student's t of n - 1 degrees times the standard error of the mean over the n trainings, s / sqrt(n): a few
    trainings drawn with replacement would vary too little, 60 % in place of 95 % of two. Where rows change nothing the
    percentile interval of the sum is the t interval over trainings; where trainings agree, the bootstrap's over rows.
    Noise that a training has on its own rows is in both parts, so that intervals are rather too wide than too narrow.

    Args:
        draws: (seeds, draws, ...), what each training gives on each draw of rows.
        seed: of the order in which t's quantiles are added; same seed and number of trainings, same order.

    Returns:
        (draws, ...); of one training its own, which say nothing of others.

    Source: Student, "The probable error of a mean", Biometrika 6 (1908), for trainings; Efron and Tibshirani, 1993, for
    rows. Difference: their sum; t at equally spaced probabilities, not at random ones.

    Example:
        >>> mean_over_seeds(np.ones((1, 2)), seed=0)
        array([1., 1.])
    """
    count, samples = draws.shape[:2]
    if count == 1:
        return draws[0]
    quantiles = special.stdtrit(count - 1, (np.arange(samples) + 0.5) / samples)
    t = np.random.default_rng(seed).permutation(quantiles).reshape(-1, *[1] * (draws.ndim - 2))
    return draws.mean(0) + t * draws.mean(1).std(0, ddof=1) / count**0.5


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
