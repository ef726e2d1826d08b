"""What the classifiers and the policy cost beside the layers, as shares of the layers' time in one run.

    python benchmarks/head_cost.py --backbone MODELS/e5-12l --batch-size 32 --sequence-length 32

Every part is timed in turn, over and over, so that a drifting machine hits all alike; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from consistentee import EarlyExitForSequenceClassification
from consistentee.backbones import encoders as backbones
from consistentee.heads.policy import PolicyNetwork


def main() -> None:
    """Time one layer, each kind of head and each kind of policy, and print the shares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    shape = (options.batch_size, options.sequence_length)
    torch.manual_seed(0)

    parts = {
        **_parts(options.backbone, "attention", shape),
        **{
            name: run
            for name, run in _parts(options.backbone, "shared_pooler", shape).items()
            if "head" in name
        },
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    with torch.inference_mode():
        for _ in range(options.repeats):
            for name, run in parts.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    layer = statistics.median(times["layer"])
    table = Table(
        "part",
        "median ms",
        "share of a layer",
        title=f"{options.backbone.name}, {shape[0]} x {shape[1]} tokens",
    )
    for name, values in times.items():
        median = statistics.median(values)
        table.add_row(name, f"{1000 * median:.2f}", f"{100 * median / layer:.1f} %")
    Console().print(table)
    Console().print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), float32")


def _parts(backbone: Path, head: str, shape: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """What runs at the middle layer: the layer, its classifier, and each kind of policy."""
    model = EarlyExitForSequenceClassification.from_backbone(backbone, num_labels=2, head=head).eval()
    middle = model.num_layers // 2
    state = backbones.embed(model.backbone, torch.randint(5, 500, shape))
    pooled, _ = model.classifiers(middle, state.hidden_states, state.attention_mask)
    passed = torch.randn(shape[0], middle + 1, 2)  # the predictions of the layers so far

    def run_policy(policy: PolicyNetwork) -> Tensor:
        features = policy.features(passed)
        return policy(pooled[:, None], None if features is None else features[:, -1:], middle)

    return {
        "layer": lambda: backbones.run_layer(model.backbone, middle, state),
        f"{head} head": lambda: model.classifiers(middle, state.hidden_states, state.attention_mask),
        **{
            f"policy on {policy_input}": partial(run_policy, model.new_policy(policy_input).eval())
            for policy_input in ("state", "log_odds", "state+log_odds")
        },
    }


if __name__ == "__main__":
    main()
