"""What default thresholds lose and save, by `max_accuracy_loss` and `threshold_margin`: from kept cells of `compare`.

    python benchmarks/threshold_tolerance.py benchmarks/results/compare --sets m-cid sst2 [--backbone e5-12l] \
        [--rows 250 1000] [--draws 60]

A cell knows where each reported row exits at each threshold of the policy, and whether it is right there. Each draw
takes so many of these rows, with replacement, for validation rows, and chooses a threshold by the rule; all rows are
the truth that the draw comes from. Loss in points against the same model's last layer, mean and standard deviation over
draws and its 90 % quantile, and layers saved; means over a set's cells of seed 1 that have usable exits.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from render_compare import read_cells

from consistentee.evaluation.comparison.measuring import unpack_bits
from consistentee.evaluation.comparison.outcomes import exit_outcomes
from consistentee.functional.curves import CurvePoint, choose_threshold

RULES = tuple((loss, margin) for loss in (0.0, 0.0025, 0.005, 0.01) for margin in (0.0, 0.25, 0.5))
"""`max_accuracy_loss` and `threshold_margin`; the default is (0.005, 0.5), and was (0, 0.5) before."""

WEAKEST = 0.5
"""Exits count as usable where those of the first layer that saves half have this share of the last layer's accuracy."""


def main() -> None:
    """Print a row a rule, for each set and number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path)
    parser.add_argument("--sets", nargs="+", required=True)
    parser.add_argument("--backbone", default="e5-12l")
    parser.add_argument("--rows", type=int, nargs="+", default=[250, 1000])
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cells = [cell for cell in read_cells(options.cells) if cell["seed"] == 1 and usable(cell)]
    for name in options.sets:
        ours = [cell for cell in cells if (cell["backbone"], cell["set"]) == (options.backbone, name)]
        print(f"{name}: {len(ours)} cells")
        for rows in options.rows:
            found = [outcomes_of_rules(cell, rows, options.draws, options.seed) for cell in ours]
            for rule in RULES:
                loss, spread, worst, layers = np.mean([figures[rule] for figures in found], axis=0)
                shown = f"{loss:.2f} ± {spread:.2f} | {worst:.2f} | {1 / layers:.2f}x"
                print(f"| {rows} | {100 * rule[0]:g} | {rule[1]:g} | {shown} |")


def usable(cell: Mapping[str, Any]) -> bool:
    """Whether a cell has exits, and those at half the depth have learnt something."""
    if "policy" not in (cell.get("criteria") or {}):
        return False
    accuracies = cell["per_layer_accuracy"]
    return accuracies[len(accuracies) // 2 - 1] > WEAKEST * accuracies[-1]


def outcomes_of_rules(
    cell: Mapping[str, Any], rows: int, draws: int, seed: int
) -> dict[tuple[float, float], tuple[float, float, float, float]]:
    """Loss in points (mean, deviation, 90 % quantile) and share of the layers, by rule."""
    depth = cell["num_hidden_layers"]
    outcomes = exit_outcomes(cell, "policy", depth)
    count = len(outcomes.correct)
    last_right = unpack_bits(cell["correct"], count, depth)[:, -1]
    lost = 100 * (last_right.mean() - outcomes.correct.mean(0))
    share = outcomes.layers.mean(0) / depth
    generator = np.random.default_rng(seed)
    chosen: dict[tuple[float, float], list[int]] = {rule: [] for rule in RULES}
    for _ in range(draws):
        drawn = generator.integers(count, size=rows)
        right, reference = outcomes.correct[drawn], last_right[drawn]
        points = [
            CurvePoint(
                place, float(accuracy), float(mean), float(depth / mean)
            )  # rounded thresholds may be equal
            for place, (accuracy, mean) in enumerate(
                zip(right.mean(0), outcomes.layers[drawn].mean(0), strict=True)
            )
        ]
        differ = (right != reference[:, None]).sum(0)
        for max_loss, margin in RULES:
            shy = right.mean(0) - margin * (np.sqrt(differ + 1) - 1) / rows
            place = choose_threshold(points, float(reference.mean()) - max_loss, shy.tolist())
            chosen[max_loss, margin].append(int(place))
    return {
        rule: (
            float(lost[at].mean()),
            float(lost[at].std()),
            float(np.quantile(lost[at], 0.9)),
            float(share[at].mean()),
        )
        for rule, at in chosen.items()
    }


if __name__ == "__main__":
    main()
