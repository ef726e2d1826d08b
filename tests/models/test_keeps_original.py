"""Exits saved without their model: small, the same when they are put onto it, refused where it has changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from consistentee.backbones.loading import backbone_fingerprint
from consistentee.models.configuration import EarlyExitConfig
from consistentee.models.loaded import load_model
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine
from tiny import tiny_classifier, tiny_dataset

TEXTS = [row[0] for row in tiny_dataset(12).texts]


@pytest.fixture(params=["bert", "modernbert"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Any]:
    """The original, its exits alone, and the model they come from."""
    original = tiny_classifier(tmp_path / "original", request.param)
    model = EarlyExitForSequenceClassification.from_classifier(
        original,
        classifier_hidden_size=8,
        exits_only=True,
        original={"name": str(original), "fingerprint": backbone_fingerprint(original)},
    ).eval()
    torch.nn.init.normal_(model.policy.state_output)
    model.save_pretrained(tmp_path / "exits")
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "exits")
    return original, tmp_path / "exits", model


@torch.no_grad()
def test_exits_alone_are_small_and_come_back(folders: tuple[Path, Path, Any], tmp_path: Path) -> None:
    original, exits, model = folders
    saved = load_file(exits / "model.safetensors")
    assert not [name for name in saved if name.startswith("backbone.") or "layers.3." in name]
    batch = AutoTokenizer.from_pretrained(original)(TEXTS, padding=True, return_tensors="pt")
    expected = model(**batch, all_layers=True)
    for opened in (
        AutoModelForSequenceClassification.from_pretrained(exits),
        load_model(exits).model,
        EarlyExitForSequenceClassification.from_pretrained(exits),
    ):
        assert not opened.training
        found = opened(**batch, all_layers=True)
        assert torch.equal(found.layer_logits, expected.layer_logits)
        assert torch.equal(found.exit_probs, expected.exit_probs)
    answers = Engine.from_pretrained(exits).predict(TEXTS, criterion="confidence", threshold=0.6)
    assert len(answers) == len(TEXTS)
    opened.save_pretrained(tmp_path / "again")  # exits alone once more
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == saved.keys()


def test_an_original_that_has_changed_is_refused(folders: tuple[Path, Path, Any], tmp_path: Path) -> None:
    original, exits, _ = folders
    moved = shutil.copytree(original, tmp_path / "moved")
    weights = load_file(original / "model.safetensors")
    name = min(weights)
    save_file({**weights, name: weights[name] + 1}, original / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"which is not what it was \(content \w{8}, now \w{8}\)"):
        load_model(exits)
    opened: Any = EarlyExitForSequenceClassification.from_pretrained(exits, original=moved)
    assert opened.num_layers == 4
    shutil.rmtree(original)
    with pytest.raises((OSError, ValueError), match="does not exist"):
        load_model(exits)


def test_exits_that_are_not_complete_are_refused(folders: tuple[Path, Path, Any]) -> None:
    _, exits, _ = folders
    weights = load_file(exits / "model.safetensors")
    del weights["policy.exit_bias"]
    save_file(weights, exits / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r'lacks 1 of its exits\' weights, such as "policy.exit_bias"'):
        load_model(exits)


def test_exits_without_an_original_make_no_sense() -> None:
    with pytest.raises(ValueError, match="exits_only must be False for a model without an original"):
        EarlyExitConfig(exits_only=True)
