r"""The figures of docs/scale.md: what a fleet takes, whole, split by depth, and autoscaled.

    python benchmarks/fleet_figures.py benchmarks/results/serving/layer-times-e5-12l_m-cid.json \
      --json benchmarks/results/serving/fleet.json --plot docs/images/fleet.png

Measured times come from `layer_times.py`, everything else from `simulate_fleet.py`. No clock is read: same figures on
every machine.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from simulate_fleet import (
    Design,
    StepTimes,
    Transfer,
    drawn_exits,
    goodput,
    poisson,
    simulate,
    split_designs,
)
from simulate_scaling import autoscaled

CORES = (2, 4, 8, 16)
DEPTHS = (3, 6, 9)
MILLION_A_MINUTE = 1e6 / 60
LINK = "10 Gb/s"
LINKS = {"free": None, LINK: (10.0, 0.2, 0.05), "1 Gb/s, slow calls": (1.0, 0.5, 0.3)}
"""Gigabits per second, latency in ms, work in ms on either side."""

WORK_MS = (0.0, 0.1, 0.2, 0.4, 0.8)
GIGABITS = (0.01, 0.1, 1.0)


def best_split(
    cores: int,
    times: StepTimes,
    histogram: Sequence[int],
    slo_ms: float,
    transfer: Transfer | None,
    depths: Sequence[int] = DEPTHS,
    fullest_first: bool = False,
) -> dict[str, Any]:
    """The depth and the cores that take the most."""
    found = [
        (
            goodput(
                replace(design, fullest_first=fullest_first), times, histogram, slo_ms, transfer=transfer
            ),
            design,
        )
        for depth in depths
        for design in split_designs(cores, depth, histogram, times)
    ]
    figures, design = max(found, key=lambda pair: pair[0].per_core)
    return {"depth": design.depth, "shallow": design.cores, "deep": design.deep_cores, **asdict(figures)}


def fleet_of_a_million(
    design: Design, times: StepTimes, histogram: Sequence[int], transfer: Transfer | None
) -> dict[str, Any]:
    """Latencies at a million requests a minute, of ten seconds."""
    rng, number = np.random.default_rng(1), int(10 * MILLION_A_MINUTE)
    arrivals, exits = poisson(MILLION_A_MINUTE, number, rng), drawn_exits(histogram, number, rng)
    found = simulate(design, times, arrivals, exits, num_layers=len(histogram), transfer=transfer)
    shares = {f"p{round(100 * share)}_ms": round(found.percentile(share), 1) for share in (0.5, 0.95, 0.99)}
    return {"cores": design.all_cores, **shares, "busy": round(found.busy, 3), "mean_rows": found.mean_rows}


def under_slo(times: StepTimes, histogram: Sequence[int], num_bytes: float, slo_ms: float) -> dict[str, Any]:
    """What fleets take where requests must be answered within so many milliseconds."""
    most, full = CORES[-1], [0] * (len(histogram) - 1) + [1]
    links = {name: None if how is None else Transfer(num_bytes, *how) for name, how in LINKS.items()}
    link = Transfer(num_bytes)

    def whole(cores: int, exits: Sequence[int], times: StepTimes = times, **how: Any) -> dict[str, Any]:
        return asdict(goodput(Design(cores, **how), times, exits, slo_ms))

    def split(cores: int, transfer: Transfer | None, depths: Sequence[int] = DEPTHS) -> dict[str, Any]:
        return best_split(cores, times, histogram, slo_ms, transfer, depths)

    at_most = {name: split(most, transfer) for name, transfer in links.items()}
    depth = at_most[LINK]["depth"]
    flat = {}
    for rows in (8, 32):
        flatter = times.flat_up_to(rows)
        split_flat = best_split(most, flatter, histogram, slo_ms, link)
        flat[str(rows)] = {"whole": whole(most, histogram, flatter), "split": split_flat}
    return {
        "slo_ms": slo_ms,
        "whole": {str(cores): whole(cores, histogram) for cores in (1, *CORES)},
        "one_queue": whole(most, histogram, central=True),
        "fullest_first": {
            "whole": whole(most, histogram, fullest_first=True),
            "split": best_split(most, times, histogram, slo_ms, link, [depth], fullest_first=True),
        },
        "full_depth": {str(cores): whole(cores, full) for cores in (1, *CORES)},
        "split": {str(cores): split(cores, link) for cores in CORES},
        "by_link": at_most,
        "by_work_ms": {str(cost): split(most, replace(link, work_ms=cost), [depth]) for cost in WORK_MS},
        "by_gigabits": {
            str(speed): split(most, replace(link, gigabits=speed), [depth]) for speed in GIGABITS
        },
        "flat_up_to": flat,
    }


def figures_of(measured: dict[str, Any], easy: Sequence[int]) -> dict[str, Any]:
    """All of them, from measured times and two histograms."""
    hard: list[int] = measured["exit_histogram"]
    times = StepTimes.measured(measured, int(1024 / measured["mean_tokens"]))
    unloaded = float(times.entry_ms[1] + measured["num_layers"] * times.layer_ms[1])  # full depth, one row
    num_bytes = measured["mean_tokens"] * measured["hidden_size"] * 4
    slos = (round(2 * unloaded, 1), round(8 * unloaded, 1))
    by_slo = [under_slo(times, hard, num_bytes, slo_ms) for slo_ms in slos]
    loose = by_slo[-1]
    cores = math.ceil(MILLION_A_MINUTE / loose["whole"][str(CORES[-1])]["per_core"])
    depth = loose["by_link"][LINK]["depth"]
    return {
        "measured": measured,
        "easy_histogram": list(easy),
        "bytes_per_request": round(num_bytes),
        "by_slo": by_slo,
        "million": {
            "whole": fleet_of_a_million(Design(cores), times, hard, None),
            "split": [
                {"depth": depth, "shallow": way.cores, "deep": way.deep_cores}
                | fleet_of_a_million(way, times, hard, Transfer(num_bytes))
                for way in split_designs(cores, depth, hard, times)
            ],
        },
        "autoscaled": {
            policy: autoscaled(policy, times, easy, hard, rate=1000, slo_ms=slos[-1])
            for policy in ("rate", "exits")
        },
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """Goodput per core by cores, for each SLO."""
    import matplotlib.pyplot as plt

    picture, panels = plt.subplots(1, len(figures["by_slo"]), figsize=(8, 3.2), layout="constrained")
    names = {"whole": "whole", "split": f"split, {LINK}", "full_depth": "whole, full depth"}
    for axes, found in zip(panels, figures["by_slo"], strict=True):
        for (name, label), style in zip(names.items(), ("o-", "^--", "s-"), strict=True):
            cores = [int(count) for count in found[name]]
            values = [one["per_core"] for one in found[name].values()]
            axes.plot(cores, values, style, label=label, markersize=4, linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks((1, *CORES), [str(count) for count in (1, *CORES)])
        axes.set_ylim(0)
        axes.set_xlabel("cores")
        axes.set_title(f"within {found['slo_ms']:.0f} ms", fontsize=10)
    panels[0].set_ylabel("answers in time\nper second and core")
    panels[0].legend(fontsize=8)
    picture.savefig(path, dpi=80)


def main() -> None:
    """Simulate, and write figures and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("times", type=Path, help="what layer_times.py wrote")
    parser.add_argument(
        "--easy",
        type=Path,
        default=Path(__file__).parent / "results" / "retrofit" / "e5-12l_sst2_held-out_0.json",
        help="a report whose exit histogram is that of easy traffic",
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    measured = json.loads(options.times.read_text(encoding="utf-8"))
    easy = json.loads(options.easy.read_text(encoding="utf-8"))["exit_histogram"]
    figures = figures_of(measured, easy)
    options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        draw(figures, options.plot)


if __name__ == "__main__":
    main()
