"""Exits for plain models of some tasks, from their texts alone, beside `train` on labels: cells of docs/retrofit.md.

    python benchmarks/retrofit_pairs.py --models DIR --data DIR --runs DIR --pairs e5-12l:m-cid e5-12l:mrpc

Each plain model is that of `run_results.py` (same rows, split, epochs, seed). `retrofit` then gets all training texts
of the task without their labels, those that the model has learnt from among them, and both are judged on the rows that
the task reports on. One JSON file a pair in `--output`; `--render` prints the table from them and from the kept cells
of `train`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run_results import CELLS, FOLDERS, MAX_TRAIN_ROWS, WARMUP_EPOCHS, rounded

from consistentee import ClassificationTrainingConfig, LoadedClassifier, finetune, load_model, load_task
from consistentee.atomic_files import write_text
from consistentee.config import RetrofitConfig
from consistentee.evaluation.classification import run_layers
from consistentee.functional.criteria import exit_scores
from consistentee.functional.curves import trade_off_curve
from consistentee.functional.exits import choose_exit_layer
from consistentee.inference.timing import environment
from consistentee.training.train import retrofit

SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0)


def main() -> None:
    """Run the pairs that are not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--output", type=Path, default=CELLS / "retrofit" / "pairs")
    parser.add_argument("--pairs", nargs="+", default=[])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    for pair in options.pairs:
        backbone, task = pair.split(":")
        file = options.output / f"{backbone}_{task}_{options.seed}.json"
        if not file.is_file():
            folders = (options.models / backbone, options.data / FOLDERS[task], options.runs)
            cell = run_pair(*folders, task, options.seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(rounded(cell)) + "\n")
    if options.render:
        for line in table(sorted(options.output.glob("*.json"))):
            print(line)


def run_pair(backbone: Path, data_dir: Path, runs: Path, task: str, seed: int) -> dict[str, Any]:
    """Fine-tune, retrofit and judge."""
    say = partial(print, flush=True)
    train_rows, _ = load_task(task, data_dir, need_train=True)
    if train_rows is None:
        raise SystemExit(f"{data_dir} holds no training rows.")
    plain = runs / f"{backbone.name}_{task}_plain_{seed}"
    finetune(
        backbone=backbone,
        train_data=train_rows.max_samples(MAX_TRAIN_ROWS.get(task), seed=0),
        output_dir=plain,
        config=ClassificationTrainingConfig(seed=seed, warmup_epochs=WARMUP_EPOCHS[task]),
        task=task,
        resume=True,
        report=say,
    )
    folder = runs / f"{backbone.name}_{task}_retrofit_{seed}"
    config = RetrofitConfig(seed=seed)
    retrofit(model=plain, texts=train_rows.texts, output_dir=folder, config=config, resume=True, report=say)
    saved = load_model(folder, LoadedClassifier)
    _, evaluation = load_task(task, data_dir, label_names=saved.label_names)
    states, _ = run_layers(saved, evaluation, description="judged rows")
    predictions, labels = states.layer_logits.argmax(-1), torch.as_tensor(evaluation.labels)
    right, agrees = predictions == labels[:, None], predictions == predictions[:, -1:]
    record = saved.record
    rules: dict[str, Any] = {}
    for rule in ("policy", "confidence"):
        scores = exit_scores(rule, states.layer_logits, states.exit_probs)
        rules[rule] = [
            [
                point.threshold,
                point.accuracy,
                float(
                    right.gather(1, choose_exit_layer(scores, point.threshold)[:, None] - 1).double().mean()
                ),
                point.layer_speedup,
            ]
            for point in trade_off_curve(scores, agrees, rule)
        ]
    exit_layer = choose_exit_layer(states.exit_probs, saved.model.config.threshold)[:, None] - 1
    return {
        "backbone": backbone.name,
        "task": task,
        "seed": seed,
        "num_examples": len(evaluation),
        "num_texts": record["data"]["train_rows"] + record["data"]["validation_rows"],
        "policy_input": record["policy"]["policy_input"],
        "plain_accuracy": float(right[:, -1].double().mean()),
        "at_default_threshold": {
            "threshold": saved.model.config.threshold,
            "agreement": float(agrees.gather(1, exit_layer).double().mean()),
            "accuracy": float(right.gather(1, exit_layer).double().mean()),
            "layer_speedup": states.exit_probs.shape[1] / float((exit_layer + 1).double().mean()),
        },
        "curve": {"columns": ["threshold", "agreement", "accuracy", "layer_speedup"], **rules},
        "environment": environment(torch.device("cpu"), seed),
    }


def table(files: list[Path]) -> list[str]:
    """Accuracy at layer speed-ups, best threshold at each for all alike, of retrofit and of `train`."""
    heads = ["pair", "exits by", "plain", *(f"{speedup:g}x" for speedup in SPEEDUPS), "at its threshold"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1)]
    for file in files:
        cell = json.loads(file.read_text(encoding="utf-8"))
        pair = f"{cell['backbone']}, {cell['task']}"
        default = cell["at_default_threshold"]
        for rule in ("policy", "confidence"):
            curve = [(speedup, accuracy) for _, _, accuracy, speedup in cell["curve"][rule]]
            at = (
                f"{100 * default['accuracy']:.1f} at {default['layer_speedup']:.2f}x"
                if rule == "policy"
                else ""
            )
            lines.append(_row(f"{pair} | retrofit, {rule}", cell["plain_accuracy"], curve, at))
        name = f"{cell['backbone']}_{cell['task']}_{{}}_{cell['seed']}.json"
        trained, plain = (
            json.loads((CELLS / name.format(kind)).read_text()) for kind in ("consistent", "plain")
        )
        found = trained["criteria"]["policy"]
        layers = len(trained["per_layer_accuracy"])
        curve = [(layers / mean, accuracy) for _, accuracy, mean in found["curve"]]
        at = f"{100 * found['metrics']['accuracy']:.1f} at {layers / found['mean_exit_layer']:.2f}x"
        lines.append(_row(f"{pair} | train on labels, policy", plain["metrics"]["accuracy"], curve, at))
    return lines


def _row(name: str, plain: float, curve: list[tuple[float, float]], at: str) -> str:
    best = [max(accuracy for speedup, accuracy in curve if speedup >= wanted) for wanted in SPEEDUPS]
    return f"| {name} | {100 * plain:.1f} | {' | '.join(f'{100 * value:.1f}' for value in best)} | {at} |"


if __name__ == "__main__":
    main()
