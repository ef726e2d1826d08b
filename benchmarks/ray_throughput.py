"""Texts per second of `predict --ray` with one worker and with two, beside the engine in one process.

    python benchmarks/ray_throughput.py MODEL --texts DATA/M-CID/train.tsv --rows 4096 --rounds 2 --json FILE

The ways take turns in every round, each with one thread an engine. Windows, and so blocks, are of 128 texts, so that a
short run has some for every worker. Clock time goes from when a quarter of the texts are finished to the last, so that
starting Ray and opening models is left out; the time with that is kept beside. Where others use the machine, read the
processor time of a text instead: that of the thread that computes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from consistentee.atomic_files import write_json
from consistentee.data.files import read_texts
from consistentee.inference.timing import environment
from consistentee.pipelines import classifier, ray_blocks
from consistentee.pipelines.classifier import Engine

os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # Ray's own is 15; on a busy machine the engine alone would win by that
WINDOW_ROWS = 128
WAYS: dict[str, int] = {"engine": 0, "ray, 1 worker": 1, "ray, 2 workers": 2}


def timed_predictor(folder: str) -> type:
    """A predictor whose actors write down how long they computed."""

    class Timed:
        def __init__(self, *args: Any, **how: Any) -> None:
            from consistentee.pipelines.ray_blocks import BlockPredictor

            self.predictor = BlockPredictor(*args, **how)
            self.seconds, self.rows = 0.0, 0

        def __call__(self, batch: Any) -> Any:
            start = time.thread_time()
            found = self.predictor(batch)
            self.seconds += time.thread_time() - start
            self.rows += len(batch)
            Path(folder, f"{os.getpid()}.txt").write_text(f"{self.seconds} {self.rows}", encoding="utf-8")
            return found

    return Timed


def timed(run: Callable[[Callable[[int], object]], object]) -> dict[str, float]:
    """Texts per second over the last three quarters, and seconds of all."""
    begin, moments = time.perf_counter(), list[tuple[float, int]]()
    run(lambda count: moments.append((time.perf_counter(), count)) if count else None)
    seconds = time.perf_counter() - begin
    done = list(itertools.accumulate(count for _, count in moments))
    first = next(index for index, count in enumerate(done) if count >= done[-1] / 4)
    rate = (done[-1] - done[first]) / (moments[-1][0] - moments[first][0])
    return {"texts_per_second": rate, "seconds_with_start": seconds}


def measure(engine: Engine, texts: list[tuple[str, ...]], workers: int) -> dict[str, float]:
    """One way, once."""
    if not workers:
        start = time.thread_time()

        def alone(on_rows: Callable[[int], object]) -> None:
            for _, found in engine.windows(texts):
                on_rows(len(found))

        figures = timed(alone)
        return figures | {"cpu_ms_per_text": 1000 * (time.thread_time() - start) / len(texts)}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cpu").mkdir()
        original = ray_blocks.BlockPredictor
        setattr(ray_blocks, "BlockPredictor", timed_predictor(f"{folder}/cpu"))  # noqa: B010
        try:
            figures = timed(
                lambda on_rows: ray_blocks.predict_blocks(
                    engine, texts, Path(folder, "blocks"), workers=workers, device="cpu", on_rows=on_rows
                )
            )
        finally:
            setattr(ray_blocks, "BlockPredictor", original)  # noqa: B010
        used = [path.read_text(encoding="utf-8").split() for path in Path(folder, "cpu").iterdir()]
        seconds = sum(float(spent) for spent, _ in used)
        return figures | {"cpu_ms_per_text": 1000 * seconds / sum(int(rows) for _, rows in used)}


def main() -> None:
    """Measure in turn, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--texts", required=True)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--rows", type=int, default=4096, help="texts; those of the file, over and over")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setattr(classifier, "WINDOW_ROWS", WINDOW_ROWS)  # noqa: B010
    engine = Engine.from_pretrained(options.model, device="cpu")
    some = list(read_texts(options.texts, [options.text_column], pairs=False))
    texts = list(itertools.islice(itertools.cycle(some), options.rows))
    engine.predict(texts[:256])
    loads: list[float] = []
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.rounds):
        found: dict[str, dict[str, float]] = {}
        for way, workers in WAYS.items():
            figures = measure(engine, texts, workers)
            found[way] = {name: round(value, 3) for name, value in figures.items()}
            loads.append(round(os.getloadavg()[0], 1))
        rounds.append(found)
    medians = {
        way: {name: round(statistics.median(one[way][name] for one in rounds), 3) for name in rounds[0][way]}
        for way in WAYS
    }
    write_json(
        options.json,
        {
            "model": Path(options.model).name,
            "rows": len(texts),
            "median": medians,
            "rounds": rounds,
            "load_average": loads,
            "cores": os.cpu_count(),
            "environment": environment(torch.device("cpu")),
        },
    )


if __name__ == "__main__":
    main()
