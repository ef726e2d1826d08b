"""A classifier with exits on some of its layers alone, opened or as a folder."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from consistentee.atomic_files import atomic_folder, names_in
from consistentee.errors import SettingError
from consistentee.models.card import write_model_card
from consistentee.models.loaded import LoadedClassifier
from consistentee.models.operating_points import CONFIG_FILE
from consistentee.models.record import RECORD_FILE, read_record


def with_exit_layers(saved: LoadedClassifier, layers: Sequence[int] | None) -> LoadedClassifier:
    """The model with exits on these layers alone, None for all; weights are shared, the configuration is its own.

    Raises:
        ValueError: layers that are not rising numbers up to the last one, or a model without exits.
    """
    model: Any = copy.copy(saved.early_exit_model)
    values = model.config.to_dict() | {"exit_layers": None if layers is None else list(layers)}
    model.config = type(model.config).from_dict(values)
    return replace(saved, model=model)


def at_full_depth(saved: LoadedClassifier) -> LoadedClassifier:
    """The model with all its exits, which none of its inputs takes: what it says at full depth."""
    found = with_exit_layers(saved, None)
    config = found.early_exit_model.config
    config.criterion, config.threshold = "confidence", 1.0
    return found


def require_new_folder(folder: Path) -> None:
    """Raise SettingError unless a folder is not there yet, or empty."""
    if folder.exists() and (not folder.is_dir() or names_in(folder)):
        raise SettingError(f'Folder "{folder}" must be new or empty. Give another one.')


def save_with_exit_layers(
    source: Path, folder: Path, layers: Sequence[int], name: str, point: Mapping[str, Any]
) -> None:
    """Copy a model's folder, with exits on these layers alone and one operating point; whole or not at all.

    The point becomes the default rule as well. Other points and thresholds are left behind, as they were found with
    exits on other layers, and so are the figures of validation and evaluation; the card is written anew.

    Args:
        source: the model's folder; its files are copied, folders in it are not.
        folder: new or empty.
        layers: from 1, rising, the last among them.
        name, point: of the operating point.

    Raises:
        SettingError: the folder holds something.
        OSError: it cannot be written.
    """
    with atomic_folder(folder, require_new_folder, CONFIG_FILE) as place:
        for file in source.iterdir():
            if file.is_file():
                shutil.copyfile(file, place / file.name)
        _change(
            place / CONFIG_FILE,
            exit_layers=list(layers),
            criterion=point["criterion"],
            threshold=point["threshold"],
            operating_points={name: dict(point)},
        )
        if (place / RECORD_FILE).is_file():
            found = {
                "thresholds": {point["criterion"]: point["threshold"]},
                "validation": {},
                "evaluation": {},
            }
            _change(place / RECORD_FILE, exit_layers=list(layers), **found)
            write_model_card(place, read_record(place))


def _change(path: Path, **values: Any) -> None:
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(known | values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
