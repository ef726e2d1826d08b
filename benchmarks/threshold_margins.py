"""What a threshold chosen on few rows loses on the truth, by the margin it keeps (`threshold_margin`).

    python benchmarks/threshold_margins.py --task m-cid --data-dir DATA/M-CID --models RUN... [--json out.json]

All layers run once over a task's rows for reporting, which the models never saw. Each draw takes so many of them, with
replacement, for validation rows, and chooses a threshold of the policy that loses nothing there; all rows are the truth
that the draw comes from. Loss in points, mean and standard deviation over draws and its 90 % quantile, and the layers
saved at the mean exit layer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistentee import load_task
from consistentee.atomic_files import write_text
from consistentee.evaluation.classification import run_layers
from consistentee.functional.curves import threshold_within, trade_off_curve
from consistentee.functional.exits import choose_exit_layer
from consistentee.models.loaded import LoadedClassifier, load_model

MARGINS = (0.0, 0.25, 0.5, 1.0)


def main() -> None:
    """Print a line for each number of rows and model, and the mean over models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 250, 500, 1500])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="figures; what it holds already is kept")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.json is not None and options.json.is_file():
        found = json.loads(options.json.read_text(encoding="utf-8"))
    for folder in options.models:
        saved = load_model(folder, LoadedClassifier)
        _, evaluation = load_task(options.task, options.data_dir, label_names=saved.label_names)
        states, _ = run_layers(saved, evaluation, description=folder.name)
        correct = states.layer_logits.argmax(-1) == torch.tensor(evaluation.labels)[:, None]
        for rows in options.rows:
            figures = losses(states.exit_probs, correct, rows, options.draws, options.seed)
            found[f"{folder.name}, {rows} rows"] = figures
            shown = " | ".join(
                f"{f['loss']:.2f} ± {f['spread']:.2f}, {f['worst_tenth']:.2f}, {f['layer_speedup']:.2f}x"
                for f in figures.values()
            )
            print(f"| {folder.name} | {rows} | {shown} |", flush=True)
    if options.json is not None:
        write_text(options.json, json.dumps(found, indent=1) + "\n")


def losses(
    scores: torch.Tensor, correct: torch.Tensor, rows: int, draws: int, seed: int
) -> dict[str, dict[str, float]]:
    """Figures by margin."""
    generator = torch.Generator().manual_seed(seed)
    full = float(correct[:, -1].double().mean())
    lost: dict[float, list[float]] = {margin: [] for margin in MARGINS}
    depth: dict[float, list[float]] = {margin: [] for margin in MARGINS}
    for _ in range(draws):
        drawn = torch.randint(len(scores), (rows,), generator=generator)
        points = trade_off_curve(scores[drawn], correct[drawn])
        for margin in MARGINS:
            threshold = threshold_within(
                points, scores[drawn], correct[drawn], "policy", max_loss=0.0, margin=margin
            )
            exit_layer = choose_exit_layer(scores, threshold)
            at_exit = correct.gather(1, exit_layer[:, None] - 1)
            lost[margin].append(100 * (full - float(at_exit.double().mean())))
            depth[margin].append(float(exit_layer.double().mean()))
    return {
        f"{margin:g}": {
            "loss": float(np.mean(lost[margin])),
            "spread": float(np.std(lost[margin], ddof=1)),
            "worst_tenth": float(np.quantile(lost[margin], 0.9)),
            "layer_speedup": scores.shape[1] / float(np.mean(depth[margin])),
        }
        for margin in MARGINS
    }


if __name__ == "__main__":
    main()
