"""What the golden runs keep of a result, and how they call a package whose names may have changed since."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from golden_models import SETTINGS
from safetensors.torch import load_file
from torch import Tensor

import consistentee

NAMES: dict[str, tuple[str, ...]] = {
    "TrainingConfig": ("ClassificationTrainingConfig", "ClassificationConfig"),
    "GenerationTrainingConfig": ("GenerationConfig",),
    "open_model": ("load_model",),
    "open_generator": ("load_model",),
    "train_generation": ("train",),
    "finetune_generation": ("finetune",),
}
"""Public names: as they were in 0.1.0 -> what else they are called in some revision."""

RENAMED_SETTINGS = {"prices": "layer_cost_mode", "price_warmup": "layer_cost_warmup"}
"""Settings of trainings: as they were in 0.1.0 -> what they are called in a revision that does not know them so."""

LEFT_OUT = {
    "backbone",
    "environment",
    "name",
    "seconds",
    "source",
    "tokens_per_second",
    "transformers_version",
}
"""Keys of records and results, at any depth, that tell of the place and the time."""

SHOWN = 300  # characters of JSON: a longer list is digested
FEW = 8  # a longer list of objects is one value


class UnknownHereError(Exception):
    """A name, a setting or one of its values that this revision does not have."""


def digest(value: Any) -> str:
    """SHA-256 of a tensor's type, shape and bytes, or of a plain value's JSON."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        data = f"{value.dtype} {list(value.shape)} ".encode()
        data += value.reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        data = json.dumps(value, sort_keys=True).encode()
    return f"sha256:{hashlib.sha256(data).hexdigest()[:24]}"


def plain(value: Any) -> Any:
    """A nested value of dicts, lists, numbers and strings, without what is `LEFT_OUT`; tensors as digests."""
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 and value.is_floating_point() else digest(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items() if key not in LEFT_OUT}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """What a plain nested value holds, by path; long lists as digests."""
    if isinstance(value, list) and len(value) <= FEW and any(isinstance(part, dict) for part in value):
        value = {str(index): part for index, part in enumerate(value)}
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for key, part in value.items():
            flat |= flatten(part, f"{name}/{key}" if name else key)
        return flat
    is_long = isinstance(value, list) and len(json.dumps(value)) > SHOWN
    return {name: digest(value) if is_long else value}


def public(name: str) -> Any:
    """A public name of the package, by what it is called in this revision."""
    for known in (name, *NAMES.get(name, ())):
        if known in consistentee.__all__:
            return getattr(consistentee, known)
    raise UnknownHereError(f"consistentee has no {name}.")


def training_config(name: str, variant: str | None = None, **changes: Any) -> Any:
    """A training config; raises `UnknownHereError` where this revision does not know a setting or its value.

    Args:
        name: public name of its class.
        variant: of the settings; None takes those that all have.
        **changes: further settings.
    """
    config_class = public(name)
    known = {field.name for field in dataclasses.fields(config_class)}
    values = {
        key if key in known else RENAMED_SETTINGS.get(key, key): value
        for key, value in settings_of(name, variant, **changes).items()
    }
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise UnknownHereError(str(error)) from error


def settings_of(name: str, variant: str | None = None, **changes: Any) -> dict[str, Any]:
    """The settings of a training config, as `training_config` takes them."""
    settings = SETTINGS["generator" if name == "GenerationTrainingConfig" else "classifier"]
    return {**settings["base"], **({} if variant is None else settings["variants"][variant]), **changes}


def saved_folder(folder: Path) -> dict[str, Any]:
    """Weights, record and configuration of a trained model."""
    config = read_json(folder / "config.json")
    return {
        "weights": load_file(folder / "model.safetensors"),
        "record": read_json(folder / "training_record.json"),
        "saved_config": {key: value for key, value in config.items() if not key.endswith("coder_config")},
    }


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def unsettle(model: Any) -> None:
    """Shift what stands on a backbone by random values: exits begin with zeros and ones, which hide mistakes."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not name.startswith("backbone."):
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
