"""Operating points: thresholds by name, each with the certificate that `consistentee calibrate` gave it.

They are a field of the configuration, `operating_points`, and so in `config.json`: what saves, uploads, downloads or
pickles a model takes them along. An entry is `{"criterion": ..., "threshold": ..., "certificate": {...}}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from consistentee.atomic_files import locked_folder, write_text
from consistentee.errors import SettingError, require_number
from consistentee.functional.criteria import check_threshold
from consistentee.functional.tables import CLASSIFICATION

CONFIG_FILE = "config.json"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)

FULL_DEPTH_POINT, SAVED_POINT = "full-depth", "saved"
"""Names that a server has for points of its own: nobody exits, and the saved rule."""

Points = Mapping[str, Mapping[str, Any]]


def require_operating_points(points: object) -> None:
    """Raise ValueError unless they are criteria with thresholds by name; None stands for none."""
    if points is None:
        return
    if not isinstance(points, Mapping):
        raise ValueError(f"operating_points must be entries by name, got {points!r}.")
    for name, point in cast("Mapping[object, object]", points).items():
        where = f"operating_points.{name}"
        if not isinstance(point, Mapping) or not {"criterion", "threshold"} <= point.keys():
            raise ValueError(f"{where} must have a criterion and a threshold, got {point!r:.80}.")
        known = cast("Mapping[str, Any]", point)
        require_number(f"{where}.threshold", known["threshold"])
        check_threshold(known["threshold"], str(known["criterion"]), CLASSIFICATION)


def check_point_name(name: str) -> str:
    """The name of a new point, or SettingError.

    It is a letter or digit, then letters, digits, dots, hyphens and underscores, and none that servers keep.
    """
    if not NAME.fullmatch(name):
        raise SettingError(
            "The name of an operating point must begin with a letter or digit and go on with letters, digits, dots, "
            f'hyphens or underscores, got "{name}".'
        )
    if name in (FULL_DEPTH_POINT, SAVED_POINT):
        raise SettingError(
            f'The name of an operating point must not be "{FULL_DEPTH_POINT}" or "{SAVED_POINT}", which every server '
            f'has already, got "{name}". Take another one.'
        )
    return name


def rule_at(points: Points | None, name: str, model: str) -> tuple[str, float]:
    """Criterion and threshold of an operating point.

    Args:
        points: what the model's configuration has.
        name: the point's.
        model: the model's name, for the message.

    Raises:
        SettingError: there is no point of this name; the message lists those that there are.
    """
    known = points or {}
    if name not in known:
        listed = (
            f"it has: {', '.join(known)}" if known else "it has none; `consistentee calibrate` makes them"
        )
        raise SettingError(f'Model "{model}" has no operating point "{name}"; {listed}.')
    return str(known[name]["criterion"]), float(known[name]["threshold"])


def point_or_rule(
    points: Points | None, name: str | None, criterion: str | None, threshold: float | None, model: str
) -> tuple[str | None, float | None]:
    """The criterion and threshold that a call asks for, by themselves or by an operating point.

    Raises:
        SettingError: both are given, or there is no such point.
    """
    if name is None:
        return criterion, threshold
    if criterion is not None or threshold is not None:
        raise SettingError("An operating point excludes criterion and threshold: it names both.")
    return rule_at(points, name, model)


def read_operating_points(folder: str | Path) -> dict[str, Any]:
    """The operating points of a model folder; none where it has no configuration."""
    points: object = read_saved_config(folder).get("operating_points")
    require_operating_points(points)
    return dict(cast("Points", points or {}))


def read_saved_config(folder: str | Path) -> dict[str, Any]:
    """What the configuration of a model folder holds; nothing where it has none."""
    path = Path(folder) / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save_operating_point(
    folder: str | Path, name: str, point: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Put an operating point into a model folder, whose other settings stay as they are; whole or not at all.

    Others may do so at the same time.

    Args:
        folder: with a `config.json`.
        name: the point's.
        point: its criterion, threshold and certificate, as plain JSON values.
        overwrite: whether it may take the place of one of this name.

    Raises:
        SettingError: the name is none, or there is one of this name.
        FileNotFoundError: the folder has no configuration.
    """
    check_point_name(name)
    path = Path(folder) / CONFIG_FILE
    with locked_folder(path.parent):
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        points = dict(values.get("operating_points") or {})
        if name in points and not overwrite:
            raise SettingError(
                f'{folder} has an operating point "{name}" ({points[name]["criterion"]} > '
                f"{points[name]['threshold']:.4g}). Give another name, or say that it may be replaced (--overwrite)."
            )
        points[name] = dict(point)
        require_operating_points(points)
        values["operating_points"] = points
        write_text(
            path, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        )
