"""ablate.json as a picture: a panel for every question, a difference of areas with its interval for every variant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consistentee.evaluation.looks import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY
from consistentee.evaluation.plots import picture

COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
LINE_HEIGHT, PANEL_ROOM, FOREST_WIDTH = 0.3, 1.1, 9.5  # inches


def plot_ablation(summary: Mapping[str, Any], path: str | Path, title: str | None = None) -> Path:
    """Draw what each switch does to the area under the curve, set by set and on their average.

    Args:
        summary: ablate.json.
        path: the picture, PNG, PDF or SVG by its ending; written whole or not at all.
        title: over the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: another ending.
    """
    panels = {name: found["differences"] for name, found in summary["questions"].items()}
    panels = {name: entries for name, entries in panels.items() if entries}
    lines = [len(_groups(entries)) for entries in panels.values()]
    heights = [PANEL_ROOM + LINE_HEIGHT * count for count in lines]
    with picture(path, title, sum(heights) if heights else PANEL_ROOM, FOREST_WIDTH) as figure:
        if not panels:
            return Path(path)
        axes_list = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, entries) in zip(axes_list, panels.items(), strict=True):
            groups = _groups(entries)
            places = list(dict.fromkeys((entry["backbone"], entry["set"]) for entry in entries))
            axes.axvline(0, color=GREY, linewidth=1, zorder=1)
            for line, of_group in enumerate(groups.values()):
                for entry in of_group:
                    place = places.index((entry["backbone"], entry["set"]))
                    area = entry["difference"]["area"]
                    height = line + 0.6 * ((place + 0.5) / len(places) - 0.5)
                    low, high = (100 * end for end in area["interval"])
                    average = entry["set"] is None
                    colour = INK if average else COLOURS[place % len(COLOURS)]
                    axes.plot([low, high], [height, height], color=colour, linewidth=1.6, zorder=2)
                    axes.plot(
                        100 * area["mean"],
                        height,
                        marker="D" if average else "o",
                        markersize=5,
                        color=colour,
                        label=_place(entry),
                        linestyle="none",
                        zorder=3,
                    )
            axes.set_yticks(range(len(groups)), groups.keys(), color=INK)
            axes.set_ylim(len(groups) - 0.5, -0.5)
            axes.set_title(
                f"{name}: {summary['questions'][name]['question']}", loc="left", color=INK, fontsize=11
            )
            handles, labels = axes.get_legend_handles_labels()
            unique = dict(zip(labels, handles, strict=True))
            axes.legend(
                unique.values(), unique.keys(), frameon=False, labelcolor=INK, fontsize=9, loc="center left",
                bbox_to_anchor=(1.0, 0.5),
            )  # fmt: skip
        axes_list[-1].set_xlabel("difference in area under the curve, points", color=INK)
    return Path(path)


def _groups(entries: Any) -> dict[str, list[Mapping[str, Any]]]:
    """Entries by what is compared."""
    criteria = {entry["criterion"] for entry in entries}
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        label = f"{entry['variant']} - {entry['baseline']}"
        if len(criteria) > 1:
            label += f", {entry['criterion']}"
        found.setdefault(label, []).append(entry)
    return found


def _place(entry: Mapping[str, Any]) -> str:
    return "average" if entry["set"] is None else f"{entry['set']}, {entry['backbone']}"
