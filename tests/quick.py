"""Trainings of a second or less, and what they leave: settings, saved weights, saved records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from consistentee.config import ClassificationTrainingConfig, RetrofitConfig

QUICK: dict[str, Any] = {
    "batch_size": 16,
    "head_dropout": 0.0,  # and tiny backbones have none: losses do not depend on how a batch is cut
    "learning_rate": 1e-3,
    "warmup_epochs": 1.0,
    "rounds": 1,
    "consistent_epochs": 1.0,
    "validation_fraction": 0.5,
    "layer_costs": (0.02,),
    "reward_loss": "cross_entropy",  # unlike `error` it feels every change of the weights
    "policy_input": "state+log_odds",
    "policy_epochs": 2,
    "policy_min_steps": 1,
    "policy_folds": 2,
    "policy_batch_size": 16,
    "mixed_precision": "no",
}


def quick_config(**changes: Any) -> ClassificationTrainingConfig:
    """Settings for a run of a few steps, in full precision, without dropout but in the policy."""
    return ClassificationTrainingConfig(**{**QUICK, **changes})


def quick_retrofit(**changes: Any) -> RetrofitConfig:
    """The same for `retrofit`, whose backbone is run once for some rows at a time."""
    values = {
        "passes": 2,
        "exit_min_steps": 1,
        "policy_epochs": 2,
        "policy_min_steps": 1,
        "policy_folds": 2,
        "classifier_hidden_size": 8,
        "num_queries": 2,
        "head_learning_rate": 5e-3,
        "head_dropout": 0.0,
        "mixed_precision": "no",
        "max_cache_mb": 0.05,
        "max_disk_mb": 0.0,
        **changes,
    }
    return RetrofitConfig(**values)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The saved weights by name."""
    return load_file(folder / "model.safetensors")


def weight_bytes(folder: Path) -> bytes:
    """The saved weights as the file holds them."""
    return (folder / "model.safetensors").read_bytes()


def read_record(folder: Path) -> dict[str, Any]:
    """The training record without the parts that say how it was made: settings, versions and hardware."""
    record = json.loads((folder / "training_record.json").read_text(encoding="utf-8"))
    return {name: value for name, value in record.items() if name not in ("config", "environment")}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two sets of weights.

    The biases of attention keys are left out: they add the same to all of a query's scores, softmax does not see them,
    and what AdamW makes of their gradients (rounding errors around zero) is noise. So is what it makes of sums in
    another order, some 1e-5 by the processor; a step that is missing changes weights by about the learning rate.
    """
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one if not name.endswith("key.bias"))


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Make the n-th call of a function raise KeyboardInterrupt, as Ctrl-C does."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
