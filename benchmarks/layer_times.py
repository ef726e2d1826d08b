"""What one layer costs by the rows in its batch, with the engine on a real model: what `simulate_fleet.py` is fed with.

    python benchmarks/layer_times.py MODEL --texts DATA/M-CID/test.tsv --text-column text --json FILE

Time is the thread's own time on the processor, so that what others compute beside it counts less; all sizes are timed
in turn, over and over, and medians are kept. One thread.
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import time
from pathlib import Path

import torch

from consistentee.atomic_files import write_json
from consistentee.data.files import read_texts
from consistentee.inference.timing import environment
from consistentee.pipelines.classifier import Engine

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def main() -> None:
    """Time, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--texts", required=True)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine.from_pretrained(options.model, device="cpu")
    texts = list(read_texts(options.texts, [options.text_column], pairs=False))
    figures = layer_times(engine, texts, options.repeats)
    write_json(options.json, figures)


@torch.inference_mode()
def layer_times(engine: Engine, texts: list[tuple[str, ...]], repeats: int) -> dict[str, object]:
    """Milliseconds of tokenizing and embedding, and of a layer with its classifier and exit score, by rows."""
    backend, rule = engine.backend, engine.rule()
    scores = engine.exit_scores(rule)
    if scores is None:
        raise SystemExit("The model must have exits.")
    entry: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    layer: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    tokens: list[int] = []
    for repeat in range(repeats + 1):
        for size in BATCH_SIZES:
            first = (repeat * 131 + size) % (len(texts) - size)
            chosen = texts[first : first + size]
            start = time.thread_time()
            rows, _ = engine.tokenize(chosen)
            batch = backend.start(rows)
            entered = time.thread_time()
            history, passed = scores.begin(size), []
            for index in range(backend.num_layers):
                begin = time.thread_time()
                batch, features = backend.pass_layer(index, batch, with_pooled=scores.reads_pooled)
                scores.step(history, features.cpu().numpy())
                passed.append(time.thread_time() - begin)
            if repeat:  # the first round warms up
                entry[size].append(entered - start)
                layer[size].append(statistics.median(passed))
                tokens += [len(row["input_ids"]) for row in rows]
    answers = [found.exit_layer for found in engine.predict(texts)]
    counts = collections.Counter(answers)
    return {
        "model": Path(engine.saved.name).name,
        "num_layers": backend.num_layers,
        "hidden_size": engine.saved.model.config.get_text_config().hidden_size,
        "mean_tokens": round(statistics.mean(tokens), 2),
        "batch_sizes": list(BATCH_SIZES),
        "entry_ms": [round(1000 * statistics.median(entry[size]), 4) for size in BATCH_SIZES],
        "layer_ms": [round(1000 * statistics.median(layer[size]), 4) for size in BATCH_SIZES],
        "exit_histogram": [counts[layer] for layer in range(1, backend.num_layers + 1)],
        "texts": len(texts),
        "repeats": repeats,
        "load_average": round(os.getloadavg()[0], 1),
        "environment": environment(backend.device),
    }


if __name__ == "__main__":
    main()
