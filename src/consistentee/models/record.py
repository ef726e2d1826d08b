"""The training record of a saved folder: settings, rounds, thresholds and figures, and the model card made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consistentee.atomic_files import write_json
from consistentee.errors import require_thresholds
from consistentee.models.card import write_model_card

RECORD_FILE = "training_record.json"
"""What the training leaves in the folder."""


def read_record(folder: str | Path) -> dict[str, Any]:
    """The training record of a folder; empty where there is none.

    Raises:
        ValueError: the file is not the JSON that training wrote.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Restore it, or remove it.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} must hold a JSON object. Restore it, or remove it.")
    if not isinstance(record.get("config", {}), dict):
        raise ValueError(
            f"{path}: config must be settings by name, got {record['config']!r}. Restore the file."
        )
    try:
        require_thresholds("thresholds", record.get("thresholds"))
    except ValueError as error:
        raise ValueError(f"{path}: {error} Restore the file, or remove it.") from error
    return record


def record_evaluation(folder: str | Path, figures: Mapping[str, Any]) -> None:
    """Put the figures of an evaluation into a folder's training record and its model card.

    Args:
        folder: a saved folder.
        figures: an evaluation as a dict, without its curves, or accuracy and metrics of a plain model.
    """
    record = {**read_record(folder), "evaluation": dict(figures)}
    write_json(Path(folder) / RECORD_FILE, record)
    write_model_card(folder, record)
