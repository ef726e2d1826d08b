"""Loading backbones of both kinds: what a folder or a name is taken for, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)
from transformers.utils import logging as transformers_logging

from consistentee.backbones.decoders import SUPPORTED_DECODER_TYPES, build_decoder, load_decoder
from consistentee.backbones.encoders import (
    SUPPORTED_MODEL_TYPES,
    architecture_of,
    build_backbone,
    load_backbone,
)
from consistentee.backbones.loading import load_pretrained, load_tokenizer, model_source
from tiny import tiny_backbone, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}


@dataclass(frozen=True)
class Kind:
    """Backbones of one kind.

    Args:
        model_type: of the tiny one.
        build, load: the kind's own functions.
        what: what messages call its types.
        foreign: a model type of the other kind.
        supported: all model types.
        layer: where the third layer's weights lie.
    """

    model_type: str
    build: Callable[[Any], Any]
    load: Callable[..., Any]
    what: str
    foreign: str
    supported: tuple[str, ...]
    layer: str

    def config(self, **values: Any) -> Any:
        return AutoConfig.for_model(self.model_type, **{**SIZES, **values})


KINDS = {
    "encoder": Kind(
        "bert", build_backbone, load_backbone, "Backbone", "gpt2", SUPPORTED_MODEL_TYPES, "encoder.layer.2"
    ),
    "decoder": Kind(
        "llama",
        build_decoder,
        load_decoder,
        "Causal language model",
        "bert",
        SUPPORTED_DECODER_TYPES,
        "model.layers.2",
    ),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def test_heads_are_dropped_quietly_and_options_handed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = KINDS["encoder"].config()
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "inner")
    capsys.readouterr()
    loaded = load_backbone(tmp_path, subfolder="inner", attn_implementation="eager", hidden_dropout_prob=0.25)
    assert "classifier" not in "".join(capsys.readouterr())
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.hidden_dropout_prob == 0.25


def test_half_precision_checkpoints_load_in_float32_unless_asked(kind: Kind, tmp_path: Path) -> None:
    kind.build(kind.config()).to(torch.float16).save_pretrained(tmp_path)
    assert kind.load(tmp_path).dtype == torch.float32
    assert kind.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_missing_folders(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'Backbone folder ".*/nowhere" does not exist'):
        kind.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r'Backbone folder "./models/none" does not exist'):
        kind.load("./models/none")
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        kind.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"must be a folder, got a file"):
        kind.load(tmp_path / "file")


def test_weights_that_may_not_be_read(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind.build(kind.config()).save_pretrained(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK or "safetensors" not in str(path))
    with pytest.raises(
        PermissionError, match=r"model.safetensors\" must be readable for this user\. .* chmod a\+r"
    ):
        kind.load(tmp_path)


def test_a_name_that_the_hub_does_not_give(kind: Kind, tmp_path: Path) -> None:
    message = (
        r'Backbone "no-one/nothing" could not be loaded \(there is no such folder, so the hub was asked\): '
    )
    with pytest.raises(OSError, match=message) as error:
        kind.load("no-one/nothing", local_files_only=True, cache_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def test_unsupported_types(kind: Kind, tmp_path: Path) -> None:
    kind.build(kind.config()).save_pretrained(tmp_path)
    for model_type in (kind.foreign, "never-heard-of"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        message = f'{kind.what} type "{model_type}" is not supported. .*{kind.supported[-1]}'
        with pytest.raises(ValueError, match=message):
            kind.load(tmp_path)


def test_configs_that_make_another_kind_of_it(kind: Kind, tmp_path: Path) -> None:
    name = {"bert": "is_decoder", "llama": "add_cross_attention"}[kind.model_type]
    kind.build(kind.config()).save_pretrained(tmp_path)
    kind.config(**{name: True}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=name):
        kind.load(tmp_path)


def test_pickles(kind: Kind, tmp_path: Path) -> None:
    backbone = kind.build(kind.config())
    backbone.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors\. Copy the weights there"):
        kind.load(tmp_path)
    torch.save(backbone.state_dict(), tmp_path / "pytorch_model.bin")
    message = r"has pickled weights only \(pytorch_model.bin\).* must be safetensors"
    with pytest.raises(ValueError, match=message):
        kind.load(tmp_path)


def test_what_is_advised_for_pickles_keeps_the_head(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(**SIZES))
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert it once") as refused:
        load_pretrained(AutoModelForSequenceClassification, tmp_path)
    exec(str(refused.value)[str(refused.value).index("from transformers import") :])
    loaded = load_pretrained(AutoModelForSequenceClassification, tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("config", ['{"architectures": []}', '{"architectures": ["a b"]}', "[]", "{"])
def test_pickles_that_do_not_say_whose_they_are(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="from transformers import ITS_CLASS as M;"):
        load_pretrained(AutoModelForSequenceClassification, tmp_path)


def test_incomplete_and_broken_weights(kind: Kind, tmp_path: Path) -> None:
    kind.build(kind.config()).save_pretrained(tmp_path)
    kind.config(num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf'lacks \d+ of the weights .* such as "{kind.layer}'):
        kind.load(tmp_path)
    kind.config(vocab_size=90).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'weights have another shape, such as ".*\.weight"'):
        kind.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(OSError, match=r"could not be loaded: .*header"):
        kind.load(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "user/name"])
def test_what_may_be_a_name_on_the_hub_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_source(name) == name
    (tmp_path / name).mkdir(parents=True)  # a folder wins
    with pytest.raises(FileNotFoundError, match=rf'Backbone folder "{name}" has no config\.json'):
        model_source(name)


@pytest.mark.parametrize(
    "name", ["rte-exits/", "a/b/c", "./gpt2", "~/gpt2", "runs\\rte", "a--b", Path("gpt2")]
)
def test_what_can_be_no_name_on_the_hub(
    name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = f'Model folder "{name}" does not exist. Check the path; a hub name reads'
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        model_source(name, "Model")


def test_threads_leave_the_settings_of_transformers_as_they_were(tmp_path: Path) -> None:
    """One that begins while another loads must not take the other's silence for what was set."""
    kind = KINDS["encoder"]
    kind.build(kind.config()).save_pretrained(tmp_path)
    inside, done = Event(), Event()

    def slow_row(model_type: Any) -> Any:
        inside.set()
        assert done.wait(60)
        return architecture_of(model_type)

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    try:
        first = Thread(target=load_pretrained, args=(AutoModel, tmp_path), kwargs={"row_of": slow_row})
        first.start()
        assert inside.wait(60)
        second = Thread(target=_load_until_after, args=(tmp_path, done, first))
        second.start()
        first.join()
        second.join()
        found = transformers_logging.get_verbosity()
    finally:
        transformers_logging.set_verbosity(before)
    assert found == transformers_logging.WARNING


def _load_until_after(folder: Path, done: Event, other: Thread) -> None:
    """Load while the other does, and end after it."""

    def row(model_type: Any) -> Any:
        done.set()
        other.join()
        return architecture_of(model_type)

    load_pretrained(AutoModel, folder, row_of=row)


@pytest.mark.parametrize("model_type", [*SUPPORTED_MODEL_TYPES, *SUPPORTED_DECODER_TYPES])
@pytest.mark.parametrize("kept", ["nothing", "settings"])
def test_a_tokenizer_that_was_not_saved(model_type: str, kept: str, tmp_path: Path) -> None:
    config: Any = AutoConfig.for_model(model_type, **SIZES)
    config.save_pretrained(tmp_path)
    if kept == "settings":
        settings = {"model_max_length": 128, "pad_token": "[PAD]", "unk_token": "[UNK]"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"has no tokenizer that knows any word: .*save_pretrained\(FOLDER\)"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_a_tokenizer_that_was_saved(model_type: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_backbone(tmp_path, model_type))
    assert tokenizer("a good film")["input_ids"] == tiny_tokenizer(model_type)("a good film")["input_ids"]
