"""One cell: trained in its run's folder, measured, kept as JSON; what is there is read and held to the plan."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from consistentee.atomic_files import write_text
from consistentee.backbones.loading import backbone_fingerprint
from consistentee.config import RENAMED, ClassificationTrainingConfig
from consistentee.errors import DataError, SettingError
from consistentee.evaluation.comparison.measuring import measure, rounded
from consistentee.evaluation.comparison.plan import SHARED, PlannedCell, backbone_name, has_exits
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.training.idle_settings import idle_settings
from consistentee.training.methods import METHODS
from consistentee.training.run import Report
from consistentee.training.run_folders import check_same_run
from consistentee.training.train import train
from consistentee.training.warm_ups import warm_up_settings

CELLS, RUNS = "cells", "runs"
FORM = 1
"""Version of a cell's form."""

_OF_RECORD = ("warmup", "history", "best_round", "policy", "environment")

_OF_PLAIN_TOO = ("max_accuracy_loss", "threshold_metric")
"""Settings of exits that cells without any share: `static` is chosen among plain models within the same loss."""

_PLANNED = ("kind", "label", "method", "backbone", "set", "task", "seed", "config", "own_settings")
_MEASURED = ("backbone_fingerprint", "data", "evaluation", "num_hidden_layers", "criterion", "validation")
"""What readers take from every cell."""

Cell = dict[str, Any]


def require_folder(output_dir: Path) -> None:
    """Raise SettingError where a comparison cannot be kept because no folder is there."""
    if os.path.lexists(output_dir) and not output_dir.is_dir():
        raise SettingError(f'output_dir must be a folder, and "{output_dir}" is none. Give another one.')


def cell_path(output_dir: Path, cell: PlannedCell) -> Path:
    """Where a cell is kept."""
    return output_dir / CELLS / f"{cell.name}.json"


def run_folder(output_dir: Path, cell: PlannedCell) -> Path:
    """Where a cell is trained."""
    return output_dir / RUNS / cell.name


def run_cell(
    cell: PlannedCell,
    output_dir: Path,
    *,
    keep_model: bool = True,
    warm_up_dir: Path | None = None,
    report: Report,
) -> Cell:
    """Train what is not trained yet, go on with what was interrupted, measure, and keep the cell.

    Args:
        cell: what to run.
        output_dir: of the comparison.
        keep_model: whether the run's folder stays.
        warm_up_dir: where its first steps are shared, see `train`; None where it is not.
        report: is given lines of text to show.

    Raises:
        ValueError: the run's folder holds a run with other settings, backbone or data.
    """
    folder = run_folder(output_dir, cell)
    started, resumed = time.monotonic(), folder.exists()
    train(
        backbone=cell.backbone,
        train_data=cell.data.train,
        output_dir=folder,
        config=cell.config(),
        task=cell.data.task,
        method=cell.method.name,
        warm_up_dir=warm_up_dir,
        resume=resumed,
        report=report,
    )
    gc.collect()  # the optimizer's states, before the model is opened again
    saved = load_model(folder, LoadedClassifier)
    figures = measure(saved, cell.data.evaluation)
    shared = saved.record.get("shared_warm_up", {"seconds": 0.0})
    kept: Cell = rounded(
        {
            "form": FORM,
            **_identity(cell),
            "set": cell.data.name,
            "task": cell.data.task,
            "label": cell.method.label,
            "seed": cell.seed,
            "own_settings": dict(cell.method.settings),
            "work": cell.work,
            "seconds": time.monotonic() - started + shared["seconds"],
            "resumed": resumed,
            **_of_record(saved.record),
            **figures,
        }
    )
    write_text(cell_path(output_dir, cell), json.dumps(kept, ensure_ascii=False, allow_nan=False) + "\n")
    if not keep_model:
        discard_run(output_dir, cell)
    return kept


def takes_over(cell: PlannedCell, moment: Mapping[str, Any]) -> bool:
    """Whether a cell's training would go on from a moment that another has left, by what that depends on."""
    method, config = METHODS[cell.method.name], cell.config().to_dict()
    to_the_end = method.one_phase or not config["rounds"] * config["consistent_epochs"]
    return (
        moment["begins_with"] == method.begins_with != ""
        and (to_the_end or moment["stop"] < moment["steps"])
        and moment["backbone"] == (_fingerprint(cell.backbone) or str(cell.backbone))
        and moment["data"] == cell.data.train.fingerprint()
        and moment["settings"] == json.loads(json.dumps(warm_up_settings(config)))
    )


def discard_run(output_dir: Path, cell: PlannedCell) -> None:
    """Remove a run's folder: first its name, so that an interruption leaves no half of a model under it."""
    folder = run_folder(output_dir, cell)
    clear_discarded(output_dir, cell)
    if folder.exists():
        os.rename(folder, _discarded(output_dir, cell))
        with suppress(FileNotFoundError):  # another command clears it away, too
            shutil.rmtree(_discarded(output_dir, cell))


def clear_discarded(output_dir: Path, cell: PlannedCell) -> None:
    """Remove what an interrupted `discard_run` has left."""
    shutil.rmtree(_discarded(output_dir, cell), ignore_errors=True)


def discard_note(output_dir: Path, cell: PlannedCell) -> Path:
    """A file that says that a run goes once its model is studied; a command that keeps models takes it away."""
    folder = run_folder(output_dir, cell)
    return folder.with_name(f".{folder.name}.discard")


def _discarded(output_dir: Path, cell: PlannedCell) -> Path:
    folder = run_folder(output_dir, cell)
    return folder.with_name(f".{folder.name}.discarded")


def _identity(cell: PlannedCell) -> dict[str, Any]:
    """What tells whether a kept cell is the planned one; without paths."""
    return {
        "kind": "early_exit" if has_exits(cell.method.name) else "full_depth",
        "method": cell.method.name,
        "backbone": backbone_name(cell.backbone),
        "backbone_fingerprint": _fingerprint(cell.backbone),
        "config": cell.config().to_dict(),
        "data": {"fingerprint": cell.data.train.fingerprint(), "train_rows": len(cell.data.train)},
        "evaluation": {
            "fingerprint": cell.data.evaluation.fingerprint(),
            "num_examples": len(cell.data.evaluation),
        },
    }


_fingerprint = functools.lru_cache(maxsize=16)(backbone_fingerprint)


def _of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a training record: figures and environment, no paths and nothing of the texts."""
    validation = {
        name: value
        for name, value in (record.get("validation") or {}).items()
        if name not in ("class_recall", "criteria", "tolerances", "loss")
    }
    return {name: record.get(name) for name in _OF_RECORD} | {"validation": validation}


def read_cells(output_dir: Path) -> list[Cell]:
    """All cells that are kept there, by name.

    Raises:
        DataError: a file is no cell.
    """
    paths = (output_dir / CELLS).glob("[!.]*.json")  # one with a dot is being written
    return [read_cell(path) for path in sorted(paths)]


def read_cell(path: Path) -> Cell:
    """A kept cell.

    Raises:
        DataError: it is none.
    """
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["form"] != FORM or not isinstance(cell["correct"], str):
            raise ValueError("another form")
        needed = (*_PLANNED, *_MEASURED, "metrics" if cell["kind"] == "full_depth" else "criteria")
        missing = [name for name in needed if name not in cell]
        if missing:
            raise ValueError(f"without {', '.join(missing)}")
    except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise DataError(
            f"It is no cell of a comparison of this version ({type(error).__name__}: {error}).",
            file=path,
            remedy="Remove it; the comparison makes it anew.",
        ) from error
    return cell


def finished_cell(cell: PlannedCell, output_dir: Path) -> Cell | None:
    """The kept cell where it is the planned one; None where there is none.

    Raises:
        DataError: the file is no cell.
        SettingError: it was made with other settings, backbone or rows.
    """
    path = cell_path(output_dir, cell)
    if not path.is_file():
        return None
    kept = read_cell(path)
    check_same_cell(f"The kept cell {path}", kept, planned_identity(cell))
    return kept


def check_same_cell(whose: str, kept: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise SettingError unless both are of one training and measured on the same rows.

    Args:
        whose: what the kept one is, for the message.
        kept: a cell, or what `planned_identity` said of it.
        other: the same of the one that is wanted.
    """
    try:
        check_same_run(whose, kept, other, ClassificationTrainingConfig().to_dict())
    except ValueError as error:
        raise SettingError(
            f"{str(error).partition(' Resume with')[0]} Give the same, or another --output-dir."
        ) from error
    if kept["evaluation"]["fingerprint"] != other["evaluation"]["fingerprint"]:
        raise SettingError(
            f"{whose} was measured on other evaluation rows. Give the same, or another --output-dir."
        )


def check_comparable(cells: Sequence[Cell]) -> None:
    """Raise DataError unless cells differ in nothing but what is compared.

    All cells of a backbone and set must have had the same rows, split, budget and validation. Those of one label are
    seeds of one method, which must share every setting that it reads. What a cell of an earlier version lacks was at
    its default.

    Args:
        cells: kept ones, or what `planned_identity` says of those to come.
    """
    first: dict[tuple[str, ...], tuple[Cell, Any]] = {}
    for cell in cells:
        place = (cell["backbone"], cell["set"])
        shared = {(*place, "", what): value for what, value in _common(cell).items()}
        shared |= {(*place, cell["label"], name): value for name, value in settings_read(cell).items()}
        for key, value in shared.items():
            other, others = first.setdefault(key, (cell, value))
            if value != others:
                raise DataError(
                    f'Cells of "{cell["set"]}" with {_label_and_seed(cell)} and {_label_and_seed(other)} must share '
                    f"{key[-1]}, got {value} and {others}.",
                    remedy="Remove those of one of them, or compare in another output folder.",
                )


def planned_identity(cell: PlannedCell) -> Cell:
    """What `check_comparable` and `check_same_cell` read of a cell, before it is run."""
    return {**_identity(cell), "set": cell.data.name, "label": cell.method.label, "seed": cell.seed}


def _label_and_seed(cell: Cell) -> str:
    return f"{cell['label']} (seed {cell['seed']})"


def _common(cell: Cell) -> dict[str, Any]:
    """What all cells of a backbone and set share; where a method is idle about a shared setting, without it."""
    config = settings_read(cell) | {name: _settings(cell)[name] for name in _OF_PLAIN_TOO}
    return {
        "training rows": cell["data"]["fingerprint"],
        "evaluation rows": cell["evaluation"]["fingerprint"],
        "the backbone": cell["backbone_fingerprint"],
        "epochs": round(config["warmup_epochs"] + config["rounds"] * config["consistent_epochs"], 9),
        **{name: config[name] for name in SHARED if name in config},
    }


def settings_read(cell: Cell) -> dict[str, Any]:
    """Settings that the cell's method reads, without the seed."""
    idle = idle_settings(cell["method"], classifier=True, unlabelled=False)
    return {name: value for name, value in _settings(cell).items() if name not in idle | {"seed"}}


def _settings(cell: Cell) -> dict[str, Any]:
    """All settings, by the names that they have now."""
    config: Mapping[str, Any] = cell["config"]
    named = {RENAMED.get(name, name): value for name, value in config.items()}
    return ClassificationTrainingConfig().to_dict() | named
