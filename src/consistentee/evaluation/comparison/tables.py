"""compare.json as tables: the same ones for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from consistentee.evaluation.comparison.outcomes import SAME_EXITS, STATIC

Entry = Mapping[str, Any]
Place = tuple[str | None, str | None]
"""Backbone and set; both None of an average."""

NOTHING = "-"
ALL_SETS = "All sets"
OUTCOMES = "ahead / level / behind"
STARRED = (
    "* zero is outside the interval: such sets count as ahead or behind in the last column, others as level."
)


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

    Of several sets first what each method and criterion gives set by set. Then for every set and for their average: the
    curve and the chosen thresholds of each method with its own criterion, what validation chooses where it is allowed a
    loss, where cells say it, then all criteria on equal exits where several were asked for.
    """
    entries: Sequence[Entry] = summary["summary"]
    places = list(dict.fromkeys(map(_place, entries)))
    sheets = _overview_sheets([place for place in places if place[1] is not None], summary)
    for place in places:
        here = [entry for entry in entries if _place(entry) == place]
        name = _place_name(place, summary)
        shown = [entry for entry in here if entry["shown"]]
        sheets += [_curve_sheet(name, shown, summary), _threshold_sheet(name, shown, summary)]
        sheets += _tolerance_sheets(name, shown, summary)
        if any(entry["criterion"] for entry in here) and summary["criteria"]:
            sheets.append(_equal_exits_sheet(name, here))
    return sheets


def terminal_tables(summary: Mapping[str, Any]) -> Group:
    """All tables of a comparison for a rich console, those of all sets last: the end is what one sees."""
    sheets = comparison_sheets(summary)
    return terminal_sheets(sorted(sheets, key=lambda sheet: sheet.title.startswith(ALL_SETS)))


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


def is_baseline(entry: Entry, summary: Mapping[str, Any]) -> bool:
    """Whether differences are taken to this method and criterion."""
    method, _, criterion = str(summary["baseline"]).partition("/")
    own = entry["criterion"] == criterion if criterion else entry["own_criterion"]
    return entry["method"] == method and own


def _overview_sheets(places: Sequence[Place], summary: Mapping[str, Any]) -> list[Sheet]:
    """Areas of all methods, of their exits by the policy, and of all criteria on equal exits; none for a single set."""
    if len(places) < 2:
        return []
    one_backbone = len({backbone for backbone, _ in places}) == 1
    names = [str(name) if one_backbone else f"{name}, {backbone}" for backbone, name in places]
    of_places = [[entry for entry in summary["summary"] if _place(entry) == place] for place in places]
    return [
        _areas_by_set(names, of_places, summary),
        *_exits_by_set(names, of_places, summary),
        *(_criteria_by_set(names, of_places) if summary["criteria"] else []),
    ]


def _areas_by_set(
    names: Sequence[str], of_places: Sequence[Sequence[Entry]], summary: Mapping[str, Any]
) -> Sheet:
    found: dict[tuple[str, str], dict[str, Entry]] = {}
    for name, entries in zip(names, of_places, strict=True):
        for entry in entries:
            if entry["is_curve"] and (entry["shown"] or is_baseline(entry, summary)):
                found.setdefault((entry["method"], entry["criterion"] or NOTHING), {})[name] = entry
    paired = [
        key for key, of_key in found.items() if any(is_baseline(one, summary) for one in of_key.values())
    ]
    keys = sorted(found, key=lambda key: key not in paired)  # the baseline first
    if paired:
        title = f"{ALL_SETS}: area minus {summary['baseline']}'s, points; its own in %"
        note = f"Paired on the seeds that both have. {STARRED}"
    else:
        title, note = f"{ALL_SETS}: area, %", ""
    rows: list[tuple[str, ...]] = []
    for key in keys:
        own = key in paired or not paired
        areas = [_area_of(found[key].get(name), with_area=own) for name in names]
        rows.append((*key, *areas, *([NOTHING if own else _outcomes(areas)] if paired else [])))
    return Sheet(title, ("method", "criterion", *names, *([OUTCOMES] if paired else [])), rows, note)


def _exits_by_set(
    names: Sequence[str], of_places: Sequence[Sequence[Entry]], summary: Mapping[str, Any]
) -> list[Sheet]:
    """What exits are worth whoever trained them; where all are read by the policy, also the baseline's."""
    found: dict[str, dict[str, Entry]] = {}
    compared = False
    for name, entries in zip(names, of_places, strict=True):
        for entry in (one for one in entries if one["criterion"] == SAME_EXITS):
            if is_baseline(entry, summary):
                compared = True
            else:
                found.setdefault(entry["method"], {})[name] = entry
    if not compared or not found or SAME_EXITS not in summary["criteria"]:
        return []
    rows: list[tuple[str, ...]] = []
    for method, of_method in found.items():
        areas = [_area_of(of_method.get(name), with_area=False) for name in names]
        rows.append((method, *areas, _outcomes(areas)))
    title = f"{ALL_SETS}: exits read by the {SAME_EXITS}, area minus {summary['baseline']}'s, points"
    note = f"One criterion for all: what heads and objective give. {STARRED}"
    return [Sheet(title, ("exits of", *names, OUTCOMES), rows, note, num_texts=1)]


def _area_of(entry: Entry | None, *, with_area: bool) -> str:
    """An area in %, or points of difference with a star where zero is outside their interval."""
    if entry is None:
        return NOTHING
    if with_area:
        return _percent(entry["area"]["mean"])
    difference = (entry["difference"] or {}).get("area")
    if difference is None or difference["mean"] is None:
        return NOTHING
    low, high = difference["interval"]
    sure = low is not None and not low <= 0 <= high
    return _in_points(difference["mean"]) + "*" * sure


def _outcomes(differences: Sequence[str]) -> str:
    """On how many sets a difference is above zero for sure, level with it, and below for sure."""
    starred = [difference for difference in differences if difference.endswith("*")]
    ahead = sum(difference.startswith("+") for difference in starred)
    level = sum(difference != NOTHING for difference in differences) - len(starred)
    return f"{ahead} / {level} / {len(starred) - ahead}"


def _criteria_by_set(names: Sequence[str], of_places: Sequence[Sequence[Entry]]) -> list[Sheet]:
    offs = [_off_policy(entries) for entries in of_places]
    criteria = dict.fromkeys(name for off in offs for name in off if name != SAME_EXITS)
    if not criteria:
        return []
    rows = [(name.replace("_", " "), *(off.get(name, NOTHING) for off in offs)) for name in criteria]
    title = f"{ALL_SETS}: criteria on equal exits, area minus {SAME_EXITS}'s, points"
    note = "Means over the exits of all methods that a set has."
    return [Sheet(title, ("criterion", *names), rows, note, num_texts=1)]


def _off_policy(entries: Sequence[Entry]) -> dict[str, str]:
    """Of each criterion the mean difference of areas to the policy on the same exits, where both are there."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        difference = entry["difference_on_same_exits"]
        if entry["criterion"] and difference is not None:
            found.setdefault(entry["criterion"], []).append(difference["area"]["mean"])
    return {name: f"{100 * sum(values) / len(values):+.2f}" for name, values in found.items()}


def _place(entry: Entry) -> Place:
    return entry["backbone"], entry["set"]


def _place_name(place: Place, summary: Mapping[str, Any]) -> str:
    if place[1] is None:
        sets = [" ".join(pair) for pair in summary["averaged_sets"]]
        return f"Average over {len(sets)} sets ({', '.join(sets)})"
    return f"{place[1]}, {place[0]}"


def _curve_sheet(name: str, entries: Sequence[Entry], summary: Mapping[str, Any]) -> Sheet:
    speedups = [f"{speedup:g}" for speedup in summary["speedups"]]
    flat = any(is_baseline(entry, summary) and not entry["is_curve"] for entry in entries)  # it has no area
    columns = ("method", "criterion", "seeds", "area", *([] if flat else [f"area - {summary['baseline']}'s"]))
    rows = [
        (
            entry["method"],
            entry["criterion"] or NOTHING,
            _seeds(entry),
            _with_interval(entry["area"]),
            *([] if flat else [_difference(entry["difference"], "area")]),
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
    off = _off_policy(entries)
    rows.append(
        (
            f"mean - {SAME_EXITS}'s",
            *([""] if differ else []),
            *(off.get(criterion, NOTHING) for criterion in criteria),
        )
    )
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
