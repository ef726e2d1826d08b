"""What exits inside one ONNX graph cost and save: processor time of one thread, so that others on the machine disturb little.

    python benchmarks/graph_efficiency.py --config-name minilm-12l-shape --batch-sizes 1 8 32 --repeats 10

In turn, in one process: all layers as one graph of ours, ONNX Runtime's own whole model, our graph with exits that nobody
takes, and with exits evenly over the layers. Medians of the ratios of each repetition.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
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


def seconds(call: Callable[[], Any]) -> float:
    start = time.thread_time()
    call()
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

    ours, exits, fixed = graph(False), graph(), graph(fixed_exits=True)
    whole = full_model_session(model)
    rng = np.random.default_rng(0)
    for size in given.batch_sizes:
        ids = rng.integers(10, 30000, (size, given.width))
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        known = {each.name for each in whole.get_inputs()}
        theirs = {name: values for name, values in feed.items() if name in known}
        taken: dict[str, list[float]] = {name: [] for name in ("ours", "whole", "nobody", "exits")}
        speedup = layers / np.resize(np.arange(1, layers + 1), layers * size if size == 1 else size).mean()
        for repeat in range(given.repeats + 1):
            where = [np.full(1, layer) for layer in range(1, layers + 1)]
            if size > 1:
                where = [rng.permutation(np.resize(np.arange(1, layers + 1), size))]
            one = {
                "ours": seconds(lambda: ours.run(None, feed)),
                "whole": seconds(lambda: whole.run(None, theirs)),
                "nobody": seconds(lambda: exits.run(None, feed)),
                "exits": statistics.mean(
                    seconds(lambda at=at: fixed.run(None, {**feed, "exit_layers": at})) for at in where
                ),
            }
            for name in taken if repeat else ():
                taken[name].append(one[name])

        def ratio(above: str, below: str) -> float:
            return statistics.median(a / b for a, b in zip(taken[above], taken[below], strict=True))

        milliseconds = {name: round(1000 * statistics.median(values), 1) for name, values in taken.items()}
        print(
            f"{given.config_name}, batch {size}: {milliseconds} ms; layers {speedup:.2f}x; efficiency over ONNX Runtime's "
            f"whole model {ratio('whole', 'exits') / speedup:.2f}, over ours {ratio('ours', 'exits') / speedup:.2f}; "
            f"nobody exits {ratio('whole', 'nobody'):.2f}x and {ratio('ours', 'nobody'):.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
