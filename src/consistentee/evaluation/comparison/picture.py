"""compare.json as a picture: a panel for every backbone and set, a line for every method with its own criterion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from consistentee.evaluation.comparison.plan import OUR_METHOD
from consistentee.evaluation.looks import (
    BLUE,
    GREEN,
    GREY,
    GRID,
    INDIGO,
    INK,
    OLIVE,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    SKY,
    TEAL,
    WINE,
)
from consistentee.evaluation.plots import DASHES, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Neighbours differ in line style too. Ours is thick and blue.
COLOUR_METHOD = (RED, GREEN, PINK, ORANGE, SKY, WINE, TEAL, OLIVE, PURPLE, INDIGO)
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
OUR_COLOUR = BLUE
TICKS = (1.0, 1.5, 2.0, 3.0, 4.0)
FASTEST = 4.6  # end of the axis
SHOWN_BELOW = 12.0  # points below the best that a panel shows
COLUMNS = 3
PANEL_HEIGHT, WIDTHS = 3.4, (6.5, 9.5, 12.0)  # inches; of pictures with so many panels in a row

Runs = Sequence[Mapping[str, Any]]


def plot_comparison(summary: Mapping[str, Any], path: str | Path, title: str | None = None) -> Path:
    """Draw accuracy against layer speed-up: means over seeds, bands from the lowest seed to the highest.

    The plain model is a horizontal line, smaller plain models are squares, and a filled point on a line is what the
    threshold that validation chose gives, the mean over seeds.

    Args:
        summary: compare.json.
        path: the picture, PNG, PDF or SVG by its ending; written whole or not at all.
        title: over the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: another ending.
    """
    runs = drawn_lines(summary)
    places = list(dict.fromkeys((run["backbone"], run["set"]) for run in runs))
    labels = list(dict.fromkeys(run["method"] for run in runs if run["method"] != summary["reference"]))
    looks = _looks(labels)
    columns = min(COLUMNS, len(places))
    rows = math.ceil(len(places) / columns)
    spare = rows * columns - len(places)  # panels that are left over: the legend's place
    legend_columns = 1 + columns + (columns == COLUMNS)
    legend_lines = 0 if spare else math.ceil((len(labels) + 1) / legend_columns)
    with picture(
        path, title, PANEL_HEIGHT * rows + 0.27 * legend_lines + 0.35, WIDTHS[columns - 1]
    ) as figure:
        panels = figure.subplots(rows, columns, squeeze=False)
        handles: dict[str, Any] = {}
        for place, axes in zip(places, panels.flat, strict=False):
            here = [run for run in runs if (run["backbone"], run["set"]) == place]
            handles |= _draw_panel(axes, here, summary["reference"], labels, looks)
            axes.set_title(f"{place[1]}, {place[0]}", loc="left", color=INK, fontsize=11)
        for axes in panels.flat[len(places) :]:
            axes.axis("off")
        for axes in panels[:, 0]:
            axes.set_ylabel("accuracy (%)", color=INK)
        for axes in panels.flat[max(0, len(places) - columns) : len(places)]:
            axes.set_xlabel("layer speed-up (layers / mean exit layer)", color=INK)
        how = {"frameon": False, "labelcolor": INK, "fontsize": 9.5}
        if spare:
            panels.flat[-1].legend(handles.values(), handles.keys(), loc="center", **how)
        else:
            where = {"loc": "outside lower center", "ncols": legend_columns}
            figure.legend(handles.values(), handles.keys(), **where, **how)
    return Path(path)


def drawn_lines(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs, and others that are to be shown on their exits, called METHOD/CRITERION."""
    found: list[Mapping[str, Any]] = list(summary["runs"])
    for method, criterion in summary["also"]:
        found += [
            {**run, **run["criteria"][criterion], "method": f"{method}/{criterion}", "criterion": criterion}
            for run in summary["runs"]
            if run["method"] == method and criterion in run["criteria"]
        ]
    return found


def _looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    looks: dict[str, dict[str, Any]] = {}
    others = [label for label in labels if label != OUR_METHOD]
    for place, label in enumerate(others):
        colour = COLOUR_METHOD[place % len(COLOUR_METHOD)]
        style = STYLES[(place // len(COLOUR_METHOD) + place % 2) % len(STYLES)]
        looks[label] = {"color": colour, "linestyle": style, "linewidth": 1.4, "zorder": 4}
    looks[OUR_METHOD] = {"color": OUR_COLOUR, "linestyle": "-", "linewidth": 2.4, "zorder": 5}
    return looks


def _draw_panel(
    axes: Axes, runs: Runs, reference: str, labels: Sequence[str], looks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One panel; returns what the legend shows, by label."""
    handles: dict[str, Any] = {}
    heights: list[float] = []
    accuracies = [run["plain_accuracy"] for run in runs if run["plain_accuracy"] is not None]
    if accuracies:
        height = 100 * float(np.mean(accuracies))
        handles[f"{reference}, all layers"] = axes.axhline(
            height, color=GREY, linewidth=1.3, linestyle=DASHES, zorder=2
        )
        heights.append(height)
    for label in labels:
        of_label = [run for run in runs if run["method"] == label]
        if not of_label:
            continue
        criterion = of_label[0]["criterion"]
        shown = label if criterion is None or "/" in label else f"{label} ({criterion})"
        look = looks[label]
        if criterion is None:
            x, y = mean_points(of_label)
            handles[shown] = axes.plot(
                x, y, color=INK, marker="s", markersize=4, linestyle=":", linewidth=1, zorder=3
            )[0]
        else:
            x, low, mean, high = seed_band(of_label)
            handles[shown] = axes.plot(x, mean, **look)[0]
            if len(of_label) > 1:
                alpha = 0.15 if label == OUR_METHOD or len(labels) < 4 else 0.05
                axes.fill_between(x, low, high, color=look["color"], alpha=alpha, linewidth=0, zorder=1)
            y = mean
        inside = [height for speedup, height in zip(x, y, strict=True) if 1 <= speedup <= FASTEST]
        heights += inside
        _mark_chosen(axes, of_label, look["color"] if criterion else INK)
    _frame_panel(axes, heights)
    return handles


def seed_band(runs: Runs) -> tuple[Any, Any, Any, Any]:
    """Accuracy in percent at even steps of the logarithm of the speed-up: lowest, mean and highest of the seeds."""
    fastest = min(FASTEST, *(max(point["layer_speedup"] for point in run["curve"]) for run in runs))
    x = np.geomspace(1, max(fastest, 1.001), 120)
    lines = []
    for run in runs:
        points = sorted((point["layer_speedup"], point["accuracy"]) for point in run["curve"])
        speedups, accuracies = (np.array(values) for values in zip(*points, strict=True))
        lines.append(100 * np.interp(np.log(x), np.log(speedups), accuracies))
    stacked = np.stack(lines)
    return x, stacked.min(0), stacked.mean(0), stacked.max(0)


def mean_points(runs: Runs) -> tuple[list[float], list[float]]:
    """Points of smaller models, layer speed-ups and accuracies in percent, means over the seeds that have them."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for point in run["curve"]:
            found.setdefault(point["layer_speedup"], []).append(100 * point["accuracy"])
    ordered = sorted(found.items())
    return [speedup for speedup, _ in ordered], [float(np.mean(values)) for _, values in ordered]


def chosen_point(runs: Runs) -> tuple[float, float] | None:
    """Layer speed-up and accuracy (%) at the thresholds that validation chose, means over seeds; None without."""
    chosen = [run["at_validation_threshold"] for run in runs if run["at_validation_threshold"] is not None]
    if not chosen:
        return None
    share = float(np.mean([1 / point["layer_speedup"] for point in chosen]))
    return 1 / share, 100 * float(np.mean([point["accuracy"] for point in chosen]))


def _mark_chosen(axes: Axes, runs: Runs, colour: str) -> None:
    """The chosen point, if there is one."""
    point = chosen_point(runs)
    if point is None:
        return
    axes.plot(
        [point[0]],
        [point[1]],
        marker="o",
        markersize=7,
        markerfacecolor=colour,
        markeredgecolor="white",
        markeredgewidth=1.1,
        linestyle="none",
        zorder=6,
    )


def _frame_panel(axes: Axes, heights: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(0.98, FASTEST)
    axes.set_xticks(TICKS, [f"{tick:g}x" for tick in TICKS])
    axes.set_xticks([], minor=True)
    if heights:
        high = max(heights)
        low = max(min(heights), high - SHOWN_BELOW)
        room = max(0.06 * (high - low), 0.3)
        axes.set_ylim(low - room, high + room)
    axes.grid(axis="both", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=GRID, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
