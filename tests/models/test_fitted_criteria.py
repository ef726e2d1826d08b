"""Criteria that need something fitted: saved with the model, and refused in one line where it is not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee.backbones.loading import backbone_fingerprint
from consistentee.evaluation.calibration import calibrate_model
from consistentee.evaluation.classification import evaluate_model
from consistentee.functional.criteria import CRITERIA, EXIT_CRITERIA
from consistentee.heads.exit_signals import LearntToExit
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine
from tiny import fit_at_random, save, tiny_backbone, tiny_classifier, tiny_dataset, tiny_model

FITTED = {name: EXIT_CRITERIA[name].fitted for name in CRITERIA if EXIT_CRITERIA[name].fitted}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without anything fitted, as all that were saved before there was any."""
    root = tmp_path_factory.mktemp("unfitted")
    return tiny_model(root / "model", tiny_backbone(root / "backbone"))


def weights_of(network: LearntToExit | None) -> list[Any]:
    assert network is not None
    return [value.tolist() for value in network.state_dict().values()]


def test_what_is_fitted_comes_back(folder: Path, tmp_path: Path) -> None:
    saved = load_model(folder, LoadedClassifier)
    model = saved.early_exit_model
    assert not any(name.startswith("learnt_to_exit") for name in model.state_dict())
    fit_at_random(model)
    save(model, saved.tokenizer, tmp_path)
    again = load_model(tmp_path, LoadedClassifier).early_exit_model
    assert again.config.temperatures == model.config.temperatures
    assert again.config.layer_weights == model.config.layer_weights
    assert weights_of(again.learnt_to_exit) == weights_of(model.learnt_to_exit)
    model.set_fitted(temperatures=None, layer_weights=None, learnt_to_exit=None)
    assert not any(name.startswith("learnt_to_exit") for name in model.state_dict())
    assert not model.config.learnt_to_exit


def test_exits_without_their_model_bring_it_along(tmp_path: Path) -> None:
    original = tiny_classifier(tmp_path / "original", "bert")
    model = EarlyExitForSequenceClassification.from_classifier(
        original,
        exits_only=True,
        original={"name": str(original), "fingerprint": backbone_fingerprint(original)},
    )
    fit_at_random(model)
    model.save_pretrained(tmp_path / "exits")
    again: Any = EarlyExitForSequenceClassification.from_pretrained(tmp_path / "exits", original=original)
    assert weights_of(again.learnt_to_exit) == weights_of(model.learnt_to_exit)
    assert again.config.temperatures == model.config.temperatures


@pytest.mark.parametrize("criterion", FITTED)
def test_a_model_without_it_says_what_to_do(folder: Path, criterion: str) -> None:
    saved = load_model(folder, LoadedClassifier)
    message = (
        f'criterion "{criterion}" needs {FITTED[criterion]}, which training fits and this model was saved without. '
        "Train it again, or take another criterion."
    )
    rows = tiny_dataset(12)
    calls: list[Any] = [
        lambda: saved.exit_rule(criterion, 0.5),
        lambda: saved.early_exit_model(input_ids=torch.tensor([[5, 6]]), criterion=criterion, threshold=0.5),
        lambda: Engine(saved).predict(["good"], criterion=criterion, threshold=0.5),
        lambda: evaluate_model(saved, rows, criteria=[criterion], threshold=0.5),
        lambda: evaluate_model(saved, rows, criteria=["policy", criterion]),
        lambda: calibrate_model(saved, rows, goal="max_disagreement", target=0.5, criterion=criterion),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()
    assert saved.known_threshold(criterion) is None


def test_all_others_run_on_it(folder: Path) -> None:
    saved = load_model(folder, LoadedClassifier)
    criteria = [name for name in CRITERIA if name not in FITTED]
    evaluation = evaluate_model(saved, tiny_dataset(12), criteria=criteria)
    assert {evaluation.criterion, *evaluation.other_criteria} == set(criteria)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperatures": [1.0, 2.0]}, "temperatures must be 3 numbers above 0, one a layer, got"),
        ({"temperatures": [1.0, 0.0, 2.0]}, "temperatures must be 3 numbers above 0"),
        ({"layer_weights": [1.0, -0.1, 2.0]}, "layer_weights must be 3 numbers at least 0"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    backbone = tiny_backbone(tmp_path)
    with pytest.raises(ValueError, match=message):
        EarlyExitForSequenceClassification.from_backbone(backbone, num_labels=2, **values)
