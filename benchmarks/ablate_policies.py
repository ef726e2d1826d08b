"""Compare policies on one trained model's frozen classifiers: input, reward, price, data, estimator, collapse guards.

    python benchmarks/ablate_policies.py runs/results/e5-12l_sst2_weighted_1 --task sst2 --data-dir DATA/glue/SST-2 \
        --max-train-samples 10000 --json ablation.json

Policies learn on the rows that training kept from the classifiers (or on rows these have seen) and are judged on the
task's evaluation rows by the best accuracy at a layer speed-up or more. The rows of training are cut again as the run
cut them, from its record. Each variant is fitted with several seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from consistentee import ClassificationTrainingConfig, LoadedClassifier, load_model, load_task
from consistentee.atomic_files import write_json
from consistentee.data.batches import collate
from consistentee.data.rows import stratified_split
from consistentee.data.tokenization import tokenize
from consistentee.functional.criteria import exit_scores
from consistentee.functional.curves import BUDGETS, CurvePoint, curve_score, trade_off_curve
from consistentee.functional.exits import choose_exit_layer
from consistentee.training.policy import policy_exit_probs
from consistentee.training.policy_phase import policy_search
from consistentee.training.states import LayerStates, run_all_layers
from consistentee.training.tasks.classification import row_instances

RANGE = (0.002, 0.2)
PRICES = (0.005, 0.02, 0.08)
COLLAPSE_PRICES = (0.1, 0.3)
GUARDS_OFF = {"initial_exit_bias": 0.0, "layer_cost_warmup": 0.0, "entropy_bonus": 0.0}
INPUTS: dict[str, dict[str, Any]] = {
    "state": {"policy_input": "state"},
    "log_odds": {"policy_input": "log_odds"},
    "state+log_odds": {"policy_input": "state+log_odds"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **INPUTS,
    **{f"{name}, seen rows": {**values, "policy_data": "seen"} for name, values in INPUTS.items()},
    **{f"{name}, one price": {**values, "layer_cost_mode": "each"} for name, values in INPUTS.items()},
    "state+log_odds, uniform reward": {"policy_input": "state+log_odds", "reward": "uniform"},
    "state+log_odds, cross-entropy": {"policy_input": "state+log_odds", "reward_loss": "cross_entropy"},
    "state+log_odds, sampled": {"policy_input": "state+log_odds", "estimator": "sampled"},
    **{
        f"state+log_odds, {measure}": {"policy_input": "state+log_odds", "hardness": measure}
        for measure in ("final_loss", "entropy", "el2n")
    },
}
GUARDS: dict[str, dict[str, Any]] = {
    "no guard": GUARDS_OFF,
    "deep start": {**GUARDS_OFF, "initial_exit_bias": -1.0},
    "price warm-up": {**GUARDS_OFF, "layer_cost_warmup": 0.3},
    "entropy bonus": {**GUARDS_OFF, "entropy_bonus": 0.01},
    "all three": {},
}


def main() -> None:
    """Cache the states, fit every variant, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--max-train-samples", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    saved = load_model(options.model, LoadedClassifier)
    config = ClassificationTrainingConfig.from_dict(saved.record["config"])
    train_data, evaluation = load_task(
        options.task, options.data_dir, need_train=True, label_names=saved.label_names
    )
    if train_data is None:
        raise SystemExit("There are no training rows.")
    train_data = train_data.max_samples(options.max_train_samples, seed=0)
    kept, held = stratified_split(train_data.labels, config.validation_fraction, config.seed)

    def states(rows: Any) -> LayerStates:
        return run_all_layers(
            saved.early_exit_model,
            tokenize(rows, saved.tokenizer, saved.max_length),
            collate=partial(collate, tokenizer=saved.tokenizer),
            keep_pooled=True,
            description="states",
        )

    held_states = states(train_data.select(held))
    seen_states = states(train_data.select(kept[: len(held)]))  # as many rows as are held out
    judged = states(evaluation)

    rows: list[dict[str, Any]] = []
    for criterion in ("confidence", "entropy", "patience"):
        scores = exit_scores(criterion, judged.layer_logits, None)
        rows.append({"name": criterion, "price": "", **_figures([scores], judged, criterion)})
    for name, changes in VARIANTS.items():
        changed = replace(config, **changes)
        for price in PRICES if changed.layer_cost_mode == "each" else (None,):
            probs = _fits(saved, changed, seen_states, held_states, judged, price, options.seeds)
            rows.append({"name": name, "price": price or "range", **_figures(probs, judged, "policy")})
    for name, changes in GUARDS.items():
        for price in COLLAPSE_PRICES:
            changed = replace(config, policy_input="state", reward_loss="cross_entropy", **changes)
            probs = _fits(saved, changed, seen_states, held_states, judged, price, options.seeds)
            rows.append({"name": f"collapse, {name}", "price": price, **_figures(probs, judged, "policy")})
    Console(width=150).print(_table(rows))
    if options.json is not None:
        write_json(options.json, {"model": str(options.model), "rows": rows})


def _fits(
    saved: Any,
    config: ClassificationTrainingConfig,
    seen: LayerStates,
    held: LayerStates,
    judged: LayerStates,
    price: float | None,
    seeds: int,
) -> list[Tensor]:
    """Exit probabilities of the judged rows under the policies of several seeds; without a price, for the range."""
    source = seen if config.policy_data == "seen" else held
    measure = config.hardness if config.reward == "hardness" else "uniform"
    learnt, other = (row_instances(states, config.reward_loss, measure) for states in (source, judged))
    search = policy_search(config, (), layer_costs=RANGE)
    model = saved.early_exit_model
    model.config.initial_exit_bias = config.initial_exit_bias
    probs: list[Tensor] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        policy = model.new_policy(config.policy_input)
        policy = search.fit(
            policy,
            learnt,
            layer_cost=math.sqrt(RANGE[0] * RANGE[1]) if price is None else price,
            layer_cost_range=RANGE if price is None else None,
            seed=seed,
        )
        probs.append(policy_exit_probs(policy, other))
    return probs


def _figures(scores_of_seeds: list[Tensor], judged: LayerStates, criterion: str) -> dict[str, Any]:
    """Means over seeds: score, accuracy at each budget, and what threshold 0.5 gives."""
    right = (judged.layer_logits.argmax(-1) == judged.labels[:, None]).float()
    curves = [trade_off_curve(scores, right.bool(), criterion) for scores in scores_of_seeds]
    exits = [choose_exit_layer(scores, 0.5) for scores in scores_of_seeds]
    return {
        "score": statistics.mean(map(curve_score, curves)),
        "accuracy_at": {
            str(budget): statistics.mean(_best_accuracy(curve, budget) for curve in curves)
            for budget in BUDGETS
        },
        "first_layer_share": statistics.mean(float((layer == 1).float().mean()) for layer in exits),
        "mean_exit_layer": statistics.mean(float(layer.float().mean()) for layer in exits),
        "accuracy": statistics.mean(float(right.gather(1, layer[:, None] - 1).mean()) for layer in exits),
    }


def _best_accuracy(curve: list[CurvePoint], layer_speedup: float) -> float:
    return max((point.accuracy for point in curve if point.layer_speedup >= layer_speedup), default=0.0)


def _table(rows: list[dict[str, Any]]) -> Table:
    speeds = [f"{budget:g}x" for budget in BUDGETS]
    table = Table("criterion", "price", "score", *speeds, "layer at 0.5", "acc", "at layer 1")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["price"]),
            f"{100 * row['score']:.2f}",
            *(f"{100 * value:.1f}" for value in row["accuracy_at"].values()),
            f"{row['mean_exit_layer']:.1f}",
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['first_layer_share']:.0f} %",
        )
    return table


if __name__ == "__main__":
    main()
