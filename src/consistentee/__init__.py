"""Early exiting for transformers that you can train, trust, tune and serve.

An input leaves the model at the first layer that is good enough. Importing this package registers its models with
transformers' Auto classes, so that `AutoModelForSequenceClassification.from_pretrained(folder)` opens a saved one.
Only the command line does without that, so that `consistentee --help` need not wait for torch (0.5 s instead of 4 s);
the names below are imported when they are first used, so nothing else differs.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consistentee.config import TrainingConfig, load_recipe
    from consistentee.configuration import EarlyExitConfig, FullDepthConfig
    from consistentee.curves import CurvePoint
    from consistentee.data import TextDataset, load_files, load_task
    from consistentee.engine import Engine, ExitRule, Prediction, Predictor
    from consistentee.errors import DataError, MissingExtraError
    from consistentee.evaluation import Evaluation, evaluate_layers, evaluate_model
    from consistentee.model import (
        EarlyExitForSequenceClassification,
        EarlyExitOutput,
        FullDepthForSequenceClassification,
    )
    from consistentee.saved import SavedModel, open_model
    from consistentee.training import finetune, train

__version__ = "0.1.0"

__all__ = [
    "CurvePoint",
    "DataError",
    "EarlyExitConfig",
    "EarlyExitForSequenceClassification",
    "EarlyExitOutput",
    "Engine",
    "Evaluation",
    "ExitRule",
    "FullDepthConfig",
    "FullDepthForSequenceClassification",
    "MissingExtraError",
    "Prediction",
    "Predictor",
    "SavedModel",
    "TextDataset",
    "TrainingConfig",
    "__version__",
    "evaluate_layers",
    "evaluate_model",
    "finetune",
    "load_files",
    "load_recipe",
    "load_task",
    "open_model",
    "train",
]

_HOMES = {
    "config": ("TrainingConfig", "load_recipe"),
    "configuration": ("EarlyExitConfig", "FullDepthConfig"),
    "curves": ("CurvePoint",),
    "data": ("TextDataset", "load_files", "load_task"),
    "engine": ("Engine", "ExitRule", "Prediction", "Predictor"),
    "errors": ("DataError", "MissingExtraError"),
    "evaluation": ("Evaluation", "evaluate_layers", "evaluate_model"),
    "model": ("EarlyExitForSequenceClassification", "EarlyExitOutput", "FullDepthForSequenceClassification"),
    "saved": ("SavedModel", "open_model"),
    "training": ("finetune", "train"),
}
_HOME_OF = {name: f"consistentee.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# How the console script looks while the package is imported.
_COMMAND_LINE = ("consistentee", "consistentee.exe")
if os.path.basename(sys.argv[0] if sys.argv else "") not in _COMMAND_LINE:
    importlib.import_module("consistentee.model")  # registers its classes
