"""Evaluations of generation as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from consistentee.evaluation.results import (
    LAST_LAYER,
    PLAIN,
    GeneratedPoint,
    GenerationEvaluation,
    GenerationPoint,
)

if TYPE_CHECKING:
    from consistentee.evaluation.generation_speed import GenerationSpeedReport

METRIC_TITLES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "bertscore": "BERT-\nScore",
}


def generation_report(evaluation: GenerationEvaluation) -> RenderableType:
    """Everything a reader of the terminal wants: ways to generate side by side, then layer by layer.

    Args:
        evaluation: the figures.

    Returns:
        Something that a rich console prints, at most 120 columns wide.
    """
    parts: list[RenderableType] = [_ways(evaluation), Text(_note(evaluation))]
    if evaluation.num_tokens:
        parts += [Text(""), _layers(evaluation)]
    return Group(*parts)


def own_point(evaluation: GenerationEvaluation) -> GeneratedPoint:
    """The reported mode, criterion and threshold as a point beside the others."""
    return GeneratedPoint(
        mode=evaluation.mode,
        criterion=evaluation.criterion,
        threshold=evaluation.threshold,
        metrics=evaluation.metrics,
        mean_exit_layer=evaluation.mean_exit_layer,
        layer_speedup=evaluation.layer_speedup,
        tokens_per_second=evaluation.tokens_per_second,
        num_tokens=evaluation.num_tokens,
        draft_share=evaluation.draft_share,
        draft_acceptance=evaluation.draft_acceptance,
    )


def _ways(evaluation: GenerationEvaluation) -> Table:
    """One row for each way to generate: the reference, every layer, the exit rule, other modes, other rules."""
    depth = evaluation.num_hidden_layers
    lossless = evaluation.mode == "lossless"
    names = [name for name in METRIC_TITLES if name in evaluation.metrics]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", max_width=34)
    for title in (
        *(METRIC_TITLES[name] for name in names),
        "token\nacc. %",
        "per-\nplexity",
        "mean exit\nlayer",
        "layer\nspeed-up",
        *(("drafted\n%", "drafts\nkept %") if lossless else ("layers\nsaved %",)),
        "tokens\nper s",
    ):
        table.add_column(title, justify="right", no_wrap=True)

    def row(
        title: str,
        text: GeneratedPoint | None,
        forced: GenerationPoint | None,
        mean_exit_layer: float,
        style: str,
        depth: int = depth,
    ) -> None:
        metrics = {} if text is None else text.metrics
        perplexity = metrics.get("perplexity", None if forced is None else forced.perplexity)
        accuracy = metrics.get("token_accuracy", None if forced is None else forced.token_accuracy)
        saved = [f"{100 * (1 - mean_exit_layer / depth):.1f}"]
        if lossless:
            saved = [
                _percent(text.draft_share if text else None),
                _percent(text.draft_acceptance if text else None),
            ]
        table.add_row(
            title,
            *(f"{100 * metrics[name]:.2f}" if name in metrics else "" for name in names),
            "" if accuracy is None else f"{100 * accuracy:.2f}",
            "" if perplexity is None else f"{perplexity:.2f}",
            f"{mean_exit_layer:.2f} / {depth}",
            f"{depth / mean_exit_layer:.2f}x",
            *saved,
            "" if text is None else f"{text.tokens_per_second:.1f}",
            style=style,
        )

    if evaluation.reference is not None:
        other = evaluation.reference
        layers = round(other.mean_exit_layer * other.layer_speedup)  # it may have others than this model
        row(evaluation.reference_name or PLAIN, other, None, other.mean_exit_layer, "", layers)
    if evaluation.full_depth is not None:
        last = [point for point in evaluation.curve if point.mean_exit_layer == depth]
        row(LAST_LAYER, evaluation.full_depth, last[0] if last else None, depth, "")
    own = own_point(evaluation)
    forced = _at(evaluation.curve, own.threshold)
    row(_title(own, evaluation.mode), own, forced, own.mean_exit_layer, "bold")
    for point in evaluation.generated:
        if point.threshold == own.threshold and point.mode != own.mode:
            row(_title(point, evaluation.mode), point, forced, point.mean_exit_layer, "")
    for name, rival in evaluation.other_criteria.items():
        text = _comparable(rival.generated, rival.threshold, own.mean_exit_layer)
        threshold = rival.threshold if text is None else text.threshold
        forced = None if threshold is None else _at(rival.curve, threshold)
        if text is not None:
            row(_title(text, evaluation.mode), text, forced, text.mean_exit_layer, "")
        elif forced is not None:
            row(f"{name} > {forced.threshold:.4g}, no text", None, forced, forced.mean_exit_layer, "")
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _title(point: GeneratedPoint, mode: str) -> str:
    return f"{point.criterion} > {point.threshold:.4g}" + ("" if point.mode == mode else f", {point.mode}")


def _at(curve: Sequence[GenerationPoint], threshold: float) -> GenerationPoint | None:
    """The curve's point at a threshold, if it has that one."""
    return next((point for point in curve if point.threshold == threshold), None)


def _comparable(
    generated: Sequence[GeneratedPoint], threshold: float | None, mean_exit_layer: float
) -> GeneratedPoint | None:
    """The point at the rival's own threshold; without one, that nearest in depth."""
    own = [point for point in generated if point.threshold == threshold]
    nearest = sorted(generated, key=lambda point: abs(point.mean_exit_layer - mean_exit_layer))
    return next(iter([*own, *nearest]), None)


def _note(evaluation: GenerationEvaluation) -> str:
    place = evaluation.environment
    where = [str(place["hardware"])] if "hardware" in place else []
    where += [f"{name} {place[name]}" for name in ("torch", "transformers", "seed") if name in place]
    return (
        f"{evaluation.num_examples:,} prompts, at most {evaluation.max_new_tokens} new tokens, batch size "
        f"{evaluation.batch_size}, mode {evaluation.mode}; {evaluation.num_tokens:,} tokens generated. ROUGE and the "
        "scores beside it x 100. Token accuracy and perplexity: on the references, at the same threshold."
        + (LOSSLESS_NOTE if evaluation.mode == "lossless" else "")
        + (f"\n{', '.join(where)}." if where else "")
    )


LOSSLESS_NOTE = (
    " Lossless: all layers verified every token; drafted: the share of the tokens that came from exits, kept: the "
    "share of the verified drafts that stayed."
)


def _layers(evaluation: GenerationEvaluation) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = ("tokens that leave here", "left by now %")
    if evaluation.draft_histogram is not None:
        names = ("tokens drafted here (last layer: not drafted)", "by now %")
    for name in ("layer", names[0], "share %", names[1]):
        table.add_column(name, justify="right")
    left_by_now = 0
    for index, left in enumerate(evaluation.draft_histogram or evaluation.exit_histogram):
        left_by_now += left
        table.add_row(
            str(index + 1),
            f"{left:,}",
            f"{100 * left / evaluation.num_tokens:.1f}",
            f"{100 * left_by_now / evaluation.num_tokens:.1f}",
        )
    return table


def generation_speed_report(report: GenerationSpeedReport) -> RenderableType:
    """What a benchmark found, batch size by batch size, and on what it ran.

    Args:
        report: the figures.

    Returns:
        Something that a rich console prints.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("batch", ""):
        table.add_column(name, no_wrap=True)
    for name in ("tokens\nper s", "ms per\ntoken", "mean exit\nlayer", "layers", "clock", "eff.", "vs\nHF"):
        table.add_column(name, justify="right", no_wrap=True)
    before: int | None = None
    for row in report.rows:
        if before not in (None, row.batch_size):
            table.add_section()
        title = SPEED_TITLES.get(row.name, row.name)
        if row.draft_acceptance is not None:
            title += f" ({100 * row.draft_acceptance:.0f} % of drafts stay)"
        table.add_row(
            "" if before == row.batch_size else str(row.batch_size),
            title,
            f"{row.tokens_per_second:.1f}",
            f"{row.latency_ms_per_token:.2f}",
            f"{row.mean_exit_layer:.2f}",
            f"{row.layer_speedup:.2f}x",
            f"{row.wall_clock_speedup:.2f}x",
            "" if row.efficiency is None else f"{row.efficiency:.2f}",
            f"{row.speedup_over_transformers:.2f}x",
            style="bold" if row.name == "engine" else "",
        )
        before = row.batch_size
    place, work = report.environment, report.workload
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in report.rows))
    flags = f" ({', '.join(place['cpu_flags'])})" if place["cpu_flags"] else ""
    return Group(
        table,
        Text(
            f"{work['model']}: {work['num_hidden_layers']} layers of {work['hidden_size']}, vocabulary "
            f"{work['vocab_size']:,}, {work['mean_prompt_tokens']:.0f} prompt and {work['new_tokens']} new tokens. "
            "Layers: layer speed-up; clock: wall-clock speed-up against all layers in this run; eff. (efficiency): the "
            "second over the first; vs HF: times faster than transformers' generate."
        ),
        Text(
            f"{dtypes} on {place['hardware']}{flags}, {place['threads']} thread(s), torch {place['torch']}, "
            f"transformers {place['transformers']}, seed {place['seed']}."
        ),
    )


SPEED_TITLES = {
    "engine": "with exits",
    "engine-full-depth": "all layers",
    "engine-nobody-leaves": "nobody leaves",
    "engine-lossless": "lossless",
}
"""Competitors by shorter names."""
