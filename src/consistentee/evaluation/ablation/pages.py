"""ablate.json as tables, the same ones for the terminal and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from consistentee.evaluation.comparison.tables import NOTHING, Sheet, made_on, markdown_sheet, signed_points

SHOWN_SPEEDUPS = ("1.5", "2", "3")


def ablation_sheets(summary: Mapping[str, Any]) -> list[Sheet]:
    """All tables, question by question."""
    sheets: list[Sheet] = []
    for name, found in summary["questions"].items():
        heading = f"{name}: {found['question']}"
        sheets.append(_difference_sheet(heading, found["differences"]))
        if "thirds" in found:
            sheets.append(_thirds_sheet(name, found["thirds"]))
        if "rounds" in found:
            sheets.append(_rounds_sheet(name, found["rounds"]))
        if found.get("gradients"):
            sheets += _gradient_sheets(name, found["gradients"])
        if found.get("policy_rows"):
            sheets.append(_policy_rows_sheet(name, found["policy_rows"]))
    return sheets


def answers_page(summary: Mapping[str, Any]) -> str:
    """The tables with what their columns mean, as Markdown."""
    parts = [
        "# Ablation",
        "One switch at a time. Differences are the variant's minus the other's, in points, on the same rows and seeds, "
        f"with 95 % bootstrap intervals ({summary['resamples']:,} draws of the rows, with Student's t over seeds where "
        "there are several). Area: mean over layer speed-ups from 1x to 4x, on a logarithmic axis, of the best "
        "accuracy at that speed-up or more. At a speed-up the threshold is swept on the reported rows, for both alike; "
        "*chosen* is the threshold that validation chose.",
        *(markdown_sheet(sheet) for sheet in ablation_sheets(summary)),
    ]
    return "\n\n".join([*parts, made_on(summary["environments"])]) + "\n"


def _difference_sheet(title: str, entries: Sequence[Mapping[str, Any]]) -> Sheet:
    columns = ("variant - other", "criterion", "on", "seeds", "area", *(f"{s}x" for s in SHOWN_SPEEDUPS))
    rows: list[tuple[str, ...]] = []
    for entry in entries:
        other = entry["difference"]
        chosen = other["at_validation_threshold"]
        rows.append(
            (
                f"{entry['variant']} - {entry['baseline']}",
                entry["criterion"],
                NOTHING if entry["set"] is None else f"{entry['set']}, {entry['backbone']}",
                " ".join(map(str, entry["seeds"])) if entry["seeds"] else "average",
                signed_points(other["area"]),
                *(signed_points(other["accuracy_at_speedup"][speedup]) for speedup in SHOWN_SPEEDUPS),
                signed_points(chosen["accuracy"]),
                signed_points(chosen["layers_saved"]),
            )
        )
    return Sheet(title, (*columns, "chosen", "layers saved"), rows, num_texts=4)


def _thirds_sheet(name: str, entries: Sequence[Mapping[str, Any]]) -> Sheet:
    columns = ("method", "on", "third", "memorized layer")
    figures = ("accuracy_at_2x", "exit_layer_at_2x", "accuracy_at_validation", "exit_layer_at_validation")
    rows = [
        (
            entry["method"],
            f"{entry['set']}, {entry['backbone']}",
            entry["third"],
            f"{entry['memorized_layer']:.1f}",
            *(_figure(figure, entry.get(figure)) for figure in figures),
        )
        for entry in entries
    ]
    heads = ("accuracy at 2x", "exit layer at 2x", "accuracy, chosen", "exit layer, chosen")
    note = (
        "Rows in order of their memorized layer, which is the mean over all methods and seeds of the table."
    )
    return Sheet(f"{name}: easy, middle and hard rows", (*columns, *heads), rows, note, num_texts=3)


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.2f}" if name.startswith("exit_layer") else f"{100 * value:.1f}"


def _rounds_sheet(name: str, entries: Sequence[Mapping[str, Any]]) -> Sheet:
    rows = [
        (
            entry["method"],
            str(entry["round"]),
            str(entry["runs"]),
            NOTHING if entry["changed_exits"] is None else f"{100 * entry['changed_exits']:.1f}",
            f"{100 * entry['score']:.2f}",
            f"{entry['reward']:.4f}",
            f"{100 * entry['full_depth_accuracy']:.2f}",
        )
        for entry in entries
    ]
    columns = ("method", "round", "runs", "exits that changed, %", "curve, %", "reward", "last layer, %")
    return Sheet(f"{name}: round by round, on validation rows", columns, rows, num_texts=1)


def _gradient_sheets(name: str, entries: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    noise_rows: list[tuple[str, ...]] = []
    for stage in ("untrained", "fitted"):
        parts = [entry["noise"][stage] for entry in entries]
        for k in parts[0]["sampling_noise"]:
            shares = [
                part["sampling_noise"][k] / part["batch_noise"] for part in parts if part["batch_noise"]
            ]
            span = f"{min(shares):.3f} to {max(shares):.3f}" if shares else NOTHING
            noise_rows.append((stage, k, f"{np.mean(shares):.3f}" if shares else NOTHING, span))
    fits: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in entries:
        exact = entry["fits"]["exact"]
        for k, fit in entry["fits"].items():
            fits[k].append((fit["area"] - exact["area"], fit["seconds"] / exact["seconds"]))
    fit_rows = [
        (
            k,
            str(len(values)),
            NOTHING if k == "exact" else _mean_and_error([100 * area for area, _ in values]),
            f"{np.median([time for _, time in values]):.2f}",
        )
        for k, values in fits.items()
    ]
    note = "Mean squared distance to the batch's exact gradient, over that of the batch's to all rows'."
    whole = sum(not entry["noise"]["fitted"]["batch_noise"] for entry in entries)
    if whole:
        note += (
            f" Without {whole} of {len(entries)} models, whose batch is all held-out rows and has no noise."
        )
    return [
        Sheet(
            f"{name}: noise of a sampled gradient, over that of a batch",
            ("policy", "K", "mean", "over models"),
            noise_rows,
            note,
            num_texts=1,
        ),
        Sheet(
            f"{name}: policies fitted by it, on the same states",
            ("K", "models", "area - exact's, points", "time / exact's"),
            fit_rows,
            num_texts=1,
        ),
    ]


def _policy_rows_sheet(name: str, entries: Sequence[Mapping[str, Any]]) -> Sheet:
    gains: dict[tuple[str, int], list[float]] = defaultdict(list)
    for entry in entries:
        for point in entry["areas"]:
            place = f"{entry['set']}, {entry['backbone']}"
            gains[place, point["rows"]].append(100 * (point["area"] - entry["confidence_area"]))
    rows = [
        (place, f"{count:,}", str(len(values)), _mean_and_error(values))
        for (place, count), values in sorted(gains.items())
    ]
    columns = ("on", "rows", "seeds", "policy - confidence, points of area")
    return Sheet(f"{name}: what the policy gains by the rows it learns from", columns, rows, num_texts=1)


def _mean_and_error(values: Sequence[float]) -> str:
    """Mean, and its standard error where there are several."""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    return f"{np.mean(values):+.2f} +- {np.std(values, ddof=1) / len(values) ** 0.5:.2f}"
