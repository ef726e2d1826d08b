"""Early exiting for transformers that you can train, trust, tune and serve.

An input, or a token that is generated, exits the model at the first layer that is good enough. Importing this package
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
    from consistentee.config import ClassificationTrainingConfig, GenerationTrainingConfig, RetrofitConfig
    from consistentee.data.classification import load_files, load_task
    from consistentee.data.generation import load_generation_files, load_generation_task
    from consistentee.data.recipes import load_recipe
    from consistentee.data.rows import InstructionDataset, TextDataset
    from consistentee.errors import DataError, MissingExtraError
    from consistentee.evaluation.agreement import evaluate_agreement
    from consistentee.evaluation.calibration import calibrate_model
    from consistentee.evaluation.classification import evaluate_layers, evaluate_model
    from consistentee.evaluation.generation import evaluate_generation
    from consistentee.evaluation.results import Evaluation, GenerationEvaluation
    from consistentee.functional.curves import CurvePoint
    from consistentee.models.causal_lm import EarlyExitForCausalLM
    from consistentee.models.configuration import EarlyExitCausalLMConfig, EarlyExitConfig, FullDepthConfig
    from consistentee.models.loaded import LoadedClassifier, LoadedGenerator, load_model
    from consistentee.models.sequence_classification import (
        EarlyExitForSequenceClassification,
        EarlyExitOutput,
        FullDepthForSequenceClassification,
    )
    from consistentee.pipelines.classifier import Engine, ExitRule, Prediction, Predictor
    from consistentee.pipelines.generator import GeneratedText, TextGenerator
    from consistentee.pipelines.ray_data import RayPredictor
    from consistentee.training.train import finetune, retrofit, train

__version__ = "0.1.0"

__all__ = [
    "ClassificationTrainingConfig",
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
    "LoadedClassifier",
    "LoadedGenerator",
    "MissingExtraError",
    "Prediction",
    "Predictor",
    "RayPredictor",
    "RetrofitConfig",
    "TextDataset",
    "TextGenerator",
    "__version__",
    "calibrate_model",
    "evaluate_agreement",
    "evaluate_generation",
    "evaluate_layers",
    "evaluate_model",
    "finetune",
    "load_files",
    "load_generation_files",
    "load_generation_task",
    "load_model",
    "load_recipe",
    "load_task",
    "retrofit",
    "train",
]

_HOMES = {
    "config": ("ClassificationTrainingConfig", "GenerationTrainingConfig", "RetrofitConfig"),
    "data.recipes": ("load_recipe",),
    "models.configuration": ("EarlyExitCausalLMConfig", "EarlyExitConfig", "FullDepthConfig"),
    "functional.curves": ("CurvePoint",),
    "data.classification": ("load_files", "load_task"),
    "pipelines.classifier": ("Engine", "ExitRule", "Prediction", "Predictor"),
    "pipelines.ray_data": ("RayPredictor",),
    "errors": ("DataError", "MissingExtraError"),
    "evaluation.classification": ("evaluate_layers", "evaluate_model"),
    "data.generation": ("load_generation_files", "load_generation_task"),
    "data.rows": ("InstructionDataset", "TextDataset"),
    "evaluation.generation": ("evaluate_generation",),
    "pipelines.generator": ("GeneratedText", "TextGenerator"),
    "models.causal_lm": ("EarlyExitForCausalLM",),
    "evaluation.results": ("Evaluation", "GenerationEvaluation"),
    "models.sequence_classification": (
        "EarlyExitForSequenceClassification",
        "EarlyExitOutput",
        "FullDepthForSequenceClassification",
    ),
    "models.loaded": ("LoadedClassifier", "LoadedGenerator", "load_model"),
    "training.train": ("finetune", "retrofit", "train"),
    "evaluation.agreement": ("evaluate_agreement",),
    "evaluation.calibration": ("calibrate_model",),
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


def _is_command_line() -> bool:
    """Whether it is imported by the console script or by `python -m consistentee`, as these look at that time."""
    program = os.path.basename(sys.argv[0] if sys.argv else "")
    if program == "-m" and "-m" in sys.orig_argv:
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == [__name__]
    return program in ("consistentee", "consistentee.exe")


if not _is_command_line():
    for _name in (
        "consistentee.models.sequence_classification",
        "consistentee.models.causal_lm",
    ):  # which register their classes
        importlib.import_module(_name)
