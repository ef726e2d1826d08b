"""What the host costs between two layers, and whether compiled segments or CUDA graphs cost less.

    python benchmarks/layer_segments.py --config-name bert-base --device cuda --dtype bfloat16 --json segments.json
    python benchmarks/layer_segments.py MODEL --device cpu          # deberta, modernbert, ...: padded layers

A segment is a layer with its classifier and what the policy reads. All segments of a model run in a row on rows of one
length, *with decisions* (after each, what the policy reads comes to the host, as where exits are decided there) and
without. Ways: the engine's code as it is (`eager`); `torch.compile` of each segment for these shapes (`compiled`); on a
GPU also segments replayed from CUDA graphs (`cuda-graph`) and `torch.compile` with its own graphs (`reduce-overhead`).
They take turns; medians. Compiling takes minutes and is not timed; a way that cannot be compiled is named with the
reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistentee.atomic_files import write_json
from consistentee.evaluation.speed import random_token_ids
from consistentee.evaluation.speed_classification import SHAPES, shape_workload
from consistentee.inference.timing import environment, time_in_turn
from consistentee.pipelines.classifier import Engine

Segment = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Hidden states of a batch to those after a layer, and what its exit reads."""

WARM_UPS = 3


def main() -> None:
    """Measure every batch size, print a line for each way, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a trained folder; or --config-name")
    parser.add_argument("--config-name", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--sequence-length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--ways", nargs="+", help="some of them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.model is None) == (options.config_name is None):
        parser.error("give a model or --config-name")
    how = {"device": options.device, "dtype": options.dtype}
    if options.model is None:
        shape = {"rows": 1, "sequence_length": options.sequence_length, "classifier_hidden_size": 64}
        engine = shape_workload(options.config_name, **shape, **how).engine
    else:
        engine = Engine.from_pretrained(options.model, **how)
    found = [
        measure(engine, size, options.sequence_length, options.repeats, options.ways)
        for size in options.batch_sizes
    ]
    if options.json is not None:
        made = environment(engine.backend.device, 0) | {"dtype": options.dtype}
        write_json(
            options.json,
            {"model": options.config_name or Path(str(options.model)).name, "environment": made}
            | {"tokens": options.sequence_length, "repeats": options.repeats, "rows": found},
        )


@torch.inference_mode()
def measure(
    engine: Engine, size: int, length: int, repeats: int, ways: Sequence[str] | None
) -> dict[str, Any]:
    """Milliseconds of all layers at one batch size, by way, with decisions and without."""
    backend: Any = engine.backend
    vocabulary = int(backend.model.backbone.config.vocab_size)
    batch = backend.start([{"input_ids": row} for row in random_token_ids(size, length, vocabulary, 0)])
    start = states_of(batch).clone()
    chains = {
        name: segments
        for name, segments in all_ways(backend, batch, start).items()
        if ways is None or name in ways
    }
    expected = run(all_ways(backend, batch, start)["eager"], start, decide=False)
    reasons = {name: why_not(segments, start, expected) for name, segments in chains.items()}
    refused = {name: reason for name, reason in reasons.items() if reason}
    chains = {name: segments for name, segments in chains.items() if name not in refused}
    work: dict[str, list[Callable[[], object]]] = {}
    for name, segments in chains.items():
        for decide in (True, False):
            work[f"{name}{', decisions' if decide else ''}"] = [
                lambda segments=segments, decide=decide: run(segments, start, decide=decide)
            ]
    seconds = time_in_turn(work, backend.device, repeats)
    milliseconds = {
        name: round(1000 * statistics.median(sum(one) for one in taken), 3) for name, taken in seconds.items()
    }
    print(
        f"{size} x {length}: {milliseconds} ms{''.join(f'; not {name}: {why}' for name, why in refused.items())}",
        flush=True,
    )
    return {"batch_size": size, "milliseconds": milliseconds, "refused": refused}


def why_not(segments: Sequence[Segment], start: Tensor, expected: Tensor) -> str:
    """Run the segments until they are compiled; why they cannot be measured, or "" where they can."""
    try:
        for _ in range(WARM_UPS - 1):
            run(segments, start, decide=False)
        found = run(segments, start, decide=False)
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    far = (found - expected).float().abs().max() > 0.05 * expected.float().abs().max()
    return "it computes something else" if far else ""


def all_ways(backend: Any, batch: Any, start: Tensor) -> dict[str, list[Segment]]:
    """The segments of all layers, by way."""

    def eager(layer: int) -> Segment:
        def segment(states: Tensor) -> tuple[Tensor, Tensor]:
            after, features = backend.pass_layer(layer, with_states(batch, states))
            return states_of(after), features

        return segment

    layers = range(backend.num_layers)
    found = {"eager": [eager(layer) for layer in layers]}
    found["compiled"] = [torch.compile(eager(layer), dynamic=False) for layer in layers]
    if backend.device.type == "cuda":
        found["cuda-graph"] = [captured(eager(layer), start) for layer in layers]
        found["reduce-overhead"] = [
            torch.compile(eager(layer), dynamic=False, mode="reduce-overhead") for layer in layers
        ]
    return found


def captured(segment: Segment, like: Tensor) -> Segment:
    """A segment that replays a CUDA graph, for states of one shape."""
    given = like.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            segment(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = segment(given)

    def replay(states: Tensor) -> tuple[Tensor, Tensor]:
        given.copy_(states)
        graph.replay()
        return outputs

    return replay


def run(segments: Sequence[Segment], states: Tensor, *, decide: bool) -> Tensor:
    """All segments in a row; what the last exit reads."""
    features = states
    for segment in segments:
        states, features = segment(states.clone() if segment is segments[0] else states)
        if decide:
            features = features.cpu()
    return features.cpu()


def states_of(batch: Any) -> Tensor:
    """The hidden states of a packed or padded batch."""
    return batch.hidden_states if hasattr(batch, "hidden_states") else batch.state.hidden_states


def with_states(batch: Any, states: Tensor) -> Any:
    """The batch with other hidden states."""
    if hasattr(batch, "hidden_states"):
        return dataclasses.replace(batch, hidden_states=states)
    return dataclasses.replace(batch, state=dataclasses.replace(batch.state, hidden_states=states))


if __name__ == "__main__":
    main()
