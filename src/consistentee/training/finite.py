"""That what training goes on from, keeps and measures is numbers: from anything else no later step comes back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LOWER_RATES = "Lower learning_rate or head_learning_rate, or take mixed_precision no."


def require_finite(what: str, where: str, values: Iterable[Tensor], remedy: str = LOWER_RATES) -> None:
    """Check that tensors on one device, of any shapes, hold no infinity and no NaN; waits for the device once.

    Args:
        what: they are.
        where: "at step 3".
        values: at least one.
        remedy: a full sentence.

    Raises:
        FloatingPointError: one of them does; the message has the first such value.

    Example:
        >>> require_finite("loss", "at step 3", [torch.tensor([0.7, float("nan")])], "Give up.")
        Traceback (most recent call last):
        ...
        FloatingPointError: loss must be finite, got nan at step 3. Give up.
    """
    tensors = [value.detach() for value in values]
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).tolist()
    if not all(finite):
        tensor = tensors[finite.index(False)]
        got = float(tensor[~tensor.isfinite()][0])
        raise FloatingPointError(f"{what} must be finite, got {got} {where}. {remedy}")
