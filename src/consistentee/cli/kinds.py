"""The two kinds of model, and what the commands need to know of each; heavy modules are imported by what they do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from consistentee.config import (
    ClassificationTrainingConfig,
    Criterion,
    GenerationCriterion,
    GenerationTrainingConfig,
    TrainingConfig,
)
from consistentee.data.tasks import ClassificationTask, GenerationTask, is_generation_task
from consistentee.errors import UsageError

AnyCriterion = Literal[Criterion, GenerationCriterion]


def _later(path: str) -> Callable[..., Any]:
    """The function "module:name" of this package, imported when it is called."""
    module, _, name = path.partition(":")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"consistentee.{module}"), name)(*args, **kwargs)

    return call


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Args:
        model: one of it, in a sentence.
        models: all of it.
        rows: what it is trained on.
        columns: options that name the columns of its rows.
        columns_needed: whether a file needs them named.
        task_class: of its tasks by name.
        config_class: of its training.
        criteria: its exit criteria.
        batch_size: the usual one of an evaluation.
        reported_rows: after a training, at most so many rows are reported on; None for all.
        load_task: takes a task's name, see `data`.
        load_files: takes the file to train on, that to report on, and columns by name.
        loaded_class: of `models.loaded`, what a saved model is opened as.
        commands: what `train`, `finetune` and others do.
    """

    model: str
    models: str
    rows: str
    columns: tuple[str, ...]
    columns_needed: bool
    task_class: type[ClassificationTask | GenerationTask]
    config_class: type[TrainingConfig]
    criteria: tuple[str, ...]
    batch_size: int
    reported_rows: int | None
    load_task: Callable[..., Any]
    load_files: Callable[..., Any]
    loaded_class: str
    commands: dict[str, Callable[..., Any]]

    @property
    def column_options(self) -> str:
        """The columns as options, in a sentence."""
        *others, last = (f"--{name.replace('_', '-')}" for name in self.columns)
        return f"{', '.join(others)} and {last}"

    def load(self, name: str | Path, **how: Any) -> Any:
        """A saved model of this kind, opened; arguments as of `load_model`."""
        from consistentee.models import loaded

        return loaded.load_model(name, getattr(loaded, self.loaded_class), **how)

    def check_criteria(self, names: Sequence[str] | None) -> None:
        """Raise UsageError unless exit criteria are of this kind."""
        for name in names or ():
            if name not in self.criteria:
                known = ", ".join(self.criteria)
                raise UsageError(f'criterion must be one of {known} for {self.model}, got "{name}".')


CLASSIFIERS = Kind(
    model="a classifier",
    models="classifiers",
    rows="rows to classify",
    columns=("text_columns", "label_column"),
    columns_needed=True,
    task_class=ClassificationTask,
    config_class=ClassificationTrainingConfig,
    criteria=get_args(Criterion),
    batch_size=64,
    reported_rows=None,
    load_task=_later("data.classification:load_task"),
    load_files=_later("data.classification:load_files"),
    loaded_class="LoadedClassifier",
    commands={
        "report": _later("cli.train:report_classifier"),
        "evaluate": _later("cli.evaluate:evaluate_classifier"),
        "benchmark": _later("cli.benchmark:benchmark_classifier"),
    },
)
GENERATORS = Kind(
    model="a text generator",
    models="text generators",
    rows="text to generate",
    columns=("prompt_column", "input_column", "response_column"),
    columns_needed=False,
    task_class=GenerationTask,
    config_class=GenerationTrainingConfig,
    criteria=get_args(GenerationCriterion),
    batch_size=8,
    reported_rows=100,  # texts are generated, which takes long
    load_task=_later("data.generation:load_generation_task"),
    load_files=_later("data.generation:load_generation_files"),
    loaded_class="LoadedGenerator",
    commands={
        "report": _later("cli.train:report_generator"),
        "evaluate": _later("cli.evaluate:evaluate_generator"),
        "benchmark": _later("cli.benchmark_generator:benchmark_generator"),
    },
)
MODEL_KINDS = (CLASSIFIERS, GENERATORS)


def kind_of_task(name: str | None) -> Kind:
    """What a task by name is for; without one, classification."""
    return GENERATORS if name is not None and is_generation_task(name) else CLASSIFIERS


def kind_of_model(name: str) -> Kind:
    """What a saved model is for, by its folder or its name on the hub."""
    from consistentee.models.loaded import LoadedGenerator, model_kind

    return GENERATORS if model_kind(name) is LoadedGenerator else CLASSIFIERS
