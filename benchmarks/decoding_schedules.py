"""How many layer passes a token costs where rows of a batch leave at different layers, under several schedules.

    python benchmarks/decoding_schedules.py

A simulation, no model: 30 layers, exits spread evenly, a pass runs one layer for all rows that wait before it and costs
the same for one row as for all (weights are what it reads). `lockstep` is what the library does: all rows begin a token
together. The others let rows run ahead and wait for one another.
"""

from __future__ import annotations

import random
from collections.abc import Callable

LAYERS = 30
Schedule = Callable[[list[int], int], int]
"""(rows before each layer, rows) -> the layer to run."""


def lockstep(waiting: list[int], rows: int) -> int:
    """Finish what has begun before anything begins."""
    return next((layer for layer in range(LAYERS - 1, 0, -1) if waiting[layer]), 0)


def fullest(waiting: list[int], rows: int) -> int:
    """The layer before which most rows wait."""
    return max(range(LAYERS), key=lambda layer: (waiting[layer], layer))


def pooled(waiting: list[int], rows: int) -> int:
    """The deepest layer before which a quarter of the rows wait, else the fullest."""
    enough = (layer for layer in range(LAYERS - 1, -1, -1) if waiting[layer] >= rows / 4)
    return next(enough, fullest(waiting, rows))


def passes_per_token(rows: int, schedule: Schedule, tokens: int = 4000, seed: int = 0) -> float:
    """Simulate a batch until so many tokens are done."""
    rng = random.Random(seed)
    depths, exits = [0] * rows, [rng.randint(1, LAYERS) for _ in range(rows)]
    done = passes = 0
    while done < tokens:
        waiting = [0] * LAYERS
        for depth in depths:
            waiting[depth] += 1
        layer = schedule(waiting, rows)
        passes += 1
        for row in range(rows):
            if depths[row] != layer:
                continue
            depths[row] += 1
            if depths[row] == exits[row]:
                done += 1
                depths[row], exits[row] = 0, rng.randint(1, LAYERS)
    return passes / done


def main() -> None:
    """Print a table: times fewer passes than full depth."""
    schedules = {"lockstep": lockstep, "fullest layer first": fullest, "pooled by a quarter": pooled}
    print("| rows | layer speed-up | " + " | ".join(schedules) + " |")
    print("|---|---|" + "---|" * len(schedules))
    for rows in (1, 8, 32, 128):
        gains = [LAYERS / rows / passes_per_token(rows, schedule) for schedule in schedules.values()]
        speedup = LAYERS / ((LAYERS + 1) / 2)
        print(f"| {rows} | {speedup:.2f}x | " + " | ".join(f"{gain:.2f}x" for gain in gains) + " |")


if __name__ == "__main__":
    main()
