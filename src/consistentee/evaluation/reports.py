"""Evaluations and speed measurements as tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from consistentee.evaluation.classification import Evaluation
from consistentee.evaluation.speed import SpeedReport
from consistentee.functional.recall import recall_warnings

MOST_CLASSES = 20
"""Classes that a report lists; JSON has all."""


def evaluation_report(evaluation: Evaluation) -> RenderableType:
    """Everything a reader of the terminal wants: models side by side, then layer by layer.

    Args:
        evaluation: the figures.

    Returns:
        Something that a rich console prints.
    """
    parts: list[RenderableType] = [_models(evaluation)]
    reference = evaluation.reference
    if reference is not None:
        parts.append(
            Text(
                f"Difference to the {reference.name} on the same {evaluation.num_examples:,} inputs: "
                f"{100 * reference.accuracy_difference:+.2f} points of accuracy "
                f"(standard error {100 * reference.standard_error:.2f})."
            )
        )
    parts += [Text(""), _layers(evaluation), Text(""), _classes(evaluation)]
    metric = "macro_f1" if "macro_f1" in evaluation.metrics else "accuracy"
    warnings = recall_warnings(evaluation.class_recall, evaluation.threshold, threshold_metric=metric)
    parts += [Text(f"Warning: {line}", style="bold") for line in warnings]
    return Group(*parts)


def _models(evaluation: Evaluation) -> Table:
    """One row for each way to predict: the reference, the last layer, the exit rule, other rules."""
    depth = evaluation.num_hidden_layers
    names = [name for name in evaluation.metrics if name != "accuracy"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("accuracy %", *names, "mean exit layer", "layer speed-up", "layers saved %"):
        table.add_column(name, justify="right")

    def row(
        title: str,
        accuracy: float,
        metrics: dict[str, float] | None,
        mean_exit_layer: float,
        style: str,
        depth: int = depth,
    ) -> None:
        others = ["" if metrics is None else f"{metrics[name]:.3f}" for name in names]
        table.add_row(
            title,
            f"{100 * accuracy:.2f}",
            *others,
            f"{mean_exit_layer:.2f} / {depth}",
            f"{depth / mean_exit_layer:.2f}x",
            f"{100 * (1 - mean_exit_layer / depth):.1f}",
            style=style,
        )

    reference = evaluation.reference
    if reference is not None:
        layers = reference.num_hidden_layers or depth
        mean = reference.mean_exit_layer or layers
        row(reference.name, reference.accuracy, reference.metrics, mean, "", layers)
    row("last layer, no exits", evaluation.per_layer_accuracy[-1], None, depth, "")
    own = f"{evaluation.criterion} > {evaluation.threshold:.4g}"
    row(own, evaluation.accuracy, evaluation.metrics, evaluation.mean_exit_layer, "bold")
    for name, rival in evaluation.other_criteria.items():
        if rival.point is not None:
            row(
                f"{name} > {rival.threshold:.4g}", rival.point.accuracy, None, rival.point.mean_exit_layer, ""
            )
    return table


def _layers(evaluation: Evaluation) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (
        "layer",
        "leave here",
        "share %",
        "their accuracy %",
        "accuracy % if all left here",
        "classifier alone %",
    ):
        table.add_column(name, justify="right")
    for index, left in enumerate(evaluation.exit_histogram):
        right = evaluation.exit_accuracy[index]
        table.add_row(
            str(index + 1),
            f"{left:,}",
            f"{100 * left / evaluation.num_examples:.1f}",
            "" if right is None else f"{100 * right:.2f}",
            f"{100 * evaluation.per_layer_accuracy[index]:.2f}",
            f"{100 * evaluation.classifier_accuracy[index]:.2f}",
        )
    return table


def _classes(evaluation: Evaluation) -> RenderableType:
    """Recall of every class; of many, those that the exits cost most."""
    ordered = evaluation.class_recall
    if len(ordered) > MOST_CLASSES:
        ordered = sorted(ordered, key=lambda found: found.gained - found.lost)[:MOST_CLASSES]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    for name in ("rows", "recall %", "recall % at the last layer"):
        table.add_column(name, justify="right")
    for found in ordered:
        shares = (
            "" if share is None else f"{100 * share:.2f}" for share in (found.recall, found.full_depth_recall)
        )
        table.add_row(Text(found.label), f"{found.num_examples:,}", *shares)
    left_out = len(evaluation.class_recall) - len(ordered)
    return Group(table, Text(f"{left_out} more classes: --json has all of them.")) if left_out else table


SPEED_NAMES = {
    "engine-full-depth": "all layers",
    "engine-nobody-leaves": "nobody leaves",
}
"""Competitors by shorter names, below `engine`."""


def speed_report(report: SpeedReport) -> RenderableType:
    """What a benchmark found, mode by mode, and on what it ran.

    Args:
        report: the figures.

    Returns:
        Something that a rich console prints.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in ("batch", ""):
        table.add_column(name, no_wrap=True)
    names = ("p50\nms", "p95\nms", "per\ns", "pad\n%", "layers", "clock", "eff.", "vs\nHF")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    before: object = ()
    for row in report.rows:
        size = "throughput" if row.batch_size is None else str(row.batch_size)
        if before not in ((), size):
            table.add_section()
        table.add_row(
            "" if before == size else size,
            SPEED_NAMES.get(row.name, row.name),
            _short(row.latency_ms_p50),
            _short(row.latency_ms_p95),
            _short(row.instances_per_second),
            f"{100 * row.padding_share:.1f}",
            _times(row.layer_speedup),
            _times(row.wall_clock_speedup),
            "" if row.efficiency is None else f"{row.efficiency:.2f}",
            _times(row.speedup_over_transformers),
            style="bold" if row.name == "engine" else "",
        )
        before = size
    place, work = report.environment, report.workload
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in report.rows))
    flags = f" ({', '.join(place['cpu_flags'])})" if place["cpu_flags"] else ""
    return Group(
        table,
        Text(
            f"{work['model']}: {work['num_hidden_layers']} layers of {work['hidden_size']}, {work['rows']:,} rows of "
            f"{work['mean_tokens']:.1f} tokens on average. Layers: layer speed-up; clock: wall-clock speed-up against "
            "the engine at full depth in this run; eff. (efficiency): the second over the first; vs HF: "
            "times faster than transformers."
        ),
        Text(
            f"{dtypes} on {place['hardware']}{flags}, {place['threads']} thread(s), torch {place['torch']}, "
            f"transformers {place['transformers']}, seed {place['seed']}."
        ),
    )


def _short(value: float | None) -> str:
    """At most five characters, but for millions."""
    if value is None:
        return ""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _times(ratio: float) -> str:
    """At most five characters, up to a thousandfold."""
    return f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:.1f}x" if ratio < 99.95 else f"{ratio:.0f}x"
