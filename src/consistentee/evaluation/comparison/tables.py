"""compare.json as tables: the same ones for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from consistentee.evaluation.comparison.outcomes import STATIC

Entry = Mapping[str, Any]
NOTHING = "-"


@dataclass(frozen=True)
class Sheet:
    """A table before it is drawn: the first `num_texts` columns of its rows are text, the others figures."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    num_texts: int = 2


def comparison_sheets(summary: Mapping[str, Any]) -> list[Sheet]:
    """All tables of a summary.

    For every set and for their average: the curve and the chosen thresholds of each method with its own criterion, what
    validation chooses where it is allowed a loss, where cells say it, then all criteria on equal exits where several
    were asked for.
    """
    entries: Sequence[Entry] = summary["summary"]
    places = list(dict.fromkeys((entry["backbone"], entry["set"]) for entry in entries))
    sheets: list[Sheet] = []
    for place in places:
        here = [entry for entry in entries if (entry["backbone"], entry["set"]) == place]
        name = _place_name(place, summary)
        shown = [entry for entry in here if entry["shown"]]
        sheets += [_curve_sheet(name, shown, summary), _threshold_sheet(name, shown, summary)]
        sheets += _tolerance_sheets(name, shown, summary)
        if any(entry["criterion"] for entry in here) and summary["criteria"]:
            sheets.append(_equal_exits_sheet(name, here))
    return sheets


def terminal_tables(summary: Mapping[str, Any]) -> Group:
    """All tables of a comparison for a rich console."""
    return terminal_sheets(comparison_sheets(summary))


def terminal_sheets(sheets: Sequence[Sheet]) -> Group:
    """Tables for a rich console, with notes between them: what has no room in its column goes on below."""
    parts: list[RenderableType] = []
    for sheet in sheets:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=sheet.title, title_justify="left")
        for place, name in enumerate(sheet.columns):
            is_text = place < sheet.num_texts
            table.add_column(
                name,
                justify="left" if is_text else "right",
                no_wrap=place == 0,
                overflow="fold",  # a figure is never cut
            )
        for row in sheet.rows:
            table.add_row(*row)
        parts.append(table)
        if sheet.note:
            parts.append(Text(sheet.note + "\n"))
    return Group(*parts)


def markdown_page(summary: Mapping[str, Any]) -> str:
    """The tables with what their columns mean, as Markdown."""
    percent = f"{100 * summary['confidence']:g} %"
    parts = [
        "# Comparison",
        f"Brackets hold {percent} bootstrap intervals ({summary['resamples']:,} draws of the rows, with Student's t "
        "over seeds where there are several); differences are paired on the same rows and seeds. Area: mean over layer "
        "speed-ups from 1x to 4x, on a logarithmic axis, of the best accuracy at that speed-up or more. Accuracy at "
        "a speed-up and layers saved at a loss sweep the threshold on the reported rows, for all alike; *at the "
        "validation threshold* nothing was chosen on them. Losses and differences are in points of accuracy.",
    ]
    parts += map(markdown_sheet, comparison_sheets(summary))
    return "\n\n".join([*parts, made_on(summary["environments"])]) + "\n"


def markdown_sheet(sheet: Sheet) -> str:
    """A table under its heading, as Markdown."""
    lines = [
        f"| {' | '.join(sheet.columns)} |",
        f"|{'|'.join(['---'] * sheet.num_texts + ['---:'] * (len(sheet.columns) - sheet.num_texts))}|",
        *(f"| {' | '.join(row)} |" for row in sheet.rows),
    ]
    return "\n\n".join([f"## {sheet.title}", "\n".join(lines), *([sheet.note] if sheet.note else [])])


def made_on(environments: Sequence[Mapping[str, Any]]) -> str:
    """Hardware and versions, a sentence."""
    made = [
        f"{value.get('hardware')} ({value.get('device')}, {value.get('threads')} threads), torch "
        f"{value.get('torch')}, transformers {value.get('transformers')}, consistentee {value.get('consistentee')}"
        for value in environments
    ]
    return "Made on " + "; ".join(made) + "."


def _place_name(place: tuple[str | None, str | None], summary: Mapping[str, Any]) -> str:
    if place[1] is None:
        sets = [" ".join(pair) for pair in summary["averaged_sets"]]
        return f"Average over {len(sets)} sets ({', '.join(sets)})"
    return f"{place[1]}, {place[0]}"


def _curve_sheet(name: str, entries: Sequence[Entry], summary: Mapping[str, Any]) -> Sheet:
    speedups = [f"{speedup:g}" for speedup in summary["speedups"]]
    columns = ("method", "criterion", "seeds", "area", f"area - {summary['baseline']}'s")
    rows = [
        (
            entry["method"],
            entry["criterion"] or NOTHING,
            _seeds(entry),
            _with_interval(entry["area"]),
            _difference(entry["difference"], "area"),
            *(_percent(entry["accuracy_at_speedup"][speedup]["mean"]) for speedup in speedups),
        )
        for entry in entries
        if entry["is_curve"]
    ]
    return Sheet(f"{name}: accuracy along the curve, %", (*columns, *(f"{s}x" for s in speedups)), rows)


def _threshold_sheet(name: str, entries: Sequence[Entry], summary: Mapping[str, Any]) -> Sheet:
    losses = [f"{loss:g}" for loss in summary["losses"]]
    metrics = [metric for entry in entries for metric in entry["metrics"] if metric != "accuracy"][:1]
    columns = (
        "method",
        "criterion",
        "accuracy %",
        f"- {summary['reference']}'s",
        "fewer layers",
        *metrics,
        *(f"{100 * float(loss):g} pt" for loss in losses),
    )
    rows = [
        (
            entry["method"],
            entry["criterion"] or NOTHING,
            _percent(entry["at_validation_threshold"]["accuracy"]["mean"]),
            NOTHING
            if entry["method"] == summary["reference"]
            else signed_points(entry["at_validation_threshold"]["difference_to_plain"]),
            _times(entry["at_validation_threshold"]["layer_speedup"]),
            *(_percent(entry["metrics"].get(metric)) for metric in metrics),
            *(_percent(entry["layers_saved_at_loss"][loss]["mean"], 0) for loss in losses),
        )
        for entry in entries
    ]
    note = "Last columns: % of the layers saved at a loss of so many points against the plain model."
    return Sheet(f"{name}: at the validation threshold, and layers saved", columns, rows, note)


def _tolerance_sheets(name: str, entries: Sequence[Entry], summary: Mapping[str, Any]) -> list[Sheet]:
    """What thresholds give that validation chose within some losses; none where no cell of exits noted them."""
    losses = [f"{loss:g}" for loss in summary["tolerances"]]
    noted = [
        entry
        for entry in entries
        if entry["is_curve"] and entry["at_tolerance"][losses[0]]["accuracy"]["mean"] is not None
    ]
    if all(entry["method"] == STATIC for entry in noted):
        return []
    rows = [
        (
            entry["method"],
            entry["criterion"] or NOTHING,
            *(
                f"{_in_points(at['difference_to_plain']['mean'])} at {at['layer_speedup']['mean']:.2f}x"
                for at in (entry["at_tolerance"][loss] for loss in losses)
            ),
        )
        for entry in noted
    ]
    columns = ("method", "criterion", *(f"{100 * float(loss):g} pt" for loss in losses))
    note = (
        f"Points of accuracy above {summary['reference']}'s, and how many times fewer layers, where validation rows "
        "chose the fastest threshold that loses no more than so many points against the model's own last layer."
    )
    return [Sheet(f"{name}: by the loss that validation allows", columns, rows, note)]


def _equal_exits_sheet(name: str, entries: Sequence[Entry]) -> Sheet:
    """Areas of every criterion on the exits of every method; a star marks a method's own criterion."""
    of = {(entry["method"], entry["criterion"]): entry for entry in entries if entry["criterion"]}
    methods, criteria = (list(dict.fromkeys(names)) for names in zip(*of, strict=True))
    seeds = {method: _seeds(next(of[pair] for pair in of if pair[0] == method)) for method in methods}
    differ = len({_seeds(entry) for entry in of.values()}) > 1
    rows: list[tuple[str, ...]] = []
    for method in methods:
        found = [of.get((method, criterion)) for criterion in criteria]
        areas = [
            NOTHING
            if entry is None
            else _percent(entry["area"]["mean"])
            + "*" * entry["own_criterion"]
            + f" ({_seeds(entry)})" * (_seeds(entry) != seeds[method])
            for entry in found
        ]
        rows.append((method, *([seeds[method]] if differ else []), *areas))
    means: list[str] = []
    for criterion in criteria:
        differences = [of[pair]["difference_on_same_exits"] for pair in of if pair[1] == criterion]
        areas_off = [one["area"]["mean"] for one in differences if one is not None]
        means.append(f"{100 * sum(areas_off) / len(areas_off):+.2f}" if areas_off else NOTHING)
    rows.append(("mean - policy's", *([""] if differ else []), *means))
    columns = (
        "exits of",
        *(["seeds"] if differ else []),
        *(criterion.replace("_", " ") for criterion in criteria),
    )
    note = (
        "* the method's own criterion. Last row: mean difference to the policy on the same exits, in points."
    )
    if differ:
        note += (
            " Areas of methods with other seeds are of other trainings: what is paired is in the first table."
        )
    return Sheet(f"{name}: area on equal exits, %", columns, rows, note, num_texts=1 + differ)


def _seeds(entry: Entry) -> str:
    return " ".join(map(str, entry["seeds"])) if entry["seeds"] else "as above"


def _percent(share: float | None, digits: int = 1) -> str:
    return NOTHING if share is None else f"{100 * share:.{digits}f}"


def _in_points(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:+.1f}"


def _with_interval(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    if value["mean"] is None or low is None:
        return _percent(value["mean"])
    return f"{_percent(value['mean'])} [{_percent(low)}, {_percent(high)}]"


def _difference(difference: Mapping[str, Any] | None, figure: str) -> str:
    return NOTHING if difference is None else signed_points(difference[figure])


def signed_points(value: Mapping[str, Any]) -> str:
    """A difference of shares with its interval, in points."""
    low, high = value["interval"]
    if value["mean"] is None or low is None:
        return NOTHING
    return f"{100 * value['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _times(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    if value["mean"] is None or low is None or high is None:
        return NOTHING
    return f"{value['mean']:.2f}x [{low:.1f}, {high:.1f}]"
