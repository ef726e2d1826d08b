"""The tables of docs/retrofit.md from files that `retrofit --json` and `evaluate --texts --json` wrote.

    python benchmarks/render_retrofit.py seed0.json seed1.json seed2.json       # the mean over them, and the spread

Agreement with the model at fixed layer speed-ups, and the fastest exits at fixed agreements, by criterion: each is read
off the curve of the judged rows, for all criteria alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

SPEEDUPS, AGREEMENTS = (2.0, 2.5, 3.0, 4.0), (0.99, 0.98)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    print(render([json.loads(file.read_text(encoding="utf-8")) for file in parser.parse_args().files]))


def render(runs: list[dict[str, Any]]) -> str:
    """The table of some runs."""
    heads = [*(f"agreement at {speedup:g}x" for speedup in SPEEDUPS)]
    heads += [f"fastest at {100 * agreement:g} %" for agreement in AGREEMENTS]
    lines = [f"| rule | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in (runs[0]["criterion"], *runs[0]["other_criteria"]):
        found = [figures(_curve(run, name)) for run in runs]
        lines.append(f"| {name} | {' | '.join(shown(values) for values in zip(*found, strict=True))} |")
    return "\n".join(lines)


def _curve(run: dict[str, Any], name: str) -> list[dict[str, float]]:
    return run["curve"] if name == run["criterion"] else run["other_criteria"][name]["curve"]


def figures(curve: list[dict[str, float]]) -> list[tuple[float, str]]:
    """Agreements at the speed-ups (percent), then speed-ups at the agreements, each with its unit."""
    best = [
        max(
            (point["agreement"] for point in curve if point["layer_speedup"] >= speedup), default=float("nan")
        )
        for speedup in SPEEDUPS
    ]
    fastest = [
        max((point["layer_speedup"] for point in curve if point["agreement"] >= agreement), default=1.0)
        for agreement in AGREEMENTS
    ]
    return [*((100 * value, "%") for value in best), *((value, "x") for value in fastest)]


def shown(values: tuple[tuple[float, str], ...]) -> str:
    """The mean over runs, with the standard deviation where there are several."""
    numbers, unit = [value for value, _ in values], values[0][1]
    space = " " if unit == "%" else ""
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.2f}{spread}{space}{unit}"


if __name__ == "__main__":
    main()
