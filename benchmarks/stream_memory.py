"""Peak memory of throughput mode as the input grows: it should not.

    python benchmarks/stream_memory.py --model MODEL --rows 10000 1000000

Each number of rows runs in a process of its own, which streams generated texts of 1 to 40 words and throws the answers
away; the peak is the process's resident set (ru_maxrss). What a run holds at a time is one window.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

WORDS = [
    "the",
    "a",
    "film",
    "movie",
    "plot",
    "actor",
    "scene",
    "is",
    "was",
    "and",
    "of",
    "it",
    "this",
    "very",
    "good",
    "bad",
    "fine",
    "dull",
    "great",
    "awful",
]


def main() -> None:
    """Run one process per number of rows and print peaks and their ratio to the first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder that `consistentee train` saved")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # what the processes are started with
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.model, options.one, options.seed)))
        return
    table = Table("rows", "peak MB", "ratio", "rows per second")
    first: float | None = None
    for rows in options.rows:
        command = [sys.executable, __file__, "--model", options.model, "--one", str(rows)]
        done = subprocess.run(
            [*command, "--seed", str(options.seed)], check=True, capture_output=True, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found["peak_mb"]
        table.add_row(
            f"{rows:,}",
            f"{found['peak_mb']:.0f}",
            f"{found['peak_mb'] / first:.3f}",
            f"{rows / found['seconds']:.0f}",
        )
    Console().print(table)


def measure(model: str, rows: int, seed: int) -> dict[str, float]:
    """Stream so many rows through an engine; peak memory in MB and seconds."""
    from consistentee import Engine

    engine = Engine.from_pretrained(model, device="cpu")
    start = time.perf_counter()
    for _prediction in engine.stream(_texts(rows, seed)):
        pass
    seconds = time.perf_counter() - start
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "seconds": seconds}


def _texts(rows: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    return (" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(rows))


if __name__ == "__main__":
    main()
