"""What counts of losses on judged rows prove: exact bounds, p-values, and how many losses or rows a promise takes.

Rows are independent draws. `losses` is their sum: a count where a loss is 0 or 1, any number where it lies between.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import optimize, special


def binomial_upper_bound(losses: float, num_rows: int, confidence: float = 0.95) -> float:
    """The exact upper confidence bound of a probability, one-sided.

    Args:
        losses: how often it happened, a whole number.
        num_rows: of how many independent rows, at least 1.
        confidence: in (0, 1).

    Returns:
        The smallest probability at which so few losses have a probability of 1 - `confidence` at most.

    Source: Clopper and Pearson, Biometrika 26 (1934). Difference: none.

    Example:
        >>> round(binomial_upper_bound(0, 299), 5)
        0.00997
    """
    check_rows(num_rows, confidence)
    if losses >= num_rows:
        return 1.0
    return float(special.betaincinv(losses + 1, num_rows - losses, confidence))


def binomial_interval(count: float, num_rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided exact confidence interval of a probability, both ends of Clopper and Pearson.

    Args:
        count: how often it happened, a whole number.
        num_rows: of how many independent rows.
        confidence: in (0, 1).

    Source: Clopper and Pearson, Biometrika 26 (1934). Difference: none.

    Example:
        >>> [round(end, 4) for end in binomial_interval(9, 10)]
        [0.555, 0.9975]
    """
    half = (1 + confidence) / 2
    low = 1 - binomial_upper_bound(num_rows - count, num_rows, half)
    return low, binomial_upper_bound(count, num_rows, half)


def binomial_p_value(losses: Any, num_rows: int, max_loss: float) -> Any:
    """P-value of "a loss has a probability above `max_loss`": `P(Bin(num_rows, max_loss) <= losses)`.

    Args:
        losses: how often it happened, a number or an array.
        num_rows: of how many independent rows.
        max_loss: in (0, 1).

    Example:
        >>> round(float(binomial_p_value(0, 299, 0.01)), 4)
        0.0495
    """
    return special.bdtr(np.asarray(losses, dtype=np.float64), num_rows, max_loss)


def hoeffding_bentkus_p_value(losses: Any, num_rows: int, max_loss: float) -> Any:
    """P-value of "the expected loss is above `max_loss`" for losses anywhere in [0, 1].

    Args:
        losses: their sum over the rows, a number or an array.
        num_rows: how many independent rows.
        max_loss: in (0, 1).

    Source: arXiv:2101.02703, the Hoeffding-Bentkus bound; their `alpha` is `max_loss`. Difference: none.

    Example:
        >>> round(float(hoeffding_bentkus_p_value(4.5, 1000, 0.01)), 4)
        0.1463
    """
    total = np.asarray(losses, dtype=np.float64)
    mean = np.minimum(total / num_rows, max_loss)
    divergence = special.rel_entr(mean, max_loss) + special.rel_entr(1 - mean, 1 - max_loss)
    # A sum that is whole but for rounding is whole: 3.0000000001 would else count as 4.
    bentkus = math.e * binomial_p_value(np.ceil(np.round(total, 9)), num_rows, max_loss)
    return np.minimum(1.0, np.minimum(np.exp(-num_rows * divergence), bentkus))


def hoeffding_bentkus_upper_bound(losses: float, num_rows: int, confidence: float = 0.95) -> float:
    """Upper confidence bound of an expected loss in [0, 1]: where the p-value is 1 - `confidence`.

    Args:
        losses: their sum over the rows.
        num_rows: how many independent rows.
        confidence: in (0, 1).

    Example:
        >>> round(hoeffding_bentkus_upper_bound(0.0, 299), 5)
        0.00997
    """
    check_rows(num_rows, confidence)
    mean = losses / num_rows

    def above(bound: float) -> float:
        return float(hoeffding_bentkus_p_value(losses, num_rows, bound)) - (1 - confidence)

    if mean >= 1 or above(1 - 1e-12) > 0:
        return 1.0
    found: Any = optimize.brentq(above, max(mean, 1e-12), 1 - 1e-12, xtol=1e-13)
    return float(found)


def losses_allowed(num_rows: int, max_loss: float, confidence: float = 0.95) -> int:
    """The most losses of 0 or 1 with which so many rows certify; -1 where not even none would do.

    Example:
        >>> losses_allowed(298, 0.01), losses_allowed(299, 0.01), losses_allowed(2000, 0.01)
        (-1, 0, 12)
    """
    check_promise(max_loss, confidence)
    if num_rows < 1:
        return -1

    def certifies(losses: int) -> bool:
        return float(binomial_p_value(losses, num_rows, max_loss)) <= 1 - confidence

    low, high = -1, num_rows  # `low` certifies or is -1, `high` does not: its p-value is 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if certifies(middle) else (low, middle)
    return low


def bounded_losses_allowed(num_rows: int, max_loss: float, confidence: float = 0.95) -> float:
    """The largest sum of losses in [0, 1] with which so many rows certify; -1 where not even 0 would do."""
    check_promise(max_loss, confidence)

    def certifies(losses: float) -> bool:
        return float(hoeffding_bentkus_p_value(losses, num_rows, max_loss)) <= 1 - confidence

    if num_rows < 1 or not certifies(0.0):
        return -1.0
    low, high = 0.0, num_rows * max_loss
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if certifies(middle) else (low, middle)
    return low


def smallest_certifiable_rows(max_loss: float, confidence: float = 0.95) -> int:
    """How many rows it takes to certify anything, with no loss at all on any of them.

    Example:
        >>> smallest_certifiable_rows(0.01), smallest_certifiable_rows(0.02), smallest_certifiable_rows(0.01, 0.99)
        (299, 149, 459)
    """
    check_promise(max_loss, confidence)
    rows = math.ceil(math.log1p(-confidence) / math.log1p(-max_loss))
    while losses_allowed(rows, max_loss, confidence) < 0:  # rounding
        rows += 1
    return rows


def paired_interval(
    lost: int, won: int, num_rows: int, confidence: float = 0.95, *, can_win: bool = True
) -> tuple[float, float]:
    """Two-sided confidence interval of a difference of two shares on the same rows, (lost - won) / rows.

    Args:
        lost: rows that only the first of two ways gets right.
        won: rows that only the second gets right.
        num_rows: all rows.
        confidence: in (0, 1).
        can_win: whether there may be rows of the second kind at all. There are none where to be right is to agree with
            the first way: the difference is then the share that is lost, and its interval that of `binomial_interval`.

    Returns:
        Lower and upper end, in [-1, 1]. Unlike the normal interval it is not a point where nothing was lost or won.

    Source: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
        paired data", J. Educ. Behav. Stat. 37 (2012). Difference: none.

    Example:
        >>> [round(end, 4) for end in paired_interval(3, 1, 100)]
        [-0.0273, 0.0665]
    """
    check_rows(num_rows, confidence)
    if not can_win:
        return binomial_interval(lost, num_rows, confidence)
    first, second = (lost + 1) / (num_rows + 2), (won + 1) / (num_rows + 2)
    middle = first - second
    error = math.sqrt((first + second - middle * middle) / (num_rows + 2))
    reach = float(special.ndtri((1 + confidence) / 2)) * error
    return max(-1.0, middle - reach), min(1.0, middle + reach)


def at_most(bound: float) -> str:
    """An upper bound of a share in percent as said: rounded up, as what is proved of it holds of no less.

    Example:
        >>> at_most(0.019642), at_most(0.0312), at_most(0.00003), at_most(0.0)
        ('1.97 %', '3.12 %', '0.01 %', '0.00 %')
    """
    return f"{math.ceil(round(10_000 * bound, 6)) / 100:.2f} %"


def check_rows(num_rows: int, confidence: float) -> None:
    """Raise ValueError for no row, or a confidence that is none."""
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence:g}.")


def check_promise(max_loss: float, confidence: float) -> None:
    """Raise ValueError for a loss or a confidence that nothing could certify."""
    if not 0 < max_loss < 1:
        raise ValueError(f"max_loss must be in (0, 1), got {max_loss:g}.")
    check_rows(1, confidence)
