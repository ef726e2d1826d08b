"""Opening saved models of both kinds: what a folder holds, what it is taken for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import consistentee
from consistentee.data.templates import ALPACA
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.models.loaded import LoadedClassifier, LoadedGenerator, load_model, model_kind, short_name
from consistentee.models.record import RECORD_FILE
from consistentee.pipelines.classifier import Engine
from saved_generators import TEMPLATE, generator_folder, plain_folder
from tiny import tiny_backbone, tiny_full_depth_model, tiny_model

KINDS: dict[str, Any] = {
    "classifier": LoadedClassifier,
    "plain classifier": LoadedClassifier,
    "generator": LoadedGenerator,
    "plain generator": LoadedGenerator,
}
EVERY_FOLDER = pytest.mark.parametrize("name", list(KINDS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    backbone = tiny_backbone(root / "backbone", layers=2)
    return {
        "backbone": backbone,
        "classifier": tiny_model(root / "classifier", backbone),
        "plain classifier": tiny_full_depth_model(root / "plain-classifier", backbone),
        "generator": generator_folder(root / "generator"),
        "plain generator": plain_folder(root / "plain-generator"),
    }


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def change(path: Path, **values: Any) -> None:
    """Other values of a JSON file; None takes one out."""
    known = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({k: v for k, v in known.items() if v is not None}), encoding="utf-8")


@EVERY_FOLDER
def test_a_folder_is_opened_as_what_it_is(folders: dict[str, Path], name: str) -> None:
    assert model_kind(folders[name]) is KINDS[name]
    for wanted in (None, KINDS[name]):
        opened = load_model(str(folders[name]), wanted, device="cpu")
        assert type(opened) is KINDS[name]
        assert not opened.model.training
        assert opened.model.dtype == torch.float32
        assert opened.has_exits == (not name.startswith("plain"))
    assert load_model(folders[name], dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


@EVERY_FOLDER
def test_another_kind_than_what_is_wanted(folders: dict[str, Path], name: str) -> None:
    other, message = {
        LoadedClassifier: (
            LoadedGenerator,
            r"is a text classifier, not a text generator\. Use it with `consistentee predict` or `Engine`\.",
        ),
        LoadedGenerator: (
            LoadedClassifier,
            r"is a text generator, not a text classifier\. Use it with `consistentee generate` or `TextGenerator`\.",
        ),
    }[KINDS[name]]
    with pytest.raises(ValueError, match=message):
        load_model(folders[name], other)


def test_what_is_neither(folders: dict[str, Path], tmp_path: Path) -> None:
    assert model_kind(folders["backbone"]) is None
    with pytest.raises(ValueError, match="must be a text classifier or a text generator, and is neither"):
        load_model(folders["backbone"])
    with pytest.raises(ValueError, match="Give the folder of a trained classifier, not of an encoder alone"):
        load_model(folders["backbone"], LoadedClassifier)
    broken = copy_of(folders["generator"], tmp_path)
    change(broken / "config.json", policy_hidden_size=7)
    with pytest.raises(
        ValueError, match=r"does not fit its config\.json: .* weights have another shape, .* Take both"
    ):
        load_model(broken)


@pytest.mark.parametrize("load", [load_model, model_kind, Engine.from_pretrained])
def test_folders_that_are_none(load: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'Model folder ".*nowhere" does not exist\. Check the path'):
        load(tmp_path / "nowhere")
    with pytest.raises(
        OSError, match=r'Model "no-such-model" could not be loaded \(there is no such folder, so the hub'
    ):
        load("no-such-model")
    with pytest.raises(FileNotFoundError, match=r'Model folder ".*" has no config\.json'):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled weights only"):
        load(tmp_path)


@EVERY_FOLDER
def test_broken_records(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = copy_of(folders[name], tmp_path)
    (folder / RECORD_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_model(folder)


def test_devices_and_precisions_that_are_not_there(folders: dict[str, Path]) -> None:
    for name in ("classifier", "generator"):
        with pytest.raises(ValueError, match='dtype must be one of float32, bfloat16, float16, got "int8"'):
            load_model(folders[name], dtype="int8")
        with pytest.raises(ValueError, match=r'device must be one that is there: .*, got "quantum"'):
            load_model(folders[name], device="quantum")


@pytest.mark.parametrize("name, other", [("classifier", "entropy"), ("generator", "static")])
def test_thresholds_come_from_the_config_or_the_record(
    folders: dict[str, Path], tmp_path: Path, name: str, other: str
) -> None:
    folder = copy_of(folders[name], tmp_path)
    with pytest.raises(ValueError, match=f'has no threshold for criterion "{other}"'):
        load_model(folder).exit_rule(other)
    (folder / RECORD_FILE).write_text(json.dumps({"thresholds": {other: 1, "policy": 0.9}}), encoding="utf-8")
    change(folder / "config.json", threshold=0.25)
    opened = load_model(folder)
    assert opened.exit_rule() == ("policy", 0.25)
    assert opened.exit_rule(other) == (other, 1.0)
    assert opened.exit_rule("policy", 0.5) == ("policy", 0.5)
    with pytest.raises(ValueError, match=r"criterion must be one of policy, .*, got"):
        opened.exit_rule("")


def test_thresholds_in_the_config_of_a_generator(tmp_path: Path) -> None:
    opened = load_model(generator_folder(tmp_path, thresholds={"softmax_margin": 0.25}))
    assert opened.exit_rule("softmax_margin") == ("softmax_margin", 0.25)


@pytest.mark.parametrize(
    "name, message",
    [
        ("plain classifier", r"has no exits \(it is a FullDepthForSequenceClassification\)"),
        ("plain generator", r"has no exits \(it is a LlamaForCausalLM\)"),
    ],
)
def test_plain_models_have_no_exits(folders: dict[str, Path], name: str, message: str) -> None:
    opened = load_model(folders[name])
    for ask in (lambda: opened.early_exit_model, opened.exit_rule):
        with pytest.raises(ValueError, match=message):
            ask()


class TestGenerators:
    def test_what_the_model_knows(self, folders: dict[str, Path]) -> None:
        opened = load_model(folders["generator"], LoadedGenerator)
        assert opened.tokenizer.padding_side == "left"
        assert opened.prompt_template() == TEMPLATE
        assert opened.prompt_template("alpaca") == ALPACA
        assert opened.exit_rule("static", 3) == ("static", 3.0)
        assert (opened.max_length, opened.context_length, opened.max_new_tokens) == (64, 256, 256)

    def test_a_padding_token_is_found(self, folders: dict[str, Path], tmp_path: Path) -> None:
        folder = copy_of(folders["plain generator"], tmp_path)
        change(folder / "tokenizer_config.json", pad_token=None)
        assert load_model(folder).tokenizer.pad_token == "</s>"
        change(folder / "tokenizer_config.json", eos_token=None)
        with pytest.raises(
            ValueError, match=r"has neither a padding nor an end-of-text token\. Set eos_token"
        ):
            load_model(folder)

    def test_the_auto_class_opens_one(self, folders: dict[str, Path]) -> None:
        assert consistentee.EarlyExitForCausalLM is EarlyExitForCausalLM
        opened = AutoModelForCausalLM.from_pretrained(folders["generator"])
        assert isinstance(opened, EarlyExitForCausalLM)


def test_the_short_name_is_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "sst2.v1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for name in (".", "./", "../sst2.v1/", str(folder), "org/sst2.v1", "sst2.v1"):
        assert short_name(name) == "sst2.v1"
    monkeypatch.chdir(folder.parent)
    assert short_name("sst2.v1/..") == "runs"
