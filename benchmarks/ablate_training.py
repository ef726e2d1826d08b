"""What one training setting buys: the same rows, seeds and epochs on the weighted sum, trained with it and without.

    python benchmarks/ablate_training.py --models DIR --data DATA --runs runs/ablation \
        --pairs minilm-6l/m-cid minilm-6l/mrpc --variants default "64 wide" --seeds 1 2 --json training.json

Judged on the task's evaluation rows, and once more together with training rows that no run used: the mean over all
layers of the running prediction's accuracy, that of the last layer, and `curve_score` under confidence and under
policies of several seeds, fitted on the rows kept from the classifiers. Differences are paired by pair and seed. A
finished training is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from rich.console import Console
from rich.table import Table
from run_results import FOLDERS

from consistentee import (
    ClassificationTrainingConfig,
    LoadedClassifier,
    TextDataset,
    load_model,
    load_task,
    train,
)
from consistentee.atomic_files import write_json
from consistentee.data.batches import collate
from consistentee.data.rows import stratified_split
from consistentee.data.tokenization import tokenize
from consistentee.functional.criteria import exit_scores
from consistentee.functional.curves import curve_score, trade_off_curve
from consistentee.training.policy import policy_exit_probs
from consistentee.training.policy_phase import policy_search
from consistentee.training.states import LayerStates, run_all_layers
from consistentee.training.tasks.classification import row_instances

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "128 wide": {"classifier_hidden_size": 128},
    "64 wide": {"classifier_hidden_size": 64},
    "32 wide": {"classifier_hidden_size": 32},
    "1 query": {"num_queries": 1},
    "float32": {"mixed_precision": "no"},
    "bfloat16": {"mixed_precision": "bf16"},
}
EPOCHS = {"sst2": 2.0, "stackoverflow": 3.0, "mrpc": 3.0, "rte": 3.0, "m-cid": 6.0}
TRAIN_ROWS = {"sst2": 2_000, "stackoverflow": 1_600, "mrpc": 1_200, "rte": 1_200}
SPARE_ROWS = 1_500  # at most, of the training rows that no run used
PRICES = (0.002, 0.2)
POLICY_SEEDS = (0, 1, 2)
MEASURES = ("all layers", "last layer", "confidence", "policy")


def main() -> None:
    """Train every variant of every pair with every seed, and print means and paired differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="folder that holds the backbones")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data sets")
    parser.add_argument("--runs", type=Path, required=True, help="where the trained models go")
    parser.add_argument("--pairs", nargs="+", required=True, help="BACKBONE/TASK")
    parser.add_argument("--variants", nargs="+", default=["default"], choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--epochs", type=float, help="in place of the task's own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cells: list[dict[str, Any]] = []
    for seed in options.seeds:
        for pair in options.pairs:
            for variant in options.variants:
                backbone, task = pair.split("/")
                print(f"== {pair}, seed {seed}, {variant}", flush=True)
                folder = options.runs / run_name(backbone, task, variant, seed)
                cell = {"pair": pair, "variant": variant, "seed": seed}
                started = time.perf_counter()
                epochs = options.epochs or EPOCHS[task]
                train_cell(options.models / backbone, options.data, task, variant, seed, epochs, folder)
                cell["seconds"] = time.perf_counter() - started
                cell["rows"] = figures_of(*cached_states(folder, options.data, task))
                cells.append(cell)
                if options.json:
                    write_json(options.json, {"torch": torch.__version__, "cells": cells})
    for rows in ("evaluation", "evaluation and spare"):
        Console(width=130).print(_table(cells, options.variants, rows))


def run_name(backbone: str, task: str, variant: str, seed: int) -> str:
    """Folder of a run."""
    return f"{backbone}_{task}_{variant.replace(' ', '-')}_{seed}"


def rows_of(task: str, data: Path, label_names: Sequence[str] | None = None) -> tuple[TextDataset, ...]:
    """Training, evaluation and spare rows, the last being training rows that no run uses."""
    found, evaluation = load_task(task, data / FOLDERS[task], label_names=label_names, need_train=True)
    if found is None:
        raise SystemExit(f"{data / FOLDERS[task]} holds no training rows.")
    if len(found) <= TRAIN_ROWS.get(task, len(found)):
        return found, evaluation, found.select([])
    spare, used = stratified_split(found.labels, TRAIN_ROWS[task] / len(found), seed=0)
    return found.select(used), evaluation, found.select(spare).max_samples(SPARE_ROWS, seed=0)


def train_cell(
    backbone: Path, data: Path, task: str, variant: str, seed: int, epochs: float, folder: Path
) -> None:
    """Train one variant, if that has not been done."""
    config = ClassificationTrainingConfig(
        seed=seed, warmup_epochs=epochs, rounds=0, policy_input="state", policy_folds=2
    )  # other policies are fitted afterwards
    train(
        backbone=backbone,
        train_data=rows_of(task, data)[0],
        output_dir=folder,
        config=replace(config, **VARIANTS[variant]),
        task=task,
        resume=True,
        report=partial(print, flush=True),
    )


def cached_states(
    folder: Path, data: Path, task: str
) -> tuple[LoadedClassifier, LayerStates, LayerStates, dict[str, slice]]:
    """A run's model, its layers' outputs for held-out and for judged rows, and the latter's parts."""
    saved = load_model(folder, LoadedClassifier)
    config = ClassificationTrainingConfig.from_dict(saved.record["config"])
    used, evaluation, spare = rows_of(task, data, saved.label_names)
    _, held = stratified_split(used.labels, config.validation_fraction, config.seed)
    states = partial(
        run_all_layers,
        saved.early_exit_model,
        collate=partial(collate, tokenizer=saved.tokenizer),
        accelerator=Accelerator(kwargs_handlers=[AutocastKwargs(enabled=False)]),
        keep_pooled=True,
    )
    both = TextDataset(
        evaluation.texts + spare.texts, evaluation.labels + spare.labels, evaluation.label_names, ""
    )
    parts = {"evaluation": slice(0, len(evaluation)), "evaluation and spare": slice(0, len(both))}
    held_rows, judged_rows = (
        tokenize(rows, saved.tokenizer, saved.max_length) for rows in (used.select(held), both)
    )
    return saved, states(held_rows), states(judged_rows), parts


def figures_of(
    saved: LoadedClassifier, held: LayerStates, judged: LayerStates, parts: dict[str, slice]
) -> dict[str, dict[str, Any]]:
    """What a run is worth on each part of the judged rows."""
    config = ClassificationTrainingConfig.from_dict(saved.record["config"])
    learnt, other = (row_instances(states, "error", "memorized_layer") for states in (held, judged))
    search = policy_search(config, (), layer_costs=PRICES)
    probs: list[torch.Tensor] = []
    for seed in POLICY_SEEDS:
        torch.manual_seed(seed)
        policy = search.fit(
            saved.early_exit_model.new_policy("state+log_odds"),
            learnt,
            layer_cost=(PRICES[0] * PRICES[1]) ** 0.5,
            layer_cost_range=PRICES,
            seed=seed,
        )
        probs.append(policy_exit_probs(policy, other))
    figures: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        logits, labels = judged.layer_logits[part], judged.labels[part]
        right = logits.argmax(-1) == labels[:, None]
        surest = exit_scores("confidence", logits, None)
        figures[name] = {
            "count": len(labels),
            "all layers": float(right.float().mean()),
            "last layer": float(right[:, -1].float().mean()),
            "confidence": curve_score(trade_off_curve(surest, right, "confidence")),
            "policy": statistics.mean(curve_score(trade_off_curve(found[part], right)) for found in probs),
        }
    return figures


def _table(cells: list[dict[str, Any]], variants: list[str], rows: str) -> Table:
    """Points of every pair, mean over its seeds, and the mean paired difference to the first variant."""
    by_key = {(cell["variant"], cell["pair"], cell["seed"]): cell["rows"][rows] for cell in cells}
    keys = sorted({(cell["pair"], cell["seed"]) for cell in cells})
    table = Table(
        "pair",
        "variant",
        *MEASURES,
        title=f"{rows} rows, points; difference to {variants[0]}, by pair and seed",
    )
    for pair in [*sorted({pair for pair, _ in keys}), None]:
        here = [key for key in keys if pair in (key[0], None)]
        for variant in variants:
            line = [pair or f"{len(here)} runs each", variant]
            for measure in MEASURES:
                values, first = (
                    [100 * by_key[(name, *key)][measure] for key in here] for name in (variant, variants[0])
                )
                changes = [value - base for value, base in zip(values, first, strict=True)]
                error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
                line.append(f"{statistics.mean(values):.1f} ({statistics.mean(changes):+.2f} ± {error:.2f})")
            table.add_row(*line)
    return table


if __name__ == "__main__":
    main()
