"""Policies on a retrofitted model's frozen exits: dropout, width, rows, epochs, input; seconds each.

    python benchmarks/ablate_retrofit.py MODEL RETROFITTED --texts FILE... [--json out.json]

MODEL, files and `--seed` are those that `consistentee retrofit` was given, so that policy and reported texts are the
same. Every variant is fitted on the policy's texts and judged on the reported ones, thresholds swept there for all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from render_retrofit import figures

from consistentee.config import RetrofitConfig
from consistentee.data.batches import collate
from consistentee.data.files import read_texts
from consistentee.data.spooled import SpooledRows
from consistentee.functional.criteria import CRITERIA
from consistentee.functional.curves import trade_off_curve
from consistentee.functional.exits import classifier_signals
from consistentee.heads.policy import PolicyNetwork
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.training.instances import Instances
from consistentee.training.policy import fit_policy, policy_exit_probs
from consistentee.training.states import LayerStates, run_all_layers
from consistentee.training.tasks.classification import row_instances
from consistentee.training.train import retrofit_task

DEFAULTS: dict[str, Any] = {"policy_input": "state+log_odds", "width": 64, "dropout": 0.0, "epochs": 20}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "dropout 0.1": {"dropout": 0.1},
    "dropout 0.5, 32 wide (train's)": {"dropout": 0.5, "width": 32},
    "128 wide": {"width": 128},
    "40 epochs": {"epochs": 40},
    "state alone": {"policy_input": "state"},
    "log-odds alone": {"policy_input": "log_odds"},
    "state and nine signals": {"policy_input": "state+signals"},
    **{f"{rows:,} rows": {"rows": rows} for rows in (500, 1000, 2000, 5000, 10_000)},
}
COSTS = (0.002, 0.2)


def main() -> None:
    """Run the layers once, fit every variant with every seed, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("retrofitted")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the retrofit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the policies")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    texts = itertools.chain.from_iterable(read_texts(file) for file in options.texts)
    task = retrofit_task(options.model, texts, RetrofitConfig(seed=options.seed), source="texts")
    saved = load_model(options.retrofitted, LoadedClassifier)
    learnt = _states(saved, SpooledRows(task.data, task.parts.policy), "policy's texts")
    judged = _states(saved, SpooledRows(task.data, task.parts.report), "reported texts")
    found: dict[str, Any] = {}
    rows, correct = _instances(judged, signals=False), _instances(judged, signals=False).correct
    for name in CRITERIA:
        if name in rows.scores:
            found[name] = [figures(_curve(rows.scores[name], correct, name))]
    for name, changes in VARIANTS.items():
        start = time.perf_counter()
        found[name] = [_figures(learnt, judged, {**DEFAULTS, **changes}, seed) for seed in options.seeds]
        seconds = (time.perf_counter() - start) / len(options.seeds)
        means = [
            sum(values) / len(values) for values in zip(*(_numbers(f) for f in found[name]), strict=True)
        ]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in means)} | {seconds:.0f} s |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _states(saved: LoadedClassifier, rows: Any, description: str) -> LayerStates:
    return run_all_layers(
        saved.early_exit_model,
        rows,
        collate=partial(collate, tokenizer=saved.tokenizer),
        accelerator=Accelerator(cpu=saved.model.device.type == "cpu"),
        keep_pooled=True,
        description=description,
    )


def _instances(states: LayerStates, *, signals: bool) -> Instances:
    answers = states.layer_logits[:, -1].argmax(-1)
    labelled = LayerStates(
        states.classifier_logits, states.layer_logits, states.exit_probs, answers, states.pooled
    )
    rows = row_instances(labelled, "error", "memorized_layer")
    if not signals:
        return rows
    return Instances(**{**vars(rows), "features": classifier_signals(states.layer_logits)})


def _figures(learnt: LayerStates, judged: LayerStates, how: dict[str, Any], seed: int) -> Any:
    signals = how["policy_input"].endswith("signals")
    rows, others = _instances(learnt, signals=signals), _instances(judged, signals=signals)
    torch.manual_seed(seed)
    policy = PolicyNetwork(
        num_layers=rows.correct.shape[1],
        hidden_size=rows.kept_states.shape[2],
        policy_input=how["policy_input"],
        policy_hidden_size=how["width"],
        dropout=how["dropout"],
        initial_exit_bias=-1.0,
    )
    fit_policy(
        policy,
        rows,
        layer_cost=math.sqrt(math.prod(COSTS)),
        layer_cost_range=COSTS,
        epochs=how["epochs"],
        seed=seed,
        rows=torch.arange(min(how.get("rows", len(rows)), len(rows))),
    )
    return figures(_curve(policy_exit_probs(policy, others), others.correct, "policy"))


def _curve(scores: torch.Tensor, correct: torch.Tensor, criterion: str) -> list[dict[str, float]]:
    points = trade_off_curve(scores, correct, criterion, limit=400)
    return [{"agreement": point.accuracy, "layer_speedup": point.layer_speedup} for point in points]


def _numbers(values: list[tuple[float, str]]) -> list[float]:
    return [value for value, _ in values]


if __name__ == "__main__":
    main()
