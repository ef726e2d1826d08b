"""Evaluations and benchmarks as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from consistentee.evaluation.results import (
    BASELINE,
    LAST_LAYER,
    MODE_NOTES,
    AgreementEvaluation,
    Evaluation,
    GeneratedPoint,
    GenerationEvaluation,
    GenerationPoint,
)
from consistentee.functional.criteria import digits
from consistentee.functional.curves import SUM_ERROR
from consistentee.functional.recall import recall_warnings

if TYPE_CHECKING:
    from consistentee.evaluation.speed import SpeedResults

MOST_CLASSES = 20
"""Classes that a table lists; JSON has all."""

METRIC_TITLES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "bertscore": "BERT-\nScore",
}


def evaluation_tables(evaluation: Evaluation | AgreementEvaluation | GenerationEvaluation) -> RenderableType:
    """Everything a reader of the terminal wants: models side by side, then layer by layer.

    Args:
        evaluation: of a classifier, with labels or without, or of a text generator.

    Returns:
        Something that a rich console prints, at most 120 columns wide.
    """
    if isinstance(evaluation, GenerationEvaluation):
        parts: list[RenderableType] = [_ways(evaluation), Text(_note(evaluation))]
        if evaluation.num_tokens:
            parts += [Text(""), _token_layers(evaluation)]
        return Group(*parts)
    if isinstance(evaluation, AgreementEvaluation):
        inputs = f"{evaluation.num_examples:,} inputs without labels"
        answers = "the last layer's class"
        if evaluation.agreement_with is not None:
            answers = f'the class of model "{evaluation.agreement_with}"'
        note = f"Agreement: the share of {inputs} that get {answers}."
        return Group(
            _agreement(evaluation),
            Text(note),
            *clock_table(evaluation),
            Text(""),
            _agreement_by_layer(evaluation, evaluation.exit_agreement, evaluation.per_layer_agreement),
        )
    parts = [_models(evaluation)]
    reference = evaluation.reference
    if reference is not None:
        parts.append(
            Text(
                f"Difference to the {reference.name} on the same {evaluation.num_examples:,} inputs: "
                f"{100 * reference.accuracy_difference:+.2f} points of accuracy "
                f"(standard error {100 * reference.standard_error:.2f})."
            )
        )
    parts += [*clock_table(evaluation), Text(""), _layers(evaluation), Text(""), _classes(evaluation)]
    metric = "macro_f1" if "macro_f1" in evaluation.metrics else "accuracy"
    warnings = recall_warnings(evaluation.class_recall, evaluation.threshold, threshold_metric=metric)
    parts += [Text(f"Warning: {line}", style="bold") for line in warnings]
    return Group(*parts)


def _table(names: Sequence[str], *, left: int = 0, **options: Any) -> Table:
    """An empty table; its first `left` columns hold text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, **options)
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place < left else "right")
    return table


def _title(criterion: str, threshold: float) -> str:
    return f"{criterion} > {digits(threshold)}"


def _depth(mean_exit_layer: float, depth: int) -> tuple[str, str, str]:
    """Mean exit layer, layer speed-up and layers saved as shown."""
    saved = f"{100 * (1 - mean_exit_layer / depth):.1f}"
    return f"{mean_exit_layer:.2f} / {depth}", f"{depth / mean_exit_layer:.2f}x", saved


def _percent(share: float | None, digits: int = 2) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def _models(evaluation: Evaluation) -> Table:
    """One row for each way to predict: the reference, the last layer, the criterion, other criteria."""
    depth = evaluation.num_hidden_layers
    names = [name for name in evaluation.metrics if name != "accuracy"]
    table = _table(
        ["", "accuracy %", *names, "mean exit layer", "layer speed-up", "layers saved %"],
        left=1,
    )

    def row(
        title: str,
        accuracy: float,
        metrics: dict[str, float] | None,
        mean_exit_layer: float,
        depth: int = depth,
        style: str = "",
    ) -> None:
        others = ["" if metrics is None else f"{metrics[name]:.3f}" for name in names]
        table.add_row(title, _percent(accuracy), *others, *_depth(mean_exit_layer, depth), style=style)

    reference = evaluation.reference
    if reference is not None:
        layers = reference.num_hidden_layers or depth
        row(
            reference.name, reference.accuracy, reference.metrics, reference.mean_exit_layer or layers, layers
        )
    row(LAST_LAYER, evaluation.full_depth_accuracy, None, depth)
    own = _title(evaluation.criterion, evaluation.threshold)
    row(own, evaluation.accuracy, evaluation.metrics, evaluation.mean_exit_layer, style="bold")
    for name, other in evaluation.other_criteria.items():
        if other.point is not None:
            point = other.point
            row(_title(name, point.threshold), point.accuracy, None, point.mean_exit_layer)
    return table


def clock_table(evaluation: Evaluation | AgreementEvaluation) -> list[RenderableType]:
    """What inputs cost on the clock; nothing where it was not asked for."""
    clock = evaluation.clock
    if clock is None:
        return []
    table = _table(["", "ms an input", "speed-up"], left=1)
    table.add_row("without early exits", f"{clock.full_depth_ms:.3f}", "1.00x")
    own = _title(evaluation.criterion, evaluation.threshold)
    speedup = f"{clock.full_depth_ms / clock.milliseconds:.2f}x"
    table.add_row(own, f"{clock.milliseconds:.3f}", speedup, style="bold")
    for name, other in evaluation.other_criteria.items():
        if other.threshold is not None and name in clock.others:
            spent = clock.others[name]
            table.add_row(
                _title(name, other.threshold), f"{spent:.3f}", f"{clock.full_depth_ms / spent:.2f}x"
            )
    note = (
        f"On this machine, batches of {clock.batch_size}: {clock.layer_ms:.3f} ms a layer, {clock.exit_ms:.3f} ms an "
        f"exit, {clock.start_ms:.3f} ms beside them."
    )
    return [Text(""), table, Text(note)]


AGREEMENTS = (0.999, 0.995, 0.99, 0.98, 0.95)


def agreement_tables(evaluation: AgreementEvaluation) -> list[RenderableType]:
    """How fast exits are at each agreement with the model, and where rows exit."""
    curves = {evaluation.criterion: evaluation.curve} | {
        name: other.curve for name, other in evaluation.other_criteria.items()
    }
    names = [f"at {100 * agreement:g} %" for agreement in AGREEMENTS]
    table = _table(["layer speed-up by", *names], left=1)
    for name, curve in curves.items():
        fastest = [
            max((at.layer_speedup for at in curve if at.agreement >= agreement - SUM_ERROR), default=None)
            for agreement in AGREEMENTS
        ]
        table.add_row(name, *("" if speedup is None else f"{speedup:.2f}x" for speedup in fastest))
    layers = _agreement_by_layer(evaluation, evaluation.exit_agreement, evaluation.per_layer_agreement)
    title = _title(evaluation.criterion, evaluation.threshold)
    note = "At so much agreement with the model, or more, on these texts."
    return [table, Text(note), Text(""), Text(f"{title}:"), layers]


def _agreement(evaluation: AgreementEvaluation) -> Table:
    """One row for the last layer, the criterion, and each of the others."""
    depth = evaluation.num_hidden_layers
    names = ("agreement %", "standard error", "mean exit layer", "layer speed-up")
    table = _table(["", *names, "layers saved %"], left=1)
    table.add_row(LAST_LAYER, _percent(evaluation.full_depth_agreement), "", *_depth(depth, depth))
    error = _percent(evaluation.agreement_standard_error)
    title = _title(evaluation.criterion, evaluation.threshold)
    shown = (_percent(evaluation.agreement), error, *_depth(evaluation.mean_exit_layer, depth))
    table.add_row(title, *shown, style="bold")
    for name, other in evaluation.other_criteria.items():
        if other.point is not None:
            point = other.point
            title = _title(name, point.threshold)
            table.add_row(title, _percent(point.agreement), "", *_depth(point.mean_exit_layer, depth))
    return table


def _agreement_by_layer(
    evaluation: Evaluation | AgreementEvaluation,
    at_exits: Sequence[float | None],
    if_all: Sequence[float | None],
) -> Table:
    table = _table(["layer", "exit here", "share %", "their agreement %", "agreement % if all exited here"])
    for index, exited in enumerate(evaluation.exit_histogram):
        table.add_row(
            str(index + 1),
            f"{exited:,}",
            _percent(exited / evaluation.num_examples, 1),
            _percent(at_exits[index]),
            _percent(if_all[index]),
        )
    return table


def _layers(evaluation: Evaluation) -> Table:
    names = ("layer", "exit here", "share %", "their accuracy %")
    table = _table([*names, "accuracy % if all exited here", "classifier alone %"])
    for index, exited in enumerate(evaluation.exit_histogram):
        table.add_row(
            str(index + 1),
            f"{exited:,}",
            _percent(exited / evaluation.num_examples, 1),
            _percent(evaluation.exit_accuracy[index]),
            _percent(evaluation.per_layer_accuracy[index]),
            _percent(evaluation.classifier_accuracy[index]),
        )
    return table


def _classes(evaluation: Evaluation) -> RenderableType:
    """Recall of every class; of many, those that the exits cost most."""
    ordered = evaluation.class_recall
    if len(ordered) > MOST_CLASSES:
        ordered = sorted(ordered, key=lambda found: found.gained - found.lost)[:MOST_CLASSES]
    table = _table(["class", "rows", "recall %", "recall % at the last layer"], left=1)
    for found in ordered:
        shares = (_percent(found.recall), _percent(found.full_depth_recall))
        table.add_row(Text(found.label), f"{found.num_examples:,}", *shares)
    left_out = len(evaluation.class_recall) - len(ordered)
    return Group(table, Text(f"{left_out} more classes: --json has all of them.")) if left_out else table


def _ways(evaluation: GenerationEvaluation) -> Table:
    """One row for each way to generate: the reference, every layer, the criterion, other modes, other criteria."""
    depth = evaluation.num_hidden_layers
    lossless = evaluation.mode == "lossless"
    names = [name for name in METRIC_TITLES if name in evaluation.metrics]
    table = _table(
        [
            "",
            *(METRIC_TITLES[name] for name in names),
            *("token\nacc. %", "per-\nplexity", "mean exit\nlayer", "layer\nspeed-up"),
            *(("drafted\n%", "drafts\nkept %") if lossless else ("layers\nsaved %",)),
            "tokens\nper s",
        ],
        left=1,
        collapse_padding=True,
    )
    table.columns[0].max_width = 34
    for column in table.columns[1:]:
        column.no_wrap = True

    def row(
        title: str,
        text: GeneratedPoint | None,
        on_references: GenerationPoint | None,
        mean_exit_layer: float,
        depth: int = depth,
        style: str = "",
    ) -> None:
        metrics = {} if text is None else text.metrics
        perplexity = metrics.get("perplexity", on_references and on_references.perplexity)
        accuracy = metrics.get("token_accuracy", on_references and on_references.token_accuracy)
        *layers, saved = _depth(mean_exit_layer, depth)
        drafts = (text.draft_share, text.draft_acceptance) if text else (None, None)
        table.add_row(
            title,
            *(_percent(metrics.get(name)) for name in names),
            _percent(accuracy),
            "" if perplexity is None else f"{perplexity:.2f}",
            *layers,
            *([_percent(share, 1) for share in drafts] if lossless else [saved]),
            "" if text is None else f"{text.tokens_per_second:.1f}",
            style=style,
        )

    def title_of(point: GeneratedPoint) -> str:
        mode = "" if point.mode == evaluation.mode else f", {point.mode}"
        return _title(point.criterion, point.threshold) + mode

    if evaluation.reference is not None:
        other = evaluation.reference
        layers = round(other.mean_exit_layer * other.layer_speedup)  # it may have others than this model
        row(evaluation.reference_name or BASELINE, other, None, other.mean_exit_layer, layers)
    if evaluation.full_depth is not None:
        last = [point for point in evaluation.curve if point.mean_exit_layer == depth]
        row(LAST_LAYER, evaluation.full_depth, last[0] if last else None, depth)
    own = evaluation.own_point()
    on_references = _at(evaluation.curve, own.threshold)
    row(title_of(own), own, on_references, own.mean_exit_layer, style="bold")
    for point in evaluation.generated:
        if point.threshold == own.threshold and point.mode != own.mode:
            row(title_of(point), point, on_references, point.mean_exit_layer)
    for name, other in evaluation.other_criteria.items():
        text = _comparable(other.generated, other.threshold, own.mean_exit_layer)
        on_references = _at(other.curve, other.threshold if text is None else text.threshold)
        if text is not None:
            row(title_of(text), text, on_references, text.mean_exit_layer)
        elif on_references is not None:
            title = f"{_title(name, on_references.threshold)}, no text"
            row(title, None, on_references, on_references.mean_exit_layer)
    return table


def _at(curve: Sequence[GenerationPoint], threshold: float | None) -> GenerationPoint | None:
    """The curve's point at a threshold, if it has that one."""
    return next((point for point in curve if point.threshold == threshold), None)


def _comparable(
    generated: Sequence[GeneratedPoint], threshold: float | None, mean_exit_layer: float
) -> GeneratedPoint | None:
    """The point at the criterion's own threshold; without one, that nearest in depth."""
    own = [point for point in generated if point.threshold == threshold]
    nearest = sorted(generated, key=lambda point: abs(point.mean_exit_layer - mean_exit_layer))
    return next(iter([*own, *nearest]), None)


def _note(evaluation: GenerationEvaluation) -> str:
    found = evaluation.environment
    where = [str(found["hardware"])] if "hardware" in found else []
    where += [f"{name} {found[name]}" for name in ("torch", "transformers", "seed") if name in found]
    return (
        f"{evaluation.num_examples:,} prompts, at most {evaluation.max_new_tokens} new tokens, batch size "
        f"{evaluation.batch_size}, mode {evaluation.mode}; {evaluation.num_tokens:,} tokens generated. ROUGE and the "
        "scores beside it x 100. Token accuracy and perplexity: on the references, at the same threshold."
        + MODE_NOTES.get(evaluation.mode, "")
        + (f"\n{', '.join(where)}." if where else "")
    )


def _token_layers(evaluation: GenerationEvaluation) -> Table:
    names = ("tokens that exit here", "exited by now %")
    if evaluation.draft_histogram is not None:
        names = ("tokens drafted here (last layer: not drafted)", "by now %")
    table = _table(["layer", names[0], "share %", names[1]])
    exited_by_now = 0
    for index, exited in enumerate(evaluation.draft_histogram or evaluation.exit_histogram):
        exited_by_now += exited
        shares = (_percent(count / evaluation.num_tokens, 1) for count in (exited, exited_by_now))
        table.add_row(str(index + 1), f"{exited:,}", *shares)
    return table


SPEED_TITLES = {
    "engine": "with exits",
    "engine-full-depth": "all layers",
    "engine-nobody-leaves": "nobody exits",
    "engine-lossless": "lossless",
}
"""Competitors by shorter names."""

_Columns = dict[str, Callable[[Any], str]]
CLASSIFICATION_COLUMNS: _Columns = {
    "p50\nms": lambda row: _short(row.latency_ms_p50),
    "p95\nms": lambda row: _short(row.latency_ms_p95),
    "per\ns": lambda row: _short(row.instances_per_second),
    "pad\n%": lambda row: _percent(row.padding_share, 1),
}
GENERATION_COLUMNS: _Columns = {
    "tokens\nper s": lambda row: _short(row.tokens_per_second),
    "ms per\ntoken": lambda row: f"{row.latency_ms_per_token:.2f}",
    "mean exit\nlayer": lambda row: f"{row.mean_exit_layer:.2f}",
}
SPEED_COLUMNS: _Columns = {
    "layers": lambda row: _times(row.layer_speedup),
    "clock": lambda row: _times(row.wall_clock_speedup),
    "eff.": lambda row: "" if row.efficiency is None else f"{row.efficiency:.2f}",
    "vs\nHF": lambda row: _times(row.speedup_over_transformers),
}


def speed_table(results: SpeedResults[Any]) -> RenderableType:
    """What a benchmark found, batch size by batch size, and on what it ran.

    Args:
        results: of a classifier or of a text generator.

    Returns:
        Something that a rich console prints.
    """
    found, work = results.environment, results.workload
    generates = "new_tokens" in work
    columns = (GENERATION_COLUMNS if generates else CLASSIFICATION_COLUMNS) | SPEED_COLUMNS
    table = _table(["batch", "", *columns], left=2, show_edge=False, collapse_padding=True)
    for column in table.columns:
        column.no_wrap = True
    before = ""
    for row in results.rows:
        size = "throughput" if row.batch_size is None else str(row.batch_size)
        if before not in ("", size):
            table.add_section()
        title = str(SPEED_TITLES.get(row.name, row.name))
        if getattr(row, "draft_acceptance", None) is not None:
            title += f" ({100 * row.draft_acceptance:.0f} % of drafts stay)"
        cells = [show(row) for show in columns.values()]
        table.add_row(
            "" if before == size else size, title, *cells, style="bold" if row.name == "engine" else ""
        )
        before = size
    inputs = f"{work['rows']:,} rows of {work['mean_tokens']:.1f} tokens on average" if not generates else ""
    if generates:
        inputs = f"vocabulary {work['vocab_size']:,}, {work['mean_prompt_tokens']:.0f} prompt and "
        inputs += f"{work['new_tokens']} new tokens"
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in results.rows))
    flags = f" ({', '.join(found['cpu_flags'])})" if found["cpu_flags"] else ""
    return Group(
        table,
        Text(
            f"{work['model']}: {work['num_hidden_layers']} layers of {work['hidden_size']}, {inputs}. Layers: layer "
            "speed-up; clock: wall-clock speed-up against all layers in this run; eff. (efficiency): the second over "
            "the first; vs HF: times faster than transformers."
        ),
        Text(
            f"{dtypes} on {found['hardware']}{flags}, {found['threads']} thread(s), torch {found['torch']}, "
            f"transformers {found['transformers']}, seed {found['seed']}."
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
