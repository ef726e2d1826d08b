"""Where an interrupted training run goes on: one folder per checkpoint, complete or not there at all.

A checkpoint holds the weights (safetensors), the optimizer's state (read back with `weights_only`), and the progress of
the run as JSON. Random states need not be kept: every step seeds itself from the run's seed and its own number.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from consistentee.atomic import write_json

FOLDER = "checkpoints"
PROGRESS = "progress.json"


def save_checkpoint(
    output_dir: Path,
    number: int,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    progress: dict[str, Any],
) -> None:
    """Write checkpoint `number` (rising within a run) and remove the ones before it."""
    folder = output_dir / FOLDER
    final, partial = folder / f"{number:09d}", folder / f"{number:09d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_separate(weights), partial / "model.safetensors")
    torch.save(optimizer, partial / "optimizer.pt")
    write_json(partial / PROGRESS, progress)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in folder.iterdir():
        if old.is_dir() and old != final:
            shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    folder = output_dir / FOLDER
    if not folder.is_dir():
        return None
    complete = [path for path in folder.iterdir() if path.name.isdigit() and (path / PROGRESS).is_file()]
    return max(complete, key=lambda path: int(path.name), default=None)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Weights, optimizer state and progress of a checkpoint folder."""
    optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return load_file(folder / "model.safetensors"), optimizer, progress


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write weights atomically as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(_separate(weights), partial)
    os.replace(partial, path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read weights that `save_weights` wrote."""
    return load_file(path)


def remove_checkpoints(output_dir: Path) -> None:
    """Delete all checkpoints of a finished run."""
    shutil.rmtree(output_dir / FOLDER, ignore_errors=True)


def _separate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Own storage for every tensor: safetensors refuses tensors that share memory."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
