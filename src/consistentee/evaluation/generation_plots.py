"""The picture of an evaluation of generation: what saved layers cost, where tokens leave, and when; extra `plot`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from consistentee.evaluation.plots import (
    BAR,
    COLOURS,
    GREY,
    GRID,
    INK,
    LINE,
    STYLES,
    draw_bars,
    draw_speedups,
    frame,
    layer_ticks,
    picture,
)
from consistentee.evaluation.results import LAST_LAYER, PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from consistentee.evaluation.generation_speed import GenerationSpeedReport
    from consistentee.evaluation.results import GeneratedPoint, GenerationEvaluation

HEIGHT, SPEED_HEIGHT = 9.0, 5.0  # inches: 1200 x 900 and 1200 x 500
DASHES = (0, (6, 3))
MARKERS = "osD^v"  # by mode, the reported one first
LEGEND_COLUMNS, LEGEND_ROW = 2, 0.068  # share of the height
USEFUL = 0.12  # a curve is drawn as far as it stays within this of the best figure


SPEED_COLOURS = {
    "transformers": ("transformers, all layers", "#999999"),
    "engine-full-depth": ("ours, all layers", "#56B4E9"),
    "engine-lossless": ("ours, lossless", "#009E73"),
    "engine": ("ours, with exits", "#0072B2"),
}


def plot_generation_speed(report: GenerationSpeedReport, path: str | Path, title: str | None = None) -> Path:
    """Draw tokens per second of the competitors and, beside it, layers saved against time saved.

    Args:
        report: the figures.
        path: the picture, PNG, PDF or SVG by its ending; written whole or not at all.
        title: over the picture, such as the model's name.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: another ending.
    """
    with picture(path, title, SPEED_HEIGHT) as figure:
        left, right = figure.subplots(1, 2)
        sizes = list(dict.fromkeys(row.batch_size for row in report.rows))
        rows = {(row.batch_size, row.name): row for row in report.rows}
        names = [name for name in SPEED_COLOURS if all((size, name) in rows for size in sizes)]
        series = [
            (*SPEED_COLOURS[name], [rows[size, name].tokens_per_second for size in sizes]) for name in names
        ]
        draw_bars(left, sizes, series, "new tokens per second", "Throughput")
        draw_speedups(right, sizes, [rows[size, "engine"] for size in sizes])
    return Path(path)


def plot_generation(evaluation: GenerationEvaluation, path: str | Path, title: str | None = None) -> Path:
    """Draw quality against depth (of generated text, and on the references), the exit histogram and exits by position.

    The panel of generated text is left out where no criterion has two points of it.

    Args:
        evaluation: the figures; its other criteria become further curves, full depth and the reference lines.
        path: the picture, PNG, PDF or SVG by its ending; written whole or not at all.
        title: over the picture, such as the task's name.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: another ending.
    """
    with picture(path, title, HEIGHT) as figure:
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
        series = _text_series(evaluation)
        has_text = any(len(points) > 1 for points in series.values())
        mosaic = [["text" if has_text else "forced", "forced"], ["layers", "positions"]]
        axes = figure.subplot_mosaic(mosaic)
        if has_text:
            _draw_text_quality(axes["text"], evaluation, series)
        _draw_token_accuracy(axes["forced"], evaluation)
        _draw_layers(axes["layers"], evaluation)
        _draw_positions(axes["positions"], evaluation)
    return Path(path)


def _text_series(evaluation: GenerationEvaluation) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(criterion, mode) to (layer speed-up, ROUGE-L in %), the reported pair first; points from slow to fast."""
    own = (evaluation.criterion, evaluation.mode)
    series: dict[tuple[str, str], set[tuple[float, float]]] = {own: set()}
    if "rougeL" in evaluation.metrics:
        series[own].add((evaluation.layer_speedup, 100 * evaluation.metrics["rougeL"]))
    rivals = [point for rival in evaluation.other_criteria.values() for point in rival.generated]
    for point in [*evaluation.generated, *rivals]:
        if "rougeL" in point.metrics:
            place = (point.layer_speedup, 100 * point.metrics["rougeL"])
            series.setdefault((point.criterion, point.mode), set()).add(place)
    return {pair: sorted(points) for pair, points in series.items() if points}


def _draw_text_quality(
    axes: Axes, evaluation: GenerationEvaluation, series: dict[tuple[str, str], list[tuple[float, float]]]
) -> None:
    modes = list(dict.fromkeys([evaluation.mode, *(mode for _, mode in series)]))
    for order, ((criterion, mode), points) in enumerate(series.items()):
        place = modes.index(mode)
        axes.plot(
            *zip(*points, strict=True),
            label=criterion if len(modes) == 1 else f"{criterion}, {mode}",
            color=COLOURS.get(criterion, INK),
            linestyle=STYLES.get(criterion, "-"),
            marker=MARKERS[place % len(MARKERS)],
            markersize=5.5,
            markerfacecolor="white" if place else COLOURS.get(criterion, INK),
            linewidth=1.3 if place else 2.2,
            zorder=5 - 0.1 * order,
        )
    lines = (
        (LAST_LAYER, evaluation.full_depth),
        (evaluation.reference_name or PLAIN, evaluation.reference),
    )
    heights = _draw_references(axes, lines)
    shown = [point for points in series.values() for point in points]
    own = None
    if "rougeL" in evaluation.metrics:
        own = (evaluation.layer_speedup, 100 * evaluation.metrics["rougeL"])
        _label(axes, *own, COLOURS.get(evaluation.criterion, INK))
    _finish_curves(axes, shown, heights, own)
    frame(axes, "layer speed-up (layers / mean exit layer)", "ROUGE-L x 100", "Generated text against depth")


def _draw_references(axes: Axes, lines: Iterable[tuple[str, GeneratedPoint | None]]) -> list[float]:
    """Horizontal lines of what all layers give; returns their heights."""
    heights: list[float] = []
    for (label, point), dashes in zip(lines, (DASHES, (0, (1.5, 2))), strict=True):
        if point is not None and "rougeL" in point.metrics:
            heights.append(100 * point.metrics["rougeL"])
            axes.axhline(heights[-1], color=GREY, linewidth=1.4, linestyle=dashes, zorder=2, label=label)
    return heights


def _draw_token_accuracy(axes: Axes, evaluation: GenerationEvaluation) -> None:
    curves = {evaluation.criterion: evaluation.curve}
    curves |= {name: rival.curve for name, rival in evaluation.other_criteria.items()}
    shown: list[tuple[float, float]] = []
    for order, (name, curve) in enumerate(curves.items()):
        points = sorted((point.layer_speedup, 100 * point.token_accuracy) for point in curve)
        if not points:
            continue
        shown += points
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=COLOURS.get(name, INK),
            linestyle=STYLES.get(name, "-"),
            linewidth=2.2,
            zorder=5 - 0.1 * order,
            solid_capstyle="round",
        )
    full = [
        100 * p.token_accuracy for p in evaluation.curve if p.mean_exit_layer == evaluation.num_hidden_layers
    ]
    for height in full[:1]:
        axes.axhline(
            height,
            color=GREY,
            linewidth=1.4,
            linestyle=DASHES,
            zorder=2,
            label=LAST_LAYER,
        )
    at = [p for p in evaluation.curve if p.threshold == evaluation.threshold]
    own = (at[0].layer_speedup, 100 * at[0].token_accuracy) if at else None
    if own is not None:
        _label(axes, *own, COLOURS.get(evaluation.criterion, INK))
    _finish_curves(axes, shown, full[:1], own)
    frame(
        axes,
        "layer speed-up (layers / mean exit layer)",
        "tokens predicted (%)",
        "Next token of the references against depth",
    )


def _label(axes: Axes, layer_speedup: float, height: float, colour: str) -> None:
    """The reported threshold: a large point with its figures."""
    axes.plot(
        [layer_speedup],
        [height],
        marker="o",
        markersize=9,
        markerfacecolor=colour,
        markeredgecolor="white",
        markeredgewidth=1.6,
        linestyle="none",
        zorder=7,
    )
    axes.annotate(
        f"{layer_speedup:.2f}x, {height:.1f}",
        (layer_speedup, height),
        xytext=(8, 7),
        textcoords="offset points",
        color=INK,
        fontsize=10,
        zorder=8,
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )


def _finish_curves(
    axes: Axes,
    shown: Sequence[tuple[float, float]],
    heights: Sequence[float],
    own: tuple[float, float] | None,
) -> None:
    """Limits around the useful part: beyond it every curve is far below the best."""
    axes.grid(axis="both", color=GRID, linewidth=0.8)
    if not shown:
        return
    best = max(height for _, height in shown)
    useful = [x for x, height in shown if height > best - 100 * USEFUL] + ([own[0]] if own else [])
    end = max(1.04 * max(useful), 1.25)
    inside = [height for x, height in shown if x <= end] + list(heights) + ([own[1]] if own else [])
    low, high = min(inside), max(inside)
    room = max(0.08 * (high - low), 0.5)
    axes.set_xlim(1 - 0.04 * (end - 1), end)
    low, high = low - room, high + 2 * room  # above the curves: the label of the reported point
    rows = math.ceil(len(axes.get_legend_handles_labels()[1]) / LEGEND_COLUMNS)
    below = 0.02 + LEGEND_ROW * rows  # under the curves: the legend
    axes.set_ylim(low - below / (1 - below) * (high - low), high)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower left", ncols=LEGEND_COLUMNS)


def _draw_layers(axes: Axes, evaluation: GenerationEvaluation) -> None:
    depth, tokens = evaluation.num_hidden_layers, max(evaluation.num_tokens, 1)
    layers = list(range(1, depth + 1))
    drafts = evaluation.draft_histogram
    shares = [100 * count / tokens for count in drafts or evaluation.exit_histogram]
    axes.bar(layers, shares, width=0.78, color=BAR, zorder=3)
    highest = max(shares)
    axes.set_ylim(0, 1.18 * highest or 1)
    for layer, share in zip(layers, shares, strict=True):
        if share >= 0.5 and (depth <= 16 or share >= 0.1 * highest):
            axes.annotate(
                f"{share:.0f}",
                (layer, share),
                xytext=(0, 2),
                ha="center",
                textcoords="offset points",
                color=GREY,
                fontsize=9 if depth <= 32 else 7,
            )
    left = evaluation.mean_exit_layer <= 0.8 * depth  # which side of the line has room
    axes.axvline(evaluation.mean_exit_layer, color=INK, linewidth=1.2, linestyle=DASHES, zorder=5)
    axes.annotate(
        f"mean {evaluation.mean_exit_layer:.1f}",
        (evaluation.mean_exit_layer, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5 if left else -5, -4),
        textcoords="offset points",
        ha="left" if left else "right",
        va="top",
        color=INK,
        fontsize=10,
        zorder=6,
    )
    axes.set_xticks(layer_ticks(depth))
    what = f"Where the {evaluation.num_tokens:,} generated tokens "
    frame(axes, "layer", "% of tokens", what + ("were drafted (last: not)" if drafts else "leave"))
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def _draw_positions(axes: Axes, evaluation: GenerationEvaluation) -> None:
    means = evaluation.exit_by_position
    axes.plot(
        range(1, len(means) + 1),
        means,
        color=LINE,
        linewidth=1.8,
        marker="o" if len(means) <= 40 else None,
        markersize=4.5,
        zorder=4,
    )
    mean = evaluation.mean_exit_layer
    axes.axhline(
        mean, color=INK, linewidth=1.2, linestyle=DASHES, zorder=5, label=f"mean of all tokens, {mean:.1f}"
    )
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower left")
    axes.set_ylim(0, 1.04 * evaluation.num_hidden_layers)
    axes.set_xlim(0.5 if len(means) < 2 else 1 - 0.02 * len(means), max(1.02 * len(means), 1.5))
    frame(axes, "position of the token in the generated text", "mean exit layer", "When tokens leave early")
    axes.grid(axis="both", color=GRID, linewidth=0.8)
