"""What exits inside one ONNX graph cost and save, by the processor time of one thread: others disturb that little.

    python benchmarks/graph_efficiency.py --config-name minilm-12l-shape --batch-sizes 1 8 32 --repeats 10

In turn, in one process: all layers as one graph of ours, ONNX Runtime's own whole model, our graph with exits that
nobody takes, and with exits evenly over the layers. Medians of the ratios of each repetition. Random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime
import torch

from consistentee.evaluation.speed_classification import shape_workload
from consistentee.inference.encoder.onnx_exits import ExitGraph
from consistentee.inference.encoder.onnx_scores import OnnxExitScores
from consistentee.inference.encoder.onnx_sessions import full_model_session


def session(proto: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


def seconds(runs: Any, feed: dict[str, Any]) -> float:
    start = time.thread_time()
    runs.run(None, feed)
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-name", default="minilm-12l-shape")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--classifier-hidden-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = {
        "rows": 1,
        "sequence_length": given.width,
        "classifier_hidden_size": given.classifier_hidden_size,
    }
    model: Any = shape_workload(given.config_name, **shape).engine.saved.model
    layers = model.num_layers

    def graph(with_exits: bool = True, **how: Any) -> Any:
        scores = OnnxExitScores.of(model, "policy") if with_exits else None
        return session(ExitGraph(model, scores, num_classes=2, **how).build(1.0))

    sessions = {"ours": graph(False), "whole": full_model_session(model), "nobody": graph()}
    sessions["exits"] = graph(fixed_exits=True)
    for size in given.batch_sizes:
        measure(given.config_name, sessions, size, given.width, layers, given.repeats)


def measure(name: str, sessions: dict[str, Any], size: int, width: int, layers: int, repeats: int) -> None:
    """Time all of them at one batch size, and print what was found."""
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 30000, (size, width))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    known = {each.name for each in sessions["whole"].get_inputs()}
    feeds = {"ours": feed, "nobody": feed, "whole": {key: feed[key] for key in feed if key in known}}
    taken: dict[str, list[float]] = {each: [] for each in sessions}
    for _ in range(repeats + 1):
        for each, values in feeds.items():
            taken[each].append(seconds(sessions[each], values))
        places = [np.full(1, layer) for layer in range(1, layers + 1)]
        if size > 1:
            places = [rng.permutation(np.resize(np.arange(1, layers + 1), size))]
        passes = [seconds(sessions["exits"], {**feed, "exit_layers": place}) for place in places]
        taken["exits"].append(statistics.mean(passes))
    taken = {each: values[1:] for each, values in taken.items()}  # the first pass warms up
    speedup = layers / np.resize(np.arange(1, layers + 1), layers if size == 1 else size).mean()

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(taken[above], taken[below], strict=True))

    milliseconds = {each: round(1000 * statistics.median(values), 1) for each, values in taken.items()}
    print(
        f"{name}, batch {size}: {milliseconds} ms; layers {speedup:.2f}x; efficiency over ONNX Runtime's whole model "
        f"{ratio('whole', 'exits') / speedup:.2f}, over ours {ratio('ours', 'exits') / speedup:.2f}; "
        f"nobody exits {ratio('whole', 'nobody'):.2f}x and {ratio('ours', 'nobody'):.2f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
