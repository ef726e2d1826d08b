"""Charts of the HTML report as numbers for its template: where lines, bars and ticks are, in pixels of an SVG.

Every chart is made at two widths: text in an SVG shrinks with it, so that a wide one cannot be read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from consistentee.evaluation.exit_report import ExitReport
from consistentee.evaluation.plots import USEFUL, layer_ticks
from consistentee.evaluation.report_figures import HardnessTable, LayerFigures

SERIES = 8
"""Colours and dashes that the style sheet has for curves."""

SPEEDUP_TICKS = (1, 1.5, 2, 3, 4, 6, 12)
PERCENT_TOPS = (2, 5, 10, 20, 30, 40, 60, 80, 100)
BESIDE_TICKS = 27
"""Pixels of the axis' label, turned, and between it, the ticks' texts and the plot."""

DIGIT = 7.7
"""Pixels of a digit, 12 px high, in the widest of the fonts that the style sheet names."""

BarBox = tuple[float, float, float, float]
"""Pixels: x, y, width, height."""


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linear.

    Args:
        low, high: of the values; not equal.
        start, end: where these are.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value, rounded to a tenth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True)
class Chart:
    """A chart of some kind; what is not needed is empty.

    Args:
        kind: name of the template's macro.
        width, height: pixels.
        x, y: scales of the plot; start and end of both are its box.
        x_ticks, y_ticks, top_ticks: pixel and text.
        x_label, y_label, top_label: of the axes.
        parts: what the kind draws.
    """

    kind: str
    width: int
    height: int
    x: Scale
    y: Scale
    x_ticks: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    y_ticks: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    top_ticks: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    x_label: str = ""
    y_label: str = ""
    top_label: str = ""
    parts: Mapping[str, Any] = field(default_factory=dict[str, Any])


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values inside a range, at most so many, and at least one.

    Example:
        >>> nice_ticks(87.2, 100.0)
        [88.0, 90.0, 92.0, 94.0, 96.0, 98.0, 100.0]
    """
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= most + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [round(step * tick, 10) for tick in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as ticks show it, with a minus sign instead of a hyphen."""
    return f"{value:g}".replace("-", "\u2212")


def left_of(y_ticks: Sequence[tuple[float, str]], least: int) -> int:
    """Pixels left of a plot: at least so many, and enough that no tick's text runs into the label beside it."""
    longest = max((len(text) for _, text in y_ticks), default=0)
    return max(least, BESIDE_TICKS + math.ceil(DIGIT * longest))


def both_widths(make: Any, *args: Any) -> list[Chart]:
    """The chart for wide pages and the one for narrow ones."""
    return [make(*args, narrow=False), make(*args, narrow=True)]


# --- The trade-off --------------------------------------------------------------------------------


def trade_off_chart(report: ExitReport, *, narrow: bool) -> Chart:
    """Quality against layers saved: curves, the reported one's intervals, operating points, full depth.

    As in other pictures the quality is drawn as far as it stays within `USEFUL` points of the best, or down to the
    reported point.
    """
    evaluation, depth = report.evaluation, report.evaluation.num_hidden_layers
    curves = {evaluation.criterion: evaluation.curve}
    curves |= {name: other.curve for name, other in evaluation.other_criteria.items()}
    percents = {
        name: [(100 * (1 - p.mean_exit_layer / depth), 100 * getattr(p, report.quality)) for p in curve]
        for name, curve in curves.items()
    }
    reference = getattr(evaluation, "reference", None)
    lines = [("full depth", 100 * report.points[0].quality)]
    if reference is not None:
        lines.append((reference.name, 100 * reference.accuracy))
    best = max([quality for points in percents.values() for _, quality in points])
    shown = [quality for points in percents.values() for _, quality in points]
    shown += [100 * end for end in report.point.interval] + [height for _, height in lines]
    low, high = max(min(shown), min(best - USEFUL, 100 * report.point.quality)), max(shown)
    room = max(0.06 * (high - low), 0.25)
    width, height = (340, 290) if narrow else (690, 400)
    y = Scale(low - room, min(high + room, max(100.0, high)) + 1e-9, height - 44, 42)
    y_ticks = [(y(tick), number(tick)) for tick in nice_ticks(y.low, y.high, 6)]
    left = left_of(y_ticks, 46 if narrow else 52)
    x = Scale(0, 100 * (1 - 1 / depth) + (1 if depth > 1 else 1e-3), left, width - 12)
    band = sorted(
        (100 * (1 - point.mean_exit_layer / depth), 100 * interval[0], 100 * interval[1])
        for point, interval in zip(evaluation.curve, report.intervals, strict=True)
    )
    around = [(at, top) for at, _, top in band] + [(at, bottom) for at, bottom, _ in reversed(band)]
    speedups = [tick for tick in SPEEDUP_TICKS if tick <= depth and (not narrow or tick != 1.5)]
    return Chart(
        kind="trade_off",
        width=width,
        height=height,
        x=x,
        y=y,
        x_ticks=[(x(tick), number(tick)) for tick in nice_ticks(0, x.high, 5 if narrow else 10)],
        y_ticks=y_ticks,
        top_ticks=[(x(100 * (1 - 1 / tick)), f"{tick:g}\u00d7") for tick in speedups],
        x_label="layers saved (%)",
        y_label=f"{report.quality} (%)",
        top_label="layer speed-up",
        parts={
            "curves": [
                (min(order, SERIES - 1), name, polyline(sorted(points), x, y))
                for order, (name, points) in enumerate(percents.items())
            ],
            "band": polyline(around, x, y) + "Z",
            "lines": [(order, name, y(at)) for order, (name, at) in enumerate(lines)],
            "marks": list(_marks(report, list(curves), x, y)),
        },
    )


def _marks(
    report: ExitReport, criteria: Sequence[str], x: Scale, y: Scale
) -> Iterator[tuple[float, float, int, str]]:
    """Where operating points are, the series of their criterion, and what sort: `own`, `named` or `other`.

    Those below the picture are left out, as curves are; the reported one never is.
    """
    for order, point in enumerate(report.points[1:]):
        if point.criterion in criteria and 100 * point.quality >= y.low:
            sort = "own" if not order else "named" if point.names else "other"
            at = (x(100 * point.layers_saved), y(100 * point.quality))
            yield *at, min(criteria.index(point.criterion), SERIES - 1), sort


def polyline(points: Iterable[tuple[float, float]], x: Scale, y: Scale) -> str:
    """Straight lines through points, the `d` of an SVG path."""
    return "M" + "L".join(f"{x(at)} {y(value)}" for at, value in points)


# --- By layer -------------------------------------------------------------------------------------


def exit_chart(histogram: Sequence[int], *, narrow: bool) -> Chart:
    """Bars of how many rows exit at each layer, in percent."""
    depth, total = len(histogram), max(sum(histogram), 1)
    shares = [100 * count / total for count in histogram]
    top = next(top for top in PERCENT_TOPS if top >= min(max(shares), 100))
    width, height = (340, 220) if narrow else (400, 400)
    y = Scale(0, top, height - 44, 26 if narrow else 42)
    y_ticks = [(y(share * top), number(share * top)) for share in (0, 0.5, 1)]
    x = Scale(0.5, depth + 0.5, left_of(y_ticks, 40 if narrow else 44), width - 6)
    return Chart(
        kind="exits",
        width=width,
        height=height,
        x=x,
        y=y,
        x_ticks=[(x(layer), str(layer)) for layer in layer_ticks(depth)],
        y_ticks=y_ticks,
        x_label="exit layer",
        y_label="share that exits (%)",
        parts={"bars": _bars(shares, x, y), "labelled": depth <= (12 if narrow else 16)},
    )


def _bars(shares: Sequence[float], x: Scale, y: Scale) -> list[dict[str, Any]]:
    wide = round(0.74 * (x(1) - x(0)), 1)
    return [
        {
            "x": round(x(layer) - wide / 2, 1),
            "y": y(share),
            "width": wide,
            "height": round(y(0) - y(share), 1),
            "middle": x(layer),
            "layer": layer,
            "label": f"{math.floor(share + 0.5)}" if share >= 0.5 else "",  # as the script rounds
        }
        for layer, share in enumerate(shares, start=1)
    ]


def layer_chart(layers: Sequence[LayerFigures], quality: str, *, narrow: bool) -> Chart:
    """Quality of the rows that exit at each layer, with intervals, and what an exit of all rows there would give.

    Ends of intervals may lie outside of the picture and are cut.
    """
    depth = len(layers)
    if_all = [(layer.layer, 100 * layer.if_all) for layer in layers if layer.if_all is not None]
    alone = [(layer.layer, 100 * layer.alone) for layer in layers if layer.alone is not None]
    alone = [] if alone == if_all else alone
    dots = [
        (layer.layer, 100 * layer.quality, 100 * layer.interval[0], 100 * layer.interval[1])
        for layer in layers
        if layer.quality is not None and layer.interval is not None
    ]
    shown = [value for _, value, *_ in (*if_all, *alone, *dots)]
    low, high = min(shown), max(shown)
    room = max(0.08 * (high - low), 0.5)
    width, height = (340, 260) if narrow else (690, 320)
    y = Scale(max(0.0, low - room), min(100.0, high + room) + 1e-9, height - 44, 14)
    y_ticks = [(y(tick), number(tick)) for tick in nice_ticks(y.low, y.high, 6)]
    x = Scale(0.5, depth + 0.5, left_of(y_ticks, 46 if narrow else 52), width - 12)
    marks = [
        {"x": x(layer), "y": y(value), "top": y(min(end, y.high)), "bottom": y(max(start, y.low))}
        for layer, value, start, end in dots
    ]
    return Chart(
        kind="by_layer",
        width=width,
        height=height,
        x=x,
        y=y,
        x_ticks=[(x(layer), str(layer)) for layer in layer_ticks(depth)],
        y_ticks=y_ticks,
        x_label="layer",
        y_label=f"{quality} (%)",
        parts={
            "if_all": polyline(if_all, x, y),
            "alone": polyline(alone, x, y) if alone else "",
            "dots": marks,
        },
    )


def hardness_chart(table: HardnessTable, *, narrow: bool) -> Chart:
    """Cells with numbers of rows, darker for more, by memorized layer and exit layer; last column: full depth errs."""
    depth = len(table.counts)
    has_never = any(table.never)
    columns = [*table.counts, *([table.never] if has_never else [])]
    left, top, bottom = 44, 8, 46
    room = 340 - left - 4 if narrow else 640
    cell = max(4 if narrow else 8, min(26 if narrow else 38, room // len(columns)))
    high = max(4 if narrow else 8, min(26, cell))
    width, height = left + cell * len(columns) + 4, top + bottom + high * depth
    x = Scale(0.5, len(columns) + 0.5, left, left + cell * len(columns))
    y = Scale(0.5, depth + 0.5, height - bottom, top)
    largest = max((count for column in columns for count in column), default=1) or 1
    cells = [
        {
            "x": round(x(column) - cell / 2 + 0.5, 1),
            "y": round(y(layer) - high / 2 + 0.5, 1),
            "middle": (x(column), y(layer)),
            "count": f"{count:,}",
            "is_written": 7 * len(f"{count:,}") < cell,
            "opacity": round(0.1 + 0.5 * math.sqrt(count / largest), 3),
            "title": _cell_title(column, layer, count, depth),
            "sort": "never" if column > depth else "sure" if layer >= column else "early",
        }
        for column, counts in enumerate(columns, start=1)
        for layer, count in enumerate(counts, start=1)
        if count
    ]
    ticks = [(x(layer), str(layer)) for layer in layer_ticks(depth)]
    return Chart(
        kind="hardness",
        width=width,
        height=height,
        x=x,
        y=y,
        x_ticks=[*ticks, *([(x(depth + 1), "\u2013")] if has_never else [])],
        y_ticks=[(y(layer), str(layer)) for layer in layer_ticks(depth)],
        x_label="memorized layer",
        y_label="exit layer",
        parts={
            "cells": cells,
            "size": (cell - 1, high - 1),
            "diagonal": polyline([(0.5, 0.5), (depth + 0.5, depth + 0.5)], x, y),
            "border": x(depth + 0.5) if has_never else None,
        },
    )


def _cell_title(column: int, layer: int, count: int, depth: int) -> str:
    rows = f"{count:,} row{'' if count == 1 else 's'}"
    if column > depth:
        return f"{rows} that full depth gets wrong exit at layer {layer}"
    return f"{rows} with memorized layer {column} exit at layer {layer}"


def mini_bars(heights: Sequence[float], width: int, height: int) -> list[BarBox]:
    """Small bars, as x, y, width and height of each.

    Args:
        heights: in [0, 1], what is outside is cut; the smallest bar that is not nothing is a pixel high.
        width, height: of all of them together.
    """
    step = width / max(len(heights), 1)
    bars: list[BarBox] = []
    for place, share in enumerate(heights):
        tall = min(max(share, 0.0), 1.0) * height
        tall = max(tall, 1.0) if share > 0 else 0.0
        bars.append((round(place * step, 1), round(height - tall, 1), round(0.78 * step, 1), round(tall, 1)))
    return bars
