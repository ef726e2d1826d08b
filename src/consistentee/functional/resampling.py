"""Bootstrap intervals, paired: what is compared is drawn together, the same rows and the same seeds for all.

The rows of an evaluation set are drawn with replacement, and so are the seeds of a training where there are several.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
    """The mean over trainings that are drawn with replacement too.

    Args:
        draws: (seeds, draws, ...), what each training gives on each draw of rows.
        seed: of the draws of trainings; same seed and number of trainings, same draws.

    Returns:
        (draws, ...).

    Example:
        >>> mean_over_seeds(np.ones((1, 2)), seed=0)
        array([1., 1.])
    """
    count, samples = draws.shape[:2]
    chosen = np.random.default_rng(seed).integers(count, size=(samples, count))
    return draws[chosen, np.arange(samples)[:, None]].mean(1)


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
