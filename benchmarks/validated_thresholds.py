"""What rules of choosing a threshold give on reported rows, from the curves of validation rows that cells keep.

    python benchmarks/validated_thresholds.py CELLS [--methods consistent] [--sets m-cid sst2] [--seeds 2] \
        [--backbones e5-12l]

A cell of `compare` keeps what each threshold of its own criterion gave on validation rows (`validation.curve`), and
where each reported row exits. A rule is a floor of the validation accuracy and a margin: `own - 0.5` is half a point
below the model's own last layer, `plain` the accuracy of the plain model with the same seed on the same validation
rows; the margin takes the loss to be so many standard errors higher than it shows. Each rule's threshold is read on
reported rows at the nearest measured one above it. Points of accuracy above the plain model, and how many times fewer
layers; means over seeds, then over sets. Nothing here is chosen on reported rows; who picks a
rule by this table does so.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from render_compare import read_cells

from consistentee.functional.curves import CurvePoint, choose_threshold, loss_error

LOSSES = (0.0, 0.0025, 0.005, 0.01)
MARGINS = (0.0, 0.5)
RULES = [*((f"own - {100 * loss:g}" if loss else "own", loss) for loss in LOSSES), ("plain", None)]

Found = tuple[float, float]
"""Accuracy above the plain model's, and the share of the layers that is used."""


def main() -> None:
    """Print a table for each backbone and method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path)
    parser.add_argument("--methods", nargs="+", default=["consistent"])
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--backbones", nargs="+", help="by default all, a table each")
    options = parser.parse_args()
    cells = read_cells(options.cells)
    if options.sets:
        cells = [cell for cell in cells if cell["set"] in options.sets]
    if options.seeds:
        cells = [cell for cell in cells if cell["seed"] in options.seeds]
    for backbone in options.backbones or sorted({cell["backbone"] for cell in cells}):
        for method in options.methods:
            print("\n".join([f"{backbone}, {method}:", "", *table(cells, method, backbone), ""]))


def table(cells: Sequence[Mapping[str, Any]], method: str, backbone: str) -> list[str]:
    """A row a rule, a column a set, and their mean: lines of Markdown."""
    cells = [cell for cell in cells if cell["backbone"] == backbone]
    plain = {(cell["set"], cell["seed"]): cell for cell in cells if cell["label"] == "plain"}
    by_set: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        if cell["label"] == method and "curve" in cell["validation"]:
            by_set[cell["set"]].append(cell)
    names = sorted(by_set)
    seeds = {name: " ".join(str(cell["seed"]) for cell in by_set[name]) for name in names}
    columns = ["floor", "margin", *(f"{name} ({seeds[name]})" for name in names), "mean"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for rule, loss in RULES:
        for margin in MARGINS:
            found = [
                np.mean(
                    [
                        chosen_on_validation(cell, plain[name, cell["seed"]], loss, margin)
                        for cell in by_set[name]
                    ],
                    axis=0,
                )
                for name in names
            ]
            texts = [
                f"{100 * gain:+.1f} at {1 / layers:.2f}x" for gain, layers in [*found, np.mean(found, axis=0)]
            ]
            lines.append(f"| {' | '.join([rule, f'{margin:g}', *texts])} |")
    return lines


def chosen_on_validation(
    cell: Mapping[str, Any], plain: Mapping[str, Any], loss: float | None, margin: float
) -> Found:
    """What the threshold of a rule gives on the reported rows.

    Args:
        cell: with the curve of its validation rows.
        plain: the plain model's with this seed.
        loss: allowed against the model's own last layer; None for the plain model's accuracy as the floor.
        margin: standard errors of the loss.
    """
    depth, validation = cell["num_hidden_layers"], cell["validation"]
    points = [
        CurvePoint(threshold, accuracy, mean, depth / mean)
        for threshold, accuracy, mean, _ in validation["curve"]
    ]
    shy = [
        point.accuracy - margin * loss_error(changed, validation["num_examples"])
        for point, (*_, changed) in zip(points, validation["curve"], strict=True)
    ]
    own = validation["full_depth_accuracy"]
    floor = plain["validation"]["accuracy"] if loss is None else own - loss
    threshold = choose_threshold(points, floor, shy)
    reported = cell["criteria"][cell["criterion"]]["curve"]
    _, accuracy, mean = next((at for at in reported if at[0] >= threshold), reported[-1])
    return accuracy - plain["accuracy"], mean / depth


if __name__ == "__main__":
    main()
