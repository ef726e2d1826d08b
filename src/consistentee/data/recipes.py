"""Recipe files: training settings, and what to train on. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from consistentee.config import ClassificationTrainingConfig, GenerationTrainingConfig, checked_settings
from consistentee.data.tasks import is_generation_task


@dataclass(frozen=True)
class Recipe:
    """A recipe file: training settings, and optionally what to train on and by which method."""

    settings: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    backbone: str | None = None
    method: str | None = None


def load_recipe(path: str | Path, config_class: type[Any] | None = None) -> Recipe:
    """Read a YAML recipe: keys of a training config, and optionally `task`, `backbone` and `method`.

    Args:
        path: the file.
        config_class: whose keys they are; None takes what the recipe's task asks for.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a YAML mapping, or a key or value is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Recipe {path} does not exist. Give the path of a YAML file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Recipe {path} is not valid YAML: {error}".replace("\n", " ")) from error
    if not isinstance(values, dict):
        raise ValueError(f"Recipe {path} must be a mapping of settings, got {type(values).__name__}.")
    names = {key: values.pop(key) for key in ("task", "backbone", "method") if key in values}
    for key, name in names.items():
        if not isinstance(name, (str, NoneType)):
            raise ValueError(
                f"Recipe {path}: {key} must be text, got {name!r}. Write a name, in quotes if it is a number."
            )
    if config_class is None:
        config_class = config_class_of(names.get("task"))
    try:
        settings = checked_settings(values, config_class)
        config_class(**settings)
    except ValueError as error:
        raise ValueError(f"Recipe {path}: {error}") from error
    return Recipe(settings=settings, **names)


def config_class_of(task: str | None) -> type[Any]:
    """Whose keys a task's recipe has; without a task, those of classification."""
    return (
        GenerationTrainingConfig if task and is_generation_task(str(task)) else ClassificationTrainingConfig
    )
