"""What cells say row by row: where each row exits at each threshold, and whether it is right there; figures of draws.

A cell without exits has one point, all rows at its last layer. Plain models of fewer layers are the points of one
method, `static`, with the plain model of all layers as its last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from consistentee.evaluation.comparison.measuring import unpack_bits, unpack_exits
from consistentee.functional.curves import TOLERANCES, area_under_curve, best_accuracy, layers_saved
from consistentee.functional.resampling import Draws

SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0)
"""Layer speed-ups at which accuracies are given."""

SAME_EXITS = "policy"
"""The criterion that the others on the same exits are compared with."""

LOSSES = (0.0, 0.005, 0.01, 0.02)
"""Accuracy that may be lost against the plain model, as shares."""

FIGURES = (
    "area",
    *(f"accuracy_at_{speedup:g}x" for speedup in SPEEDUPS),
    *(f"layers_saved_at_{100 * loss:g}" for loss in LOSSES),
    "validation_accuracy",
    "validation_layers_saved",
    "validation_gain",
    *(
        f"{name}_within_{100 * loss:g}"
        for loss in TOLERANCES
        for name in ("accuracy", "layers_saved", "gain")
    ),
)
"""What `figures_of_draws` gives: layers saved as shares of full depth; the gain is accuracy over the plain model's."""

ENDS_OF_DIFFERENCES = np.array([[-1.0], [1.0]])
"""What a difference of two figures can be at least and at most."""

STATIC = "static"
"""What plain models of fewer layers are called together."""


@dataclass(frozen=True)
class Outcomes:
    """Rows at the points of one curve, from the fastest point to the slowest.

    Attributes:
        thresholds: of each point; numbers of layers where nothing exits.
        correct: (rows, points), whether a row is right where it exits.
        layers: (rows, points), where it exits, from 1.
        depth: layers of the whole backbone.
        chosen: the point that validation chose; None where it chose none.
        metrics: the task's own, at that point.
        within: the points that validation chose within each of the `TOLERANCES`; empty where it was not asked.
    """

    thresholds: tuple[float, ...]
    correct: NDArray[np.bool_]
    layers: NDArray[np.uint8]
    depth: int
    chosen: int | None
    metrics: Mapping[str, float]
    within: Sequence[int] = ()

    @property
    def is_curve(self) -> bool:
        """Whether there are several points."""
        return len(self.thresholds) > 1

    def curve(self) -> list[dict[str, float]]:
        """Its points as plain values."""
        accuracy, mean = self.correct.mean(0), self.layers.mean(0)
        return [
            {
                "threshold": threshold,
                "accuracy": float(accuracy[point]),
                "mean_exit_layer": float(mean[point]),
                "layer_speedup": float(self.depth / mean[point]),
            }
            for point, threshold in enumerate(self.thresholds)
        ]


def exit_outcomes(cell: Mapping[str, Any], criterion: str, depth: int) -> Outcomes:
    """A criterion on the exits of a cell.

    Args:
        cell: of a model with exits.
        criterion: one that it was measured with.
        depth: layers of the whole backbone.

    Raises:
        ValueError: what is packed is broken.
    """
    rows, num_layers = int(cell["evaluation"]["num_examples"]), int(cell["num_hidden_layers"])
    figures = cell["criteria"][criterion]
    thresholds = tuple(float(point[0]) for point in figures["curve"])
    layers = unpack_exits(figures["exits"], rows, num_layers, len(thresholds))
    right = unpack_bits(cell["correct"], rows, num_layers)
    at = figures["at_validation_threshold"]
    return Outcomes(
        thresholds=thresholds,
        correct=np.take_along_axis(right, layers.astype(np.int64) - 1, axis=1),
        layers=layers,
        depth=depth,
        chosen=None if at is None else int(at["point"]),
        metrics={} if at is None else at["metrics"],
        within=_within(figures),
    )


def static_outcomes(cells: Sequence[Mapping[str, Any]], depth: int) -> Outcomes:
    """Cells without exits, each a point; of several, validation chooses the one with the fewest layers.

    It must be no worse on validation rows than the deepest one, by more than the loss that all methods are allowed.

    Args:
        cells: of one backbone, set and seed.
        depth: layers of the whole backbone.
    """
    ordered = sorted(cells, key=lambda cell: cell["num_hidden_layers"])
    rows = int(ordered[0]["evaluation"]["num_examples"])
    counts = [int(cell["num_hidden_layers"]) for cell in ordered]
    validation = [float(cell["validation"]["accuracy"]) for cell in ordered]

    def within(loss: float) -> int:
        floor = validation[-1] - loss - 1e-9
        return next(point for point, accuracy in enumerate(validation) if accuracy >= floor)

    chosen = within(float(ordered[-1]["config"]["max_accuracy_loss"]))
    return Outcomes(
        thresholds=tuple(map(float, counts)),
        correct=np.hstack([unpack_bits(cell["correct"], rows, 1) for cell in ordered]),
        layers=np.tile(np.array(counts, dtype=np.uint8), (rows, 1)),
        depth=depth,
        chosen=chosen,
        metrics=ordered[chosen]["metrics"],
        within=[within(loss) for loss in TOLERANCES],
    )


def _within(figures: Mapping[str, Any]) -> list[int]:
    """Points of a criterion's curve by tolerance; none in cells that were made before these were noted."""
    noted = figures.get("at_tolerances") or {}
    return [int(noted[f"{loss:g}"]) for loss in TOLERANCES] if noted else []


def ends_of_figures(depth: int) -> Draws:
    """What each of the `FIGURES` can be at least and at most, (2, figures), with so many layers."""
    lowest = [-1.0 if "gain" in name else 0.0 for name in FIGURES]
    return np.array([lowest, [1 - 1 / depth if "layers_saved" in name else 1.0 for name in FIGURES]])


def figures_of_draws(
    outcomes: Outcomes, weights: NDArray[np.float32], plain: NDArray[np.bool_] | None
) -> Draws:
    """`FIGURES` of each draw of rows.

    Args:
        outcomes: of the rows.
        weights: (draws, rows), how often each row was drawn.
        plain: (rows,), whether the plain model is right; its accuracy is that of the same draw. None without one.

    Returns:
        (draws, figures), NaN for what there is not.
    """
    total = torch.from_numpy(weights.sum(1, keepdims=True)).double()
    accuracy = _sums(weights, outcomes.correct) / total  # (draws, points)
    mean_layer = _sums(weights, outcomes.layers) / total
    speedup = outcomes.depth / mean_layer
    nothing = torch.full_like(total[:, 0], torch.nan)
    reference = nothing if plain is None else (_sums(weights, plain[:, None]) / total)[:, 0]
    saved_at = [layers_saved(accuracy, speedup, reference - loss) for loss in LOSSES]
    found = [
        area_under_curve(accuracy, speedup) if outcomes.is_curve else nothing,
        *(best_accuracy(accuracy, speedup, at) for at in SPEEDUPS),
        *([nothing] * len(LOSSES) if plain is None else saved_at),
    ]
    chosen = [outcomes.chosen, *(outcomes.within or [None] * len(TOLERANCES))]
    for point in chosen:
        if point is None:
            found += [nothing] * 3
        else:
            saved = 1 - mean_layer[:, point] / outcomes.depth
            found += [accuracy[:, point], saved, accuracy[:, point] - reference]
    return torch.stack(found, dim=1).numpy()


def _sums(weights: NDArray[np.float32], values: NDArray[Any]) -> torch.Tensor:
    """Whole numbers, exact in float32 for as many rows as evaluation sets have: (draws, rows) x (rows, points)."""
    return (torch.from_numpy(weights) @ torch.from_numpy(values.astype(np.float32))).double()
