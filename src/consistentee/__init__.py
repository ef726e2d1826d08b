"""Early exiting for transformers that you can train, trust, tune and serve.

An input, or a token that is generated, leaves the model at the first layer that is good enough. Importing this package
registers its models with transformers' Auto classes, so that `AutoModelForSequenceClassification` and
`AutoModelForCausalLM.from_pretrained(folder)` open a saved one.
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
    from consistentee.generation.config import GenerationTrainingConfig
    from consistentee.generation.configuration import EarlyExitCausalLMConfig
    from consistentee.generation.data import InstructionDataset, load_generation_files, load_generation_task
    from consistentee.generation.evaluation import evaluate_generation
    from consistentee.generation.generator import GeneratedText, TextGenerator
    from consistentee.generation.model import EarlyExitForCausalLM
    from consistentee.generation.results import GenerationEvaluation
    from consistentee.generation.saved import SavedGenerator, open_generator
    from consistentee.generation.training import finetune_generation, train_generation
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
    "EarlyExitCausalLMConfig",
    "EarlyExitConfig",
    "EarlyExitForCausalLM",
    "EarlyExitForSequenceClassification",
    "EarlyExitOutput",
    "Engine",
    "Evaluation",
    "ExitRule",
    "FullDepthConfig",
    "FullDepthForSequenceClassification",
    "GeneratedText",
    "GenerationEvaluation",
    "GenerationTrainingConfig",
    "InstructionDataset",
    "MissingExtraError",
    "Prediction",
    "Predictor",
    "SavedGenerator",
    "SavedModel",
    "TextDataset",
    "TextGenerator",
    "TrainingConfig",
    "__version__",
    "evaluate_generation",
    "evaluate_layers",
    "evaluate_model",
    "finetune",
    "finetune_generation",
    "load_files",
    "load_generation_files",
    "load_generation_task",
    "load_recipe",
    "load_task",
    "open_generator",
    "open_model",
    "train",
    "train_generation",
]

_HOMES = {
    "config": ("TrainingConfig", "load_recipe"),
    "configuration": ("EarlyExitConfig", "FullDepthConfig"),
    "curves": ("CurvePoint",),
    "data": ("TextDataset", "load_files", "load_task"),
    "engine": ("Engine", "ExitRule", "Prediction", "Predictor"),
    "errors": ("DataError", "MissingExtraError"),
    "evaluation": ("Evaluation", "evaluate_layers", "evaluate_model"),
    "generation.config": ("GenerationTrainingConfig",),
    "generation.configuration": ("EarlyExitCausalLMConfig",),
    "generation.data": ("InstructionDataset", "load_generation_files", "load_generation_task"),
    "generation.evaluation": ("evaluate_generation",),
    "generation.generator": ("GeneratedText", "TextGenerator"),
    "generation.model": ("EarlyExitForCausalLM",),
    "generation.results": ("GenerationEvaluation",),
    "generation.saved": ("SavedGenerator", "open_generator"),
    "generation.training": ("finetune_generation", "train_generation"),
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
    for _name in ("consistentee.model", "consistentee.generation.model"):  # which register their classes
        importlib.import_module(_name)
