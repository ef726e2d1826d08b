"""What `alternatives` found: a table, what it comes to in sentences, and a picture of accuracy over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from consistentee.evaluation.alternatives import MOST_LOSS, AlternativeRow
from consistentee.evaluation.looks import BLUE, GREY, INK, ORANGE
from consistentee.evaluation.plots import HIGH, picture
from consistentee.evaluation.speed import SpeedResults

WORTH_RATIO = 1.05
"""Times that exits must be faster than what one would take instead: less is noise."""

TITLES = {
    "transformers": "transformers",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-int8": "ONNX Runtime, its int8",
    "engine-full-depth": "engine, all layers",
    "engine": "engine with exits",
    "engine-int8-full-depth": "engine int8, all layers",
    "engine-int8": "engine int8 with exits",
    "onnx-graph": "exported graph with exits",
    "onnx-graph-int8": "exported graph int8 with exits",
}


def way_title(name: str) -> str:
    """What a way is called in tables and pictures."""
    return TITLES.get(name, name.replace(" onnxruntime", ", ONNX Runtime").replace(" engine", ", engine"))


def alternatives_table(results: SpeedResults[AlternativeRow]) -> RenderableType:
    """Accuracy and milliseconds of every way, and on what they were measured."""
    work, found = results.workload, results.environment
    sizes = list(dict.fromkeys(row.batch_size for row in results.rows))
    table = Table(show_edge=False, collapse_padding=True)
    table.add_column("")
    for title in ("layers", "accuracy" if work["has_labels"] else "", "same class"):
        if title:
            table.add_column(title, justify="right", no_wrap=True)
    for size in sizes:
        table.add_column(f"batch {size}\nms", justify="right", no_wrap=True)
        table.add_column("\nvs HF", justify="right", no_wrap=True)
    for name in dict.fromkeys(row.name for row in results.rows):
        rows = {row.batch_size: row for row in results.rows if row.name == name}
        one = next(iter(rows.values()))
        cells = [f"{one.mean_exit_layer:.1f}"]
        if one.accuracy is not None:
            cells.append(f"{100 * one.accuracy:.1f}")
        cells.append(f"{100 * one.agreement:.1f}")
        for size in sizes:
            row = rows.get(size)
            cells += (
                ["", ""]
                if row is None
                else [f"{row.milliseconds:.2f}", f"{row.speedup_over_transformers:.2f}x"]
            )
        table.add_row(way_title(name), *cells, style="bold" if one.has_exits else "")
    flags = f" ({', '.join(found['cpu_flags'])})" if found["cpu_flags"] else ""
    return Group(
        table,
        Text(
            f"{work['model']}: {work['num_hidden_layers']} layers of {work['hidden_size']}, {work['rows']:,} rows of "
            f"{work['mean_tokens']:.1f} tokens on average. Layers: mean number that ran; same class: as transformers "
            "gives, in percent; ms: of an input, the median of the repetitions; vs HF: times faster than transformers."
        ),
        Text(
            f"{found['hardware']}{flags}, {found['threads']} thread(s), torch {found['torch']}, "
            f"transformers {found['transformers']}, seed {found['seed']}."
        ),
        *(Text(line) for line in verdicts(results)),
    )


def verdicts(results: SpeedResults[AlternativeRow]) -> list[str]:
    """Whether exits are worth it, batch size by batch size: a sentence each."""
    lines: list[str] = []
    for size in dict.fromkeys(row.batch_size for row in results.rows):
        rows = [row for row in results.rows if row.batch_size == size and row.is_as_good]
        plain = _fastest([row for row in rows if not row.has_exits])
        exits = _fastest([row for row in rows if row.has_exits])
        without = f"fastest without exits: {way_title(plain.name)}, {plain.milliseconds:.2f} ms"
        if exits is None:
            lines.append(f"Batch {size}: {without}. No way with exits loses so little.")
            continue
        ratio = plain.milliseconds / exits.milliseconds
        worth = (
            f"exits are worth {ratio:.2f}x"
            if ratio >= WORTH_RATIO
            else f"exits are not worth it ({ratio:.2f}x)"
        )
        lines.append(
            f"Batch {size}: {without}; with exits: {way_title(exits.name)}, {exits.milliseconds:.2f} ms. Here {worth}."
        )
    most = (
        f"{100 * MOST_LOSS:g} point"
        if results.workload["has_labels"]
        else f"{100 * MOST_LOSS:g} % of the classes"
    )
    lines.append(f"Of the ways that lose at most {most} against transformers on these rows.")
    return lines


def _fastest(rows: Sequence[AlternativeRow]) -> Any:
    """The row with the fewest milliseconds; None of none."""
    return min(rows, key=lambda row: row.milliseconds, default=None)


def plot_alternatives(
    results: SpeedResults[AlternativeRow], path: str | Path, title: str | None = None
) -> None:
    """Draw accuracy (without labels: the share of the same class) over milliseconds, a panel a batch size.

    Args:
        results: what was found.
        path: the picture, PNG, PDF or SVG by its ending; written whole or not at all.
        title: over the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: another ending.
    """
    sizes = list(dict.fromkeys(row.batch_size for row in results.rows))
    first = sorted(
        (row for row in results.rows if row.batch_size == sizes[0]), key=lambda row: row.milliseconds
    )
    numbers = {row.name: number for number, row in enumerate(first, start=1)}
    with picture(path, title, HIGH) as figure:
        panels = figure.subplots(1, len(sizes), squeeze=False)[0]
        for axes, size in zip(panels, sizes, strict=True):
            rows = [row for row in results.rows if row.batch_size == size and row.name in numbers]
            for row in sorted(rows, key=lambda row: numbers[row.name]):
                share = row.agreement if row.accuracy is None else row.accuracy
                colour = BLUE if row.has_exits else GREY if row.model == results.workload["model"] else ORANGE
                label = f"{numbers[row.name]} {way_title(row.name)}"
                axes.plot(row.milliseconds, 100 * share, "o", color=colour, markersize=8, label=label)
                axes.annotate(
                    str(numbers[row.name]),
                    (row.milliseconds, 100 * share),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=INK,
                )
            axes.set(xlim=(0, None), xlabel="milliseconds of an input", title=f"batch size {size}")
            axes.set_ylabel("accuracy (%)" if results.workload["has_labels"] else "same class (%)")
            axes.margins(y=0.2)
            axes.grid(visible=True, color="#E3E3E3")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
