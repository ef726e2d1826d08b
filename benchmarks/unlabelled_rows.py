"""What `train --unlabelled-file` gives: the same run with and without the rest of the training file, labels left out.

    python benchmarks/unlabelled_rows.py --models DIR --data DIR --runs DIR --pairs e5-12l:stackoverflow e5-12l:sst2

The labelled rows are drawn as in `run_results.py` (`--max-train-rows` for fewer); all other training texts of the task
are the texts without labels. Both models are judged on the rows that the task reports on, thresholds swept there for
all alike, beside the threshold that validation chose. One JSON file a pair in `--output`; `--render` prints the table.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from retrofit_pairs import SPEEDUPS
from run_results import CELLS, FOLDERS, MAX_TRAIN_ROWS, WARMUP_EPOCHS, rounded

from consistentee import ClassificationTrainingConfig, LoadedClassifier, load_model, load_task, train
from consistentee.atomic_files import write_text
from consistentee.evaluation.classification import run_layers
from consistentee.functional.curves import trade_off_curve
from consistentee.functional.exits import choose_exit_layer
from consistentee.inference.timing import environment

KINDS = ("without", "with")


def main() -> None:
    """Run the pairs that are not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--output", type=Path, default=CELLS / "unlabelled")
    parser.add_argument("--pairs", nargs="+", default=[])
    parser.add_argument("--max-train-rows", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    for pair in options.pairs:
        backbone, task = pair.split(":")
        file = options.output / f"{backbone}_{task}_{options.seed}.json"
        if not file.is_file():
            rows = options.max_train_rows or MAX_TRAIN_ROWS.get(task)
            cell = run_pair(
                options.models / backbone,
                options.data / FOLDERS[task],
                options.runs,
                task,
                rows,
                options.seed,
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(rounded(cell)) + "\n")
    if options.render:
        for line in table(sorted(options.output.glob("*.json"))):
            print(line)


def run_pair(
    backbone: Path, data_dir: Path, runs: Path, task: str, max_rows: int | None, seed: int
) -> dict[str, Any]:
    """Train twice and judge."""
    all_rows, _ = load_task(task, data_dir, need_train=True)
    if all_rows is None:
        raise SystemExit(f"{data_dir} holds no training rows.")
    labelled = all_rows.max_samples(max_rows, seed=0)
    found: dict[str, Any] = {}
    for kind in KINDS:
        folder = runs / f"{backbone.name}_{task}_{kind}_unlabelled_{seed}"
        train(
            backbone=backbone,
            train_data=labelled,
            output_dir=folder,
            config=ClassificationTrainingConfig(
                seed=seed, warmup_epochs=WARMUP_EPOCHS[task], max_accuracy_loss=0.0
            ),
            task=task,
            unlabelled=None if kind == "without" else all_rows.texts,
            resume=True,
            report=partial(print, flush=True),
        )
        found[kind] = judged(load_model(folder, LoadedClassifier), task, data_dir)
    return {
        "backbone": backbone.name,
        "task": task,
        "seed": seed,
        "num_train_rows": len(labelled),
        **found,
        "environment": environment(torch.device("cpu"), seed),
    }


def judged(saved: LoadedClassifier, task: str, data_dir: Path) -> dict[str, Any]:
    """A model's curves on the reported rows, and what its default threshold gives."""
    _, evaluation = load_task(task, data_dir, label_names=saved.label_names)
    states, _ = run_layers(saved, evaluation, description="reported rows")
    right = states.layer_logits.argmax(-1) == torch.as_tensor(evaluation.labels)[:, None]
    rules: dict[str, Any] = {}
    for rule in ("policy", "confidence"):
        curve = trade_off_curve(states.exit_scores(rule), right, rule)
        rules[rule] = [[point.threshold, point.accuracy, point.layer_speedup] for point in curve]
    criterion, threshold = saved.exit_rule()
    exit_layer = choose_exit_layer(states.exit_scores(criterion), threshold)[:, None] - 1
    return {
        "num_examples": len(evaluation),
        "unlabelled": saved.record.get("unlabelled"),
        "full_depth_accuracy": float(right[:, -1].double().mean()),
        "at_default_threshold": {
            "criterion": criterion,
            "threshold": threshold,
            "accuracy": float(right.gather(1, exit_layer).double().mean()),
            "layer_speedup": right.shape[1] / float((exit_layer + 1).double().mean()),
        },
        "curve": {"columns": ["threshold", "accuracy", "layer_speedup"], **rules},
    }


def table(files: list[Path]) -> list[str]:
    """Accuracy at layer speed-ups, best threshold at each for all alike, with and without the texts."""
    heads = ["pair", "texts without labels", "exits by", "full depth"]
    heads += [f"{speedup:g}x" for speedup in SPEEDUPS] + ["at its threshold"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|" + "---|" * (len(heads) - 3)]
    for file in files:
        cell = json.loads(file.read_text(encoding="utf-8"))
        for kind in KINDS:
            one = cell[kind]
            texts = "none" if kind == "without" else _texts(one["unlabelled"])
            default = one["at_default_threshold"]
            for rule in ("policy", "confidence"):
                best = [
                    max(accuracy for _, accuracy, speedup in one["curve"][rule] if speedup >= wanted)
                    for wanted in SPEEDUPS
                ]
                at = f"{100 * default['accuracy']:.1f} at {default['layer_speedup']:.2f}x"
                lines.append(
                    f"| {cell['backbone']}, {cell['task']} | {texts} | {rule} | "
                    f"{100 * one['full_depth_accuracy']:.1f} | "
                    f"{' | '.join(f'{100 * value:.1f}' for value in best)} | "
                    f"{at if rule == default['criterion'] else ''} |"
                )
    return lines


def _texts(found: dict[str, Any]) -> str:
    kept = "kept" if found["kept"] else "not kept"
    return f"{found['num_exit_texts']:,} for exits, {found['num_policy_texts']:,} for the policy ({kept})"


if __name__ == "__main__":
    main()
