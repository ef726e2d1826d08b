"""Pictures: of an evaluation (what a saved layer costs, where inputs exit) and of a benchmark; extra `plot`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consistentee.atomic_files import atomic_path
from consistentee.errors import require_extra
from consistentee.evaluation.looks import BAR, BLUE, GREEN, GREY, GRID, INK, LOOKS, RED, SKY
from consistentee.evaluation.results import BASELINE, LAST_LAYER, AgreementEvaluation, GenerationEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from consistentee.evaluation.results import Evaluation, Reference
    from consistentee.evaluation.speed import SpeedResults, SpeedRow

WIDTH, LOW, HIGH, DPI = 12.0, 5.0, 9.0, 100  # inches, and dots per inch: 1200 x 500, 1200 x 900
PICTURE_FORMATS = (".png", ".pdf", ".svg")

SPEED_LOOKS = {
    "transformers": ("transformers, all layers", "#999999"),
    "onnxruntime": ("ONNX Runtime, all layers", "#CCBB44"),
    "onnx-graph": ("ONNX graph, with exits", "#66CCEE"),
    "engine-full-depth": ("engine, all layers", SKY),
    "engine-lossless": ("engine, lossless", GREEN),
    "engine": ("engine with exits", BLUE),
}
DASHES, DOTS = (0, (6, 3)), (0, (1.5, 2))
MARKERS = "osD^v"  # by mode, the reported one first
LEGEND_COLUMNS, LEGEND_ROW = 2, 0.068  # share of the height
USEFUL = 12  # points: a curve is drawn as far as it stays within this of the best
SPEEDUP = "layer speed-up (layers / mean exit layer)"

Point = tuple[float, float]
"""Layer speed-up, and a quality in points of 100."""


def plot_evaluation(
    evaluation: Evaluation | AgreementEvaluation | GenerationEvaluation,
    path: str | Path,
    title: str | None = None,
) -> Path:
    """Draw quality against depth, and where inputs or tokens exit.

    Of a text generator: of generated text (left out where no criterion has two points of it) and on the references, the
    exit histogram and exits by position.

    Args:
        evaluation: its other criteria become further curves, its reference a horizontal line.
        path: the picture, PNG, PDF or SVG by its ending; written whole or not at all.
        title: over the picture, such as the task's name.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: another ending.
    """
    generates = isinstance(evaluation, GenerationEvaluation)
    with picture(path, title, HIGH if generates else LOW) as figure:
        if generates:
            figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
            series = _text_series(evaluation)
            has_text = any(len(points) > 1 for points in series.values())
            mosaic = [["text" if has_text else "references", "references"], ["layers", "positions"]]
            axes = figure.subplot_mosaic(mosaic)
            if has_text:
                _draw_text_quality(axes["text"], evaluation, series)
            _draw_token_accuracy(axes["references"], evaluation)
            _draw_token_layers(axes["layers"], evaluation)
            _draw_positions(axes["positions"], evaluation)
        else:
            left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
            quality = "agreement" if isinstance(evaluation, AgreementEvaluation) else "accuracy"
            _draw_quality(left, evaluation, quality)
            _draw_layers(right, evaluation, quality)
    return Path(path)


def plot_speed(results: SpeedResults[Any], path: str | Path, title: str | None = None) -> Path:
    """Draw throughput of the competitors and, beside it, layers saved against time saved.

    Args:
        results: of a classifier or of a text generator.
        path, title: as of `plot_evaluation`, whose errors it raises.
    """
    generates = "new_tokens" in results.workload
    per_second, label = "instances_per_second", "inputs per second"
    if generates:
        per_second, label = "tokens_per_second", "new tokens per second"
    with picture(path, title, LOW) as figure:
        left, right = figure.subplots(1, 2)
        sizes = list(dict.fromkeys(row.batch_size for row in results.rows))
        rows = {(row.batch_size, row.name): row for row in results.rows}
        names = [name for name in SPEED_LOOKS if all((size, name) in rows for size in sizes)]
        series = [
            (*SPEED_LOOKS[name], [getattr(rows[size, name], per_second) for size in sizes]) for name in names
        ]
        _draw_groups(left, sizes, series, label, "Throughput")
        exits = [rows[size, "engine"] for size in sizes if (size, "engine") in rows]
        _draw_speedups(right, sizes, exits)
    return Path(path)


@contextmanager
def picture(path: str | Path, title: str | None, height: float, width: float = WIDTH) -> Iterator[Any]:
    """An empty matplotlib figure that is written whole once the block ends without an error.

    Args:
        path: the picture, PNG, PDF or SVG by its ending.
        title: over the picture.
        height, width: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: another ending.
    """
    path = Path(path)
    check_plot(path)
    figure_module = require_extra("plot", "matplotlib.figure")
    figure = figure_module.Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    yield figure
    if title:
        figure.suptitle(title, color=INK, fontsize=14, fontweight="bold", x=0.01, ha="left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())


def check_plot(path: Path) -> None:
    """Raise unless a picture of this name could be drawn here; to be called before a long computation.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: the ending is not one of `PICTURE_FORMATS`.
    """
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise ValueError(f'The picture must end in {", ".join(PICTURE_FORMATS)}, got "{path}".')
    require_extra("plot", "matplotlib")


def layer_ticks(num_hidden_layers: int) -> list[int]:
    """Layers to name on an axis: the first, the last, and round ones between that leave room.

    Example:
        >>> layer_ticks(30)
        [1, 5, 10, 15, 20, 25, 30]
    """
    step = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if num_hidden_layers <= 12 * step)
    round_ones = range(step, num_hidden_layers - step // 2, step)
    return sorted({1, num_hidden_layers, *(layer for layer in round_ones if layer != 2 or step == 1)})


def _look(criterion: str) -> tuple[str, Any]:
    return LOOKS.get(criterion, (INK, "-"))


def _points(
    evaluation: Evaluation | AgreementEvaluation | GenerationEvaluation, quality: str
) -> dict[str, list[Point]]:
    """Every criterion's curve, the reported one first."""
    curves = {evaluation.criterion: evaluation.curve}
    curves |= {name: other.curve for name, other in evaluation.other_criteria.items()}
    clock = getattr(evaluation, "clock", None)
    return {
        name: [
            (
                point.layer_speedup if clock is None else clock.full_depth_ms / clock.curves[name][place],
                100 * getattr(point, quality),
            )
            for place, point in enumerate(curve)
        ]
        for name, curve in curves.items()
    }


def _draw_quality(axes: Axes, evaluation: Evaluation | AgreementEvaluation, quality: str) -> None:
    """Accuracy or agreement against depth, or time; hollow points are the other criteria's chosen thresholds."""
    points, clock = _points(evaluation, quality), evaluation.clock
    for name, other in evaluation.other_criteria.items():
        if other.point is not None:
            x = other.point.layer_speedup if clock is None else clock.full_depth_ms / clock.others[name]
            _mark(axes, (x, 100 * getattr(other.point, quality)), name, filled=False)
    reference: Reference | None = getattr(evaluation, "reference", None)
    lines = {} if reference is None else {_reference_label(reference): 100 * reference.accuracy}
    x = evaluation.layer_speedup if clock is None else clock.full_depth_ms / clock.milliseconds
    _draw_curves(axes, points, lines, (x, 100 * getattr(evaluation, quality)), " %")
    if clock is None:
        _frame(axes, SPEEDUP, f"{quality} (%)", f"{quality.capitalize()} against depth")
        return
    label = f"speed-up ({clock.full_depth_ms:.3g} ms without exits / ms of an input, batches of {clock.batch_size})"
    _frame(axes, label, f"{quality} (%)", f"{quality.capitalize()} against time")


def _reference_label(reference: Reference) -> str:
    mean, layers = reference.mean_exit_layer, reference.num_hidden_layers
    if mean is None or mean == layers:
        return f"{reference.name}, all layers"
    return f"{reference.name} ({mean:.2f} of {layers} layers)"


def _draw_token_accuracy(axes: Axes, evaluation: GenerationEvaluation) -> None:
    """How many tokens of the references are predicted, against depth."""
    points = _points(evaluation, "token_accuracy")
    depth = evaluation.num_hidden_layers
    full = [100 * point.token_accuracy for point in evaluation.curve if point.mean_exit_layer == depth]
    at = [point for point in evaluation.curve if point.threshold == evaluation.threshold]
    own = (at[0].layer_speedup, 100 * at[0].token_accuracy) if at else None
    _draw_curves(axes, points, {LAST_LAYER: full[0]} if full else {}, own)
    _frame(axes, SPEEDUP, "tokens predicted (%)", "Next token of the references against depth")


def _text_series(evaluation: GenerationEvaluation) -> dict[tuple[str, str], list[Point]]:
    """ROUGE-L of generated text by (criterion, mode), the reported pair first; points from slow to fast."""
    others = [point for other in evaluation.other_criteria.values() for point in other.generated]
    series: dict[tuple[str, str], set[Point]] = {}
    for point in [evaluation.own_point(), *evaluation.generated, *others]:
        if "rougeL" in point.metrics:
            found = series.setdefault((point.criterion, point.mode), set())
            found.add((point.layer_speedup, 100 * point.metrics["rougeL"]))
    return {pair: sorted(points) for pair, points in series.items()}


def _draw_text_quality(
    axes: Axes, evaluation: GenerationEvaluation, series: dict[tuple[str, str], list[Point]]
) -> None:
    modes = list(dict.fromkeys([evaluation.mode, *(mode for _, mode in series)]))
    for order, ((criterion, mode), points) in enumerate(series.items()):
        mark, (colour, style) = modes.index(mode), _look(criterion)
        axes.plot(
            *zip(*points, strict=True),
            label=criterion if len(modes) == 1 else f"{criterion}, {mode}",
            color=colour,
            linestyle=style,
            marker=MARKERS[mark % len(MARKERS)],
            markersize=5.5,
            markerfacecolor="white" if mark else colour,
            linewidth=1.3 if mark else 2.2,
            zorder=5 - 0.1 * order,
        )
    horizontal = {LAST_LAYER: evaluation.full_depth}
    horizontal[evaluation.reference_name or BASELINE] = evaluation.reference
    lines = {
        label: 100 * point.metrics["rougeL"]
        for label, point in horizontal.items()
        if point is not None and "rougeL" in point.metrics
    }
    own = None
    if "rougeL" in evaluation.metrics:
        own = (evaluation.layer_speedup, 100 * evaluation.metrics["rougeL"])
        _mark(axes, own, evaluation.criterion, label=f"{own[0]:.2f}x, {own[1]:.1f}")
    _draw_lines(axes, lines)
    _fit(axes, [point for points in series.values() for point in points], [*lines.values()], own)
    _frame(axes, SPEEDUP, "ROUGE-L x 100", "Generated text against depth")


def _draw_curves(
    axes: Axes,
    curves: Mapping[str, Sequence[Point]],
    lines: Mapping[str, float],
    own: Point | None,
    unit: str = "",
) -> None:
    """Curves by criterion, the reported one first, horizontal lines by label, and the reported threshold."""
    for order, (name, points) in enumerate(curves.items()):
        if points:
            colour, style = _look(name)
            axes.plot(
                *zip(*sorted(points, key=lambda point: (point[0], -point[1])), strict=True),
                label=name,
                color=colour,
                linestyle=style,
                linewidth=2.2,
                zorder=5 - 0.1 * order,
                solid_capstyle="round",
            )
    if own is not None:
        _mark(axes, own, next(iter(curves)), label=f"{own[0]:.2f}x, {own[1]:.1f}{unit}")
    _draw_lines(axes, lines)
    _fit(axes, [point for points in curves.values() for point in points], [*lines.values()], own)


def _draw_lines(axes: Axes, lines: Mapping[str, float]) -> None:
    """What other models, or all layers, give: horizontal lines by label."""
    for (label, height), dashes in zip(lines.items(), (DASHES, DOTS), strict=False):
        axes.axhline(height, color=GREY, linewidth=1.4, linestyle=dashes, zorder=2, label=label)


def _mark(axes: Axes, point: Point, criterion: str, *, filled: bool = True, label: str = "") -> None:
    """A chosen threshold; the reported one is larger and says what it gives."""
    colour, _ = _look(criterion)
    axes.plot(
        [point[0]],
        [point[1]],
        marker="o",
        markersize=9 if filled else 7,
        markerfacecolor=colour if filled else "white",
        markeredgecolor="white" if filled else colour,
        markeredgewidth=1.6,
        linestyle="none",
        zorder=7 if filled else 6,
    )
    if label:
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        _write(axes, label, point, (8, 7), zorder=8, bbox=box)


def _fit(axes: Axes, shown: Sequence[Point], heights: Sequence[float], own: Point | None) -> None:
    """Limits around the useful part: beyond it every curve is far below the best; the legend below the curves."""
    axes.grid(axis="both", color=GRID, linewidth=0.8)
    if not shown:
        return
    best = max(height for _, height in shown)
    useful = [x for x, height in shown if height > best - USEFUL] + ([own[0]] if own else [])
    end = max(1.04 * max(useful), 1.25)
    inside = [height for x, height in shown if x <= end] + list(heights) + ([own[1]] if own else [])
    low, high = min(inside), max(inside)
    room = max(0.08 * (high - low), 0.5)
    axes.set_xlim(1 - 0.04 * (end - 1), end)
    low, high = low - room, high + 2 * room  # above the curves: the label of the reported point
    rows = math.ceil(len(axes.get_legend_handles_labels()[1]) / LEGEND_COLUMNS)
    below = 0.02 + LEGEND_ROW * rows
    axes.set_ylim(low - below / (1 - below) * (high - low), high)
    _legend(axes, "lower left", ncols=LEGEND_COLUMNS)


def _draw_shares(axes: Axes, shares: Sequence[float], least: float, label: str | None = None) -> None:
    """Bars of how many exit at each layer, in percent, in numbers from `least` on."""
    depth = len(shares)
    axes.bar(range(1, depth + 1), shares, width=0.75, color=BAR, zorder=1, label=label)
    for layer, share in enumerate(shares, start=1):
        if share >= least:
            size = 9 if depth <= 32 else 7
            _write(axes, f"{share:.0f}", (layer, share), (0, 2), ha="center", color=GREY, fontsize=size)
    axes.set_xticks(layer_ticks(depth))
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def _draw_layers(axes: Axes, evaluation: Evaluation | AgreementEvaluation, quality: str) -> None:
    shares = [100 * count / evaluation.num_examples for count in evaluation.exit_histogram]
    names = ("share that exits here", f"their {quality}", f"{quality} if all exited here")
    _draw_shares(axes, shares, 0.5, names[0])
    layers = range(1, evaluation.num_hidden_layers + 1)
    at_exits = getattr(evaluation, f"exit_{quality}")
    heights = [math.nan if value is None else 100 * value for value in at_exits]
    axes.plot(layers, heights, color=RED, marker="D", markersize=5, linestyle="none", label=names[1])
    there = enumerate(getattr(evaluation, f"per_layer_{quality}"), start=1)
    if_all = {layer: 100 * value for layer, value in there if value is not None}
    axes.plot([*if_all], [*if_all.values()], color=BLUE, marker="o", ms=4.5, lw=1.8, label=names[2])
    _frame(axes, "layer", "%", f"Where the {evaluation.num_examples:,} inputs exit")
    axes.set_ylim(0, 119)
    axes.set_yticks(range(0, 101, 20))
    _legend(axes, "upper center", fontsize=8.5, ncols=3, columnspacing=1.0, handlelength=1.2)


def _draw_token_layers(axes: Axes, evaluation: GenerationEvaluation) -> None:
    depth, mean = evaluation.num_hidden_layers, evaluation.mean_exit_layer
    drafts = evaluation.draft_histogram
    tokens = max(evaluation.num_tokens, 1)
    shares = [100 * count / tokens for count in drafts or evaluation.exit_histogram]
    highest = max(shares)
    _draw_shares(axes, shares, 0.5 if depth <= 16 else max(0.5, 0.1 * highest))
    axes.set_ylim(0, 1.18 * highest or 1)
    left = mean <= 0.8 * depth  # which side of the line has room
    axes.axvline(mean, color=INK, linewidth=1.2, linestyle=DASHES, zorder=5)
    side = {"ha": "left" if left else "right", "va": "top", "xycoords": ("data", "axes fraction")}
    _write(axes, f"mean {mean:.1f}", (mean, 1), (5 if left else -5, -4), zorder=6, **side)
    what = f"Where the {evaluation.num_tokens:,} generated tokens "
    _frame(axes, "layer", "% of tokens", what + ("were drafted (last: not)" if drafts else "exit"))


def _draw_positions(axes: Axes, evaluation: GenerationEvaluation) -> None:
    means, mean = evaluation.exit_by_position, evaluation.mean_exit_layer
    marker = "o" if len(means) <= 40 else None
    positions = range(1, len(means) + 1)
    axes.plot(positions, means, color=BLUE, linewidth=1.8, marker=marker, markersize=4.5, zorder=4)
    label = f"mean of all tokens, {mean:.1f}"
    axes.axhline(mean, color=INK, linewidth=1.2, linestyle=DASHES, zorder=5, label=label)
    _legend(axes, "lower left")
    axes.set_ylim(0, 1.04 * evaluation.num_hidden_layers)
    axes.set_xlim(0.5 if len(means) < 2 else 1 - 0.02 * len(means), max(1.02 * len(means), 1.5))
    _frame(axes, "position of the token in the generated text", "mean exit layer", "When tokens exit early")
    axes.grid(axis="both", color=GRID, linewidth=0.8)


def _draw_speedups(axes: Axes, sizes: Sequence[int | None], rows: Sequence[SpeedRow]) -> None:
    """Bars of layer speed-up beside wall-clock speed-up, one pair for each batch size."""
    if not rows:
        axes.axis("off")
        axes.text(0.5, 0.5, "This model has no exits.", ha="center", color=GREY, transform=axes.transAxes)
        return
    series = [
        ("layer speed-up", BAR, [row.layer_speedup for row in rows]),
        ("wall-clock speed-up", BLUE, [row.wall_clock_speedup for row in rows]),
    ]
    _draw_groups(axes, sizes, series, "times faster than all layers", "Layers saved, and time saved")
    for group, row in enumerate(rows):
        top = max(row.layer_speedup, row.wall_clock_speedup)
        _write(axes, f"{row.efficiency or 0:.2f}", (group, top), (0, 4), ha="center")
    axes.axhline(1, color=GREY, linewidth=1, zorder=1)
    note = "figure above the bars: efficiency"
    axes.text(0.01, 0.86, note, color=GREY, fontsize=9, transform=axes.transAxes, va="top")


def _draw_groups(
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
        centres = [group + offset for group in range(len(sizes))]
        axes.bar(centres, heights, width=0.92 * width, color=colour, label=label, zorder=3)
    axes.set_xticks(range(len(sizes)), ["throughput\nmode" if size is None else str(size) for size in sizes])
    axes.set_ylim(0, 1.3 * max(max(heights) for _, _, heights in series))  # room for the legend
    _frame(axes, "batch size", y_label, title)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    _legend(axes, "upper left", fontsize=9.5, ncols=2)


def _write(axes: Axes, text: str, at: Point, offset: Point, **options: Any) -> None:
    """A text beside a place, `offset` in points from it."""
    options = {"color": INK, "fontsize": 10, **options}
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **options)


def _legend(axes: Axes, loc: Any, **options: Any) -> None:
    axes.legend(loc=loc, frameon=False, labelcolor=INK, **{"fontsize": 10, **options})


def _frame(axes: Axes, x_label: str, y_label: str, title: str) -> None:
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
