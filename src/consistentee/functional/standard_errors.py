"""How far a mean may be off by chance: of independent rows, or of tokens, which are not independent within a text."""

from __future__ import annotations

from torch import Tensor


def standard_error(values: Tensor, counts: Tensor | None = None) -> float:
    """Standard error of the mean of some values, such as paired differences.

    Args:
        values: (rows,) a value for each row; or (texts,) the values of each text's tokens, summed.
        counts: (texts,) tokens of each text; None where every row stands for itself.

    Returns:
        Of rows the standard deviation over the root of their number, 0 for a single one. Of texts the error that counts
        each text once (clustered): the root of the summed squares of what each text adds to the mean.

    Source: Miller, arXiv:2411.00640 (clustered standard errors). Difference: none.

    Example:
        >>> import torch
        >>> standard_error(torch.tensor([1.0, -1.0]))
        1.0
        >>> round(standard_error(torch.tensor([2.0, -2.0]), torch.tensor([2, 2])), 6)
        0.707107
    """
    values = values.double()
    if counts is None:
        return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    total = counts.double().sum()
    mean = values.sum() / total
    return float((values - mean * counts).square().sum().sqrt() / total)
