"""Train and measure every method on every pair of backbone and task: the figures behind docs/results.md.

    python benchmarks/run_results.py --models DIR --data DIR --runs runs/results \
        --backbones e5-12l mpnet-12l --tasks m-cid sst2 --seeds 1 2 3

Each finished cell is one JSON file in `benchmarks/results` and is not run again; an interrupted cell is resumed from
its run's folder. Then `python benchmarks/render_results.py benchmarks/results docs/results.md` writes the page.

Methods, all with the same rows, split, heads, epochs, batches and learning rates:

    plain       one classifier at the top (`consistentee finetune`), at full depth
    weighted    all classifiers on the layer-weighted sum of their losses throughout, then a policy
    consistent  the defaults of `consistentee train`: warm-up, then policy and consistent phase in turn
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs

from consistentee import (
    ClassificationTrainingConfig,
    LoadedClassifier,
    TextDataset,
    finetune,
    load_model,
    load_task,
    train,
)
from consistentee.atomic_files import write_text
from consistentee.data.batches import collate
from consistentee.data.tasks import get_task
from consistentee.data.tokenization import tokenize
from consistentee.functional.criteria import CRITERIA
from consistentee.functional.curves import trade_off_curve
from consistentee.functional.exits import choose_exit_layer
from consistentee.functional.hardness import memorized_layer
from consistentee.functional.metrics import compute_metrics
from consistentee.training.states import LayerStates, run_all_layers, run_full_depth

FOLDERS = {
    "sst2": "glue/SST-2",
    "mrpc": "glue/MRPC",
    "rte": "glue/RTE",
    "m-cid": "M-CID",
    "stackoverflow": "StackOverflow",
}
MAX_TRAIN_ROWS = {"sst2": 10_000, "stackoverflow": 5_000}
WARMUP_EPOCHS = {"sst2": 2.0, "stackoverflow": 2.0, "mrpc": 3.0, "rte": 3.0, "m-cid": 6.0}
METHODS = ("plain", "weighted", "consistent")
CELLS = Path(__file__).parent / "results"


def main() -> None:
    """Run the cells that are not there yet, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=Path, required=True, help="folder that holds one folder per backbone"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data sets")
    parser.add_argument("--runs", type=Path, required=True, help="where the trained models go")
    parser.add_argument(
        "--output", type=Path, default=CELLS, help="where the figures go (default: %(default)s)"
    )
    parser.add_argument("--backbones", nargs="+", default=["e5-12l", "mpnet-12l"])
    parser.add_argument("--tasks", nargs="+", default=list(FOLDERS), choices=list(FOLDERS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    options = parser.parse_args()
    for seed in options.seeds:
        for backbone in options.backbones:
            for task in options.tasks:
                for method in options.methods:
                    name = f"{backbone}_{task}_{method}_{seed}"
                    if not (options.output / f"{name}.json").is_file():
                        print(f"== {name}", flush=True)
                        cell = run_cell(
                            options.models / backbone,
                            options.data / FOLDERS[task],
                            task,
                            method,
                            seed,
                            options.runs / name,
                        )
                        write_text(options.output / f"{name}.json", json.dumps(cell) + "\n")


def run_cell(
    backbone: Path, data_dir: Path, task: str, method: str, seed: int, folder: Path
) -> dict[str, Any]:
    """Train one method on one task with one backbone, and measure what it does on the evaluation rows."""
    train_data, _ = load_task(task, data_dir, need_train=True)
    if train_data is None:
        raise SystemExit(f"{data_dir} holds no training rows.")
    train_data = train_data.max_samples(MAX_TRAIN_ROWS.get(task), seed=0)
    config = ClassificationTrainingConfig(seed=seed, warmup_epochs=WARMUP_EPOCHS[task], max_accuracy_loss=0.0)
    if method == "weighted":  # as many epochs, all of them on the weighted sum
        total = config.warmup_epochs + config.rounds * config.consistent_epochs
        config = replace(config, warmup_epochs=total, rounds=0)
    fit = finetune if method == "plain" else train
    fit(
        backbone=backbone,
        train_data=train_data,
        output_dir=folder,
        config=config,
        task=task,
        resume=True,
        report=partial(print, flush=True),
    )
    saved = load_model(folder, LoadedClassifier)
    _, evaluation = load_task(task, data_dir, label_names=saved.label_names)
    figures = _figures_of(saved, evaluation, task)
    keys = ("environment", "warmup", "history", "best_round", "policy")
    record: dict[str, Any] = {key: saved.record.get(key) for key in keys}
    record["data"] = {name: value for name, value in saved.record["data"].items() if name != "source"}
    cell = {"backbone": backbone.name, "task": task, "method": method, "seed": seed}
    cell |= {"num_examples": len(evaluation), "config": asdict(config)}
    return rounded(cell | record | figures)


def rounded(value: Any) -> Any:
    """The same with every fraction cut to five digits: cells are kept under version control."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    return value


def _figures_of(saved: LoadedClassifier, evaluation: TextDataset, task: str) -> dict[str, Any]:
    rows = tokenize(evaluation, saved.tokenizer, saved.max_length)
    batches = partial(collate, tokenizer=saved.tokenizer)
    full_precision = Accelerator(kwargs_handlers=[AutocastKwargs(enabled=False)])
    if saved.record["kind"] == "full_depth":
        predictions = run_full_depth(saved.model, rows, collate=batches, accelerator=full_precision).argmax(
            -1
        )
        return {"metrics": compute_metrics(get_task(task).metrics, predictions.numpy(), rows.labels.numpy())}
    states = run_all_layers(saved.early_exit_model, rows, collate=batches, accelerator=full_precision)
    return _exit_figures(states, saved.record["thresholds"], task)


def _exit_figures(states: LayerStates, thresholds: dict[str, float], task: str) -> dict[str, Any]:
    right = (states.layer_logits.argmax(-1) == states.labels[:, None]).float()
    num_layers = right.shape[1]
    layers = memorized_layer(states.classifier_logits.argmax(-1) == states.labels[:, None])
    figures: dict[str, Any] = {
        "per_layer_accuracy": right.mean(0).tolist(),
        "classifier_accuracy": _accuracy_by_layer(states.classifier_logits, states.labels),
        "memorized_layer_histogram": torch.bincount(layers - 1, minlength=num_layers).tolist(),
        "oracle_speedup": num_layers / float(_first_right(right).float().mean()),
        "criteria": {},
    }
    for criterion in CRITERIA:
        scores = states.exit_scores(criterion)
        exit_layer = choose_exit_layer(scores, thresholds[criterion])
        predictions = states.layer_logits.argmax(-1).gather(1, exit_layer[:, None] - 1).squeeze(1)
        figures["criteria"][criterion] = {
            "threshold": thresholds[criterion],
            "metrics": compute_metrics(get_task(task).metrics, predictions.numpy(), states.labels.numpy()),
            "mean_exit_layer": float(exit_layer.float().mean()),
            "exit_histogram": torch.bincount(exit_layer - 1, minlength=num_layers).tolist(),
            "curve": [
                [point.threshold, point.accuracy, point.mean_exit_layer]
                for point in trade_off_curve(scores, right.bool(), criterion)
            ],
        }
    return figures


def _accuracy_by_layer(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    return (logits.argmax(-1) == labels[:, None]).float().mean(0).tolist()


def _first_right(right: torch.Tensor) -> torch.Tensor:
    """The first layer that is right, the last where none is: (rows, layers) -> (rows,), 1-based."""
    any_right = right.max(1).values > 0
    return torch.where(
        any_right, right.argmax(1) + 1, torch.full_like(any_right, right.shape[1], dtype=torch.long)
    )


if __name__ == "__main__":
    main()
