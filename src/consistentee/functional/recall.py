"""Recall class by class: what accuracy hides where classes are unequal, and what to say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from consistentee.functional.criteria import digits

RARE_SHARE = 0.2
"""A class with fewer than this share of an even part of the rows is rare: below 10 % of two classes, 1 % of twenty."""

WELL_BELOW = 0.05
"""Recall that exits cost a class, from which on it is worth a warning, if it is no chance either."""

NAMED = 5  # classes that a warning names


@dataclass(frozen=True)
class ClassRecall:
    """How many rows of a class are found, at the exits and at full depth.

    Args:
        label: the class.
        num_examples: its rows.
        recall: share of them that is right at the exits; None without rows.
        full_depth_recall: share of them that is right at the last layer; None without rows.
        lost: rows that are right at the last layer only.
        gained: rows that are right at the exits only.
    """

    label: str
    num_examples: int
    recall: float | None
    full_depth_recall: float | None
    lost: int
    gained: int

    @property
    def falls(self) -> bool:
        """Whether the exits cost it more than `WELL_BELOW`, and more than two standard errors of the paired rows."""
        gap = self.lost - self.gained
        return gap > WELL_BELOW * self.num_examples and gap >= 2 * (self.lost + self.gained) ** 0.5


def recall_by_class(
    predictions: ArrayLike, full_depth_predictions: ArrayLike, labels: ArrayLike, label_names: Sequence[str]
) -> list[ClassRecall]:
    """Recall of every class.

    Args:
        predictions: (rows,) class indices at the exits.
        full_depth_predictions: (rows,) class indices at the last layer.
        labels: (rows,) class indices.
        label_names: classes by index.

    Returns:
        One entry a class, in the order of `label_names`.
    """
    actual = np.asarray(labels)
    right = np.asarray(predictions) == actual
    right_at_top = np.asarray(full_depth_predictions) == actual
    found: list[ClassRecall] = []
    for index, label in enumerate(label_names):
        rows = actual == index
        count, here, there = int(rows.sum()), right[rows], right_at_top[rows]
        found.append(
            ClassRecall(
                label=label,
                num_examples=count,
                recall=float(here.mean()) if count else None,
                full_depth_recall=float(there.mean()) if count else None,
                lost=int((there & ~here).sum()),
                gained=int((here & ~there).sum()),
            )
        )
    return found


def recall_warnings(
    classes: Sequence[ClassRecall], threshold: float, *, threshold_metric: str = "accuracy"
) -> list[str]:
    """What must not go unnoticed: classes that exits lose, and classes too rare for accuracy to show them.

    Args:
        classes: from `recall_by_class`.
        threshold: of the exits.
        threshold_metric: by which training chose it, as far as is known.

    Returns:
        What to say and to do, a line each, to stand behind "Warning:"; none where all is well.
    """
    remedy = "A higher --threshold keeps more of it"
    if threshold_metric != "macro_f1":
        remedy += "; training with --threshold-metric macro_f1 chooses one that counts every class alike"
    fallen = sorted((found for found in classes if found.falls), key=lambda found: found.gained - found.lost)
    lines = [
        f'recall of class "{found.label}" ({found.num_examples:,} rows) falls from '
        f"{100 * (found.full_depth_recall or 0):.1f} % at full depth to {100 * (found.recall or 0):.1f} % at threshold "
        f"{digits(threshold)}. {remedy}."
        for found in fallen[:NAMED]
    ]
    if len(fallen) > NAMED:
        lines.append(f"so it does of {len(fallen) - NAMED} more classes.")
    total = sum(found.num_examples for found in classes)
    rare = [found for found in classes if 0 < found.num_examples < RARE_SHARE * total / len(classes)]
    if rare:
        named = ", ".join(f'"{found.label}" ({found.num_examples:,})' for found in rare[:NAMED])
        more = f" and {len(rare) - NAMED} more" if len(rare) > NAMED else ""
        advice = (
            "" if threshold_metric == "macro_f1" else ", and consider --threshold-metric macro_f1 in training"
        )
        lines.append(
            f"rare among {total:,} rows: {named}{more}. Accuracy hardly shows them: read their recall{advice}."
        )
    return lines
