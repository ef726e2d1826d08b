"""compare.json as one HTML page: how methods rank, a panel of curves for every backbone and set, all tables."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consistentee.errors import DataError
from consistentee.evaluation.comparison.picture import (
    FASTEST,
    SHOWN_BELOW,
    TICKS,
    Runs,
    chosen_point,
    drawn_lines,
    mean_points,
    seed_band,
)
from consistentee.evaluation.comparison.tables import Entry, Sheet, comparison_sheets, is_baseline
from consistentee.evaluation.html_page import render_page, shown
from consistentee.evaluation.svg_charts import (
    Chart,
    Scale,
    both_widths,
    left_of,
    nice_ticks,
    number,
    polyline,
)

METHOD_SERIES = 16
"""Colours and dashes that the style sheet has for methods; the baseline's is the first."""

STRIP = 90
"""Pixels of an interval's strip."""


def comparison_page(file: str | Path) -> str:
    """The page on a comparison.

    Args:
        file: its compare.json.

    Raises:
        DataError: it is not what `consistentee compare` writes, or no method in it has exits.
    """
    path = Path(file)
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        ranked = [entry for entry in summary["summary"] if entry["is_curve"] and entry["shown"]]
        if summary["summary"] and not ranked:
            labels = ", ".join(summary["methods"])
            raise DataError(
                f"A comparison must have a method with exits, or smaller models, to be reported on, got {labels}.",
                file=path,
                remedy="Compare one in the same folder: consistentee compare --methods consistent ...",
            )
        return _page(summary, path.resolve().parent.name)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            f"This is no summary of a comparison ({type(error).__name__}: {error}).",
            file=path,
            remedy="Write it anew, with the --baseline, --criteria and --also that it had: consistentee compare "
            f"--render --output-dir {shlex.quote(str(path.parent))}",
        ) from error


def _page(summary: Mapping[str, Any], name: str) -> str:
    runs, entries = drawn_lines(summary), list(summary["summary"])
    places = list(dict.fromkeys((run["backbone"], run["set"]) for run in runs))
    methods = list(dict.fromkeys(run["method"] for run in runs if run["method"] != summary["reference"]))
    methods.sort(key=lambda method: method != summary["baseline"].partition("/")[0])
    series = {method: _series(place) for place, method in enumerate(methods)}
    average = [entry for entry in entries if entry["set"] is None]
    place = next((one["backbone"], one["set"]) for one in entries if one["is_curve"] and one["shown"])
    first = average or [entry for entry in entries if (entry["backbone"], entry["set"]) == place]
    where = (
        f"the average of {len(summary['averaged_sets'])} sets" if average else " on ".join(reversed(place))
    )
    ranked = _ranked(first, summary)
    criteria = {run["method"]: run["criterion"] for run in runs}
    panels = [
        (f"{place[1]}, {place[0]}", both_widths(panel_chart, here, summary["reference"], methods, series))
        for place in places
        for here in [[run for run in runs if (run["backbone"], run["set"]) == place]]
    ]
    sheets: dict[str, list[Sheet]] = {}
    for sheet in comparison_sheets(summary):
        sheets.setdefault(sheet.title.partition(": ")[0], []).append(sheet)
    sections = [("ranking", "Ranking"), ("curves", "Curves"), ("tables", "Tables")]
    return render_page(
        "compare.html",
        title=f"{shown(name)}: a comparison of ways to exit early",
        eyebrow="Comparison",
        sections=[*sections, ("methods", "Methods"), ("environment", "Environment")],
        name=shown(name),
        summary=summary,
        where=where,
        ranked=ranked,
        seeds_differ=len({one["seeds"] for one in ranked}) > 1,
        paired=any(is_baseline(entry, summary) and _has_area(entry) for entry in first),
        best=_best(first, summary),
        base=_baseline(first, summary),
        legend=[(series[method], _label(method, criteria[method]), criteria[method]) for method in methods],
        panels=panels,
        sheets=sheets,
        open_sheets=next(iter(sheets)),
        made=_made(summary["environments"]),
        minus=lambda text: re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text),
    )


def panel_chart(
    runs: Runs, reference: str, methods: Sequence[str], series: Mapping[str, int], *, narrow: bool
) -> Chart:
    """Accuracy against layer speed-up on one backbone and set, means over seeds, as `plot_comparison` draws it.

    Args:
        runs: of this backbone and set.
        reference: the method whose accuracy is a horizontal line.
        methods: in the order of the legend; the first has its band from the lowest seed to the highest.
        series: colour and dash of each method.
        narrow: whether it is for narrow pages.
    """
    width, height = (340, 260) if narrow else (540, 320)
    lines = {method: [run for run in runs if run["method"] == method] for method in methods}
    lines = {method: of_method for method, of_method in lines.items() if of_method}
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    bands: dict[str, Any] = {}
    for method, of_method in lines.items():
        if of_method[0]["criterion"] is None:
            curves[method] = mean_points(of_method)
        else:
            at, low, mean, high = (values.tolist() for values in seed_band(of_method))
            curves[method], bands[method] = (at, mean), (at, low, high)
    plain = [run["plain_accuracy"] for run in runs if run["plain_accuracy"] is not None]
    rule = 100 * sum(plain) / len(plain) if plain else None
    heights = [] if rule is None else [rule]
    heights += [v for at, values in curves.values() for a, v in zip(at, values, strict=True) if a <= FASTEST]
    low, high = max(min(heights), max(heights) - SHOWN_BELOW), max(heights)
    room = max(0.06 * (high - low), 0.3)
    y = Scale(low - room, high + room, height - 44, 12)
    y_ticks = [(y(tick), number(tick)) for tick in nice_ticks(y.low, y.high, 6)]
    x = Scale(0, math.log(FASTEST), left_of(y_ticks, 46), width - 10)

    def points(at: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
        return [(math.log(speedup), value) for speedup, value in zip(at, values, strict=True)]

    band = ""
    if methods[0] in bands and len(lines[methods[0]]) > 1:
        at, lowest, highest = bands[methods[0]]
        band = polyline([*points(at, highest), *reversed(points(at, lowest))], x, y) + "Z"
    chosen = [(method, chosen_point(of_method)) for method, of_method in lines.items()]
    return Chart(
        kind="methods",
        width=width,
        height=height,
        x=x,
        y=y,
        x_ticks=[(x(math.log(tick)), f"{tick:g}\u00d7") for tick in TICKS],
        y_ticks=y_ticks,
        x_label="layer speed-up",
        y_label="accuracy (%)",
        parts={
            "band": band,
            "rule": None if rule is None else y(rule),
            "curves": [
                (series[method], polyline(points(at, values), x, y), lines[method][0]["criterion"] is None)
                for method, (at, values) in curves.items()
            ],
            "squares": [
                (series[method], x(math.log(speedup)), y(value))
                for method, (at, values) in curves.items()
                if lines[method][0]["criterion"] is None
                for speedup, value in zip(at, values, strict=True)
                if speedup <= FASTEST and value >= y.low
            ],
            "marks": [
                (series[method], x(math.log(point[0])), y(point[1]), lines[method][0]["criterion"] is None)
                for method, point in chosen
                if point is not None and point[0] <= FASTEST and point[1] >= y.low
            ],
        },
    )


def _series(place: int) -> int:
    """Colour and dash of the method at a place; the first's is nobody else's."""
    return place if place < METHOD_SERIES else 1 + (place - 1) % (METHOD_SERIES - 1)


def _label(method: str, criterion: str | None) -> str:
    return method if criterion is None or "/" in method else f"{method} ({criterion})"


def _entry_label(entry: Entry) -> str:
    return _label(entry["method"], entry["criterion"])


def _has_area(entry: Entry) -> bool:
    return entry["area"]["mean"] is not None


def _ahead(entry: Entry) -> Mapping[str, Any] | None:
    """How far an area is from the baseline's, on the seeds that both have; None where one of them has no area."""
    difference = entry["difference"]
    return None if difference is None or not _has_area(difference) else difference["area"]


def _in_order(entries: Sequence[Entry], summary: Mapping[str, Any]) -> list[Entry]:
    """Shown methods with an area, the best first: by what is paired with the baseline on the seeds that both have.

    Means over the seeds that each has would rank seeds, not methods. They are all there is where there is no baseline,
    or one without an area; methods that share no seed with it come last.
    """

    def rank(entry: Entry) -> tuple[bool, float]:
        if is_baseline(entry, summary):
            return False, 0.0
        ahead = _ahead(entry)
        return ahead is None, -(ahead or entry["area"])["mean"]

    return sorted((entry for entry in entries if entry["shown"] and _has_area(entry)), key=rank)


def _seeds(entry: Entry, summary: Mapping[str, Any]) -> str:
    """A method's seeds; of an average those of its sets, each list once."""
    if entry["seeds"] is not None:
        return " ".join(map(str, entry["seeds"]))
    of_sets = [
        " ".join(map(str, one["seeds"]))
        for one in summary["summary"]
        if [one["backbone"], one["set"]] in summary["averaged_sets"]
        and (one["method"], one["criterion"]) == (entry["method"], entry["criterion"])
    ]
    return "; ".join(dict.fromkeys(of_sets))


def _best(entries: Sequence[Entry], summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first of the ranking, and how many methods there are."""
    known = [entry for entry in _in_order(entries, summary) if entry["is_curve"]]
    return {
        "label": _entry_label(known[0]),
        "area": known[0]["area"],
        "difference": _ahead(known[0]),
        "count": len(known),
    }


def _baseline(entries: Sequence[Entry], summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The baseline at the threshold that validation chose; None where it has none here, as without exits."""
    for entry in entries:
        at = entry["at_validation_threshold"]
        if (
            is_baseline(entry, summary)
            and entry["is_curve"]
            and at["layer_speedup"]["mean"] is not None
            and at["difference_to_plain"]["mean"] is not None
        ):
            return {"label": _entry_label(entry), **at}
    return None


def _ranked(entries: Sequence[Entry], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Shown methods in order, with each figure's strip: pixels of its interval and of its mean."""
    known = _in_order(entries, summary)
    figures = {
        "area": [entry["area"] for entry in known],
        "difference": [_ahead(entry) for entry in known],
        "gain": [entry["at_validation_threshold"]["difference_to_plain"] for entry in known],
    }
    strips = {name: _strips(values) for name, values in figures.items()}
    return [
        {
            "label": _entry_label(entry),
            "seeds": _seeds(entry, summary),
            "is_baseline": is_baseline(entry, summary),
            "is_reference": entry["method"] == summary["reference"],
            "speedup": entry["at_validation_threshold"]["layer_speedup"]["mean"],
            "saved": entry["at_validation_threshold"]["layers_saved"],
            **{name: (values[place], strips[name][place]) for name, values in figures.items()},
        }
        for place, entry in enumerate(known)
    ]


def _strips(values: Sequence[Mapping[str, Any] | None]) -> list[dict[str, float | None] | None]:
    """Where intervals, means and zero (if inside) lie in a strip of `STRIP` pixels, all of a column at one scale."""
    known = [value for value in values if value is not None and _is_whole(value)]
    if not known:
        return [None] * len(values)
    low, high = min(value["interval"][0] for value in known), max(value["interval"][1] for value in known)
    scale = Scale(low, high if high > low else low + 1e-6, 4, STRIP - 4)
    zero = scale(0) if low < 0 < high else None
    return [
        {
            "low": scale(value["interval"][0]),
            "high": scale(value["interval"][1]),
            "mean": scale(value["mean"]),
            "zero": zero,
        }
        if value is not None and _is_whole(value)
        else None
        for value in values
    ]


def _is_whole(value: Mapping[str, Any]) -> bool:
    return value["mean"] is not None and None not in value["interval"]


def _made(environments: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Every figure's hardware and versions; what differs between runs, all values."""
    names = dict.fromkeys(name for found in environments for name in found)
    return {
        name.replace("_", " "): "; ".join(
            dict.fromkeys(_text(found[name]) for found in environments if name in found)
        )
        for name in names
    }


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
