"""What a comparison runs: methods with their settings, and a cell for every backbone, data set, method and seed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consistentee.config import ClassificationTrainingConfig, checked_settings
from consistentee.data.recipes import load_recipe
from consistentee.data.rows import TextDataset
from consistentee.errors import SettingError, require_seed
from consistentee.functional.metrics import check_threshold_metric
from consistentee.functional.tables import CLASSIFICATION
from consistentee.training.idle_settings import idle_among
from consistentee.training.methods import METHODS, check_method, method_of
from consistentee.training.warm_ups import warm_up_settings

REFERENCE = "plain"
"""The method that all others are measured against; always among those compared."""

OUR_METHOD = "consistent"
"""The method that differences are taken to unless another is named."""

DEPTH_SETTING = "num_layers"
"""What a number behind the name of a method without exits sets: `static:6` is the plain model of 6 layers."""

SHARED = (
    "seed",
    "validation_fraction",
    "max_length",
    "parse_special_tokens",
    "max_accuracy_loss",
    "threshold_margin",
    "threshold_metric",
)
"""Settings that a method cannot have of its own: rows, split, and how validation chooses."""


@dataclass(frozen=True)
class ComparedMethod:
    """A method as it is compared.

    Attributes:
        label: `NAME`, or `NAME:VARIANT` for one with settings of its own.
        name: its row of `METHODS`.
        settings: those that differ from the shared ones.
    """

    label: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class ComparedSet:
    """A data set.

    Attributes:
        name: for tables and file names.
        train: rows to train on, of which every method keeps the same share for validation.
        evaluation: rows to report on, and on which nothing is chosen.
        task: the task's name; None for files.
    """

    name: str
    train: TextDataset
    evaluation: TextDataset
    task: str | None = None


@dataclass(frozen=True)
class PlannedCell:
    """One training: its backbone, data, method, seed and all settings that are not defaults."""

    backbone: str
    data: ComparedSet
    method: ComparedMethod
    seed: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its file and of its run's folder: backbone, set, method and seed."""
        label = self.method.label.replace(":", "-")
        return f"{backbone_name(self.backbone)}_{self.data.name}_{label}_{self.seed}"

    def config(self) -> ClassificationTrainingConfig:
        """Its settings as training takes them."""
        return ClassificationTrainingConfig.from_dict({**self.settings, "seed": self.seed})

    @property
    def work(self) -> float:
        """Rows that training goes through, over all epochs: what its time is proportional to."""
        return self._work_of(_epochs(self.config()))

    @property
    def shared(self) -> dict[str, float]:
        """How much of its work is done at each moment that it may share, by what cells that do have in common."""
        config, method = self.config(), METHODS[self.method.name]
        settings = warm_up_settings(config.to_dict()) if method.begins_with else None
        if settings is None:
            return {}
        ends = [config.warmup_epochs] if config.warmup_epochs else []
        ends += [_epochs(config)] if method.one_phase else []
        alike = [self.backbone, self.data.name, self.seed, method.begins_with, _epochs(config), settings]
        return {json.dumps([*alike, end], sort_keys=True): self._work_of(end) for end in ends}

    def _work_of(self, epochs: float) -> float:
        return len(self.data.train) * (1 - self.config().validation_fraction) * epochs


def backbone_name(backbone: str) -> str:
    """The last part of a folder or of a name on the hub; dots before it go, as cells of hidden names are not read."""
    name = Path(backbone).name
    return (Path(backbone).resolve().name if name in ("", "..") else name).lstrip(".")


def compared_methods(
    labels: Sequence[str],
    shared: Mapping[str, Any],
    overrides: Mapping[str, Mapping[str, Any]],
    recipes: Path | None = None,
) -> list[ComparedMethod]:
    """The methods by their labels, the reference first, each with settings that fit the shared ones.

    Settings of `NAME:VARIANT` are those of the recipe `VARIANT/NAME.yaml` or `NAME_VARIANT.yaml`, where there is one,
    then its overrides.

    Args:
        labels: `NAME` or `NAME:VARIANT`.
        shared: settings of all methods, where they are not defaults.
        overrides: settings of single methods, by label.
        recipes: folder of recipes.

    Raises:
        SettingError: no such method, the same one twice, a variant that nothing describes, overrides of a method that
            is not compared or without effect there, or settings that all methods must share.
    """
    if len(set(labels)) < len(labels):
        raise SettingError(f"methods must differ, got {', '.join(labels)}.")
    ordered = [REFERENCE, *(label for label in labels if label != REFERENCE)]
    for label in overrides:
        if label not in ordered:
            raise SettingError(
                f'Settings are given for "{label}", which is not among the methods {", ".join(ordered)}. '
                "Add it to them, or leave its settings out."
            )
    return [_compared_method(label, shared, overrides.get(label), recipes) for label in ordered]


def _compared_method(
    label: str, shared: Mapping[str, Any], own: Mapping[str, Any] | None, recipes: Path | None
) -> ComparedMethod:
    name, _, variant = label.partition(":")
    if not re.fullmatch(r"[\w.+-]+(:[\w.+-]+)?", label):
        raise SettingError(f'methods must be written NAME or NAME:VARIANT, got "{label}".')
    try:
        method_of(name)
        settings = _variant_settings(name, variant, recipes)
        if variant and not settings and own is None:
            raise ValueError(
                f"a variant must be described, and nothing says what this one is. Give settings for it, or a recipe "
                f"{variant}/{name}.yaml{'' if recipes is None else f' in {recipes}'}."
            )
        settings.update(own or {})
        common = ClassificationTrainingConfig.from_dict(dict(shared))
        config = ClassificationTrainingConfig.from_dict({**shared, **settings})
        check_method(name, CLASSIFICATION, config)
        _check_effects(name, own or {}, config)
    except ValueError as error:
        raise SettingError(f"{label}: {error}") from error
    for setting in SHARED:
        if getattr(config, setting) != getattr(common, setting):
            raise SettingError(
                f"{label}: {setting} must be the same for all methods of a comparison "
                f"({getattr(common, setting)}), got {getattr(config, setting)}. Leave it out, or give it for all."
            )
    if not math.isclose(_epochs(config), _epochs(common)):
        raise SettingError(
            f"{label}: warmup_epochs + rounds x consistent_epochs must be the same for all methods of a comparison "
            f"({_epochs(common):g}), got {_epochs(config):g}. One budget for all: change it for all, or split it."
        )
    return ComparedMethod(label, name, settings)


def _check_effects(method: str, own: Mapping[str, Any], config: Any) -> None:
    """Raise ValueError where settings that were given for this method change nothing; a recipe's may."""
    words = {name: name for name in config.to_dict()} | {
        "method": method,
        "consistent": f"the method {OUR_METHOD}",
        "texts": "texts without labels",
    }
    given = [name for name in checked_settings(own, ClassificationTrainingConfig) if name not in SHARED]
    for name, why in idle_among(given, config, method, classifier=True):
        raise ValueError(f"{name} {why.format(**words)}. Leave it out.")


def _variant_settings(name: str, variant: str, recipes: Path | None) -> dict[str, Any]:
    """What a variant's name says by itself, and its recipe."""
    if variant.isdigit() and not has_exits(name):
        return {DEPTH_SETTING: int(variant)}
    if recipes is None or not variant:
        return {}
    if not recipes.is_dir():
        raise ValueError(f"recipes must be a folder that is there, got {recipes}.")
    named = sorted(recipes.rglob(f"{name}_{variant}.yaml"))
    path = next((path for path in (recipes / variant / f"{name}.yaml", *named) if path.is_file()), None)
    if path is None:
        return {}
    recipe = load_recipe(path, ClassificationTrainingConfig)
    if recipe.method not in (None, name):
        raise ValueError(f'recipe {path} must be of the method "{name}", got "{recipe.method}".')
    return dict(recipe.settings)


def _epochs(config: Any) -> float:
    return config.warmup_epochs + config.rounds * config.consistent_epochs


def planned_cells(
    backbones: Sequence[str],
    sets: Sequence[ComparedSet],
    methods: Sequence[ComparedMethod],
    seeds: Sequence[int],
    shared: Mapping[str, Any],
) -> list[PlannedCell]:
    """All cells, seed by seed, so that whatever is finished early is a whole comparison.

    Raises:
        SettingError: two backbones or sets of one name, a seed twice or out of range, none of something, or a set whose
            classes the metric of thresholds does not fit.
    """
    for what, names in (
        ("backbones", [backbone_name(backbone) for backbone in backbones]),
        ("data sets", [data.name for data in sets]),
        ("seeds", [str(seed) for seed in seeds]),
    ):
        if not names:
            raise SettingError(f"{what} must be at least one, got none.")
        if len(set(names)) < len(names):
            raise SettingError(f"{what} must differ by name, got {', '.join(names)}.")
    try:
        for seed in seeds:
            require_seed(seed)
    except ValueError as error:
        raise SettingError(str(error)) from error
    metric = ClassificationTrainingConfig.from_dict(dict(shared)).threshold_metric
    for data in sets:
        _check_metric(metric, data)
    return [
        PlannedCell(backbone, data, method, seed, {**shared, **method.settings})
        for seed in seeds
        for backbone in backbones
        for data in sets
        for method in methods
    ]


def _check_metric(metric: str, data: ComparedSet) -> None:
    try:
        check_threshold_metric(metric, len(data.train.label_names))
    except ValueError as error:
        raise SettingError(f"{data.name}: {error}") from error


def begin_alike(cells: Sequence[PlannedCell]) -> dict[str, list[str]]:
    """For each of the cells, by name, the others that have first steps in common with it."""
    shared = {cell.name: cell.shared.keys() for cell in cells}
    return {
        name: [other for other in shared if other != name and shared[other] & moments]
        for name, moments in shared.items()
    }


def sharing_cells(cells: Sequence[PlannedCell]) -> list[PlannedCell]:
    """Those of the cells whose first steps another of them needs, too."""
    alike = begin_alike(cells)
    return [cell for cell in cells if alike[cell.name]]


def work_left(cells: Sequence[PlannedCell]) -> list[float]:
    """The work of each of the cells in turn: of those that share first steps the first takes them."""
    done: set[str] = set()
    work: list[float] = []
    for cell in cells:
        shared = cell.shared
        work.append(cell.work - max((shared[name] for name in shared.keys() & done), default=0.0))
        done.update(shared)
    return work


def has_exits(method: str) -> bool:
    """Whether a row of `METHODS` gives a model with exits."""
    return METHODS[method].exits
