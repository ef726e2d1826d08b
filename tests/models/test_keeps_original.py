"""Exits saved without their model: small, the same when they are put onto it, refused where it has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from consistentee.backbones.loading import backbone_fingerprint
from consistentee.cli.main import main
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
    opened.half().save_pretrained(tmp_path / "half")  # in another precision they are the original's, too
    assert load_file(tmp_path / "half" / "model.safetensors").keys() == saved.keys()


def test_exits_alone_in_shards_come_back(folders: tuple[Path, Path, Any], tmp_path: Path) -> None:
    """`max_shard_size` splits large exits as it does all weights."""
    _, exits, model = folders
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len([*(tmp_path / "shards").glob("model-*-of-*.safetensors")]) > 1
    found = EarlyExitForSequenceClassification.from_pretrained(tmp_path / "shards").state_dict()
    for name, weight in load_file(exits / "model.safetensors").items():
        assert torch.equal(found[name], weight), name
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        EarlyExitForSequenceClassification.from_pretrained(tmp_path / "shards")


@pytest.mark.parametrize("size", ["1GB", "10KB"])
def test_exits_alone_of_a_variant_come_back(
    folders: tuple[Path, Path, Any], tmp_path: Path, size: str
) -> None:
    _, exits, model = folders
    model.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size=size)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "variant", variant="fp16")
    found = opened.state_dict()
    for name, weight in load_file(exits / "model.safetensors").items():
        assert torch.equal(found[name], weight), name


def trained(model: Any, batch: Any) -> Any:
    """The model after two steps of all its weights, in evaluation mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=torch.arange(len(TEXTS)) % 2).loss.backward()
        optimizer.step()
    return model.eval()


def test_what_was_trained_below_the_exits_is_saved_with_them(
    folders: tuple[Path, Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, exits, _ = folders
    batch = AutoTokenizer.from_pretrained(original)(TEXTS, padding=True, return_tensors="pt")
    model = trained(EarlyExitForSequenceClassification.from_pretrained(exits), batch)
    generator = torch.get_rng_state()
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(torch.get_rng_state(), generator)
    assert "all weights are saved" in caplog.text
    assert "no longer those of" in caplog.text
    again = EarlyExitForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert not again.config.exits_only
    assert again.config.is_tuned
    for threshold in (0.4, 1.0):
        with torch.no_grad():
            assert torch.equal(
                again(**batch, threshold=threshold).logits, model(**batch, threshold=threshold).logits
            )


def test_without_the_original_everything_is_saved(
    folders: tuple[Path, Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, exits, _ = folders
    moved = original.rename(tmp_path / "moved")
    model = EarlyExitForSequenceClassification.from_pretrained(exits, original=moved)
    model.save_pretrained(tmp_path / "found")  # it is known where it lies now
    assert EarlyExitConfig.from_pretrained(tmp_path / "found").exits_only
    shutil.rmtree(moved)
    model.save_pretrained(tmp_path / "alone")
    assert "cannot be compared with" in caplog.text
    opened = EarlyExitForSequenceClassification.from_pretrained(tmp_path / "alone")
    assert all(weight.equal(model.state_dict()[name]) for name, weight in opened.state_dict().items())


def test_exits_alone_take_the_options_of_whole_folders(
    folders: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    _, exits, model = folders
    whole = shutil.copytree(exits, tmp_path / "whole")
    model.config.exits_only = False
    model.save_pretrained(whole)
    options: dict[str, Any] = {
        "threshold": 0.875, "criterion": "confidence", "torch_dtype": torch.bfloat16,
        "attn_implementation": "eager", "device_map": "cpu",
    }  # fmt: skip
    for folder in (exits, whole):
        opened = EarlyExitForSequenceClassification.from_pretrained(folder, **options)
        assert (opened.config.threshold, opened.config.criterion) == (0.875, "confidence")
        assert {weight.dtype for weight in opened.parameters()} == {torch.bfloat16}
        assert opened.backbone.config._attn_implementation == "eager"


def test_the_originals_head_stays_frozen(folders: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, exits, model = folders
    model.config.exits_only = False
    model.save_pretrained(tmp_path / "whole")
    for folder in (exits, tmp_path / "whole"):
        for opened in (
            AutoModelForSequenceClassification.from_pretrained(folder),
            EarlyExitForSequenceClassification.from_pretrained(folder, output_loading_info=True)[0],
        ):
            head = opened.classifiers.layers[-1]
            assert not any(weight.requires_grad for weight in head.parameters())
            assert all(weight.requires_grad for weight in opened.backbone.parameters())


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


def test_an_original_that_has_moved_is_named_with_the_remedy(
    folders: tuple[Path, Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, exits, _ = folders
    elsewhere = original.rename(tmp_path / "elsewhere")
    assert main(["predict", str(exits), "a text", "--output", str(tmp_path / "o.jsonl")]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert f'holds the exits alone, and the model that they are for, "{original}", cannot be opened' in said
    assert "Put it there, or write its place into original.name of config.json" in said
    with pytest.raises(OSError, match="holds the exits alone"):
        EarlyExitForSequenceClassification.from_pretrained(exits)
    EarlyExitForSequenceClassification.from_pretrained(exits, original=elsewhere)
    config = json.loads((exits / "config.json").read_text(encoding="utf-8"))
    config["original"]["name"] = str(elsewhere)  # the remedy
    (exits / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert len(Engine.from_pretrained(exits).predict(TEXTS)) == len(TEXTS)


@torch.no_grad()
def test_every_way_to_open_them_takes_the_place_of_the_original(
    folders: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    original, exits, model = folders
    moved = original.rename(tmp_path / "moved")
    batch = AutoTokenizer.from_pretrained(moved)(TEXTS, padding=True, return_tensors="pt")
    expected = model(**batch, all_layers=True).layer_logits
    for opened in (
        AutoModelForSequenceClassification.from_pretrained(exits, original=moved),
        AutoModelForSequenceClassification.from_pretrained(exits, original=str(moved)),
        load_model(exits, original=moved).model,
        Engine.from_pretrained(exits, original=str(moved)).saved.model,
    ):
        assert torch.equal(opened(**batch, all_layers=True).layer_logits, expected)
        assert opened.config.original["name"] == str(original)
    options = {"original": str(moved)}
    classify: Any = pipeline("text-classification", model=str(exits), model_kwargs=options)
    engine = Engine.from_pretrained(exits, original=moved)
    assert [answer["label"] for answer in classify(TEXTS)] == [one.label for one in engine.predict(TEXTS)]
    with pytest.raises(ValueError, match=r'original goes with exits that were saved alone, .* got ".*moved"'):
        load_model(moved, original=moved)


def test_they_know_where_they_came_from(folders: tuple[Path, Path, Any]) -> None:
    _, exits, _ = folders
    for model_class in (EarlyExitForSequenceClassification, AutoModelForSequenceClassification):
        opened = model_class.from_pretrained(exits)
        assert opened.name_or_path == opened.config.name_or_path == str(exits)


def test_the_originals_head_decides_the_classes(folders: tuple[Path, Path, Any]) -> None:
    original, exits, _ = folders
    for model_class in (EarlyExitForSequenceClassification, AutoModelForSequenceClassification):
        message = f"num_labels must be 2 for exits on .*{original.name}., got 3: the original's head decides"
        with pytest.raises(ValueError, match=message):
            model_class.from_pretrained(exits, num_labels=3, ignore_mismatched_sizes=True)
