"""The section about speed of the page of generation results, from the reports that run_generation_speed.sh kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def speed_section(speeds: dict[str, dict[str, Any]]) -> str:
    """The section about speed: what the tables say together, then a table for each report, by its name."""
    lines = [
        "## Speed",
        "",
        "Efficiency is wall-clock speed-up over layer speed-up, against our own full depth in the same run; `nobody "
        "exits` computes the policy at every layer although all tokens go to the last one. What bounds batches of 8 "
        "and 32: [generation](generation.md). `smollm2-float32` and `smollm2-bfloat16` were measured just before a "
        "single token's policy was moved to plain numbers, `smollm2-float32-one-text` after it.",
        "",
        *speed_summary(speeds),
        "",
    ]
    for name, report in speeds.items():
        place, work = report["environment"], report["workload"]
        flags = f" ({', '.join(place['cpu_flags'])})" if place["cpu_flags"] else ""
        exits = "the model's own exits" if work["exits"] == "model" else "forced exits"
        lines += [
            f"**{name}**: {work['num_hidden_layers']} layers of {work['hidden_size']}, vocabulary "
            f"{work['vocab_size']:,}, {work['mean_prompt_tokens']:.0f} prompt and {work['new_tokens']} new tokens, "
            f"{exits}, {work['repeats']} repetitions, {place['hardware']}{flags}, {place['threads']} thread(s), torch "
            f"{place['torch']}, transformers {place['transformers']}, seed {place['seed']}.",
            "",
            "| batch | | tokens/s | mean exit layer | layer speed-up | wall-clock speed-up | efficiency | against "
            "transformers |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in report["rows"]:
            low, high = row["wall_clock_speedup_quartiles"]
            efficiency = "" if row["efficiency"] is None else f"**{row['efficiency']:.2f}**"
            title = row["name"].removeprefix("engine-")
            if row["draft_acceptance"] is not None:
                title += f" ({100 * row['draft_acceptance']:.0f} % of drafts stay)"
            lines.append(
                f"| {row['batch_size']} | {title} | {row['tokens_per_second']:.1f} | {row['mean_exit_layer']:.2f} | "
                f"{row['layer_speedup']:.2f}x | {row['wall_clock_speedup']:.2f}x ({low:.2f} to {high:.2f}) | "
                f"{efficiency} | {row['speedup_over_transformers']:.2f}x |"
            )
        lines.append("")
    return "\n".join(lines)


def speed_summary(speeds: dict[str, dict[str, Any]]) -> list[str]:
    """What the speed tables say together, a list item each: full depth, the model's own exits, forced exits."""
    full = [row["speedup_over_transformers"] for _, row in _rows_of(speeds, "engine-full-depth")]
    lines = [
        f"- Full depth is {_between(full)} as fast as `transformers` (sdpa, the same precision and batch, "
        f"{len(full)} measurements)."
    ]
    own = [row for report, row in _rows_of(speeds, "engine") if report["workload"]["exits"] == "model"]
    if own:
        slower = all(row["wall_clock_speedup"] < 1 for row in own)
        verdict = (
            "**slower** than our own full depth" if slower else "not always faster than our own full depth"
        )
        own.sort(key=lambda row: row["batch_size"])
        clock, layers, rival = (
            _listed([f"{row[key]:.2f}x" for row in own])
            for key in ("wall_clock_speedup", "layer_speedup", "speedup_over_transformers")
        )
        lines.append(
            f"- With the exits that the trained model takes by itself (default threshold) it is {verdict}: {clock} at "
            f"batches {_listed([str(row['batch_size']) for row in own])}, for {layers} fewer layers ({rival} against "
            "`transformers`). So few layers saved do not pay for asking a policy after every layer: turn exits off "
            "(`--mode full`) for speed, or lower the threshold for other text."
        )
    forced = [
        row
        for report, row in _rows_of({name: speeds[name] for name in speeds if "margin" not in name}, "engine")
        if report["workload"]["exits"] != "model"
    ]
    if forced:
        one, more = (
            [row["wall_clock_speedup"] for row in forced if (row["batch_size"] == 1) == alone]
            for alone in (True, False)
        )
        lines.append(
            "- Where half of the layers are saved by force "
            f"({_between([row['layer_speedup'] for row in forced])} fewer) it is {_between(one)} against our own full "
            f"depth with one text, {_between(more)} in batches of 8 and 32."
        )
    return lines


def _rows_of(speeds: dict[str, dict[str, Any]], name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A competitor's rows of all reports, each with its report."""
    return [(report, row) for report in speeds.values() for row in report["rows"] if row["name"] == name]


def _between(values: Sequence[float]) -> str:
    """The lowest and the highest, "1.20x to 1.46x"."""
    low, high = f"{min(values):.2f}x", f"{max(values):.2f}x"
    return low if low == high else f"{low} to {high}"


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence: commas, and `and` before the last."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
