"""Pictures: of an evaluation (what a saved layer costs, where inputs leave) and of a benchmark; extra `plot`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consistentee.atomic_files import atomic_path
from consistentee.errors import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from consistentee.evaluation.classification import Evaluation, Reference
    from consistentee.evaluation.generation_speed import GenerationSpeedRow
    from consistentee.evaluation.speed import SpeedReport, SpeedRow
    from consistentee.functional.curves import CurvePoint

WIDTH, HEIGHT, DPI = 12.0, 5.0, 100  # inches, inches, dots per inch: 1200 x 500
FORMATS = (".png", ".pdf", ".svg")

# Okabe and Ito's palette: told apart under every common colour blindness, and by line style without colour.
INK, GREY, GRID = "#222222", "#777777", "#E3E3E3"
COLOURS = {
    "policy": "#0072B2",
    "confidence": "#D55E00",
    "entropy": "#009E73",
    "patience": "#CC79A7",
    "softmax_margin": "#D55E00",
    "state_similarity": "#009E73",
    "confidence_classifier": "#CC79A7",
    "static": "#777777",
}
STYLES = {
    "policy": "-",
    "confidence": "--",
    "entropy": "-.",
    "patience": ":",
    "softmax_margin": "--",
    "state_similarity": "-.",
    "confidence_classifier": ":",
    "static": (0, (1, 3)),
}
BAR, LINE = "#A9CCE3", "#0072B2"


def plot_evaluation(evaluation: Evaluation, path: str | Path, title: str | None = None) -> Path:
    """Draw the trade-off curves and the exit histogram side by side.

    Args:
        evaluation: the figures; its other criteria become further curves, its reference a horizontal line.
        path: the picture, PNG, PDF or SVG by its ending; written whole or not at all.
        title: over the picture, such as the task's name.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: another ending.
    """
    with picture(path, title, HEIGHT) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _draw_curves(left, evaluation)
        _draw_histogram(right, evaluation)
    return Path(path)


SPEED_NAMES = {
    "transformers": ("transformers, all layers", "#999999"),
    "onnxruntime": ("ONNX Runtime, all layers", "#CCBB44"),
    "engine-full-depth": ("engine, all layers", "#56B4E9"),
    "engine": ("engine with exits", "#0072B2"),
}


def plot_speed(report: SpeedReport, path: str | Path, title: str | None = None) -> Path:
    """Draw throughput of the competitors and, beside it, layers saved against time saved.

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
    with picture(path, title, HEIGHT) as figure:
        left, right = figure.subplots(1, 2)
        sizes = list(dict.fromkeys(row.batch_size for row in report.rows))
        rows = {(row.batch_size, row.name): row for row in report.rows}
        names = [name for name in SPEED_NAMES if any((size, name) in rows for size in sizes)]
        draw_bars(
            left,
            sizes,
            [
                (*SPEED_NAMES[name], [rows[size, name].instances_per_second for size in sizes])
                for name in names
            ],
            "inputs per second",
            "Throughput",
        )
        exits = [rows.get((size, "engine")) for size in sizes]
        draw_speedups(right, sizes, [row for row in exits if row is not None])
    return Path(path)


def draw_speedups(
    axes: Axes, sizes: Sequence[int | None], rows: Sequence[SpeedRow | GenerationSpeedRow]
) -> None:
    """Bars of layer speed-up beside wall-clock speed-up, one pair for each batch size."""
    if not rows:
        axes.axis("off")
        axes.text(0.5, 0.5, "This model has no exits.", ha="center", color=GREY, transform=axes.transAxes)
        return
    series = [
        ("layer speed-up", BAR, [row.layer_speedup for row in rows]),
        ("wall-clock speed-up", LINE, [row.wall_clock_speedup for row in rows]),
    ]
    draw_bars(axes, sizes, series, "times faster than all layers", "Layers saved, and time saved")
    for place, row in enumerate(rows):
        efficiency = 0 if row.efficiency is None else row.efficiency
        top = max(row.layer_speedup, row.wall_clock_speedup)
        axes.annotate(
            f"{efficiency:.2f}",
            (place, top),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=10,
        )
    axes.axhline(1, color=GREY, linewidth=1, zorder=1)
    axes.set_ylim(0, 1.3 * max(max(row.layer_speedup, row.wall_clock_speedup) for row in rows))
    axes.text(
        0.01,
        0.86,
        "figure above the bars: efficiency",
        color=GREY,
        fontsize=9,
        transform=axes.transAxes,
        va="top",
    )


def draw_bars(
    axes: Axes,
    sizes: Sequence[int | None],
    series: Sequence[tuple[str, str, Sequence[float]]],
    y_label: str,
    title: str,
) -> None:
    """Bars in groups, one group for each batch size; `series` are (label, colour, heights)."""
    width = 0.8 / len(series)
    for order, (label, colour, heights) in enumerate(series):
        offset = (order - (len(series) - 1) / 2) * width
        places = [place + offset for place in range(len(sizes))]
        axes.bar(places, heights, width=0.92 * width, color=colour, label=label, zorder=3)
    axes.set_xticks(range(len(sizes)), ["throughput\nmode" if size is None else str(size) for size in sizes])
    highest = max(max(heights) for _, _, heights in series)
    axes.set_ylim(0, 1.3 * highest)  # room for the legend
    frame(axes, "batch size", y_label, title)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="upper left", ncols=2)


@contextmanager
def picture(path: str | Path, title: str | None, height: float) -> Iterator[Any]:
    """An empty matplotlib figure, `WIDTH` inches wide, that is written whole once the block ends without an error.

    Args:
        path: the picture, PNG, PDF or SVG by its ending.
        title: over the picture.
        height: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: another ending.
    """
    path = Path(path)
    check_plot(path)
    figure_module = require_extra("plot", "matplotlib.figure")
    figure = figure_module.Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    yield figure
    if title:
        figure.suptitle(title, color=INK, fontsize=14, fontweight="bold", x=0.01, ha="left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())


def check_plot(path: Path) -> None:
    """Raise unless a picture of this name could be drawn here; to be called before a long computation.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: the ending is not one of `FORMATS`.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f'The picture must end in {", ".join(FORMATS)}, got "{path}".')
    require_extra("plot", "matplotlib")


def _draw_curves(axes: Axes, evaluation: Evaluation) -> None:
    curves = {evaluation.criterion: evaluation.curve}
    curves |= {name: rival.curve for name, rival in evaluation.other_criteria.items()}
    for order, (name, curve) in enumerate(curves.items()):
        points = _drawable(curve)
        axes.plot(
            [point.layer_speedup for point in points],
            [100 * point.accuracy for point in points],
            label=name,
            color=COLOURS.get(name, INK),
            linestyle=STYLES.get(name, "-"),
            linewidth=2.2,
            zorder=5 - 0.1 * order,
            solid_capstyle="round",
        )
    for name, rival in evaluation.other_criteria.items():
        if rival.point is not None:
            _mark(axes, rival.point.layer_speedup, rival.point.accuracy, COLOURS.get(name, INK), filled=False)
    _mark(
        axes,
        evaluation.layer_speedup,
        evaluation.accuracy,
        COLOURS.get(evaluation.criterion, INK),
        filled=True,
    )
    axes.annotate(
        f"{evaluation.layer_speedup:.2f}x, {100 * evaluation.accuracy:.1f} %",
        (evaluation.layer_speedup, 100 * evaluation.accuracy),
        xytext=(8, 7),
        textcoords="offset points",
        color=INK,
        fontsize=10,
        zorder=8,
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )
    if evaluation.reference is not None:
        axes.axhline(
            100 * evaluation.reference.accuracy,
            color=GREY,
            linewidth=1.4,
            linestyle=(0, (6, 3)),
            zorder=2,
            label=_reference_label(evaluation.reference),
        )
    frame(axes, "layer speed-up (layers / mean exit layer)", "accuracy (%)", "Accuracy against depth")
    axes.grid(axis="both", color=GRID, linewidth=0.8)
    axes.set_xlim(left=0.9, right=max(_useful_end(evaluation, curves), 1.5))
    _fit_height(axes, evaluation, curves)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower left")


def _reference_label(reference: Reference) -> str:
    mean, layers = reference.mean_exit_layer, reference.num_hidden_layers
    if mean is None or mean == layers:
        return f"{reference.name}, all layers"
    return f"{reference.name} ({mean:.2f} of {layers} layers)"


def _drawable(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    return sorted(curve, key=lambda point: (point.layer_speedup, -point.accuracy))


def _useful_end(evaluation: Evaluation, curves: dict[str, list[CurvePoint]]) -> float:
    """Where the axis ends: beyond it every curve is more than 12 points below the best accuracy."""
    best = max(point.accuracy for curve in curves.values() for point in curve)
    useful = [
        point.layer_speedup for curve in curves.values() for point in curve if point.accuracy > best - 0.12
    ]
    return 1.03 * max(*useful, evaluation.layer_speedup)


def _fit_height(axes: Axes, evaluation: Evaluation, curves: dict[str, list[CurvePoint]]) -> None:
    end = axes.get_xlim()[1]
    shown = [p.accuracy for curve in curves.values() for p in curve if p.layer_speedup <= end]
    shown += [evaluation.accuracy] + ([evaluation.reference.accuracy] if evaluation.reference else [])
    low, high = 100 * min(shown), 100 * max(shown)
    room = max(0.08 * (high - low), 0.5)
    axes.set_ylim(low - room, high + 2 * room)  # above the curves: the label of the chosen point
    axes.set_yticks([tick for tick in axes.get_yticks() if low - room <= tick <= 100])


def _mark(axes: Axes, layer_speedup: float, accuracy: float, colour: str, *, filled: bool) -> None:
    axes.plot(
        [layer_speedup],
        [100 * accuracy],
        marker="o",
        markersize=9 if filled else 7,
        markerfacecolor=colour if filled else "white",
        markeredgecolor="white" if filled else colour,
        markeredgewidth=1.6,
        linestyle="none",
        zorder=7 if filled else 6,
    )


def _draw_histogram(axes: Axes, evaluation: Evaluation) -> None:
    layers = list(range(1, evaluation.num_hidden_layers + 1))
    shares = [100 * count / evaluation.num_examples for count in evaluation.exit_histogram]
    bars = axes.bar(layers, shares, width=0.72, color=BAR, label="share that leaves here")
    for bar, share in zip(bars, shares, strict=True):
        if share >= 0.5:
            axes.annotate(
                f"{share:.0f}",
                (bar.get_x() + bar.get_width() / 2, share),
                xytext=(0, 2),
                ha="center",
                textcoords="offset points",
                color=GREY,
                fontsize=9,
            )
    axes.plot(
        layers,
        [100 * value for value in evaluation.per_layer_accuracy],
        color=LINE,
        marker="o",
        markersize=4.5,
        linewidth=1.8,
        label="accuracy if all left here",
    )
    spots = [
        (n, 100 * value)
        for n, value in zip(layers, evaluation.exit_accuracy, strict=True)
        if value is not None
    ]
    axes.plot(
        [x for x, _ in spots],
        [y for _, y in spots],
        color=COLOURS["confidence"],
        marker="D",
        markersize=5,
        linestyle="none",
        label="their accuracy",
    )
    frame(axes, "layer", "%", f"Where the {evaluation.num_examples:,} inputs leave")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_xticks(layers)
    axes.set_ylim(0, 119)
    axes.set_yticks(range(0, 101, 20))
    lines, names = axes.get_legend_handles_labels()
    by_name = dict(zip(names, lines, strict=True))
    ordered = ("share that leaves here", "their accuracy", "accuracy if all left here")
    axes.legend(
        [by_name[name] for name in ordered],
        ordered,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        loc="upper center",
        ncols=3,
        columnspacing=1.2,
        handlelength=1.4,
    )


def frame(axes: Axes, x_label: str, y_label: str, title: str) -> None:
    """Title, labels and quiet spines."""
    axes.set_title(title, loc="left", color=INK, fontsize=12)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.set_axisbelow(True)
    axes.tick_params(color=GRID, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)


def layer_ticks(num_hidden_layers: int) -> list[int]:
    """Layers to name on an axis: the first, the last, and round ones between that leave room.

    Example:
        >>> layer_ticks(30)
        [1, 5, 10, 15, 20, 25, 30]
    """
    step = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if num_hidden_layers <= 12 * step)
    round_ones = range(step, num_hidden_layers - step // 2, step)
    return sorted({1, num_hidden_layers, *(layer for layer in round_ones if layer != 2)})
