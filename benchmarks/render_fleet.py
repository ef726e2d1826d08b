"""The tables of docs/scale.md, from what `fleet_figures.py` and `ray_throughput.py` wrote.

python benchmarks/render_fleet.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from simulate_fleet import Design, StepTimes, drawn_exits, simulate

FOLDER = Path(__file__).parent / "results" / "serving"
FLEET = FOLDER / "fleet.json"
RAY = FOLDER / "ray-e5-12l_m-cid.json"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def times_table(measured: dict[str, Any]) -> str:
    """What a step costs by its rows."""
    sizes = measured["batch_sizes"]
    by_row = [f"{ms / size:.2f}" for ms, size in zip(measured["layer_ms"], sizes, strict=True)]
    lines = [
        ["rows", *map(str, sizes)],
        ["---"] * (len(sizes) + 1),
        ["a layer, ms", *(f"{ms:.1f}" for ms in measured["layer_ms"])],
        ["a layer, ms a row", *by_row],
        ["tokenizing and embedding, ms", *(f"{ms:.1f}" for ms in measured["entry_ms"])],
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goodput_table(found: dict[str, Any]) -> str:
    """Answers in time per second and core, by cores."""
    lines = [
        "| cores | full depth | whole | split | whole: p50 / p95 / p99 ms, busy, rows a step | split: at layer, cores, "
        "p50 / p95 / p99 ms, rows a step |",
        "|---|---|---|---|---|---|",
    ]
    for cores, whole in found["whole"].items():
        full, split = found["full_depth"][cores], found["split"].get(cores)
        cells = [
            cores,
            f"{full['per_core']:.0f}",
            f"{whole['per_core']:.0f}",
            "" if split is None else f"{split['per_core']:.0f}",
            f"{percentiles(whole)}, {100 * whole['busy']:.0f} %, {rows(whole)}",
            ""
            if split is None
            else f"{split['depth']}, {split['shallow']} + {split['deep']}, {percentiles(split)}, {rows(split)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percentiles(found: dict[str, Any]) -> str:
    return " / ".join(f"{found[name]:.0f}" for name in ("p50_ms", "p95_ms", "p99_ms"))


def rows(found: dict[str, Any]) -> str:
    return " and ".join(f"{value:.1f}" for value in found["mean_rows"])


def transfer_table(by_slo: list[dict[str, Any]]) -> str:
    """What a split fleet of the most cores takes of what a whole one does, by what a transfer costs."""
    names = {"by_link": "", "by_work_ms": " ms of work on either side", "by_gigabits": " Gb/s"}
    heads = [f"within {found['slo_ms']:.0f} ms" for found in by_slo]
    lines = [f"| transfer | {' | '.join(heads)} |", "|---|" + "---|" * len(by_slo)]
    for group, unit in names.items():
        for name in by_slo[0][group]:
            cells = []
            for found in by_slo:
                most = list(found["whole"].values())[-1]["per_core"]
                cells.append(f"{found[group][name]['per_core'] / most:.2f}x")
            lines.append(f"| {name}{unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def flat_table(by_slo: list[dict[str, Any]]) -> str:
    """Split against whole where small batches cost no more than a row."""
    lines = ["| so many rows cost what one does | SLO, ms | whole | split | ratio |", "|---|---|---|---|---|"]
    for found in by_slo:
        for name, pair in found["flat_up_to"].items():
            whole, split = pair["whole"]["per_core"], pair["split"]["per_core"]
            lines.append(
                f"| {name} | {found['slo_ms']:.0f} | {whole:.0f} | {split:.0f} | {split / whole:.2f}x |"
            )
    return "\n".join(lines)


def order_table(by_slo: list[dict[str, Any]]) -> str:
    """Whole and split by which layer of a server goes next, and one queue for whole servers."""
    heads = [f"within {found['slo_ms']:.0f} ms: whole, split" for found in by_slo]
    lines = [f"| goes next | {' | '.join(heads)} |", "|---|" + "---|" * len(by_slo)]
    shallowest: list[str] = []
    fullest: list[str] = []
    queue: list[str] = []
    for found in by_slo:
        whole, split = list(found["whole"].values())[-1], list(found["split"].values())[-1]
        shallowest.append(f"{whole['per_core']:.0f}, {split['per_core']:.0f}")
        pair = found["fullest_first"]
        fullest.append(f"{pair['whole']['per_core']:.0f}, {pair['split']['per_core']:.0f}")
        queue.append(f"{found['one_queue']['per_core']:.0f}")
    for name, cells in (
        ("the shallowest layer", shallowest),
        ("the layer with the most rows", fullest),
        ("the shallowest, whole replicas on one queue", queue),
    ):
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def million_table(million: dict[str, Any]) -> str:
    """Latencies at a million requests a minute."""
    lines = ["| fleet | cores | busy | p50 / p95 / p99 ms | rows a step |", "|---|---|---|---|---|"]
    named = [("whole", million["whole"])] + [
        (f"split at layer {one['depth']}, {one['shallow']} + {one['deep']}", one) for one in million["split"]
    ]
    for name, one in named:
        lines.append(
            f"| {name} | {one['cores']} | {100 * one['busy']:.0f} % | {percentiles(one)} | {rows(one)} |"
        )
    return "\n".join(lines)


def scaling_table(found: dict[str, dict[str, float]]) -> str:
    """Replicas by the rate of requests and by exits."""
    lines = ["| scaled by | replicas | core seconds | in time | p50 / p99 ms |", "|---|---|---|---|---|"]
    for policy, name in (("rate", "requests a second"), ("exits", "and the layers they take")):
        one = found[policy]
        ends = [f"{one[part]:.0f}" if one[part] >= 0 else "never" for part in ("p50_ms", "p99_ms")]
        lines.append(
            f"| {name} | {one['replicas_first']} to {one['replicas_last']} | {one['core_seconds']:.0f} | "
            f"{100 * one['in_time']:.1f} % | {' / '.join(ends)} |"
        )
    return "\n".join(lines)


def ray_table(found: dict[str, Any]) -> str:
    """Texts per second of the engine alone and on Ray."""
    alone = found["median"]["engine"]
    lines = [
        "| | texts/s | of the engine's | with its start, s | processor ms a text |",
        "|---|---|---|---|---|",
    ]
    for way, one in found["median"].items():
        ratio = one["texts_per_second"] / alone["texts_per_second"]
        lines.append(
            f"| {way} | {one['texts_per_second']:.0f} | {ratio:.2f}x | {one['seconds_with_start']:.0f} | "
            f"{one['cpu_ms_per_text']:.2f} |"
        )
    return "\n".join(lines)


def predicted_ms(measured: dict[str, Any], window: int = 128, windows: int = 40) -> float:
    """Milliseconds of a text in windows that follow each other, as `ray_throughput.py` runs them, simulated."""
    times, rng = (
        StepTimes.measured(measured, int(1024 / measured["mean_tokens"])),
        np.random.default_rng(0),
    )
    histogram = measured["exit_histogram"]
    spent = sum(
        simulate(
            Design(1),
            times,
            np.zeros(window),
            drawn_exits(histogram, window, rng),
            num_layers=len(histogram),
        ).seconds
        for _ in range(windows)
    )
    return 1000 * spent / (window * windows)


def main() -> None:
    figures = read(FLEET)
    print(times_table(figures["measured"]), end="\n\n")
    for found in figures["by_slo"]:
        print(goodput_table(found), end="\n\n")
    print(order_table(figures["by_slo"]), end="\n\n")
    print(transfer_table(figures["by_slo"]), flat_table(figures["by_slo"]), sep="\n\n", end="\n\n")
    print(million_table(figures["million"]), scaling_table(figures["autoscaled"]), sep="\n\n", end="\n\n")
    if RAY.exists():
        print(ray_table(read(RAY)), end="\n\n")
    print(f"predicted: {predicted_ms(figures['measured']):.2f} ms a text")


if __name__ == "__main__":
    main()
