"""What narrower classifiers do to accuracy: the warm-up's weighted sum with each kind of head, paired by seed.

    python benchmarks/ablate_heads.py --backbone MODELS/e5-12l --data DATA --runs runs/heads \
        --tasks mrpc rte m-cid --seeds 1 2 --json heads.json

Judged on the task's evaluation rows: the mean over all layers of the running prediction's accuracy, that of the last
layer, and the best accuracy at a layer speed-up or more under confidence and under the learned policy.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from rich.console import Console
from rich.table import Table
from run_results import FOLDERS, MAX_TRAIN_ROWS, WARMUP_EPOCHS

from consistentee import ClassificationTrainingConfig, LoadedClassifier, load_model, load_task, train
from consistentee.atomic_files import write_json
from consistentee.data.batches import collate
from consistentee.data.tokenization import tokenize
from consistentee.functional.criteria import exit_scores
from consistentee.functional.curves import curve_score, trade_off_curve
from consistentee.training.states import LayerStates, run_all_layers

HEADS: dict[str, dict[str, Any]] = {
    "4 queries, as wide as the backbone": {"classifier_hidden_size": None},
    "4 queries, 128": {"classifier_hidden_size": 128},
    "4 queries, 64": {"classifier_hidden_size": 64},
    "4 queries, 32": {"classifier_hidden_size": 32},
    "1 query, as wide as the backbone": {"num_queries": 1, "classifier_hidden_size": None},
    "1 query, 64": {"num_queries": 1, "classifier_hidden_size": 64},
}


def main() -> None:
    """Train every head on every task with every seed, and print means and paired differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data sets")
    parser.add_argument("--runs", type=Path, required=True, help="where the trained models go")
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "rte", "m-cid"], choices=list(FOLDERS))
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cells: list[dict[str, Any]] = []
    for seed in options.seeds:
        for task in options.tasks:
            for head in options.heads:
                folder = options.runs / f"{task}_{seed}_{head.replace(' ', '-').replace(',', '')}"
                print(f"== {task}, seed {seed}, {head}", flush=True)
                figures = run_cell(options.backbone, options.data / FOLDERS[task], task, head, seed, folder)
                cells.append({"task": task, "head": head, "seed": seed} | figures)
                if options.json:
                    write_json(options.json, {"backbone": options.backbone.name, "cells": cells})
    Console().print(_table(cells, options.heads))


def run_cell(backbone: Path, data_dir: Path, task: str, head: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one head and measure it on the evaluation rows."""
    train_data, _ = load_task(task, data_dir, need_train=True)
    if train_data is None:
        raise SystemExit(f"{data_dir} holds no training rows.")
    config = ClassificationTrainingConfig(seed=seed, warmup_epochs=WARMUP_EPOCHS[task], rounds=0)
    train(
        backbone=backbone,
        train_data=train_data.max_samples(MAX_TRAIN_ROWS.get(task), seed=0),
        output_dir=folder,
        config=replace(config, **HEADS[head]),
        task=task,
        resume=True,
        report=partial(print, flush=True),
    )
    saved = load_model(folder, LoadedClassifier)
    _, evaluation = load_task(task, data_dir, label_names=saved.label_names)
    rows = tokenize(evaluation, saved.tokenizer, saved.max_length)
    states = run_all_layers(
        saved.early_exit_model,
        rows,
        collate=partial(collate, tokenizer=saved.tokenizer),
        accelerator=Accelerator(kwargs_handlers=[AutocastKwargs(enabled=False)]),
    )
    return _figures_of(states)


def _figures_of(states: LayerStates) -> dict[str, Any]:
    right = (states.layer_logits.argmax(-1) == states.labels[:, None]).float()
    figures: dict[str, Any] = {"all layers": float(right.mean()), "last layer": float(right[:, -1].mean())}
    for criterion in ("confidence", "policy"):
        scores = exit_scores(criterion, states.layer_logits, states.exit_probs)
        curve = trade_off_curve(scores, states.layer_logits, states.labels, criterion)
        figures[criterion] = curve_score(curve)
    return figures


def _table(cells: list[dict[str, Any]], heads: list[str]) -> Table:
    """Accuracy in points, mean over tasks and seeds, and the paired difference to the first head."""
    measures = ("all layers", "last layer", "confidence", "policy")
    by_key: dict[tuple[str, str, int], dict[str, Any]] = {
        (cell["head"], cell["task"], cell["seed"]): cell for cell in cells
    }
    keys = sorted({(cell["task"], cell["seed"]) for cell in cells})
    table = Table(
        "head", *measures, title=f"{len(keys)} pairs of task and seed, points; difference to the first"
    )
    for head in heads:
        row = [head]
        for measure in measures:
            values, first = (
                [100 * by_key[(name, *key)][measure] for key in keys] for name in (head, heads[0])
            )
            changes = [value - base for value, base in zip(values, first, strict=True)]
            error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
            row.append(f"{statistics.mean(values):.1f} ({statistics.mean(changes):+.1f} ± {error:.1f})")
        table.add_row(*row)
    return table


if __name__ == "__main__":
    main()
