"""The report on a model: what its HTML page shows, from what was found on rows or from the training record alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from consistentee.config import ClassificationTrainingConfig, RetrofitConfig
from consistentee.evaluation.exit_report import ExitReport, score_range
from consistentee.evaluation.html_page import isolated, percent, render_page, shown, span
from consistentee.evaluation.plots import USEFUL
from consistentee.evaluation.report_figures import (
    ClassExits,
    HardnessTable,
    ReportedPoint,
    layer_figures,
    recorded_point,
)
from consistentee.evaluation.svg_charts import (
    PERCENT_TOPS,
    both_widths,
    exit_chart,
    hardness_chart,
    layer_chart,
    trade_off_chart,
)
from consistentee.functional.bounds import at_most
from consistentee.functional.criteria import digits
from consistentee.functional.recall import ClassRecall, recall_warnings
from consistentee.models.loaded import LoadedClassifier

BAR_WIDTH, BAR_HEIGHT = 168, 40
"""Pixels of the bars beside a text."""


def model_page(saved: LoadedClassifier, report: ExitReport, *, with_texts: bool = True) -> str:
    """The page on a saved model and what was found on some rows.

    Args:
        saved: the model.
        report: what was found.
        with_texts: False says in the page that example texts were left out.
    """
    evaluation, point = report.evaluation, report.point
    low, high = score_range(point.criterion, evaluation.num_hidden_layers)
    threshold_share = min(max(((point.threshold or 0) - low) / (high - low), 0), 1)
    named = [one for one in report.points[2:] if one.names]
    classes = [one for one in report.classes if one.num_examples] or report.classes
    charts = {
        "trade_off": both_widths(trade_off_chart, report),
        "hardness": both_widths(hardness_chart, report.hardness),
    }
    lowest = min(getattr(one, report.quality) for one in evaluation.curve)
    return render_page(
        "model.html",
        **_common(saved, report.quality, point, evaluation.to_dict(), report.source),
        **charts,
        report=report,
        classes=classes,
        class_top=_class_top(classes),
        is_cut=100 * lowest < charts["trade_off"][0].y.low,
        useful=USEFUL,
        reference=getattr(evaluation, "reference", None),
        has_named=bool(named),
        has_others=any(not one.names for one in report.points[2:]),
        fingerprint=report.fingerprint,
        certificates=[line for one in report.points for line in _certificates(one)],
        hardness_sentence=hardness_sentence(report.hardness, report.quality),
        hardness_rows=list(_hardness_rows(report.hardness)),
        bar_width=BAR_WIDTH,
        bar_height=BAR_HEIGHT,
        score_low=low,
        score_high=high,
        score_name="exit probability" if point.criterion == "policy" else f"exit score ({point.criterion})",
        level=round(BAR_HEIGHT * (1 - threshold_share), 1),
        with_texts=with_texts,
        texts=_texts(report),
        curve=_curve(report),
    )


def record_page(saved: LoadedClassifier) -> str:
    """The page on a saved model by its training record alone: no curve, no hardness, no texts.

    Raises:
        ValueError: the record holds no evaluation with figures by layer.
    """
    evaluation = saved.record.get("evaluation") or {}
    try:
        quality, point = recorded_point(evaluation)
        layer_figures(evaluation, quality)
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            f'The training record of model "{saved.name}" holds no figures by layer to report on. Give rows: --task, '
            "--eval-file or --texts."
        ) from None
    classes = [
        ClassExits(
            found["label"], found["num_examples"], [], None, found["recall"], found["full_depth_recall"]
        )
        for found in evaluation.get("class_recall") or ()
    ]
    return render_page(
        "model.html",
        **_common(saved, quality, point, evaluation, "training record"),
        report=None,
        classes=classes,
        class_top=1.0,
        fingerprint="",
    )


def _common(
    saved: LoadedClassifier, quality: str, point: ReportedPoint, evaluation: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """What both pages show; the evaluation as a dict."""
    layers = layer_figures(evaluation, quality)
    name, record = shown(Path(saved.name).name or saved.name), saved.record
    point_name = "default operating point"
    if point.names and "default" not in point.names:
        point_name = f'operating point "{point.names[0]}"'
    settings, changed = _settings(record)
    environments = [
        ("this report" if source != "training record" else "evaluation", evaluation.get("environment") or {})
    ]
    environments.append(("training", record.get("environment") or {}))
    environments = [(title, _flat(values)) for title, values in environments if values]
    noun, other = "rows" if quality == "accuracy" else "texts", evaluation.get("agreement_with")
    return {
        "title": f"{name}: exits, layers saved and {quality}",
        "eyebrow": f"Exit report · {shown(Path(source).name)}",
        "sections": _sections(source != "training record", bool(evaluation.get("class_recall"))),
        "name": name,
        "source": shown(Path(source).name),
        "quality": quality,
        "point": point,
        "point_name": point_name,
        "depth": evaluation["num_hidden_layers"],
        "num_examples": evaluation["num_examples"],
        "num_truncated": evaluation.get("num_truncated", 0),
        "full_depth": layers[-1].if_all,
        "agreement_with": None if other is None else _model_of(other),
        "layers": layers,
        "exits": both_widths(exit_chart, evaluation["exit_histogram"]),
        "by_layer": both_widths(layer_chart, layers, quality),
        "trade_off_description": (
            f"{quality} {percent(point.quality, 1)} with {percent(point.layers_saved, 1)} of the layers saved at the "
            f"reported point; full depth {percent(evaluation[f'per_layer_{quality}'][-1], 1)}. The table below has all "
            "operating points."
        ),
        "exits_description": ", ".join(f"layer {one.layer}: {percent(one.share, 1)}" for one in layers),
        "by_layer_description": f"If all exited at the layer: {_spoken(layers)}. The table below has all figures.",
        "hardness_description": f"Where {noun} exit against the layer that they need; the sentence before says it.",
        "warnings": _warnings(evaluation, point),
        "facts": list(_facts(saved, evaluation, source)),
        "validation": _validation(record),
        "is_retrofit": record.get("method") == "retrofit",
        "threshold_metric": (record.get("config") or {}).get("threshold_metric", "accuracy"),
        "settings": settings,
        "changed": changed,
        "environments": environments,
        "environment_names": list(dict.fromkeys(name for _, values in environments for name in values)),
    }


def _sections(whole: bool, has_classes: bool) -> list[tuple[str, str]]:
    """Id and name of what the page has, for its list of contents."""
    names = [("trade-off", "Trade-off" if whole else "Exits"), ("points", "Points"), ("classes", "Classes")]
    names += [("layers", "Layers"), ("hardness", "Hardness"), ("texts", "Texts")]
    names += [("settings", "Settings"), ("environment", "Environment")]
    only_whole = {"points", "hardness", "texts"} | (set() if has_classes else {"classes"})
    return [(id_, name) for id_, name in names if whole or id_ not in only_whole]


def _spoken(layers: Iterable[Any]) -> str:
    return ", ".join(
        f"layer {one.layer} {percent(one.if_all, 1)}" for one in layers if one.if_all is not None
    )


def _warnings(evaluation: Mapping[str, Any], point: ReportedPoint) -> list[str]:
    found = [
        ClassRecall(**{**one, "label": isolated(one["label"])})
        for one in evaluation.get("class_recall") or ()
    ]
    metric = "macro_f1" if "macro_f1" in evaluation["metrics"] else "accuracy"
    return recall_warnings(found, point.threshold or 0, threshold_metric=metric) if found else []


def _class_top(classes: Sequence[ClassExits]) -> float:
    """The share of a class that is a full bar: round, and not below any."""
    shares = [max(one.exit_histogram) / one.num_examples for one in classes if one.num_examples]
    return next(top / 100 for top in PERCENT_TOPS if top >= 100 * max(shares, default=1.0) - 1e-9)


def _curve(report: ExitReport) -> dict[str, Any]:
    """What the page's script reads: every threshold of the reported criterion, from full depth on."""
    evaluation = report.evaluation
    curve = zip(evaluation.curve, report.intervals, report.histograms, strict=True)
    ordered = sorted(curve, key=lambda found: -found[0].mean_exit_layer)
    points = [
        (
            digits(point.threshold),
            round(getattr(point, report.quality), 6),
            round(point.mean_exit_layer, 5),
            histogram,
        )
        for point, _, histogram in ordered
    ]
    distances = [abs(point.mean_exit_layer - evaluation.mean_exit_layer) for point, _, _ in ordered]
    place = distances.index(min(distances))
    chosen = {"place": place, "histogram": evaluation.exit_histogram}
    depth = evaluation.num_hidden_layers
    said = [  # rounded as elsewhere on the page; the script would round halves up
        {
            "quality": percent(getattr(point, report.quality), 1),
            "interval": span(interval, 1),
            "layer": f"{point.mean_exit_layer:.2f}",
            "speedup": f"{point.layer_speedup:.2f}\u00d7",
            "saved": percent(1 - point.mean_exit_layer / depth, 1),
        }
        for point, interval, _ in ordered
    ]
    return {"layers": depth, "points": points, "said": said, "chosen": chosen}


def _texts(report: ExitReport) -> list[tuple[str, str, Any]]:
    """Title, what they are, and texts."""
    right = "right" if report.quality == "accuracy" else "that of full depth"
    order = "Those that full depth is surest of come first, classes in turn."
    if report.quality == "accuracy":
        order = "Those that only full depth gets right come first, then those that it is surest of, classes in turn."
    return [
        (
            "Texts that exit early",
            f"The earliest exits whose answer is {right}, classes in turn.",
            report.early,
        ),
        (
            "Texts that need depth",
            "The latest exits, of those whose answer is right, the hardest first, classes in turn."
            if report.quality == "accuracy"
            else "The latest exits, the hardest first, classes in turn.",
            report.deep,
        ),
        ("Texts whose answer the exit changes", order, report.changed),
    ]


def hardness_sentence(table: HardnessTable, quality: str) -> str:
    """How exit layers follow what rows need, in words."""
    totals = [sum(counts) for counts in table.counts]
    known, half = sum(totals), math.ceil(len(totals) / 2)
    if not known:
        return "Full depth gets no row right."

    def mean(rows: Sequence[Sequence[int]]) -> float:
        counts = [sum(layer) for layer in zip(*rows, strict=True)]
        return sum(layer * count for layer, count in enumerate(counts, start=1)) / sum(counts)

    noun = "rows that full depth gets right" if quality == "accuracy" else "texts"
    parts: list[str] = []
    if totals[0]:
        share, exits = 100 * totals[0] / known, mean(table.counts[:1])
        parts.append(f"{share:.0f}\u00a0% need one layer and exit at layer {exits:.1f} on average")
    if sum(totals[half:]):
        share, exits = 100 * sum(totals[half:]) / known, mean(table.counts[half:])
        parts.append(f"{share:.0f}\u00a0% need more than {half} and exit at layer {exits:.1f}")
    sentence = f"Of {known:,} {noun} " + "; ".join(parts) + "." if parts else ""
    if table.rank_correlation is not None:
        sentence += f" Rank correlation of the two layers: {table.rank_correlation:.2f}.".replace(
            "-", "\u2212"
        )
    return sentence


def _hardness_rows(table: HardnessTable) -> Iterator[tuple[int | str, int, float, int | None]]:
    """Memorized layer, its rows, their mean exit layer, and how many exit before it; "-" where full depth is wrong."""
    for layer, counts in enumerate([*table.counts, table.never], start=1):
        total, is_known = sum(counts), layer <= len(table.counts)
        mean = sum(exit_layer * count for exit_layer, count in enumerate(counts, start=1)) / max(total, 1)
        if is_known or total:
            yield layer if is_known else "\u2013", total, mean, sum(counts[: layer - 1]) if is_known else None


def _certificates(point: ReportedPoint) -> Iterator[dict[str, str]]:
    """What was proved of operating points, in words."""
    for name, proof in point.certificates:
        date = f", {str(proof['date'])[:10]}" if proof.get("date") else ""
        yield {
            "name": name,
            "text": f"{_proved(proof)}{date}. It holds on average, for rows drawn as those were.",
        }


def _proved(proof: Mapping[str, Any]) -> str:
    of = _model_of(proof.get("reference"))
    sure = f"{100 * proof['confidence']:g}\u00a0% confidence"
    rows = f"{proof['num_rows']:,} rows of {proof.get('rows_source') or 'unknown source'}"
    goal = {
        "max_disagreement": f"disagreement with {of}",
        "max_accuracy_loss": f"rows lost against {of}",
    }
    if proof["goal"] in goal:
        points = f"{100 * proof['target']:g} point{'' if proof['target'] == 0.01 else 's'}"
        return f"at most {points} of {goal[proof['goal']]}, {sure}, from {rows}"
    bound, clock = at_most(proof["bound"]).replace(" ", "\u00a0"), proof.get("clock")
    faster = "fewer layers" if clock is None else f"faster on the clock at batches of {clock['batch_size']}"
    reached = proof.get("layer_speedup") if clock is None else clock.get("speedup")
    times = f"{min(proof['target'], reached or proof['target']):.4g}"  # what was asked for, or less where it was missed
    return f"at {times}\u00d7 {faster} at most {bound} of disagreement with {of}, {sure}, from {rows}"


def _model_of(name: str | None) -> str:
    """Whose answers are meant: full depth's, or another model's, without the folders that it lies in."""
    return "full depth" if name is None else f"model \u201c{shown(Path(name).name or name)}\u201d"


def _facts(saved: LoadedClassifier, evaluation: Mapping[str, Any], source: str) -> Iterator[tuple[str, str]]:
    """Names and values of what the model is and what it was made from."""
    config: Any = saved.early_exit_model.config
    record, data = saved.record, saved.record.get("data") or {}
    method = record.get("method")
    if method:
        yield (
            "made by",
            "consistentee retrofit" if method == "retrofit" else f"consistentee train, method {method}",
        )
    if record.get("backbone"):
        backbone = str(record["backbone"])
        yield "backbone", Path(backbone).name if Path(backbone).is_absolute() else backbone
    yield (
        "kind of backbone",
        f"{config.backbone_config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}",
    )
    names = saved.label_names
    listed = ", ".join(f"\u201c{isolated(name)}\u201d" for name in names[:10])
    yield "classes", f"{len(names)}: {listed}" + (", \u2026" if len(names) > 10 else "")
    yield "exit heads", str(config.head)
    yield "default exit rule", f"{config.criterion} > {digits(config.threshold)}"
    yield "longest input", f"{saved.max_length} tokens"
    if saved.task:
        yield "task", saved.task
    if "train_rows" in data:
        yield "trained on", f"{data['train_rows']:,} rows of {Path(str(data.get('source', ''))).name}"
    if "validation_rows" in data:
        yield "validation rows", f"{data['validation_rows']:,}"
    if "calibration_rows" in data:
        yield "calibration rows", f"{data['calibration_rows']:,}"
    yield "reported on", f"{evaluation['num_examples']:,} rows, {Path(source).name}"


def _settings(record: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """The training's settings as shown, and the names of those that are not the defaults."""
    config: Mapping[str, Any] = record.get("config") or {}
    known = RetrofitConfig if record.get("method") == "retrofit" else ClassificationTrainingConfig
    defaults = {field.name: field.default for field in dataclasses.fields(known)}
    changed = [
        name for name, value in config.items() if name in defaults and _plain(value) != _plain(defaults[name])
    ]
    return [(name, _plain(value)) for name, value in config.items()], changed


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): _plain(value) for name, value in values.items()}


def _validation(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Figures of the validation rows, if the record has all that the page shows of them."""
    found = record.get("validation") or {}
    needed = {"criteria", "num_examples", "full_depth_accuracy"}
    return found if needed <= found.keys() else None
