"""How long the installed onnxruntime takes to open a graph with exits, one `If` inside another, by its layers.

    python benchmarks/graph_opening.py --layers 6 12 15 30

A tiny bert, the criterion `static`, one thread; seconds on the clock, of one session each. Versions before 1.29 take
about twice as long for each layer more: give them no more layers than you have time for.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, cast

import onnxruntime
from transformers import BertConfig

from consistentee.inference.encoder.onnx_exits import ExitGraph
from consistentee.inference.encoder.onnx_scores import OnnxExitScores
from consistentee.models.configuration import EarlyExitConfig
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification


def graph_of(layers: int) -> bytes:
    """The serialized graph of a model with so many layers."""
    encoder = BertConfig(
        num_hidden_layers=layers, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=64
    )
    options: dict[str, Any] = {"encoder_config": encoder, "num_labels": 2}
    model: Any = EarlyExitForSequenceClassification(EarlyExitConfig(**options)).eval()
    graph: Any = ExitGraph(model, OnnxExitScores.of(model, "static"), num_classes=2).build()
    return cast(bytes, graph.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for layers in parser.parse_args().layers:
        graph = graph_of(layers)
        start = time.perf_counter()
        onnxruntime.InferenceSession(graph, options)
        seconds = time.perf_counter() - start
        print(f"onnxruntime {onnxruntime.__version__}: {layers} layers, {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()
