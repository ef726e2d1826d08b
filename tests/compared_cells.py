"""Cells of a comparison, made by hand: random exits, packed as `consistentee compare` keeps them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from consistentee.evaluation.comparison.measuring import pack_bits, pack_exits
from consistentee.functional.curves import TOLERANCES, trade_off_curve
from consistentee.functional.exits import choose_exit_layer

LAYERS, ROWS = 6, 90
CONFIG = {
    "warmup_epochs": 2.0,
    "rounds": 2,
    "consistent_epochs": 0.5,
    "validation_fraction": 0.2,
    "max_length": 128,
    "max_accuracy_loss": 0.0,
    "threshold_metric": "accuracy",
}


def cell_of(
    label: str, seed: int = 1, *, name: str = "rte", layers: int = LAYERS, skill: float = 0.7, **changes: Any
) -> dict[str, Any]:
    """A kept cell of random exits; without exits where its label begins with `plain`."""
    generator = np.random.default_rng([len(label), seed, layers])
    cell: dict[str, Any] = {
        "form": 1,
        "kind": "early_exit",
        "label": label,
        "method": label.partition(":")[0],
        "backbone": "small",
        "backbone_fingerprint": "f",
        "set": name,
        "task": name,
        "seed": seed,
        "config": CONFIG,
        "data": {"fingerprint": "train"},
        "evaluation": {"fingerprint": "evaluation", "num_examples": ROWS},
        "own_settings": {},
        "environment": {"hardware": "a machine", "torch": "2", "seed": seed},
        "num_hidden_layers": layers,
        "criterion": None,
        "validation": {"accuracy": skill},
        "seconds": 10.0,
        "work": 100.0,
        "resumed": False,
    }
    right = generator.random((ROWS, layers)) < skill * np.linspace(0.8, 1.0, layers)
    if label.startswith("plain"):
        cell |= {
            "kind": "full_depth",
            "correct": pack_bits(right[:, -1:]),
            "metrics": {"accuracy": float(right[:, -1].mean()), "f1": 0.5},
        }
        return cell | changes
    cell |= {"correct": pack_bits(right), "criterion": "policy", "criteria": {}}
    for criterion in ("policy", "patience"):
        scores = torch.rand(ROWS, layers, generator=torch.Generator().manual_seed(seed))
        scores = scores * layers if criterion == "patience" else scores
        points = trade_off_curve(scores, torch.from_numpy(right), criterion, limit=20)
        thresholds = sorted(point.threshold for point in points)
        exits = torch.stack([choose_exit_layer(scores, threshold) for threshold in thresholds], 1)
        cell["criteria"][criterion] = {
            "curve": [[p.threshold, p.accuracy, p.mean_exit_layer] for p in points],
            "exits": pack_exits(exits.numpy(), layers),
            "at_validation_threshold": {
                "point": len(thresholds) // 2,
                "threshold": thresholds[len(thresholds) // 2],
                "metrics": {"accuracy": 0.5, "f1": 0.4},
            },
            "at_tolerances": {
                f"{loss:g}": len(thresholds) // 2 - place for place, loss in enumerate(TOLERANCES)
            },
        }
    return cell | changes
